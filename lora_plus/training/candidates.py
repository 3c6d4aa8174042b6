"""The settings that are compared in a sweep, and what came of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from lora_plus.text import aligned


@dataclass(frozen=True)
class Candidate:
    """The settings of one run; all others are common to the runs of a sweep."""

    lr: float
    lr_ratio: float = 4.0
    r: int = 8
    alpha: float = 16
    seed: int = 0
    """Of the random numbers that the adapter starts from."""
    name: str = ""
    """Of its adapter; empty for ``candidate_0``, ``candidate_1``, ... by its place in the sweep."""


def grid(
    *,
    lr: float | Sequence[float],
    lr_ratio: float | Sequence[float] = 4.0,
    r: int | Sequence[int] = 8,
    alpha: float | Sequence[float] = 16,
    seed: int | Sequence[int] = 0,
) -> list[Candidate]:
    """A candidate for each combination of these values, the last ones varying fastest.

    Example:
        >>> len(grid(lr=[1e-4, 3e-4], lr_ratio=[1, 4, 16], seed=range(2)))
        12

    Args:
        lr, lr_ratio, r, alpha, seed: a number, or several.
    """
    given: tuple[Any, ...] = (lr, lr_ratio, r, alpha, seed)
    axes = [value if isinstance(value, Sequence) else (value,) for value in given]
    return [Candidate(*settings) for settings in itertools.product(*axes)]


@dataclass(frozen=True)
class SweepRow:
    """What came of one candidate."""

    candidate: Candidate
    loss: float
    """What it is ranked by: the mean loss of the evaluation after its last step; if there was none, the mean of the
    training losses of the last fifth of its steps."""
    losses: tuple[float, ...]
    """Its training loss in each step, before the update."""
    stopped: str
    """Why it was trained no further: ``"diverged"``, ``"halved"``, or empty if it was trained to the end."""

    @property
    def lowest(self) -> float:
        """The lowest of its training losses, or NaN without any."""
        return min((loss for loss in self.losses if math.isfinite(loss)), default=math.nan)

    @property
    def rank(self) -> tuple[bool, int, float]:
        """What the rows are sorted by: not diverged, then trained for longer, then of lower loss."""
        return self.stopped == "diverged", -len(self.losses), self.loss if math.isfinite(self.loss) else math.inf


@dataclass(frozen=True)
class SweepResult:
    """What came of a sweep. ``str()`` of it is a table."""

    rows: list[SweepRow]
    """The candidates, the best first."""

    @property
    def best(self) -> SweepRow:
        """The best candidate's row.

        Raises:
            ValueError: if all diverged.
        """
        if self.rows[0].stopped == "diverged":
            raise ValueError("all candidates diverged; try lower rates")
        return self.rows[0]

    def __str__(self) -> str:
        settings = [setting.name for setting in fields(Candidate) if setting.name != "name"]
        head = ("name", *settings, "loss", "lowest", "steps", "stopped")
        cells = [
            (row.candidate.name, *(f"{getattr(row.candidate, setting):g}" for setting in settings),
             f"{row.loss:.4g}", f"{row.lowest:.4g}", str(len(row.losses)), row.stopped)
            for row in self.rows
        ]  # fmt: skip
        return "\n".join(aligned([head, *cells]))

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the loss over lr and lr_ratio into a file: a panel for each r and alpha, the mean over seeds.

        A cell is empty where there is no candidate, or one diverged. Stopped candidates have the loss they stopped at.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("the picture of a sweep needs matplotlib: pip install matplotlib") from None
        chosen = [row.candidate for row in self.rows]
        panels = sorted({(each.r, each.alpha) for each in chosen})
        rates, ratios = sorted({each.lr for each in chosen}), sorted({each.lr_ratio for each in chosen})
        cells: dict[tuple[float, ...], list[float]] = {}
        for row in self.rows:
            own = row.candidate
            loss = math.nan if row.stopped == "diverged" else row.loss
            cells.setdefault((own.r, own.alpha, own.lr, own.lr_ratio), []).append(loss)
        means = {cell: sum(losses) / len(losses) for cell, losses in cells.items()}
        finite = [mean for mean in means.values() if math.isfinite(mean)] or [0.0]
        figure = Figure(figsize=(1.5 + 3.5 * len(panels), 3.5), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, (r, alpha) in zip(axes, panels, strict=True):
            shown = [[means.get((r, alpha, lr, ratio), math.nan) for ratio in ratios] for lr in rates]
            image = panel.imshow(shown, vmin=min(finite), vmax=max(finite), origin="lower", aspect="auto")
            panel.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
            panel.set_yticks(range(len(rates)), [f"{lr:g}" for lr in rates])
            panel.set(title=f"r = {r}, alpha = {alpha:g}", xlabel="lr_ratio", ylabel="lr")
        figure.colorbar(image, ax=list(axes), label="loss")
        figure.savefig(path)

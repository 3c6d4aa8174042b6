"""The settings that are compared in a sweep, their training, and what came of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

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
    """A candidate for each combination of these values, each a number or several, the last ones varying fastest.

    Examples:
        >>> len(grid(lr=[1e-4, 3e-4], lr_ratio=[1, 4, 16], seed=range(2)))
        12
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


@dataclass
class Run:
    """One candidate in training."""

    candidate: Candidate
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer | None
    """None once it is trained no further."""
    schedule: LambdaLR | None
    losses: list[float] = field(default_factory=list)
    evaluated: float | None = None
    """The mean loss of an evaluation after the last step."""
    stopped: str = ""

    def step(self, loss: float, max_norm: float | None) -> None:
        """Update the adapter by its gradients, or stop if the loss or the gradients are not finite."""
        assert self.optimizer is not None
        norm = nn.utils.clip_grad_norm_(self.parameters, math.inf if max_norm is None else max_norm)
        self.losses.append(loss)
        self.evaluated = None
        if not (math.isfinite(loss) and bool(norm.isfinite())):
            self.stop("diverged")
            return
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def stop(self, why: str) -> None:
        """Leave the adapter as it is from here on."""
        self.stopped, self.optimizer, self.schedule = why, None, None
        self.clear()
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def row(self) -> SweepRow:
        last = self.losses[-max(1, len(self.losses) // 5) :]
        mean = sum(last) / len(last) if last else math.nan
        loss = mean if self.evaluated is None else self.evaluated
        return SweepRow(self.candidate, loss, tuple(self.losses), self.stopped)


@dataclass(frozen=True)
class SweepResult:
    """What came of a sweep. ``str()`` of it is a table."""

    rows: list[SweepRow]
    """The candidates, the best first."""

    @property
    def best(self) -> SweepRow:
        """The best candidate's row; raises a ValueError if all diverged."""
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

"""The plane of both learning rates: where the loss is low, as tables and as a picture."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from records import PLANE, Record

sys.path.append(str(Path(__file__).parents[1] / "paper"))  # where pictures are drawn in one way
from page import lines_of_table, power, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "plane"
"""The picture's file, without its ending."""
WORDS = """\
A and B at any two rates, {steps} steps, the head (if it is trained) at {head}: validation loss (seeds: {seeds}). Rows
are rates of A, columns rates of B; the least is in bold. Equal rates (plain LoRA) are in *italics*.
"""


@dataclass(frozen=True)
class Plane:
    """Mean validation losses by (rate of A, rate of B)."""

    losses: Mapping[tuple[float, float], float]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Plane:
        """From the runs of one task; only those of its plane count."""
        found: dict[tuple[float, float], list[float]] = {}
        for record in records:
            if record.run.stage == PLANE and record.run.rate_B is not None:
                found.setdefault((record.run.rate, record.run.rate_B), []).append(record.outcome.validation.loss)
        return cls({cell: statistics.mean(losses) for cell, losses in sorted(found.items())})

    @property
    def best(self) -> tuple[float, float]:
        """The cell with the least loss."""
        return min(self.losses, key=self.losses.__getitem__)

    def rates(self) -> tuple[list[float], list[float]]:
        """Those of A and those of B."""
        of_A, of_B = (sorted(set(rates)) for rates in zip(*self.losses, strict=True))
        return of_A, of_B

    def ridge(self) -> dict[int, tuple[float, float]]:
        """log2 of the ratio -> the least loss among its cells, and the geometric mean of both rates there.

        Only ratios of which three geometric means were run at least, and the best of them is not at an end.
        """
        by_ratio: dict[int, list[tuple[float, float]]] = {}
        for (rate_A, rate_B), loss in self.losses.items():
            by_ratio.setdefault(round(math.log2(rate_B / rate_A)), []).append((math.sqrt(rate_A * rate_B), loss))
        found = {}
        for ratio, cells in sorted(by_ratio.items()):
            mean, loss = min(cells, key=lambda cell: cell[1])
            if min(cells)[0] < mean < max(cells)[0]:
                found[ratio] = loss, mean
        return found

    def table(self) -> list[str]:
        """Rates of A by rates of B."""
        of_A, of_B = self.rates()
        least = self.losses[self.best]

        def shown(rate_A: float, rate_B: float) -> str:
            loss = self.losses.get((rate_A, rate_B))
            if loss is None:
                return ""
            return f"**{loss:.4f}**" if loss == least else f"*{loss:.4f}*" if rate_A == rate_B else f"{loss:.4f}"

        rows = [[power(rate_A), *(shown(rate_A, rate_B) for rate_B in of_B)] for rate_A in of_A]
        return lines_of_table(("A \\ B", *map(power, of_B)), rows)

    def ridge_table(self) -> list[str]:
        """The least loss at each ratio; nothing where no ratio has its least loss inside the plane."""
        columns, losses, means = ["ratio"], ["least loss"], ["geometric mean of the rates there"]
        for ratio, (loss, mean) in self.ridge().items():
            columns.append(f"2^{ratio}")
            losses.append(f"{loss:.4f}")
            means.append(power(mean))
        return lines_of_table(columns, [losses, means]) if len(columns) > 1 else []

    def words(self) -> str:
        """How far the loss varies along the ridge, across it, and from equal rates to any."""
        (rate_A, rate_B), least = self.best, self.losses[self.best]
        found = [f"The least loss, {least:.4f}, is at {power(rate_A)} and {power(rate_B)}."]
        equal = [loss for (of_A, of_B), loss in self.losses.items() if of_A == of_B]
        if equal:
            found.append(f"The best of equal rates costs {min(equal) - least:.4f} more.")
        ridge = self.ridge()
        if ridge:
            losses = [loss for loss, _ in ridge.values()]
            ends, spread = f"From ratio 2^{min(ridge)} to 2^{max(ridge)}", max(losses) - min(losses)
            found.append(f"{ends} the least losses differ by {spread:.4f}.")
        across = [self.losses.get((rate_A * step, rate_B * step)) for step in (0.5, 2)]
        costs = [f"{loss - least:.4f}" for loss in across if loss is not None]
        if costs:
            found.append(f"Both rates half or twice as large as the best cost {' and '.join(costs)} more.")
        return " ".join(found)

    def lines(self, steps: int, head: str, seeds: str) -> list[str]:
        """The part of a task's section."""
        intro = WORDS.format(steps=steps, head=head, seeds=seeds)
        return ["### Both rates", "", intro, *self.table(), self.words(), "", *self.ridge_table()]


def figure_of(planes: Mapping[str, Plane]) -> Figure:
    """Heat maps: loss above the least of the task; the colours end at the median, as some corners diverge."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(planes), 3.3), layout="constrained")
    panels = figure.subplots(1, len(planes), squeeze=False)
    for panel, (name, plane) in zip(panels.flat, planes.items(), strict=True):
        of_A, of_B = plane.rates()
        least = plane.losses[plane.best]
        cells = [[plane.losses.get((a, b), math.nan) - least for a in of_A] for b in of_B]
        top = statistics.median(plane.losses.values()) - least
        x, y = [math.log2(rate) for rate in of_A], [math.log2(rate) for rate in of_B]
        mesh = panel.pcolormesh(x, y, cells, cmap="viridis", vmin=0, vmax=top, shading="nearest")
        low, high = max(x[0], y[0]), min(x[-1], y[-1])
        panel.plot((low, high), (low, high), color="white", linewidth=1)
        panel.plot(*map(math.log2, plane.best), "*", markersize=11, color="white", markeredgecolor="black")
        panel.set_title(name)
        panel.set_xlabel("log2 of A's rate")
        panel.set_ylabel("log2 of B's rate")
        figure.colorbar(mesh, ax=panel, label="nats above the least", extend="max")
    return figure


def draw(planes: Mapping[str, Plane], folder: Path) -> None:
    """Draw the picture into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with style():
        figure_of(planes).savefig(folder / f"{PICTURE}.svg", metadata={"Date": None})

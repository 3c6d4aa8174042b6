"""Where on the plane of both learning rates is the loss lowest, how far from the diagonal, and what does that gain?

The question of figure 2 of Hayou et al. 2024 (arXiv:2402.12354), on a teacher-student task of width n. The plane is
swept in octaves; the diagonal (equal rates, plain LoRA) also in quarter octaves, because all cells against the few that
lie on it would favour the plane.

    python benchmarks/studies/paper/heat_map.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import page
import torch
from page import Finding, Picture, Section, Table, power
from torch import Tensor
from toy import draw_problem, octaves, tail, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = (64, 256, 1024)
SEEDS = 5
GRIDS: dict[str, tuple[Tensor, Tensor]] = {
    "µP": (octaves(-13, -2), octaves(-6, 1)),
    "SP": (octaves(-13, -3), octaves(-8, -1)),
}
"""Rates of A and of B, for each parametrization of the head."""
FINE_DIAGONAL = octaves(-10, -1, per_octave=4)
WINDOW = 5
"""Losses that are averaged before asking when a loss is reached."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """The runs at one width, of all seeds."""

    rates_A: Tensor
    rates_B: Tensor
    plane: Tensor
    """Losses ``(seeds, rates of A, rates of B, steps + 1)``."""
    fine: Tensor
    """Losses on the fine diagonal, ``(seeds, FINE_DIAGONAL, steps + 1)``."""

    @property
    def diagonal(self) -> Tensor:
        """Losses where the plane's rates are equal, ``(seeds, cells, steps + 1)``."""
        return self.plane[:, self.rates_A[:, None] == self.rates_B]

    def best(self) -> tuple[int, int]:
        """The cell with the least mean over seeds of `tail`."""
        return divmod(int(tail(self.plane).mean(0).argmin()), len(self.rates_B))

    def best_ratio(self) -> float:
        """eta_B / eta_A there."""
        a, b = self.best()
        return float(self.rates_B[b] / self.rates_A[a])

    def log_ratios(self) -> list[int]:
        """log2 of the best ratio in each seed."""
        cells = tail(self.plane).flatten(1).argmin(1)
        ratios = (self.rates_B / self.rates_A[:, None]).flatten()[cells]
        return [round(value) for value in ratios.log2().tolist()]

    def best_diagonal(self) -> float:
        """The equal rate, on the fine diagonal, with the least mean over seeds of `tail`."""
        return float(FINE_DIAGONAL[tail(self.fine).mean(0).argmin()])


@cache
def sweep(n: int, head: str, seeds: int = SEEDS) -> Sweep:
    """Train all cells at one width; kept, as other experiments start from the same runs."""
    rates_A, rates_B = GRIDS[head]
    equal = torch.stack([FINE_DIAGONAL, FINE_DIAGONAL], dim=1)
    planes, fine = [], []
    for seed in range(seeds):
        problem = draw_problem(n, seed, head=head)
        cells = train(problem, torch.cartesian_prod(rates_A, rates_B))
        planes.append(cells.unflatten(0, (len(rates_A), len(rates_B))))
        fine.append(train(problem, equal))
    return Sweep(rates_A, rates_B, torch.stack(planes), torch.stack(fine))


def best_of_seed(losses: Tensor) -> Tensor:
    """In each seed the run with the least `tail`: ``(seeds, runs, steps + 1) -> (seeds, steps + 1)``."""
    return losses[torch.arange(len(losses)), tail(losses).argmin(1)]


def gain(equal: Tensor, apart: Tensor) -> Tensor:
    """In each seed, how many times lower the best loss is where rates may differ, ``(seeds,)``."""
    return (tail(best_of_seed(equal)) - tail(best_of_seed(apart))).exp2()


def speed_up(equal: Tensor, apart: Tensor) -> Tensor:
    """In each seed, steps of the best equal rates to their own final loss over steps of the best cell, ``(seeds,)``.

    A loss is reached at the first of `WINDOW` losses in a row whose mean is at most as large.
    """
    equal, apart = best_of_seed(equal), best_of_seed(apart)
    goal = tail(equal).exp2()[:, None]
    steps = [(run.unfold(-1, WINDOW, 1).mean(-1) <= goal).int().argmax(-1).float() for run in (equal, apart)]
    return steps[0] / steps[1]


def mean_and_least(values: Tensor, *, geometric: bool = False) -> str:
    """The mean over seeds, and the least."""
    mean = values.log().mean().exp() if geometric else values.mean()
    return f"{mean:.2f} ({values.min():.2f})"


def _rows(found: Mapping[tuple[str, int], Sweep]) -> list[list[str]]:
    rows = []
    for (head, n), swept in found.items():
        a, b = swept.best()
        apart = swept.plane.flatten(1, 2)
        row = [head, str(n), power(swept.best_ratio())]
        row += [f"{power(float(swept.rates_A[a]))}, {power(float(swept.rates_B[b]))}"]
        row += [" ".join(map(str, swept.log_ratios()))]
        diagonals = (swept.diagonal, swept.fine)
        row += [mean_and_least(gain(equal, apart), geometric=True) for equal in diagonals]
        row += [mean_and_least(speed_up(equal, apart)) for equal in diagonals]
        rows.append(row)
    return rows


def by_ratio(swept: Sweep) -> dict[int, float]:
    """The least mean over seeds of `tail` among the cells of each ratio of at least 1; keys are log2 of the ratio."""
    means = tail(swept.plane).mean(0)
    ratios = (swept.rates_B / swept.rates_A[:, None]).log2().round()
    return {int(ratio): float(means[ratios == ratio].min()) for ratio in ratios.unique() if ratio >= 0}


def _findings(found: Mapping[tuple[str, int], Sweep]) -> list[Finding]:
    def over_widths(head: str) -> list[Sweep]:
        return [found[head, n] for n in WIDTHS]

    best = {head: [swept.best_ratio() for swept in over_widths(head)] for head in GRIDS}
    all_apart = all(ratio >= 2 for swept in found.values() for ratio in swept.log_ratios())
    least = min(ratio for swept in found.values() for ratio in swept.log_ratios())
    grows = {head: sorted(set(ratios)) == ratios for head, ratios in best.items()}
    rate_A = [float(swept.rates_A[swept.best()[0]]) for swept in over_widths("µP")]
    rate_B = [float(swept.rates_B[swept.best()[1]]) for swept in over_widths("µP")]
    fine = {
        n: (gain(s.fine, s.plane.flatten(1, 2)), speed_up(s.fine, s.plane.flatten(1, 2)))
        for n, s in zip(WIDTHS, over_widths("µP"), strict=True)
    }
    coarse = {n: gain(s.diagonal, s.plane.flatten(1, 2)) for n, s in zip(WIDTHS, over_widths("µP"), strict=True)}
    gains = [mean_and_least(gains, geometric=True) for gains, _ in fine.values()]
    speeds = [float(speeds.mean()) for _, speeds in fine.values()]
    coarse_gains = [mean_and_least(gains, geometric=True) for gains in coarse.values()]
    return [
        Finding(
            "The best pair of rates has η_B ≫ η_A",
            f"the least ratio over heads, widths and seeds is 2^{least}",
            all_apart,
        ),
        Finding(
            "Thm. 1: the best ratio grows with the width",
            "; ".join(f"{head}: {', '.join(map(power, ratios))}" for head, ratios in best.items()),
            all(grows.values()),
        ),
        Finding(
            "Thm. 1: η_A = Θ(1/n), η_B = Θ(1)",
            f"µP, n = {', '.join(map(str, WIDTHS))}: best η_A {', '.join(map(power, rate_A))}, "
            f"best η_B {', '.join(map(power, rate_B))}",
            rate_A[0] / rate_A[-1] >= WIDTHS[-1] / WIDTHS[0] / 2 and max(rate_B) / min(rate_B) <= 2,
        ),
        Finding(
            "LoRA+ reaches a better loss than equal rates",
            f"µP, loss lower by {', '.join(gains)} times against the fine diagonal, mean and least over seeds; against "
            f"the diagonal of the same grid, which holds few equal rates, by {', '.join(coarse_gains)}",
            all(bool((gains > 1).all()) for gains, _ in fine.values()),
        ),
        Finding(
            "Abstract: up to twice as fast",
            f"µP, {', '.join(f'{speed:.2f}' for speed in speeds)} times against the fine diagonal, mean over seeds",
            max(speeds) >= 2,
            "a full-batch toy trained for 60 steps; its rates are tuned finely",
        ),
    ]


def run() -> Section:
    """All heads at all widths."""
    found = {(head, n): sweep(n, head) for head in GRIDS for n in WIDTHS}
    by_ratios = {key: by_ratio(swept) for key, swept in found.items()}
    ratios = range(max(ratio for of_ratios in by_ratios.values() for ratio in of_ratios) + 1)
    ratio_rows = [
        [head, str(n), *(f"{of_ratios[ratio]:.1f}" if ratio in of_ratios else "" for ratio in ratios)]
        for (head, n), of_ratios in by_ratios.items()
    ]
    columns = (
        "head", "n", "best ratio", "η_A, η_B", "log2 ratio, each seed", "gain, same grid", "gain, fine diagonal",
        "speed-up, same grid", "speed-up, fine diagonal",
    )  # fmt: skip
    return Section(
        "The plane of both learning rates",
        f"Teacher-student task (sin), rank 4, 64 samples, Adam, 60 full-batch steps, {SEEDS} seeds; SP and µP heads. "
        "S is log2 of the mean loss over the last fifth of the steps. The best cell has the least mean of S over "
        "seeds; the best ratio is its ratio. Gain: best loss on the diagonal, divided by best loss on the plane, for "
        "each seed; geometric mean over seeds (least). Speed-up: number of steps in which the best equal rates reach "
        "their final loss, divided by the number in which the best cell reaches it; mean (least). Both are given for "
        "two diagonals: that of the same grid, in octaves, and a fine one, in quarter octaves.",
        _findings(found),
        [
            Table("Best cells, and what they gain over equal rates", columns, _rows(found)),
            Table("Least mean of S by log2 of the ratio", ("head", "n", *map(str, ratios)), ratio_rows),
        ],
        {
            "heat_map": Picture(
                "Mean of S over seeds. Circle: best of equal rates on this grid (on the line); star: best of all. Dark "
                "is better; the colour scale is cut off at 0, the loss of the frozen network being about 1",
                lambda: _draw(found),
            )
        },
    )


def _draw(found: Mapping[tuple[str, int], Sweep]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.2), layout="constrained")
    panels = figure.subplots(len(GRIDS), len(WIDTHS), squeeze=False)
    for panel, ((head, n), swept) in zip(panels.flat, found.items(), strict=True):
        values = tail(swept.plane).mean(0)
        x, y = swept.rates_A.log2().tolist(), swept.rates_B.log2().tolist()
        mesh = panel.pcolormesh(x, y, values.T.numpy(), cmap="viridis", vmin=-10, vmax=0, shading="nearest")
        ends = (max(x[0], y[0]), min(x[-1], y[-1]))
        panel.plot(ends, ends, color="white", linewidth=1)
        on_diagonal = values.where(swept.rates_A[:, None] == swept.rates_B, torch.inf)
        equal = float(swept.rates_A[int(on_diagonal.argmin()) // len(y)].log2())
        a, b = swept.best()
        panel.plot(equal, equal, "o", markersize=8, markerfacecolor="none", markeredgecolor="white")
        panel.plot(x[a], y[b], "*", markersize=11, color="white", markeredgecolor="black", markeredgewidth=0.5)
        panel.set_title(f"{head} head, n = {n}: best ratio {power(swept.best_ratio())}")
        panel.set_xlabel("log2 η_A")
        panel.set_ylabel("log2 η_B")
    figure.colorbar(mesh, ax=panels, label="S = log2 of the final loss, mean over seeds", extend="both")
    return figure


if __name__ == "__main__":
    page.main(__doc__, run)

"""Which learning rates keep what an adapter computes of order one at large width, and let both factors learn?

Theorem 1 of Hayou et al. 2024 (arXiv:2402.12354), for Adam: ``eta_A = Theta(1/n), eta_B = Theta(1)`` does, equal rates
do not. The change of B A x in a step is the sum of delta1 (A moves), delta2 (B moves) and delta3 (both); Z_A = A x.
Printed are the exponents of the width with which their root mean squares grow.

    python benchmarks/studies/paper/coordinate_check.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import page
import torch
from page import COLOURS, MARKERS, Finding, Picture, Section, Table, signed
from torch import Tensor
from toy import Adam, Members, Problem, draw_problem, slope

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = tuple(2**exponent for exponent in range(6, 13))
SEEDS = 3
STEPS = 10
QUANTITIES = ("δ1", "δ2", "δ3", "Z_A", "B")
TOLERANCE = 0.15
"""How far an exponent that is measured over a finite range of widths may be from the theory's."""


@dataclass(frozen=True)
class Rates:
    """How both rates follow the width."""

    name: str
    at: Callable[[int], tuple[float, float]]
    """``n -> (eta_A, eta_B)``."""
    step: int
    """The step at which exponents are compared with the theory."""
    exponents: tuple[float, ...] | None
    """Of `QUANTITIES`, by theorem 1; None where it gives none."""
    claim: str


def _equal(rate: float) -> tuple[float, float]:
    return rate, rate


RATES = (
    Rates(
        "LoRA+, .01 · 64 / n and .2",
        lambda n: (0.01 * 64 / n, 0.2),
        10,
        (0, 0, 0, 0, 0),
        "Thm. 1: η_A = Θ(1/n), η_B = Θ(1) is efficient: both factors move f by Θ(1), and all stays bounded",
    ),
    Rates(
        "equal, .05 (64 / n)^½",
        lambda n: _equal(0.05 * math.sqrt(64 / n)),
        10,
        (0, 0, 0, 0.5, -0.5),
        "Thm. 1: equal rates are not efficient. Where f moves by Θ(1), with η = Θ(n^-1/2), Z_A grows as n^1/2",
    ),
    Rates(
        "equal, .05 · 64 / n",
        lambda n: _equal(0.05 * 64 / n),
        3,
        (-1, -1, -1, 0, -1),
        "Thm. 1: with equal rates of Θ(1/n), the updates of f vanish as 1/n",
    ),
    Rates("equal, .01", lambda n: _equal(0.01), 3, None, "Thm. 1: with equal rates of Θ(1) the updates of f grow"),
)


def changes(H: Tensor, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """delta1, delta2, delta3, whose sum is the change of ``(H A^T) B^T``, ``(..., N, n)`` each."""
    A, B = before
    moved_A, moved_B = after[0] - A, after[1] - B
    h, moved_h = H @ A.mT, H @ moved_A.mT  # (..., N, r)
    return moved_h @ B.mT, h @ moved_B.mT, moved_h @ moved_B.mT


def sizes(problem: Problem, n: int, steps: int = STEPS, ways: Sequence[Rates] = RATES) -> tuple[Tensor, Tensor]:
    """Root mean squares of `QUANTITIES` in each step, with the factors before it, and the losses after the last.

    Returns:
        ``(steps, rates, quantities)`` and ``(rates,)``.
    """
    members = Members(problem, torch.tensor([rates.at(n) for rates in ways]), partial(Adam, eps=1e-12))
    found = []
    for _ in range(steps):
        A, B = members.A, members.B
        members.step()
        features = (*changes(problem.H, (A, B), (members.A, members.B)), problem.H @ A.mT, B)
        found.append(torch.stack([feature.square().mean((-2, -1)).sqrt() for feature in features], dim=-1))
    return torch.stack(found), members.gradients()[0]


def over_widths(
    widths: Sequence[int] = WIDTHS,
    seeds: int = SEEDS,
    steps: int = STEPS,
    ways: Sequence[Rates] = RATES,
    start: str = "Init[A]",
) -> tuple[Tensor, Tensor]:
    """`sizes` at each width, means over seeds: ``(widths, steps, rates, quantities)`` and ``(widths, rates)``."""
    of_widths = []
    for n in widths:
        of_seeds = [sizes(draw_problem(n, seed, start=start), n, steps, ways) for seed in range(seeds)]
        of_widths.append([torch.stack(values).mean(0) for values in zip(*of_seeds, strict=True)])
    of_features, losses = (torch.stack(values) for values in zip(*of_widths, strict=True))
    return of_features, losses


def exponents(of_features: Tensor, widths: Sequence[int] = WIDTHS) -> Tensor:
    """Slopes of the sizes against the width, ``(steps, rates, quantities)``."""
    return slope(of_features, torch.tensor(widths))


def holds(rates: Rates, slopes: Tensor) -> bool:
    """Whether the exponents ``(quantities,)`` are those of the theory; without any, whether all updates grow."""
    if rates.exponents is None:
        return bool((slopes[:3] > 0.5).all())
    return bool(((slopes - torch.tensor(rates.exponents)).abs() < TOLERANCE).all())


def _finding(rates: Rates, slopes: Tensor) -> Finding:
    of_theory = f" ({', '.join(f'{e:g}' for e in rates.exponents)})" if rates.exponents else ""
    return Finding(rates.claim + of_theory, ", ".join(map(signed, slopes.tolist())), holds(rates, slopes))


def run() -> Section:
    """All rates at all widths."""
    of_features, losses = over_widths()
    slopes = exponents(of_features)
    ends = [0, len(WIDTHS) - 1]
    exponent_rows, size_rows = [], []
    for index, rates in enumerate(RATES):
        for step in (3, 6, 10):
            exponent_rows.append([rates.name, str(step), *map(signed, slopes[step - 1, index].tolist())])
        at_ends = of_features[ends, rates.step - 1, index]  # (2, quantities)
        pairs = [f"{small:.3g} / {large:.3g}" for small, large in at_ends.T.tolist()]
        small, large = losses[ends, index].tolist()
        size_rows.append([rates.name, str(rates.step), *pairs, f"{small:.3g} / {large:.3g}"])
    findings = [_finding(rates, slopes[rates.step - 1, index]) for index, rates in enumerate(RATES)]
    adapted, equal = losses[-1, :2].tolist()
    findings.append(
        Finding(
            "Equal rates are inefficient (read as: the loss falls more slowly)",
            f"loss at n = {WIDTHS[-1]} after {STEPS} steps: {equal:.2f} with η = Θ(n^-1/2), {adapted:.2f} with LoRA+",
            equal > 1.1 * adapted,
            "in these steps they learn as fast, and break only the bound on Z_A",
        )
    )
    return Section(
        "The coordinate check: theorem 1",
        f"Teacher-student task, µP head, rank 4, Adam (eps 1e-12), {STEPS} steps, {SEEDS} seeds, widths {WIDTHS[0]} to "
        f"{WIDTHS[-1]}. Exponents of the root mean squares of {', '.join(QUANTITIES)}; in brackets the theory's. "
        "Equal rates of Θ(1/n) and Θ(1) are read at step 3, because later f is near y at some widths only.",
        findings,
        [
            Table("Exponents", ("rates", "step", *QUANTITIES), exponent_rows),
            Table(
                f"Root mean squares at n = {WIDTHS[0]} / {WIDTHS[-1]}, and the loss after {STEPS} steps",
                ("rates", "step", *QUANTITIES, "loss"),
                size_rows,
            ),
        ],
        {
            "coordinate_check": Picture(
                "Root mean squares against the width; dotted: slopes ½ and -½",
                lambda: _draw(of_features),
            )
        },
    )


def _draw(of_features: Tensor) -> Figure:
    """One panel for each way of choosing rates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, len(RATES), sharey=True)
    for index, (rates, panel) in enumerate(zip(RATES, panels, strict=True)):
        for number, name in enumerate(QUANTITIES):
            values = of_features[:, rates.step - 1, index, number].tolist()
            panel.plot(WIDTHS, values, color=COLOURS[number], marker=MARKERS[number], markersize=4, label=name)
        for exponent in (0.5, -0.5):
            guide = [3 * (n / WIDTHS[0]) ** exponent for n in WIDTHS]
            panel.plot(WIDTHS, guide, color="#888888", linestyle=":", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_title(f"{rates.name}\nstep {rates.step}")
        panel.set_xlabel("width n")
    panels[0].set_ylabel("root mean square")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(QUANTITIES))
    return figure


if __name__ == "__main__":
    page.main(__doc__, run)

"""Which learning rates let both factors learn at large width, in the paper's linear model with one neuron and rank 1?

Propositions 1 and 2 of Hayou et al. 2024 (arXiv:2402.12354): ``f(x) = b (a . x)`` with ``b`` a number, loss
``(f - y)^2 / 2`` on one sample, gradient descent. The change of f in a step is the sum of three parts: by a alone
(delta1), by b alone (delta2), by both (delta3). Printed are the exponents of the width with which they grow.

    python benchmarks/studies/paper/linear_check.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import page
import torch
from page import Finding, Section, Table, signed
from torch import Tensor
from toy import slope

WIDTHS = tuple(2**exponent for exponent in range(6, 17))
SEEDS = 20
STEPS = (3, 5)
"""The steps at which exponents are read; the first one is special, as one factor is zero there."""
QUANTITIES = ("δ1", "δ2", "δ3", "b", "a·x", "f")


@dataclass(frozen=True)
class Rates:
    """How both rates follow the width, and the exponents that the propositions give for it."""

    name: str
    at: Callable[[int], tuple[float, float]]
    """``n -> (eta_a, eta_b)``."""
    exponents: tuple[float, float, float]
    """Of delta1, delta2, delta3 by the paper's calculus of exponents, where b starts at zero."""
    claim: str


RATES = (
    Rates(
        "equal, .1 n^-1/2",
        lambda n: (0.1 / math.sqrt(n), 0.1 / math.sqrt(n)),
        (-0.5, -0.5, -0.5),
        "Prop. 1: with one rate, δ1 and δ2 are not both Θ(1). The largest that leaves f bounded is Θ(n^-1/2)",
    ),
    Rates(
        "equal, .1 / n",
        lambda n: (0.1 / n, 0.1 / n),
        (-2, -1, -2),
        "The same with the rate Θ(1/n)",
    ),
    Rates(
        "LoRA+, .1 / n and .1",
        lambda n: (0.1 / n, 0.1),
        (0, 0, 0),
        "Prop. 2: η_a = Θ(1/n), η_b = Θ(1) makes all three Θ(1)",
    ),
)
INITS: dict[str, tuple[float, float]] = {"b = 0": (1.0, 0.0), "a = 0": (0.0, 1.0)}
"""Standard deviation of ``sqrt(n) a``, and the value of b; the paper's Init[1] and Init[2]."""


def parts(rates: Rates, init: str, n: int, seed: int, steps: int) -> Tensor:
    """``QUANTITIES`` at each step, with the factors before it, ``(steps, 6)``, in float64.

    The dynamics close on b, ``a . x`` and ``|x|^2``.
    """
    generator = torch.Generator().manual_seed(1000 * seed + 3)
    x, a = torch.randn(2, n, generator=generator, dtype=torch.float64)
    size, b = INITS[init]
    along, square = size / math.sqrt(n) * float(a @ x), float(x @ x)
    rate_a, rate_b = rates.at(n)
    found = []
    for _ in range(steps):
        f = b * along
        change_along, change_b = -rate_a * b * (f - 1) * square, -rate_b * along * (f - 1)
        found.append([b * change_along, change_b * along, change_b * change_along, b, along, f])
        along, b = along + change_along, b + change_b
    return torch.tensor(found, dtype=torch.float64)


def exponents(rates: Rates, init: str, widths: Sequence[int] = WIDTHS, seeds: int = SEEDS) -> Tensor:
    """Slopes of the median size over seeds against the width, at each of `STEPS`, ``(len(STEPS), 6)``."""
    sizes = torch.stack([
        torch.stack([parts(rates, init, n, seed, max(STEPS)) for seed in range(seeds)]).abs().median(dim=0).values
        for n in widths
    ])  # fmt: skip
    return slope(sizes, torch.tensor(widths))[[step - 1 for step in STEPS]]


def run() -> Section:
    """All rates and starts."""
    measured = {(rates.name, init): exponents(rates, init) for init in INITS for rates in RATES}
    rows = [
        [init, name, str(step), *map(signed, of_step.tolist())]
        for (name, init), of_steps in measured.items()
        for step, of_step in zip(STEPS, of_steps, strict=True)
    ]
    at_three = {rates: measured[rates.name, "b = 0"][0, :3] for rates in RATES}
    off = {rates: float((slopes - torch.tensor(rates.exponents)).abs().max()) for rates, slopes in at_three.items()}
    findings = [
        Finding(
            f"{rates.claim}; exponents of δ1, δ2, δ3: {', '.join(f'{e:g}' for e in rates.exponents)}",
            ", ".join(map(signed, at_three[rates].tolist())),
            off[rates] < 0.1,
        )
        for rates in RATES
    ]
    return Section(
        "The linear model: propositions 1 and 2",
        f"f = b (a·x), y = 1, x ~ N(0, I), a ~ N(0, I/n) and b = 0, or a = 0 and b = 1; widths 2^6 to 2^16, {SEEDS} "
        "seeds, float64. Exponent: slope of log2 of the median size against log2 of the width. δ1, δ2, δ3: change of f "
        "in a step by a, by b, by both. If b starts at zero, the statements are read at step 3.",
        findings,
        [Table("Exponents", ("start", "rates", "step", *QUANTITIES), rows)],
    )


if __name__ == "__main__":
    page.main(__doc__, run)

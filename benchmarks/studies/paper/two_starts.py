"""Does it matter which factor starts at zero, B as usual (Init[A]) or A (Init[B]), and what does a ratio do for each?

The question of Hayou et al. 2024 (arXiv:2406.08447), on the teacher-student task: exponents of the width, the rates
that are stable, the best loss; and on pretrained models, from the runs of `finetune/compare_starts.py`.

    python benchmarks/studies/paper/two_starts.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import page
import pretrained_starts
import torch
from coordinate_check import QUANTITIES, Rates, exponents, holds, over_widths
from page import Finding, Section, Table, power, signed
from torch import Tensor
from toy import STARTS, draw_problem, octaves, slope, tail, train

from lora_plus.training.groups import LR_MODES

WIDTHS = tuple(2**exponent for exponent in range(6, 12))
TRAINED = (64, 128, 256)
"""Widths at which rates are tuned."""
SEEDS = 5
MEANS = octaves(-8, -1, per_octave=2)
"""Geometric means of the rates."""
RATIOS = tuple(4.0**exponent for exponent in range(-2, 5))
RUNS = Path(__file__).parents[2] / "results" / "paper.jsonl"


def _equal(rate: float) -> tuple[float, float]:
    return rate, rate


ROOT = Rates(
    "equal, .05 (64 / n)^½",
    lambda n: _equal(0.05 * math.sqrt(64 / n)),
    3,
    (0.5, 0, 0, 0.5, 0),
    "Init[B] with η = Θ(n^-1/2), the largest rate for Init[A], is not stable: f moves by Θ(n^½)",
)
INVERSE = Rates(
    "equal, .05 · 64 / n",
    lambda n: _equal(0.05 * 64 / n),
    3,
    (0, -1, -1, 0, 0),
    "Init[B] with η = Θ(1/n) is stable, and all stays bounded; but what B learns vanishes as 1/n",
)
APART = Rates(
    "LoRA+, .01 · 64 / n and .2",
    lambda n: (0.01 * 64 / n, 0.2),
    10,
    (0, 0, 0, 0, 0),
    "Init[B] with the rates of LoRA+: both factors move f by Θ(1), and all stays bounded",
)
OF_B = (ROOT, INVERSE, APART)
USUAL = Rates(
    ROOT.name,
    ROOT.at,
    10,
    (0, 0, 0, 0.5, -0.5),
    "Init[A] with η = Θ(n^-1/2) learns with both factors, and Z_A grows as n^½",
)


@dataclass(frozen=True, eq=False)
class Swept:
    """All runs of one start at one width."""

    losses: Tensor
    """``(seeds, ratios, means, steps + 1)``."""

    @property
    def tails(self) -> Tensor:
        """Mean over seeds of `toy.tail`, ``(ratios, means)``."""
        return tail(self.losses).mean(0)

    def best(self, ratio: float) -> tuple[float, float]:
        """The best geometric mean of the rates at a ratio, and its `toy.tail`."""
        of_ratio = self.tails[RATIOS.index(ratio)]
        return float(MEANS[of_ratio.argmin()]), float(of_ratio.min())

    def best_ratio(self) -> float:
        return RATIOS[int(self.tails.amin(1).argmin())]

    def stable(self) -> float:
        """The largest equal rate at which every seed ends below its first loss."""
        equal = self.losses[:, RATIOS.index(1.0)]
        return float(MEANS[(tail(equal) < equal[..., 0].log2()).all(0)].max())


def sweep(n: int, start: str, seeds: int = SEEDS) -> Swept:
    """Train with all ratios and means of the rates."""
    rates = torch.tensor([LR_MODES["geometric"](mean, ratio) for ratio in RATIOS for mean in MEANS.tolist()])
    runs = [train(draw_problem(n, seed, start=start), rates) for seed in range(seeds)]
    return Swept(torch.stack(runs).unflatten(1, (len(RATIOS), len(MEANS))))


def _exponent_part(widths: Sequence[int] = WIDTHS) -> tuple[list[Finding], Table]:
    findings, rows = [], []
    for start, ways in (("Init[A]", (USUAL,)), ("Init[B]", OF_B)):
        slopes = exponents(over_widths(widths, ways=ways, start=start)[0], widths)
        for index, rates in enumerate(ways):
            measured = slopes[rates.step - 1, index]
            assert rates.exponents is not None
            wanted = ", ".join(f"{e:g}" for e in rates.exponents)
            findings.append(
                Finding(f"{rates.claim} ({wanted})", ", ".join(map(signed, measured.tolist())), holds(rates, measured))
            )
            for step in (3, 6, 10):
                rows.append([start, rates.name, str(step), *map(signed, slopes[step - 1, index].tolist())])
    return findings, Table("Exponents", ("start", "rates", "step", *QUANTITIES), rows)


def _best_part(found: dict[tuple[str, int], Swept]) -> list[Finding]:
    def each(figure: str) -> str:
        return f"n = {', '.join(map(str, TRAINED))}: {figure}"

    def listed(start: str, ratio: float | None) -> list[float]:
        swept = [found[start, n] for n in TRAINED]
        return [each.best(each.best_ratio() if ratio is None else ratio)[1] for each in swept]

    widths = torch.tensor(TRAINED)
    rates = {s: [found[s, n].best(1.0)[0] for n in TRAINED] for s in STARTS}
    stable = {s: [found[s, n].stable() for n in TRAINED] for s in STARTS}
    slopes = {s: float(slope(torch.tensor(rates[s]), widths)) for s in STARTS}
    equal, apart = ({s: listed(s, ratio) for s in STARTS} for ratio in (1.0, None))
    words = {
        name: each("; ".join(f"{s} {', '.join(show(x) for x in of[s])}" for s in STARTS))
        for name, of, show in (
            ("stable", stable, power),
            ("equal", equal, lambda x: f"{x:.2f}"),
            ("apart", apart, lambda x: f"{x:.2f}"),
            ("ratio", {s: [found[s, n].best_ratio() for n in TRAINED] for s in STARTS}, power),
        )
    }
    return [
        Finding(
            "The best equal rate falls as n^-½ with Init[A], as 1/n with Init[B]",
            f"{signed(slopes['Init[A]'])} and {signed(slopes['Init[B]'])}",
            abs(slopes["Init[A]"] + 0.5) < 0.25 and abs(slopes["Init[B]"] + 1) < 0.25,
            "at these widths B has forgotten its start by the last step",
        ),
        Finding(
            "Init[A] allows larger rates (the largest equal rate at which all seeds end below their first loss)",
            words["stable"],
            all(a >= b for a, b in zip(*stable.values(), strict=True)) and stable["Init[A]"] != stable["Init[B]"],
            "at these widths the two are as stable",
        ),
        Finding(
            "Init[A] learns better (S at the best equal rate)",
            words["equal"],
            all(a < b for a, b in zip(*equal.values(), strict=True)),
            "on this toy Init[B] has at equal rates what Init[A] needs a ratio for",
        ),
        Finding(
            "The same, each at its best ratio too",
            words["apart"],
            all(a < b for a, b in zip(*apart.values(), strict=True)),
        ),
        Finding(
            "LoRA+ for both starts: the best ratio η_B / η_A is far above 1",
            words["ratio"],
            all(found[s, n].best_ratio() > 4 for s in STARTS for n in TRAINED),
            "with Init[B] it turns around here: B is there from the start, and A has all to learn",
        ),
    ]


def run() -> Section:
    """Both starts, on toys, and what was measured on a pretrained model."""
    findings, exponent_table = _exponent_part()
    pretrained = [
        (pretrained_starts.findings(task, runs), pretrained_starts.tables(task, runs))
        for task, runs in pretrained_starts.read(RUNS).items()
    ]
    found = {(start, n): sweep(n, start) for start in STARTS for n in TRAINED}
    rows = [
        [start, str(n), *(f"{power(mean)}: {loss:.2f}" for mean, loss in map(found[start, n].best, RATIOS))]
        for start, n in found
    ]
    return Section(
        "Which factor starts at zero: Init[A] and Init[B]",
        "The statements are those of Hayou et al. 2024, *The Impact of Initialization on LoRA Finetuning Dynamics* "
        '(arXiv:2406.08447), and theorem 1 for the other start. Init[A] is `init="kaiming"`: B is zero. Init[B] is '
        '`init="kaiming_B"`: A is zero and B uniform in ±1/√r. Exponents: the task of the coordinate check; in '
        f"brackets the theory's for {', '.join(QUANTITIES)}. Losses: the task of the plane of learning rates, {SEEDS} "
        "seeds, µP head, 60 steps; S is log2 of the mean loss over the last fifth of the steps.",
        [*findings, *_best_part(found), *(each for of_task in pretrained for each in of_task[0])],
        [
            exponent_table,
            Table(
                "The best √(η_A η_B) at each ratio η_B / η_A, and its S",
                ("start", "n", *(power(ratio) for ratio in RATIOS)),
                rows,
            ),
            *(table for of_task in pretrained for table in of_task[1]),
        ],
    )


if __name__ == "__main__":
    page.main(__doc__, run)

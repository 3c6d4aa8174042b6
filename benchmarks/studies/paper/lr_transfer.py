"""Which rate stays the same when a tuned LoRA run is switched to LoRA+: that of A, that of B, or their geometric mean?

Twelve settings of the teacher-student task. Plain LoRA's rate is tuned in half octaves; then the ratio is raised while
one rate is kept, by the rules of `lora_plus.training.groups.LR_MODES`; and the ratio's own best rate is looked for.

    python benchmarks/studies/paper/lr_transfer.py
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import page
import torch
from page import COLOURS, MARKERS, Finding, Picture, Section, Table, signed
from torch import Tensor
from toy import draw_problem, octaves, tail, train

from lora_plus.training.groups import LR_MODES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = 5
RATES = octaves(-10, 0, per_octave=2)
"""Tried rates of plain LoRA, and geometric means of the two rates of LoRA+."""
RATIOS = (4.0, 16.0)
KEPT = {"A": "η_A", "geometric": "√(η_A η_B)", "B": "η_B"}
"""What each mode of `LR_MODES` keeps."""


@dataclass(frozen=True)
class Setting:
    """One task."""

    n: int
    head: str
    target: str
    r: int

    def __str__(self) -> str:
        return f"n = {self.n}, {self.head}, {self.target}, r = {self.r}"


SETTINGS = (
    *(Setting(64, "µP", "sin", r) for r in (2, 4, 16)),
    Setting(64, "µP", "prod", 4),
    Setting(64, "µP", "lin", 4),
    *(Setting(64, "SP", "sin", r) for r in (4, 16)),
    Setting(64, "SP", "prod", 4),
    *(Setting(256, head, target, 4) for head, target in itertools.product(("µP", "SP"), ("sin", "prod"))),
)


def mean_tail(setting: Setting, rates: Tensor, seeds: int = SEEDS) -> Tensor:
    """Mean over seeds of `toy.tail` for each pair of rates, ``(pairs, 2) -> (pairs,)``."""
    problems = (
        draw_problem(setting.n, seed, r=setting.r, target=setting.target, head=setting.head) for seed in range(seeds)
    )
    return torch.stack([tail(train(problem, rates)) for problem in problems]).mean(0)


@dataclass(frozen=True)
class Switch:
    """What becomes of one tuned setting, in log2 of the loss relative to tuned LoRA."""

    setting: Setting
    kept: dict[tuple[float, str], float]
    """By ratio and mode."""
    tuned: dict[float, float]
    """The best of all tried geometric means, by ratio."""


def switch(setting: Setting, seeds: int = SEEDS) -> Switch:
    """Tune LoRA, switch to each ratio in each mode, tune each ratio too."""
    ratios = (1.0, *RATIOS)
    tried = torch.tensor([LR_MODES["geometric"](rate, ratio) for ratio in ratios for rate in RATES.tolist()])
    by_ratio = mean_tail(setting, tried, seeds).unflatten(0, (len(ratios), len(RATES)))
    plain, best = float(by_ratio[0].min()), float(RATES[by_ratio[0].argmin()])
    ways = list(itertools.product(RATIOS, LR_MODES))
    kept = mean_tail(setting, torch.tensor([LR_MODES[mode](best, ratio) for ratio, mode in ways]), seeds)
    return Switch(
        setting,
        {way: value - plain for way, value in zip(ways, kept.tolist(), strict=True)},
        {ratio: value - plain for ratio, value in zip(RATIOS, by_ratio[1:].amin(1).tolist(), strict=True)},
    )


def least_worse(switches: list[Switch], ratio: float) -> int:
    """In how many settings keeping the geometric mean is better than keeping either rate."""
    return sum(min(LR_MODES, key=lambda mode: s.kept[ratio, mode]) == "geometric" for s in switches)


def _summary(switches: list[Switch]) -> list[list[str]]:
    rows = []
    for ratio in RATIOS:
        changes = {kept: [s.kept[ratio, mode] for s in switches] for mode, kept in KEPT.items()}
        changes["none: tuned again"] = [s.tuned[ratio] for s in switches]
        for kept, of_settings in changes.items():
            better = f"{sum(change < 0 for change in of_settings)}/{len(switches)}"
            figures = (sum(of_settings) / len(switches), min(of_settings), max(of_settings))
            rows.append([f"{ratio:g}", kept, better, *map(signed, figures)])
    return rows


def run() -> Section:
    """All settings."""
    switches = [switch(setting) for setting in SETTINGS]
    total = len(switches)
    high = RATIOS[-1]
    won = ", ".join(f"{least_worse(switches, ratio)} of {total} at ratio {ratio:g}" for ratio in RATIOS)
    means = {mode: sum(s.kept[high, mode] for s in switches) / total for mode in LR_MODES}
    helped = sum(s.kept[high, "geometric"] < 0 for s in switches)
    findings = [
        Finding(
            "The method: fix the ratio, tune η_A again (LoRA's tuned rate is not the one to keep for A)",
            f"at ratio {high:g} and η_A of tuned LoRA, log2 of the loss changes by {signed(means['A'])} on average",
            means["A"] > 0,
        ),
        Finding(
            'Not in the paper, the rule of `lr_mode="geometric"`: keep the geometric mean of both rates',
            f"{signed(means['geometric'])} on average, better than tuned LoRA in {helped} of {total}; the best of the "
            f"three in {won}",
            helped >= 0.75 * total and all(least_worse(switches, ratio) == total for ratio in RATIOS),
        ),
    ]
    each = [
        [str(s.setting), *(signed(s.kept[ratio, mode]) for ratio in RATIOS for mode in KEPT)] for s in switches
    ]  # fmt: skip
    columns = [f"ratio {ratio:g}, {kept}" for ratio in RATIOS for kept in KEPT.values()]
    return Section(
        "The rate that transfers from LoRA to LoRA+",
        f"{total} settings of the teacher-student task, {SEEDS} seeds, Adam, 60 steps. LoRA's rate is tuned from 2^-10 "
        "to 2^0 in half octaves, on the mean over seeds of S = log2 of the mean loss over the last fifth of the steps. "
        "Figures are changes of S; negative is better.",
        findings,
        [
            Table(
                "Over all settings", ("ratio", "kept", "better in", "mean change", "best", "worst"), _summary(switches)
            ),
            Table("Each setting", ("setting", *columns), each),
        ],
        {
            "lr_transfer": Picture(
                f"Change of S from tuned LoRA to ratio {high:g}, by what is kept; below the line is better",
                lambda: _draw(switches),
            )
        },
    )


def _draw(switches: list[Switch]) -> Figure:
    """A dot for each setting and mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    panel = figure.subplots()
    places = range(len(switches))
    for number, (mode, kept) in enumerate(KEPT.items()):
        changes = [s.kept[RATIOS[-1], mode] for s in switches]
        panel.plot(places, changes, MARKERS[number], color=COLOURS[number], label=f"{kept} kept")
    panel.axhline(0, color="black", linewidth=1)
    panel.set_xticks(places, [str(s.setting) for s in switches], rotation=40, ha="right")
    panel.set_ylabel("change of log2 of the loss")
    panel.legend()
    return figure


if __name__ == "__main__":
    page.main(__doc__, run)

"""How often is the gauge's verdict on the ratio right? Settings of small tasks, tuned, judged, and then tried.

1. Each setting is tuned at a start ratio, mostly 1, over half-octaves of the geometric-mean rate.
2. At the tuned rate the gauge reads w, log2 of the work of A over that of B. It says yes if w is above zero.
3. The ratios 2 to 64 times the start are tried, each at all rates.
4. Rates and the best ratio are chosen on a few seeds. The benefit, in log2 of the loss, is measured on four times as
   many other seeds, so that choosing the best of many does not count as a benefit. A larger ratio "helps" if the
   benefit is above 0.1.

    python benchmarks/studies/gauge/gauge.py --out benchmarks/results/gauge.md
    python benchmarks/studies/gauge/gauge.py --short
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gauge_tasks import Outcome, Task, matrix, pretrained, toy, train
from torch import Tensor, nn

from lora_plus import create_loraplus_optimizer, inject_lora
from lora_plus.training import LoRAPlusGauge

sys.path.append(str(Path(__file__).parents[2]))  # where the other benchmarks are
from report import versions

HELPS = 0.1
"""log2 of the loss: 7 percent."""
FACTORS = tuple(2**k for k in range(7))
"""The ratios that are tried, over the start ratio, which is the first."""


def octaves(lowest: float, highest: float) -> Tensor:
    """Rates from 2^lowest to 2^highest in half-octaves."""
    return 2.0 ** torch.arange(lowest, highest + 0.25, 0.5)


@dataclass(frozen=True)
class Setting:
    """A task, and how it is trained."""

    make: partial[Task]
    """From the seed."""
    formed: bool = False
    """Whether the rule, w above zero, was formed on it."""
    start: int = 1
    """The ratio at which it is tuned and judged."""
    rates: Tensor = octaves(-8, 0)  # noqa: RUF009
    rule: str = "Adam"

    @property
    def family(self) -> str:
        return self.make.func.__name__

    @property
    def what(self) -> str:
        """The task's arguments, and the optimizer's rule."""
        return ", ".join([*(f"{name}={value}" for name, value in self.make.keywords.items()), self.rule])


HEADS = ("muP", "SP")
FORMED = [
    *((64, "muP", "sin", r) for r in (2, 4, 16)), (64, "muP", "prod", 4), (64, "muP", "lin", 4),
    (64, "SP", "sin", 4), (64, "SP", "sin", 16), (64, "SP", "prod", 4),
    *((256, head, target, 4) for head in HEADS for target in ("sin", "prod")),
]  # fmt: skip
"""Of the toys on which the rule was formed: width, head, target and rank."""
OTHERS = [(64, "SP", "lin", 4), (64, "SP", "sin", 2), (64, "SP", "prod", 16), (64, "muP", "prod", 2)]
MATRICES: list[tuple[dict[str, Any], int]] = [
    ({}, 1),
    ({}, 16),
    ({"mean": 2}, 1),
    ({"mean": 8}, 1),
    ({"mean": 8, "r": 16}, 1),
]
"""Of the matrices: arguments and start ratio."""
FINE_TUNED: list[tuple[dict[str, Any], int, bool]] = [
    ({}, 1, True), ({}, 16, False), ({"init": "B"}, 1, False),
    *(({"r": r}, 1, False) for r in (2, 16)), *(({"base": base}, 1, False) for base in ("near", "negated", "none")),
]  # fmt: skip
"""Of the networks: arguments, start ratio, and whether the rule was formed on them."""


def _settings() -> Iterator[Setting]:
    for formed, sizes in ((True, FORMED), (False, OTHERS)):
        for n, head, target, r in sizes:
            yield Setting(partial(toy, n=n, head=head, target=target, r=r), formed)
    for head, target in itertools.product(HEADS, ("sin", "prod")):
        for features in ("tanh", "linear"):
            yield Setting(partial(toy, head=head, target=target, features=features))
        yield Setting(partial(toy, head=head, target=target, init="B"))
    for head, target in itertools.product(HEADS, ("sin", "prod", "lin")):
        yield Setting(partial(toy, head=head, target=target), start=16)
    for head, rates in zip(HEADS, (octaves(-2, 6), octaves(-6, 2)), strict=True):
        yield Setting(partial(toy, head=head, steps=240))
        yield Setting(partial(toy, head=head, samples=256))
        yield Setting(partial(toy, head=head), rule="SGD", rates=rates)
    for kind, start in MATRICES:
        yield Setting(partial(matrix, **kind), start=start)
    for kind, start, formed in FINE_TUNED:
        yield Setting(partial(pretrained, **kind), formed, start, octaves(-8, -2))


SETTINGS = list(_settings())


@dataclass(frozen=True)
class Result:
    """What came of a setting."""

    setting: Setting
    rate: float
    """The tuned one, as log2 of the geometric mean."""
    at_edge: bool
    """Whether a chosen rate is the first or the last of the grid."""
    w: float
    """At the tuned rate, as a mean over the seeds of tuning."""
    w_low: float
    """At a quarter of the tuned rate."""
    factor: int
    """The best, over the start ratio, of those above 1."""
    benefits: list[float]
    """Of that factor at its own best rate, for each fresh seed."""
    kept: float
    """The mean benefit of the best factor at the rate that was tuned at the start ratio."""

    @property
    def benefit(self) -> float:
        return statistics.mean(self.benefits)

    @property
    def error(self) -> float:
        """Standard error of the benefit."""
        return statistics.stdev(self.benefits) / math.sqrt(len(self.benefits))

    @property
    def says_yes(self) -> bool:
        return self.w > 0

    @property
    def helps(self) -> bool:
        return self.benefit > HELPS

    @property
    def clear(self) -> bool:
        """Whether the benefit is off the limit by two standard errors."""
        return abs(self.benefit - HELPS) > 2 * self.error


def judge(setting: Setting, seeds: int) -> Result:
    """Tune on so many seeds, and take the benefit on four times as many others."""
    rates = setting.rates
    ratios = setting.start * torch.tensor(FACTORS, dtype=torch.float32)
    g, ratio = (grid.flatten() for grid in torch.meshgrid(rates, ratios, indexing="ij"))

    def trained(seed: int, members: slice | list[int]) -> Outcome:
        root = ratio[members].sqrt()
        return train(setting.make(seed), g[members] / root, g[members] * root, setting.rule)

    runs = [trained(seed, slice(None)) for seed in range(seeds)]
    scores = torch.stack([run.score for run in runs]).mean(0).view(len(rates), -1)
    shares = torch.stack([run.work_share for run in runs]).mean(0).view(len(rates), -1)[:, 0]
    best = scores.argmin(0)  # the best rate of each factor
    at, factor = int(best[0]), 1 + int(scores.amin(0)[1:].argmin())
    kept = 1 + int(scores[at, 1:].argmin())
    chosen = [row * len(FACTORS) + n for row, n in ((at, 0), (int(best[factor]), factor), (at, kept))]
    fresh = torch.stack([trained(seed, chosen).score for seed in range(seeds, 5 * seeds)])
    return Result(
        setting=setting,
        rate=math.log2(rates[at]),
        at_edge=bool({at, int(best[factor])} & {0, len(rates) - 1}),
        w=float(shares[at]),
        w_low=float(shares[max(at - 4, 0)]),
        factor=FACTORS[factor],
        benefits=(fresh[:, 0] - fresh[:, 1]).tolist(),
        kept=float((fresh[:, 0] - fresh[:, 2]).mean()),
    )


def by_hooks(task: Task, rate: float, ratio: float) -> float:
    """w as the library's gauge reads it from layers and an optimizer, for a task with a head and without batches."""
    assert task.head is not None and task.batches is None
    r, n = task.A.shape
    layer = nn.Linear(n, len(task.B), bias=False).to(task.A.dtype)
    inject_lora(layer, "", r=r, alpha=r)
    with torch.no_grad():
        # the features determine their images, and so the weight as far as it matters
        layer.weight.copy_(torch.linalg.lstsq(task.train.H, task.train.Z, driver="gelsd").solution.T)
        layer.lora_A["default"].copy_(task.A)  # type: ignore[index,operator]
        layer.lora_B["default"].copy_(task.B)  # type: ignore[index,operator]
    optimizer = create_loraplus_optimizer(layer, torch.optim.Adam, lr=rate, lr_ratio=ratio, lr_mode="geometric")
    with LoRAPlusGauge(layer, optimizer) as gauge:
        for _ in range(task.steps):
            optimizer.zero_grad()
            (layer(task.train.H).relu() @ task.head - task.train.y).square().mean().backward()
            optimizer.step()
    return gauge.report().work_share


def by_products(task: Task, rate: float, ratio: float) -> float:
    """The same from the batched training."""
    rates = torch.tensor([rate / math.sqrt(ratio), rate * math.sqrt(ratio)], dtype=task.A.dtype)
    return float(train(task, rates[:1], rates[1:]).work_share)


# ---- the page -------------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """As Markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def order(results: Sequence[Result]) -> float:
    """How probable it is that a setting where a larger ratio helps has a larger w than one where it does not."""
    pairs = [(a.w > b.w) + (a.w == b.w) / 2 for a in results if a.helps for b in results if not b.helps]
    return statistics.mean(pairs) if pairs else math.nan


def confusion(results: Sequence[Result]) -> tuple[object, ...]:
    """How many said no, how many of them were right, the same of yes, in how many it helps, and their order."""
    no, yes = ([r for r in results if r.says_yes is said] for said in (False, True))
    right_no, right_yes = sum(not r.helps for r in no), sum(r.helps for r in yes)
    helped = f"{sum(r.helps for r in results)} of {len(results)}"
    return len(no), right_no, len(yes), right_yes, helped, f"{order(results):.2f}"


def counts(results: Sequence[Result]) -> str:
    """The confusion table, of all and of some."""
    held_out = [r for r in results if not r.setting.formed]
    families = dict.fromkeys(r.setting.family for r in held_out)
    groups = {
        "**held out**": held_out,
        "held out and clear": [r for r in held_out if r.clear],
        **{f"held out, {name}": [r for r in held_out if r.setting.family == name] for name in families},
        "those on which the rule was formed": [r for r in results if r.setting.formed],
    }
    columns = ("settings", "says no", "of them right", "says yes", "of them right", "helps in", "order")
    return table(columns, [(name, *confusion(group)) for name, group in groups.items()])


COLUMNS: dict[str, Callable[[Result], object]] = {
    "setting": lambda r: f"{r.setting.family}({r.setting.what})",
    "formed on": lambda r: "yes" if r.setting.formed else "",
    "from ratio": lambda r: r.setting.start,
    "tuned rate": lambda r: f"2^{r.rate:g}" + (" (edge)" if r.at_edge else ""),
    "w": lambda r: f"{r.w:+.2f}",
    "w at rate / 4": lambda r: f"{r.w_low:+.2f}",
    "best": lambda r: f"x {r.factor}",
    "benefit": lambda r: f"{r.benefit:+.2f} ± {r.error:.2f}",
    "rate kept": lambda r: f"{r.kept:+.2f}",
    "helps": lambda r: ("yes" if r.helps else "no") + ("" if r.clear else "?"),
    "says": lambda r: ("yes" if r.says_yes else "no") + ("" if r.says_yes == r.helps else ", **wrong**"),
}


def page(results: Sequence[Result], agreement: tuple[float, float], seconds: float) -> str:
    """All that was found, as Markdown."""
    held_out = [r for r in results if not r.setting.formed]
    yes, no = ([r for r in held_out if r.says_yes is said] for said in (True, False))
    mean = {name: f"{statistics.mean(r.benefit for r in group):+.2f}" if group else "-"
            for name, group in (("yes", yes), ("no", no))}  # fmt: skip
    kept = f"{statistics.mean(r.kept for r in yes):+.2f}" if yes else "-"
    ran = ", ".join(f"{name} {version}" for name, version in versions().items() if name in ("torch", "Python"))
    paragraphs = [
        "# Does the gauge know whether a larger ratio helps?",
        f"`{shlex.join(['python', *sys.argv])}`, {seconds:.0f} CPU seconds on one thread, {ran}.",
        (__doc__ or "").partition("\n\n")[2].partition("\n\n    python")[0],
        "## How often it is right",
        counts(results),
        'A "clear" setting has a benefit at least two standard errors away from 0.1. "Order": of two settings, how '
        "often the one where a larger ratio helps has the larger w; 0.5 is chance.",
        f"On held-out settings the mean benefit is {mean['yes']} if the gauge says yes ({kept} with the rate kept), "
        f"and {mean['no']} if it says no. Of the {len(yes)} held-out settings with w above zero, "
        f"{sum(r.w_low <= 0 for r in yes)} have w at or below zero at a quarter of the tuned rate.",
        f"The library's gauge, on layers and an optimizer, reads w = {agreement[0]:.12f}; the batched products of this "
        f"benchmark give {agreement[1]:.12f} (float64, the first seed of toy()).",
        "## Every setting",
        "The tasks are in `benchmarks/studies/gauge/gauge_tasks.py`. Benefit: log2 of the loss at the start ratio over "
        "that at the best larger ratio, each at its tuned rate, with the standard error over fresh seeds. Rate kept: "
        "the same at the start ratio's rate. Question mark: not clear. Edge: a chosen rate is at the end of the grid.",
        table(list(COLUMNS), [[show(r) for show in COLUMNS.values()] for r in results]),
    ]
    return "\n\n".join(paragraphs) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, default=5, help="to tune with; the benefit is taken on four times as many others"
    )
    parser.add_argument("--out", type=Path, help="write the page to this file")
    parser.add_argument("--short", action="store_true", help="every fourth setting, three seeds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, results = time.process_time(), []
    for setting in SETTINGS[::4] if options.short else SETTINGS:
        results.append(r := judge(setting, 3 if options.short else options.seeds))
        print(
            f"{r.setting.family}, {r.setting.what}, from {r.setting.start}: w {r.w:+.2f}, benefit {r.benefit:+.2f}",
            flush=True,
        )
    example = toy(0).double()
    agreement = by_hooks(example, 2**-3.5, 1.0), by_products(example, 2**-3.5, 1.0)
    text = page(results, agreement, time.process_time() - start)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()

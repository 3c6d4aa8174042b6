"""The page on the rivals of a ratio, written from the records."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from methods import RANK, SCALE
from records import REPORT, SWEEP, Record, mean_losses
from results_page import Estimate, table
from tasks import Setting

FLAT = 0.01
"""A rate is as good as the best one where the loss is above its by at most this part."""
HEAD = """\
# The rivals of a ratio: Riemannian preconditioning, LoRA-RITE and LoRA-Muon beside LoRA+

{verdict}

LoRA+ balances A and B by a ratio of their rates. Other methods balance them at each step, from the Gram matrices
BᵀB and AAᵀ (r x r). The package contains none of them:

| method | step | source | invariant |
|---|---|---|---|
| Riemannian | (BᵀB + d)⁻¹ g_A and g_B (AAᵀ + d)⁻¹ in place of the gradients, then AdamW | 2402.02347 | with SGD |
| LoRA-RITE | Adam with an r x r second moment, in the basis of the other factor | 2410.20625, algorithm 1 | yes |
| LoRA-Muon | ½ msign(m S^-½) S^-½ with S the other factor's Gram matrix, m the mean of gradients | 2606.12921 | yes |

*Invariant*: (T A, B T⁻¹) takes the same steps as (A, B). `tests/studies/test_rivals.py` tests the formulas and these
claims in float64.

`python benchmarks/studies/finetune/compare_rivals.py` does the runs, saves each in `rivals.jsonl`, and writes this
page. Models, data and training are those of [the comparison of methods](finetune.md): r = {rank}, alpha = {alpha:g}, no
decay, {steps} steps, rates that fall linearly to zero, a trained head. The search for LoRA and LoRA+ includes the runs
of that page.

{total} runs, {minutes:.0f} CPU minutes, on one thread each; {machines}.

**Equal search.** Each method has 10 trials per seed of the search, and more if its best rate is at an end. LoRA has 10
rates, half an octave apart. The others have 5 rates, an octave apart, with each of 2 settings. The rate and setting
with the least mean validation loss are scored on test examples, with fresh seeds. AdamW trains the head at the method's
rate; with LoRA-RITE and LoRA-Muon, whose rates have another unit, at the rate of tuned LoRA.
"""
LEGEND = """\
The tables show the mean ± standard error over seeds. *To LoRA*, *to LoRA+*: the paired difference of the test loss.
Below zero the method is better; bold is significant by Student's t at 95 %. *Time*: the median CPU time of a training
step, divided by LoRA's. *Octaves*: the width of the range of rates whose validation loss is within 1 % of the best, at
the chosen setting.
"""
CAVEATS = """\
## Limits

- {judged} differences are shown, without a correction for their number. About one in twenty is bold by chance.
- The search has {sweeps} seeds, and its rates differ by a factor of two. A method can be off its best by as much as the
  differences shown. If the table ranks a method above another but the search ranks it below, it has not been shown to
  be better. The spread comes from A's start and the batches; it does not cover other tasks.
- The runs are short and the models small. The papers' claims are about long runs of large models. This page does not
  refute them.
- The methods are implemented for clarity, in float64. Their time is an upper bound.
- A setting can have no effect in so few steps, such as β2 of LoRA-RITE. Then the search of that method is narrower.
"""


@dataclass(frozen=True)
class Outcomes:
    """The records of one task."""

    task: str
    records: Sequence[Record]
    tried: Mapping[str, Sequence[str]]
    """By method, the names that its runs have."""

    def of(self, method: str) -> dict[int, Record]:
        """The reported runs by seed."""
        return {
            record.run.seed: record
            for record in self.records
            if record.run.stage == REPORT and record.run.method in self.tried[method]
        }

    def difference(self, method: str, other: str) -> Estimate:
        """Of the test losses, by seed."""
        ours, theirs = self.of(method), self.of(other)
        return Estimate([test(ours[seed])[0] - test(theirs[seed])[0] for seed in sorted(ours.keys() & theirs.keys())])

    def differences(self) -> Iterator[tuple[str, str, Estimate]]:
        """Of each method to those before the first rival."""
        plain, plus, *_ = self.tried
        for other, method in itertools.product((plain, plus), self.tried):
            if method != other and (method, other) != (plain, plus):
                yield method, other, self.difference(method, other)

    def row(self, method: str) -> list[str]:
        plain, plus, *_ = self.tried
        records = [record for _, record in sorted(self.of(method).items())]
        losses, accuracies = (Estimate(values) for values in zip(*map(test, records), strict=True))
        run = records[0].run
        means = mean_losses(self.records, self.task, run.method)
        at_end = run.rate in (min(means), max(means))
        first = self.of(plain)
        times = [r.outcome.step_seconds / first[r.run.seed].outcome.step_seconds for r in records]
        return [
            run.method,
            f"*{power(run.rate)}*" if at_end else power(run.rate),
            losses.text(),
            "" if method == plain else shown(self.difference(method, plain)),
            "" if method in (plain, plus) else shown(self.difference(method, plus)),
            accuracies.text(digits=3),
            f"{statistics.median(times):.2f}",
            f"{flat_octaves(means):.1f}",
        ]

    def swept(self, name: str) -> list[str]:
        """A setting, and its mean validation losses by rate, the least in bold."""
        means = mean_losses(self.records, self.task, name)
        least = min(means.values())
        return [
            name,
            ", ".join(
                f"{power(rate)}: **{loss:.4f}**" if loss == least else f"{power(rate)}: {loss:.4f}"
                for rate, loss in means.items()
            ),
        ]

    def lines(self, setting: Setting) -> list[str]:
        """The section."""
        seeds = {
            stage: ", ".join(map(str, sorted({r.run.seed for r in self.records if r.run.stage == stage})))
            for stage in (SWEEP, REPORT)
        }
        minutes = sum(record.seconds for record in self.records) / 60
        return [
            f"## {self.task.capitalize()}",
            "",
            setting.words,
            "",
            f"Seeds of the search {seeds[SWEEP]}, of the table {seeds[REPORT]}. {len(self.records)} runs, "
            f"{minutes:.0f} CPU minutes.",
            "",
            *table(
                ("method", "rate", "test loss", "to LoRA", "to LoRA+", "accuracy", "time", "octaves"),
                [self.row(method) for method in self.tried],
            ),
            "Mean validation loss of the search:",
            "",
            *table(("setting", "by rate"), [self.swept(name) for names in self.tried.values() for name in names]),
        ]


def test(record: Record) -> tuple[float, float]:
    """Loss and accuracy on the test examples."""
    assert record.outcome.test is not None
    return record.outcome.test.loss, record.outcome.test.accuracy


def shown(difference: Estimate) -> str:
    return f"**{difference.text('+')}**" if difference.separated else difference.text("+")


def power(rate: float) -> str:
    return f"2^{round(math.log2(rate), 2):g}"


def flat_octaves(means: Mapping[float, float]) -> float:
    """How many octaves about the best rate have a loss within `FLAT` of the least, linear between the rates tried."""
    points = [(math.log2(rate), loss) for rate, loss in means.items()]
    best = min(range(len(points)), key=lambda n: points[n][1])
    bound = (1 + FLAT) * points[best][1]
    ends = []
    for side in (points[best::-1], points[best:]):
        end = side[-1][0]
        for (x, loss), (beyond, worse) in itertools.pairwise(side):
            if worse > bound:
                end = x + (beyond - x) * (bound - loss) / (worse - loss)
                break
        ends.append(end)
    return ends[1] - ends[0]


def verdict(found: Sequence[Outcomes]) -> str:
    """What separates, in a sentence for each base of comparison."""
    sentences = []
    for base in list(found[0].tried)[:2]:
        sides: dict[str, list[str]] = {"better": [], "worse": []}
        for outcomes in found:
            for method, other, difference in outcomes.differences():
                if other == base and difference.separated:
                    sides["better" if difference.mean < 0 else "worse"].append(f"{method} on the {outcomes.task}")
        parts = [f"{side}: {', '.join(names) or 'none'}" for side, names in sides.items()]
        sentences.append(f"Beside tuned {base}, {'; '.join(parts)}.")
    return f"**At tuned rates and equal search, beyond the noise of {_seeds(found)} seeds.** {' '.join(sentences)}"


def _seeds(found: Sequence[Outcomes]) -> str:
    plain = next(iter(found[0].tried))
    return " or ".join(sorted({str(len(outcomes.of(plain))) for outcomes in found}))


def page(
    settings: Mapping[str, Setting], tried: Mapping[str, Mapping[str, Sequence[str]]], records: Sequence[Record]
) -> str:
    """The page as Markdown.

    Args:
        settings: how the tasks are trained.
        tried: by task and by name of a method, the names that its runs have; plain LoRA first, then LoRA+.
        records: of all runs.
    """
    found = [Outcomes(task, [r for r in records if r.run.task == task], names) for task, names in tried.items()]
    searched = {r.run.seed for r in records if r.run.stage == SWEEP}
    head = HEAD.format(
        verdict=verdict(found),
        total=len(records),
        minutes=sum(record.seconds for record in records) / 60,
        machines="; ".join(sorted({", ".join(map(" ".join, record.machine.items())) for record in records})),
        rank=RANK,
        alpha=SCALE * RANK,
        steps=" or ".join(sorted({str(settings[task].steps) for task in tried})),
    )
    caveats = CAVEATS.format(judged=sum(1 for outcomes in found for _ in outcomes.differences()), sweeps=len(searched))
    lines = [head, LEGEND]
    for outcomes in found:
        lines += outcomes.lines(settings[outcomes.task])
    return "\n".join([*lines, caveats])

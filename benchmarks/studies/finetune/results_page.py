"""The results page, written from the records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from methods import FULL, PLAIN, PROBE, RANK, RATIO, RULES, SCALE, Rule
from page_texts import CAVEATS, HEAD, LEGEND
from peft_check import Check
from plane_page import PICTURE, Plane
from records import PLANE, REPORT, SWEEP, Record, mean_losses
from tasks import HEAD_RATE, Setting
from training import GRADIENT_BATCHES

FOLDER = "finetune"
"""Of the pictures, beside the page."""
CAPTION = "Validation loss above the least of the task, by both rates. Line: equal rates, plain LoRA; star: the least"
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
"""Student's t by degrees of freedom: a difference above so many standard errors comes by chance once in twenty."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    values: Sequence[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def error(self) -> float:
        """Standard error; NaN for one value."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else math.nan

    @property
    def separated(self) -> bool:
        """Whether the mean is away from zero, at the 95 % level."""
        return len(self.values) > 1 and abs(self.mean) > T95[len(self.values) - 1] * self.error

    def text(self, sign: str = "", digits: int = 4) -> str:
        mean = f"{self.mean:{sign}.{digits}f}"
        return f"{mean} ± {self.error:.{digits}f}" if len(self.values) > 1 else mean


def steps_to(curve: Sequence[tuple[int, float]], target: float) -> float:
    """Where a curve of (step, loss) first comes down to the target, interpolated linearly; infinite if never."""
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None or before[1] == loss:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (step, loss)
    return math.inf


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, with an empty line after it."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return [lines[0], "|" + "---|" * len(columns), *lines[1:], ""]


def power(rate: float) -> str:
    return f"2^{math.log2(rate):g}"


@dataclass(frozen=True)
class Results:
    """All records of one task."""

    name: str
    setting: Setting
    records: Sequence[Record]

    def of(self, stage: str, method: str) -> list[Record]:
        found = [record for record in self.records if (record.run.stage, record.run.method) == (stage, method)]
        return sorted(found, key=lambda record: record.run.seed)

    def seeds(self, stage: str) -> str:
        found = {record.run.seed for record in self.records if record.run.stage == stage and record.run.steps}
        return ", ".join(map(str, sorted(found)))

    def reported(self) -> list[str]:
        """The methods with test figures, in the order of the table."""
        return [method for method in self.setting.methods if self.of(REPORT, method)]

    def paired(self, method: str, figure: Callable[[Record, Record], float], against: str = PLAIN) -> list[float]:
        """A figure of each run of the method and the other method's run with the same seed."""
        others = {record.run.seed: record for record in self.of(REPORT, against)}
        return [
            figure(record, others[record.run.seed]) for record in self.of(REPORT, method) if record.run.seed in others
        ]

    def difference(self, method: str, against: str = PLAIN) -> Estimate:
        """Test loss less the other method's."""
        return Estimate(self.paired(method, lambda record, other: _test(record)[0] - _test(other)[0], against))

    def curve(self, method: str) -> list[tuple[int, float]]:
        """The validation loss on the way, the mean over seeds."""
        points = zip(*(record.outcome.curve for record in self.of(REPORT, method)), strict=True)
        return [(of_step[0][0], statistics.mean(loss for _, loss in of_step)) for of_step in points]

    def row(self, method: str) -> list[str]:
        records = self.of(REPORT, method)
        losses, accuracies = (Estimate(values) for values in zip(*map(_test, records), strict=True))
        rate = records[0].run.rate
        swept = [record.run.rate for record in self.of(SWEEP, method)]
        steps = steps_to(self.curve(method), self.curve(PLAIN)[-1][1])
        ratios = self.paired(method, lambda record, plain: record.outcome.step_seconds / plain.outcome.step_seconds)
        return [
            method,
            f"*{power(rate)}*" if rate in (min(swept), max(swept)) else power(rate),
            losses.text(),
            "" if method == PLAIN else self.difference(method).text("+"),
            accuracies.text(digits=3),
            f"{steps:.0f}" if math.isfinite(steps) else "never",
            f"{statistics.median(ratios):.2f}" if self.took_turns(method) else "",
        ]

    def took_turns(self, method: str) -> bool:
        """Whether the method's runs began before LoRA's ended, in the order of the records."""
        ran, plain = ([self.records.index(record) for record in self.of(REPORT, each)] for each in (method, PLAIN))
        return min(ran) <= max(plain)

    def rates(self) -> list[float]:
        """All that were swept."""
        return sorted({record.run.rate for record in self.records if record.run.stage == SWEEP})

    def swept(self, method: str) -> list[str]:
        """Mean validation loss at each rate of the sweep, the least in bold."""
        means = mean_losses(self.records, self.name, method)
        least = min(means.values(), default=None)
        shown = {rate: f"**{mean:.4f}**" if mean == least else f"{mean:.4f}" for rate, mean in means.items()}
        return [method, *(shown.get(rate, "") for rate in self.rates())]

    def verdict(self) -> list[str]:
        """Which methods separate from LoRA."""
        others = [method for method in self.reported() if method != PLAIN]
        apart = [method for method in others if self.difference(method).separated]
        better = [method for method in apart if self.difference(method).mean < 0]
        worse = [method for method in apart if method not in better]
        tied = [method for method in others if method not in apart]
        sides = (("Better than LoRA", better), ("Worse", worse), ("No difference found", tied))
        lines = [". ".join(f"{words}: {', '.join(names) or 'none'}" for words, names in sides) + ".", ""]
        left = [method for method in self.setting.methods if method not in self.reported()]
        return lines + ([f"Planned, but not run for this page: {', '.join(left)}.", ""] if left else [])

    def lines(self) -> list[str]:
        """The section."""
        probe = [_test(record) for record in self.of(REPORT, PROBE)]
        train, validation, test = self.setting.sizes
        lines = [f"## {self.name.capitalize()}", "", self.setting.words, ""]
        lines += [
            f"{train} training, {validation} validation and {test} test examples; {self.setting.steps} steps of "
            f"{self.setting.batch}. The grid has {len(self.setting.rates)} rates, the seeds of the sweep are "
            f"{self.seeds(SWEEP)}, those of the table {self.seeds(REPORT)}. {len(self.records)} runs, "
            f"{sum(record.seconds for record in self.records) / 60:.0f} CPU minutes.",
            "",
        ]
        lines += [f"Before training: test loss {loss:.4f}, accuracy {accuracy:.3f}." for loss, accuracy in probe]
        columns = ("method", "rate", "test loss", "difference", "accuracy", "steps", "time")
        lines += ["", *table(columns, [self.row(method) for method in self.reported()]), *self.verdict()]
        lines += ["Mean validation loss of the sweep, by rate:", ""]
        swept = [method for method in self.setting.methods if self.of(SWEEP, method)]
        lines += table(("method", *map(power, self.rates())), [self.swept(method) for method in swept])
        plane = Plane.of(self.records)
        return lines + (plane.lines(self.setting.steps, power(HEAD_RATE), self.seeds(PLANE)) if plane.losses else [])


def _test(record: Record) -> tuple[float, float]:
    assert record.outcome.test is not None
    return record.outcome.test.loss, record.outcome.test.accuracy


@dataclass(frozen=True)
class Evidence:
    """What following a rule of thumb changes, in each task that has both methods."""

    rule: Rule
    gains: Mapping[str, Estimate]
    """By task: test loss of the method that follows the rule less that of the other one, seed by seed."""

    @classmethod
    def of(cls, rule: Rule, results: Sequence[Results]) -> Evidence:
        """From all results."""
        found = {result.name: result.difference(rule.followed, rule.otherwise) for result in results}
        return cls(rule, {name: gain for name, gain in found.items() if gain.values})

    def counts(self) -> str:
        """In how many tasks the rule helps, harms, or cannot be told from the other method."""
        apart = [gain.mean for gain in self.gains.values() if gain.separated]
        better = sum(mean < 0 for mean in apart)
        return (
            f"better in {better}, worse in {len(apart) - better}, no difference found in {len(self.gains) - len(apart)}"
        )

    def range(self) -> str:
        """Of the mean differences over tasks."""
        means = [gain.mean for gain in self.gains.values()]
        return f"{min(means):+.3f} to {max(means):+.3f}, median {statistics.median(means):+.3f}"

    def row(self, tasks: Sequence[str]) -> list[str]:
        """A line of the table."""
        cells = {
            name: f"**{gain.text('+')}**" if gain.separated else gain.text("+") for name, gain in self.gains.items()
        }
        return [self.rule.words, *(cells.get(task, "") for task in tasks)]


def rates_over_full(results: Sequence[Results]) -> dict[str, float]:
    """By task: LoRA's best rate over that of full fine-tuning."""
    found = {result.name: [result.of(REPORT, method) for method in (PLAIN, FULL)] for result in results}
    return {name: plain[0].run.rate / full[0].run.rate for name, (plain, full) in found.items() if plain and full}


def rule_lines(evidence: Sequence[Evidence], results: Sequence[Results]) -> list[str]:
    """The section on rules of thumb."""
    tasks = list(dict.fromkeys(task for each in evidence for task in each.gains))
    rates = ", ".join(f"{rate:g} ({name})" for name, rate in rates_over_full(results).items())
    return [
        "## Rules of thumb",
        "",
        "The test loss with the rule minus that without it, in nats, each at its own tuned rate: mean ± standard error "
        "over paired seeds. Below zero the rule helps. **Bold**: different from zero at the 95 % level of Student's t.",
        "",
        *table(("rule", *tasks), [each.row(tasks) for each in evidence]),
        f"LoRA's best rate over that of full fine-tuning: {rates or 'not run'}.",
        "",
    ]


def at_a_low_rate(results: Sequence[Results], method: str) -> list[float]:
    """In each task: validation loss less LoRA's, both at a quarter of LoRA's best rate, in the sweep."""
    found = []
    for result in results:
        plain, other = (mean_losses(result.records, result.name, each) for each in (PLAIN, method))
        low = min(plain, key=plain.__getitem__) / 4 if plain else None
        if low in plain and low in other:
            found.append(other[low] - plain[low])
    return found


def headline(evidence: Sequence[Evidence], results: Sequence[Results]) -> str:
    """The sentences that a reader may quote: what the ratio gains over LoRA at tuned rates, and at too low ones.

    Only ratios that were run in several tasks.
    """
    ratios = [each for each in evidence if each.rule.words.startswith(RATIO) and len(each.gains) > 1]
    parts = [
        f"- {each.rule.followed} instead of {each.rule.otherwise}: {each.range()} nats ({each.counts()} settings)."
        for each in ratios
    ]
    text = "\n".join(
        ["**With the rate of each method tuned on grids of equal size**, the test loss changes by:", "", *parts]
    )
    low = [
        f"- {followed}: {min(gains):+.3f} to {max(gains):+.3f} nats ({len(gains)} settings)."
        for followed in dict.fromkeys(each.rule.followed for each in ratios)
        if (gains := at_a_low_rate(results, followed))
    ]
    return (
        "\n".join([text, "", "**At a quarter of LoRA's best rate**, the validation loss changes by:", "", *low])
        if low
        else text
    )


def check_lines(checks: Sequence[Check]) -> list[str]:
    """The section on PEFT."""
    rows = [
        [check.task, check.method, power(check.rate), str(len(check.ours)), f"{check.ours[-1]:.6f}",
         f"{check.theirs[-1]:.6f}", f"{check.difference:.1e}"]
        for check in checks
    ]  # fmt: skip
    columns = ("task", "method", "rate", "steps", "last loss, here", "last loss, PEFT", "largest difference")
    return [
        "## The same through PEFT",
        "",
        "PEFT's layers with the same A, the same parameter groups and the same batches, in float32. The difference is "
        "that of the training losses, over all steps.",
        "",
        *table(columns, rows),
    ]


def page(settings: Mapping[str, Setting], records: Sequence[Record], checks: Sequence[Check]) -> str:
    """The page as Markdown, with a section for each task that has a report."""
    results = [
        Results(name, setting, [record for record in records if record.run.task == name])
        for name, setting in settings.items()
    ]
    results = [result for result in results if result.reported()]
    evidence = [each for each in (Evidence.of(rule, results) for rule in RULES) if each.gains]
    planes = {result.name: Plane.of(result.records) for result in results}
    head = HEAD.format(
        headline=headline(evidence, results),
        total=len(records),
        minutes=sum(record.seconds for record in records) / 60,
        machines="; ".join(sorted({", ".join(map(" ".join, record.machine.items())) for record in records})),
        rank=RANK,
        scale=SCALE,
        batches=GRADIENT_BATCHES,
    )
    judged = {(result.name, frozenset((method, PLAIN))) for result in results for method in result.reported()}
    judged |= {(name, frozenset((each.rule.followed, each.rule.otherwise))) for each in evidence for name in each.gains}
    caveats = CAVEATS.format(
        judged=sum(len(pair) == 2 for _, pair in judged),
        steps=" or ".join(map(str, sorted({result.setting.steps for result in results}))),
        sweeps=" or ".join(sorted({str(len({r.run.seed for r in records if r.run.stage == SWEEP}))})),
    )
    lines = [head, *rule_lines(evidence, results)]
    if any(plane.losses for plane in planes.values()):
        lines += [f"![{CAPTION}]({FOLDER}/{PICTURE}.svg)", "", f"*{CAPTION}*", ""]
    lines += [LEGEND]
    for result in results:
        lines += result.lines()
    return "\n".join([*lines, *check_lines(checks), caveats, ""])

"""The part on pretrained models of the question which factor starts at zero, from runs that are kept."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from page import Finding, Table, power, signed

STARTS = ("Init[A]", "Init[B]")


@dataclass(frozen=True)
class Runs:
    """All runs of one start at one ratio."""

    start: str
    ratio: str
    searched: dict[float, float]
    """Mean validation loss at each geometric mean of the rates, ascending."""
    tests: dict[int, float]
    """Test loss of each fresh seed, at the best of them."""

    @property
    def best(self) -> float:
        return min(self.searched, key=self.searched.__getitem__)

    @property
    def least(self) -> float:
        return self.searched[self.best]

    def apart(self, other: Runs) -> str:
        """The paired difference of the test losses to others'; nothing to its own."""
        return "" if other is self else _mean([loss - other.tests[seed] for seed, loss in self.tests.items()], "+")


def read(path: Path) -> dict[str, list[Runs]]:
    """All runs by task, in the order of the file."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tasks = dict.fromkeys(record["run"]["task"] for record in records)
    return {task: _runs([record for record in records if record["run"]["task"] == task]) for task in tasks}


def _runs(records: Sequence[dict[str, Any]]) -> list[Runs]:
    found = []
    for name in dict.fromkeys(record["run"]["method"] for record in records):
        own = [record for record in records if record["run"]["method"] == name]
        searched: dict[float, list[float]] = {}
        for record in own:
            if record["run"]["stage"] == "sweep":
                searched.setdefault(record["run"]["rate"], []).append(record["outcome"]["validation"]["loss"])
        tests = {
            record["run"]["seed"]: record["outcome"]["test"]["loss"]
            for record in own
            if record["run"]["stage"] == "report"
        }
        start, ratio = name.split(", ratio ")
        found.append(Runs(start, ratio, {rate: statistics.mean(searched[rate]) for rate in sorted(searched)}, tests))
    return found


def findings(task: str, runs: Sequence[Runs]) -> list[Finding]:
    """Statements of both papers on pretrained models, on one task."""
    of_start = {start: [each for each in runs if each.start == start] for start in STARTS}
    usual, turned = (of_start[start][0] for start in STARTS)
    ratios = [min(each, key=lambda run: run.least).ratio for each in of_start.values()]
    return [
        Finding(
            f"On the {task}. arXiv:2406.08447: Init[A] takes larger rates than Init[B] (ratio 1)",
            f"best rate {power(usual.best)} and {power(turned.best)}",
            usual.best > turned.best,
        ),
        Finding(
            f"On the {task}. arXiv:2406.08447: Init[A] is better (ratio 1)",
            f"test loss {_mean(list(usual.tests.values()))} and {_mean(list(turned.tests.values()))}; Init[B] less "
            f"Init[A] {turned.apart(usual)}",
            statistics.mean(usual.tests.values()) < statistics.mean(turned.tests.values()),
        ),
        Finding(
            f"On the {task}. arXiv:2402.12354: Init[B] (its Init[2]) wants the larger ratio",
            f"of the search, the best ratio is {ratios[0]} and {ratios[1]}",
            float(ratios[1]) > float(ratios[0]),
        ),
    ]


def tables(task: str, runs: Sequence[Runs]) -> list[Table]:
    """Test losses at the best rates, and validation losses of the search by rate."""
    rates = sorted({rate for each in runs for rate in each.searched})
    same = {each.ratio: each for each in reversed(runs)}
    tests = [
        [
            f"{each.start}, ratio {each.ratio}", power(each.best), _mean(list(each.tests.values())),
            each.apart(runs[0]), each.apart(same[each.ratio]),
        ]
        for each in runs
    ]  # fmt: skip
    search = []
    for each in runs:
        shown = {rate: f"{loss:.4f}" for rate, loss in each.searched.items()}
        shown[each.best] = f"**{shown[each.best]}**"
        search.append([f"{each.start}, ratio {each.ratio}", *(shown.get(rate, "") for rate in rates)])
    first = runs[0]
    return [
        Table(
            f"On the {task} of `finetune.md`, 40 steps: test loss at the best √(η_A η_B), paired differences; "
            f"{len(first.tests)} seeds, ± standard error",
            ("start", "√(η_A η_B)", "test loss", f"to {first.start}, ratio {first.ratio}", "to Init[A] at this ratio"),
            tests,
        ),
        Table(
            f"Mean validation loss of the search on the {task}, by √(η_A η_B)", ("start", *map(power, rates)), search
        ),
    ]


def _mean(values: list[float], sign: str = "") -> str:
    """With the standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{signed(statistics.mean(values), 4) if sign else f'{statistics.mean(values):.4f}'} ± {error:.4f}"

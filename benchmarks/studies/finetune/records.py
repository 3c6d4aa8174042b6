"""The runs that are done, one JSON line each, so that an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from training import Outcome, Score

sys.path.append(str(Path(__file__).parents[2]))  # where the other benchmarks are
from report import processor

SWEEP, PLANE, REPORT = "sweep", "plane", "report"


@dataclass(frozen=True)
class Run:
    """What is run: the key of a record."""

    stage: str
    """`SWEEP`, where rates are chosen, `PLANE`, where A and B have any two rates, or `REPORT`, with fresh seeds."""
    task: str
    method: str
    rate: float
    """On the plane that of A."""
    seed: int
    steps: int
    batch: int
    rate_B: float | None = None
    """On the plane that of B."""


@dataclass(frozen=True)
class Record:
    """A run and what it gave."""

    run: Run
    outcome: Outcome
    seconds: float
    """CPU time of the whole run."""
    machine: dict[str, str]


def machine() -> dict[str, str]:
    """Where and with what."""
    return {"processor": processor("cpu"), "torch": torch.__version__, "Python": platform.python_version()}


def append(path: Path, record: Record) -> None:
    """Add a line to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def _record(plain: dict[str, Any]) -> Record:
    outcome = plain["outcome"]
    outcome["validation"] = Score(**outcome["validation"])
    outcome["test"] = outcome["test"] and Score(**outcome["test"])
    outcome["curve"] = [(step, loss) for step, loss in outcome["curve"]]
    return Record(Run(**plain["run"]), Outcome(**outcome), plain["seconds"], plain["machine"])


def read(path: Path) -> list[Record]:
    """All records of the file, the first of a run that is there twice; none if there is no file."""
    lines: Iterable[str] = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ()
    found: dict[Run, Record] = {}
    for line in lines:
        record = _record(json.loads(line))
        found.setdefault(record.run, record)
    return list(found.values())


def mean_losses(records: Iterable[Record], task: str, method: str) -> dict[float, float]:
    """Mean validation loss at each rate of the sweep, by ascending rate."""
    losses: dict[float, list[float]] = {}
    for record in records:
        if (record.run.stage, record.run.task, record.run.method) == (SWEEP, task, method):
            losses.setdefault(record.run.rate, []).append(record.outcome.validation.loss)
    return {rate: statistics.mean(losses[rate]) for rate in sorted(losses)}

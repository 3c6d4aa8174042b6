"""How the benchmarks measure time: callables timed in turns, and how their seconds spread over the rounds."""

from __future__ import annotations

import argparse
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Clock = Callable[[Call, int], float]
"""Seconds of one call, as the mean over a number of calls."""


def synchronise() -> None:
    """Wait for the GPU, if there is one at work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _cpu_seconds(call: Call, number: int) -> float:
    start = time.process_time()
    for _ in range(number):
        call()
    return (time.process_time() - start) / number


def _wall_seconds(call: Call, number: int) -> float:
    synchronise()
    start = time.perf_counter()
    for _ in range(number):
        call()
    synchronise()
    return (time.perf_counter() - start) / number


def _event_seconds(call: Call, number: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronise()
    start.record()
    for _ in range(number):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / number


CLOCKS: dict[str, Clock] = {"cpu": _cpu_seconds, "wall": _wall_seconds, "events": _event_seconds}
"""CPU time of the process, which other processes disturb least; elapsed time; time between two events on the GPU."""
UNITS: dict[str, Callable[[float], str]] = {
    "s": lambda value: _scaled(value, ((1, "s"), (1e-3, "ms"), (0, "µs")), 1e-6),
    "B": lambda value: _scaled(value, ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (0, "B")), 1),
    "B/s": lambda value: _scaled(value, ((1e9, "GB/s"), (0, "MB/s")), 1e6),
    "FLOP/s": lambda value: _scaled(value, ((1e12, "TFLOP/s"), (0, "GFLOP/s")), 1e9),
    "tokens/s": lambda value: f"{value:,.0f}",
    "norm": lambda value: f"{value:.4g}",
    "s/B": lambda value: f"{value * 1e12:.0f} ms/GB",
    "x": lambda value: f"{value:.3f}",
}
"""How a value in a unit is written; ``x`` is a ratio."""


def _scaled(value: float, steps: tuple[tuple[float, str], ...], smallest: float) -> str:
    size, unit = next((size, unit) for size, unit in steps if abs(value) >= size)
    number = value / (size or smallest)
    return f"{number:,.0f} {unit}" if abs(number) >= 999.5 else f"{number:.3g} {unit}"


@dataclass(frozen=True)
class Spread:
    """The values of one quantity, one for each round; a single value is a quantity that is counted."""

    values: tuple[float, ...]
    unit: str = "s"
    """A key of UNITS."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        first, _, third = statistics.quantiles(self.values, method="inclusive")
        return first, third

    def over(self, floor: Spread) -> Spread:
        """The ratio to another quantity, round by round."""
        return Spread(tuple(a / b for a, b in zip(self.values, floor.values, strict=True)), "x")

    def rate(self, amount: float, unit: str) -> Spread:
        """How much of something is done in a second, if these are the seconds for all of it."""
        return Spread(tuple(amount / seconds for seconds in self.values), unit)

    def per(self, amount: float, unit: str) -> Spread:
        """The part of one of so many."""
        return Spread(tuple(value / amount for value in self.values), unit)

    def __str__(self) -> str:
        write = UNITS[self.unit]
        if len(self.values) == 1 or self.unit != "x":
            return write(self.median)
        first, third = self.quartiles
        return f"{write(self.median)} ({write(first)} - {write(third)})"


def count(value: float, unit: str = "B") -> Spread:
    """A quantity that is counted, not timed."""
    return Spread((float(value),), unit)


@dataclass(frozen=True)
class Task:
    """Something to time."""

    run: Call
    undo: Call
    """What brings back the state before; it is not timed, and such a task runs once in a sample."""


def as_task(task: Task | Call) -> Task:
    """A call without anything to undo is a task too."""
    return task if isinstance(task, Task) else Task(task, lambda: None)


def interleaved(
    tasks: Mapping[str, Task | Call], options: argparse.Namespace, *, clock: str = "", least: float = 0.02
) -> dict[str, Spread]:
    """Seconds of each task, measured in turns, so that what disturbs the machine disturbs all of them.

    Every round takes one sample of each task in a shuffled order, with the garbage collector off. Before the first
    round each task runs twice uncounted (once with ``--short``); the last time decides how often it runs in a sample,
    and quick ones take a whole sample uncounted.

    Args:
        tasks: what to time, by name.
        options: of `options.parse`; the number of rounds and the clock are taken from it.
        clock: a key of CLOCKS, in place of the one in the options.
        least: seconds that a sample should last.
    """
    time_of = CLOCKS[clock or options.clock]
    full = {name: as_task(task) for name, task in tasks.items()}
    numbers = {}
    for name, task in full.items():
        for _ in range(1 if options.short else 2):
            seconds = time_of(task.run, 1)
            task.undo()
        numbers[name] = 1 if isinstance(tasks[name], Task) else max(1, math.ceil(least / max(seconds, 1e-7)))
        if numbers[name] > 1:
            time_of(task.run, numbers[name])
    order, samples = random.Random(0), dict[str, list[float]]({name: [] for name in tasks})
    for _ in range(options.rounds):
        gc.collect()
        gc.disable()
        try:
            for name in order.sample(list(full), len(full)):
                samples[name].append(time_of(full[name].run, numbers[name]))
                full[name].undo()
        finally:
            gc.enable()
    return {name: Spread(tuple(values)) for name, values in samples.items()}

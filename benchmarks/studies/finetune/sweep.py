"""How do ways of fine-tuning compare on real models, each at its own best learning rate, and which rules of thumb hold?

For each method the rate is chosen among the same number of rates, by the mean validation loss over the seeds of the
sweep. The methods are then trained at their rates with fresh seeds and scored on test examples. Every run is kept in a
file of JSON lines and is not repeated; the results page is written from that file.

    python benchmarks/studies/finetune/sweep.py            # runs what is missing, writes benchmarks/results/finetune.md
    python benchmarks/studies/finetune/sweep.py --page     # only writes the page
    python benchmarks/studies/finetune/sweep.py --short    # a quick look in a few minutes, which keeps nothing
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from methods import PLAIN, PROBE
from peft_check import CHECKED, compared, read_checks, write_checks
from plane_page import Plane, draw
from records import PLANE, REPORT, SWEEP, Record, Run, append, machine, mean_losses, read
from results_page import FOLDER, page
from tasks import HEAD_RATE, TASKS, Setting, Task
from training import Outcome, run, score

RESULTS = Path(__file__).parents[2] / "results"


@dataclass(frozen=True)
class Plan:
    """Which seeds are run."""

    sweep: tuple[int, ...] = (0, 1)
    """Where the rates are chosen."""
    plane: tuple[int, ...] = (0,)
    """Where A and B have any two rates."""
    report: tuple[int, ...] = (10, 11, 12, 13, 14)
    """Where the methods are compared."""
    through_peft: tuple[str, ...] = CHECKED
    """Methods that are trained through PEFT's layers too."""
    extra: int = 3
    """By how many rates a grid is extended at most, one at a time, at the end where the best rate lies."""


PLANS = {
    "phonemes": Plan(report=(10, 11, 12), through_peft=()),
    "phonemes, 120 steps": Plan(sweep=(0,), report=(10, 11, 12), through_peft=(), extra=1),
}
"""Tasks whose plan is not the usual one."""


def chosen_rate(records: Iterable[Record], task: str, method: str) -> float:
    """The rate with the least mean validation loss in the sweep."""
    means = mean_losses(records, task, method)
    return min(means, key=means.__getitem__)


def beyond(means: Mapping[float, float]) -> float | None:
    """The rate that follows the best one if that is at an end of the rates, which ascend; None if it is inside."""
    best, rates = min(means, key=means.__getitem__), list(means)
    return {rates[0]: rates[0] ** 2 / rates[1], rates[-1]: rates[-1] ** 2 / rates[-2]}.get(best)


def planned(name: str, setting: Setting, plan: Plan, path: Path) -> Iterator[Run]:
    """The runs of a task, done or not, in the order in which they must be done, as the later ones follow from records.

    First the plane of both rates and the grid, with seeds as the outer loop, so that a sweep which is cut short has all
    methods; then rates beyond the grid's ends; then the probe and the report at the chosen rates.
    """

    def runs(stage: str, method: str, rate: float, seeds: Iterable[int]) -> Iterator[Run]:
        return (Run(stage, name, method, rate, seed, setting.steps, setting.batch) for seed in seeds)

    for seed, rate_A, rate_B in itertools.product(plan.plane if PLAIN in setting.methods else (), *setting.plane):
        yield Run(PLANE, name, PLAIN, rate_A, seed, setting.steps, setting.batch, rate_B)
    for seed in plan.sweep:
        for rate in setting.rates:
            for method, chosen in setting.methods.items():
                yield from runs(SWEEP, method, rate * 2**chosen.octaves, [seed])
    for method, chosen in setting.methods.items():
        # not all recorded ones, so that an interrupted extension is completed
        rates = {rate * 2**chosen.octaves for rate in setting.rates}
        for _ in range(plan.extra):
            means = mean_losses(read(path), name, method)
            further = beyond({rate: loss for rate, loss in means.items() if rate in rates})
            if further is None:
                break
            rates.add(further)
            yield from runs(SWEEP, method, further, plan.sweep)
    yield Run(REPORT, name, PROBE, 0.0, 0, 0, setting.batch)
    for seed in plan.report:
        for method in setting.methods:
            yield from runs(REPORT, method, chosen_rate(read(path), name, method), [seed])


def perform(task: Task, setting: Setting, wanted: Run) -> Record:
    """Do one run; of the probe there is nothing to train."""
    start = time.process_time()
    if wanted.method == PROBE:
        outcome = Outcome(score(task.start, task.validation), score(task.start, task.test), [], 0.0)
    else:
        method, rate = setting.methods[wanted.method], wanted.rate
        if wanted.rate_B is not None:
            method = replace(method, lr_ratio=wanted.rate_B / rate, head_rate=HEAD_RATE)
            rate = math.sqrt(rate * wanted.rate_B)
        outcome = run(task, setting, method, rate, wanted.seed, whole=wanted.stage == REPORT)
    return Record(wanted, outcome, time.process_time() - start, machine())


def sweep(name: str, setting: Setting, plan: Plan, path: Path) -> None:
    """Do the runs of a task that are not in the file yet, and the comparison with PEFT.

    Args:
        name: of the task.
        setting: the task.
        plan: the seeds.
        path: the file of all runs; the comparison lies beside it.
    """
    done, task = {record.run for record in read(path)}, None
    for wanted in planned(name, setting, plan, path):
        if wanted not in done:
            task = task or setting.load(*setting.sizes)
            record = perform(task, setting, wanted)
            append(path, record)
            print(f"{wanted}: validation loss {record.outcome.validation.loss:.4f}, {record.seconds:.0f} s", flush=True)
    checked = {(check.task, check.method) for check in read_checks(beside(path))}
    for method in plan.through_peft:
        if method in setting.methods and (name, method) not in checked:
            task = task or setting.load(*setting.sizes)
            rate = chosen_rate(read(path), name, method)
            check = compared(name, task, setting, method, rate, plan.report[0])
            write_checks(beside(path), [*read_checks(beside(path)), check])
            print(f"{method} on {name}: within {check.difference:.1e} of PEFT", flush=True)


def beside(path: Path) -> Path:
    """Where the comparison with PEFT is kept."""
    return path.with_suffix(".peft.json")


def write_page(settings: Mapping[str, Setting], path: Path) -> Path:
    """Write the results page and its picture beside the file of all runs; the page's path."""
    out, records = path.with_suffix(".md"), read(path)
    out.write_text(page(settings, records, read_checks(beside(path))), encoding="utf-8")
    planes = {name: Plane.of([record for record in records if record.run.task == name]) for name in settings}
    if shown := {name: plane for name, plane in planes.items() if plane.losses}:
        draw(shown, path.with_name(FOLDER))
    return out


def short(setting: Setting) -> Setting:
    """The same task with few examples, steps and rates."""
    middle = len(setting.rates) // 2
    rates, plane = setting.rates[middle - 1 : middle + 1], (setting.plane[0][:2], setting.plane[1][:2])
    return replace(setting, sizes=(300, 60, 60), steps=6, rates=rates, plane=plane)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="only these methods; the plane is LoRA's")
    parser.add_argument("--runs", type=Path, default=RESULTS / "finetune.jsonl", help="the file of all runs")
    parser.add_argument("--page", action="store_true", help="write the page from the runs that are there")
    parser.add_argument("--short", action="store_true", help="few examples, steps, rates and seeds; prints the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.short:
        with tempfile.TemporaryDirectory() as folder:
            small = {name: short(TASKS[name]) for name in options.tasks}
            runs = Path(folder, "runs.jsonl")
            for name, setting in small.items():
                sweep(name, setting, Plan(sweep=(0,), report=(10,), extra=0), runs)
            print(write_page(small, runs).read_text(encoding="utf-8"))
        return
    for name in () if options.page else options.tasks:
        setting = TASKS[name]
        wanted = {key: method for key, method in setting.methods.items() if key in (options.methods or setting.methods)}
        sweep(name, replace(setting, methods=wanted), PLANS.get(name, Plan()), options.runs)
    print(f"written to {write_page(TASKS, options.runs)}")


if __name__ == "__main__":
    main()

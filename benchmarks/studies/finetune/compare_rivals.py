"""How do the rivals of a ratio compare with LoRA and LoRA+ on real models, where each has the same number of trials?

Each method has a setting besides its rate: LoRA+ the ratio, the others what their papers leave open. LoRA has none, and
tries its rate in half of the others' steps. The pair with the least mean validation loss over the seeds of the search
is trained with fresh seeds and scored on test examples. Every run is kept and is not repeated; the search of LoRA and
LoRA+ begins with the runs of `finetune.jsonl`.

    python benchmarks/studies/finetune/compare_rivals.py            # runs what is missing, writes results/rivals.md
    python benchmarks/studies/finetune/compare_rivals.py --page     # only writes the page
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from methods import Method
from records import REPORT, SWEEP, Record, Run, append, machine, mean_losses, read
from rivals import Muon, Riemannian, Rite, under_adamw
from rivals_page import page
from sweep import RESULTS, Plan, beyond
from tasks import TASKS, Setting, Task, octaves
from training import run

PLAIN = "LoRA"


@dataclass(frozen=True)
class Rival:
    """What is tried of one method."""

    settings: Mapping[str, Method]
    """What is tried besides the rate, by the name that its runs have."""
    rates: Mapping[str, tuple[float, ...]]
    """By task, in ascending order; all of them with each setting."""
    own_unit: bool = False
    """Whether its steps are no AdamW's, so that the head learns at the rate of tuned LoRA, and not at its own."""


def halves(lowest: int, highest: int) -> tuple[float, ...]:
    """Two rates for each octave."""
    return tuple(rate * factor for rate in octaves(lowest, highest) for factor in (0.5**0.5, 1.0))


def _riemannian(damping: float) -> Method:
    return Method(optimizer=under_adamw(partial(Riemannian, damping), whole=False))


def _rite(beta: float) -> Method:
    return Method(optimizer=under_adamw(partial(Rite, (0.9, beta)), whole=True))


def _muon(beta: float) -> Method:
    return Method(optimizer=under_adamw(partial(Muon, beta), whole=True))


RIVALS: dict[str, Rival] = {
    PLAIN: Rival({PLAIN: Method()}, {"glosses": halves(-12, -8), "digits": halves(-11, -7)}),
    "LoRA+": Rival(
        {f"LoRA+, ratio {ratio}": Method(lr_ratio=ratio) for ratio in (4, 8)},
        {"glosses": octaves(-12, -8), "digits": octaves(-11, -7)},
    ),
    "Riemannian": Rival(
        {f"Riemannian, d = {damping:g}": _riemannian(damping) for damping in (1e-6, 1e-2)},
        {"glosses": octaves(-12, -8), "digits": octaves(-14, -10)},
    ),
    "LoRA-RITE": Rival(
        {f"LoRA-RITE, β2 = {beta:g}": _rite(beta) for beta in (0.99, 0.999)},
        {"glosses": octaves(-14, -10), "digits": octaves(-16, -12)},
        own_unit=True,
    ),
    "LoRA-Muon": Rival(
        {f"LoRA-Muon, β = {beta:g}": _muon(beta) for beta in (0.9, 0.95)},
        {"glosses": octaves(-10, -6), "digits": octaves(-12, -8)},
        own_unit=True,
    ),
}
"""By name. The rates are about those that runs with seed 100 liked."""


def chosen(records: Sequence[Record], task: str, rival: Rival) -> tuple[str, float]:
    """The setting and the rate with the least mean validation loss in the search."""
    means = {
        (setting, rate): loss
        for setting in rival.settings
        for rate, loss in mean_losses(records, task, setting).items()
    }
    return min(means, key=means.__getitem__)


Rivals = Mapping[str, Rival]


def planned(task: str, setting: Setting, plan: Plan, path: Path, rivals: Rivals = RIVALS) -> Iterator[Run]:
    """The runs of a task, done or not, in the order in which they must be done: the later ones follow from records.

    The first method is searched first, as others take the head's rate from it. Where the best rate of a setting is at
    an end of the rates, further ones are tried.
    """
    for rival in rivals.values():
        for name in rival.settings:
            rates = set(rival.rates[task])
            for further in range(plan.extra + 1):
                for rate in sorted(rates):
                    for seed in plan.sweep:
                        yield Run(SWEEP, task, name, rate, seed, setting.steps, setting.batch)
                means = mean_losses(read(path), task, name)
                end = beyond({rate: loss for rate, loss in means.items() if rate in rates})
                if end is None or further == plan.extra:
                    break
                rates.add(end)
    for seed in plan.report:
        for rival in rivals.values():
            name, rate = chosen(read(path), task, rival)
            yield Run(REPORT, task, name, rate, seed, setting.steps, setting.batch)


def method_of(records: Sequence[Record], wanted: Run, rivals: Rivals = RIVALS) -> Method:
    """How a run is trained, with the head's rate."""
    rival = next(rival for rival in rivals.values() if wanted.method in rival.settings)
    method = rival.settings[wanted.method]
    if not rival.own_unit:
        return method
    return replace(method, head_rate=chosen(records, wanted.task, next(iter(rivals.values())))[1])


Perform = Callable[[Run, Method], Record]


def performer(setting: Setting) -> Perform:
    """What does a run of a task, which is loaded when the first one is wanted."""
    loaded: list[Task] = []

    def perform(wanted: Run, method: Method) -> Record:
        if not loaded:
            loaded.append(setting.load(*setting.sizes))
        start = time.process_time()
        outcome = run(loaded[0], setting, method, wanted.rate, wanted.seed, whole=wanted.stage == REPORT)
        return Record(wanted, outcome, time.process_time() - start, machine())

    return perform


def search(task: str, setting: Setting, plan: Plan, path: Path, perform: Perform, rivals: Rivals = RIVALS) -> None:
    """Do the runs of a task that are not in the file yet."""
    done = {record.run for record in read(path)}
    for wanted in planned(task, setting, plan, path, rivals):
        if wanted not in done:
            record = perform(wanted, method_of(read(path), wanted, rivals))
            append(path, record)
            done.add(wanted)
            print(f"{wanted}: validation loss {record.outcome.validation.loss:.4f}, {record.seconds:.0f} s", flush=True)


def tried(tasks: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """By task and by name of a method, the names that its runs have."""
    return {task: {name: list(rival.settings) for name, rival in RIVALS.items()} for task in tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["glosses", "digits"])
    parser.add_argument("--runs", type=Path, default=RESULTS / "rivals.jsonl", help="the file of all runs")
    parser.add_argument("--page", action="store_true", help="write the page from the runs that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in () if options.page else options.tasks:
        search(name, TASKS[name], Plan(), options.runs, performer(TASKS[name]))
    out = options.runs.with_suffix(".md")
    out.write_text(page(TASKS, tried(options.tasks), read(options.runs)), encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()

"""What does a sweep over many candidates cost side by side, one after the other, and in processes of their own?

Every way trains the same candidates on the same batches and must end at the same losses. Each is run in fresh
processes, whose CPU times and peak memories are added up (memories of as many as run at a time), imports included.
"wall" is measured around all processes; where there is one, after its imports. On a GPU the peak is its allocator's.

    python benchmarks/sweep_cost.py --model mlp-gelu llama --tokens 4x32 --steps 4
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import workloads
from measuring import count
from options import common_parser, parse
from report import Cell, Report, versions
from torch import Tensor, nn

import lora_plus

CANDIDATES = lora_plus.grid(lr=[1e-4, 3e-4, 1e-3, 3e-3], lr_ratio=[1, 4], r=[4, 8])


@dataclass(frozen=True)
class Cost:
    """Of one process, or of several."""

    losses: tuple[float, ...]
    """The loss of each candidate in the last step."""
    wall: float
    cpu: float
    peak: int


class Setting(NamedTuple):
    """What is trained; the same in every process."""

    model: nn.Module
    targets: tuple[str, ...]
    loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]
    """Of each sample."""
    batches: list[tuple[Tensor, Tensor]]


def setting(name: str, options: argparse.Namespace) -> Setting:
    """The model with random targets near its own outputs."""
    torch.manual_seed(0)
    workload, model, _ = workloads.prepared(name, options.dtype[0], options)
    where = {"device": options.device, "dtype": next(model.parameters()).dtype}
    sizes = options.tokens or workload.tokens
    batches = []
    for _ in range(options.steps):
        x = workload.input(*sizes).to(**where)
        with torch.no_grad():
            y = workload.output(model, x)
        batches.append((x, y + 0.1 * torch.randn_like(y).cumsum(-1)))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (workload.output(model, batch[0]) - batch[1]).square().flatten(1).mean(1)

    return Setting(model, workload.targets, loss, batches)


def side_by_side(together: int, given: Setting) -> list[float]:
    """A sweep."""
    running = lora_plus.Sweep(given.model, given.targets, CANDIDATES, given.loss, together=together)
    for batch in given.batches:
        losses = running.step(batch)
    return list(losses.values())


def one_by_one(candidates: list[lora_plus.Candidate], given: Setting) -> list[float]:
    """Plain training loops, the adapter being removed after each."""
    last, model = [], given.model
    for candidate in candidates:
        generator = torch.Generator().manual_seed(candidate.seed)
        lora_plus.inject_lora(model, given.targets, r=candidate.r, alpha=candidate.alpha, generator=generator)
        optimizer = lora_plus.create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=candidate.lr, lr_ratio=candidate.lr_ratio
        )
        for batch in given.batches:
            mean = given.loss(model, batch).mean()
            optimizer.zero_grad()
            mean.backward()
            optimizer.step()
        last.append(mean.item())
        lora_plus.remove_lora(model)
    return last


Train = Callable[[Setting], list[float]]


def alone(train: Train, name: str, options: argparse.Namespace) -> Cost:
    """What training costs, if it is all that this process does."""
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    losses = train(setting(name, options))
    wall = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.device(options.device).type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return Cost(tuple(losses), wall, time.process_time(), peak)


def in_processes(trains: list[Train], name: str, options: argparse.Namespace) -> Cost:
    """The cost of running each in a process of its own, as many at a time as asked for."""
    workers = min(len(trains), options.processes)
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        costs = pool.starmap(alone, [(train, name, options) for train in trains], chunksize=1)
    wall = time.perf_counter() - start if len(trains) > 1 else costs[0].wall
    return Cost(
        tuple(loss for cost in costs for loss in cost.losses),
        wall,
        sum(cost.cpu for cost in costs),
        sum(sorted((cost.peak for cost in costs), reverse=True)[:workers]),
    )


def ways(options: argparse.Namespace) -> dict[str, list[Train]]:
    """What each process trains, by the name of the way."""
    return {
        "one after the other": [partial(one_by_one, CANDIDATES)],
        f"a process each, {options.processes} at a time": [partial(one_by_one, [each]) for each in CANDIDATES],
        **{f"sweep, {n} together": [partial(side_by_side, n)] for n in options.together},
    }


def compare(name: str, options: argparse.Namespace) -> list[list[Cell]]:
    """A row for each way."""
    costs = {way: in_processes(trains, name, options) for way, trains in ways(options).items()}
    floor = next(iter(costs.values()))
    return [
        [way, count(cost.wall, "s"), count(cost.cpu, "s"), count(cost.peak, "B"),
         count(cost.wall / floor.wall, "x"), count(cost.peak / floor.peak, "x"),
         f"{min(cost.losses):.6g} ... {max(cost.losses):.6g}",
         f"{max(abs(a / b - 1) for a, b in zip(cost.losses, floor.losses, strict=True)):.1e}"]
        for way, cost in costs.items()
    ]  # fmt: skip


COLUMNS = ("way", "wall", "CPU", "peak", "wall / first", "peak / first", "last losses", "losses off by")


def main() -> None:
    parser = common_parser(__doc__)
    workloads.add_options(parser, "mlp-gelu", "llama")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--together", type=int, nargs="+", default=[16, 4, 1], help="candidates at once in a sweep")
    parser.add_argument("--processes", type=int, default=2, help="at a time")
    parser.add_argument("--append", type=Path, help="append the tables to this Markdown file")
    options = parse(parser, tokens=(2, 16), steps=3, model=["mlp-gelu"])
    report = Report(__doc__, options)
    for name in options.model:
        samples, tokens = options.tokens or workloads.WORKLOADS[name](options).tokens
        work = f"{options.steps} steps of {samples} x {tokens} tokens"
        title = f"{name}, {len(CANDIDATES)} candidates, {work}, {options.dtype[0]}"
        report.table(title, COLUMNS, compare(name, options), drawn=("wall / first", "peak / first"))
    report.close()
    if options.append:
        with options.append.open("a") as file:
            file.write(markdown(report))


def markdown(report: Report) -> str:
    """The tables, and what they were measured with."""
    facts = report.facts
    with_versions = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [f"## {facts['date']}", "", f"`{facts['command']}`: {facts['processor']}, {with_versions}."]
    for table in report.tables:
        rows = [table.columns, ["---"] * len(table.columns), *table.rows]
        lines += ["", f"**{table.title}**", "", *(f"| {' | '.join(map(str, row))} |" for row in rows)]
    return "\n".join([*lines, "", ""])


if __name__ == "__main__":
    main()

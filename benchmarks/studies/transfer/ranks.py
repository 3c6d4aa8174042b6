"""Does the best rate follow g * sqrt(r * s) on pretrained models, and what does a transferred rate cost?

For each rank, scale and ratio the best geometric mean g of the rates of A and B is looked for: the mean validation
loss over the seeds at rates an octave apart, and the minimum of the parabola through the best one and its neighbours.
Then each setting's best rate is carried to every other one by `transfer_lr`, and the loss there is compared with that
of the search. The head stays the linear probe that all start from. Every run is kept in a file of JSON lines and is
not repeated; the page is written from that file.

    python benchmarks/studies/transfer/ranks.py            # runs what is missing, writes benchmarks/results/transfer.md
    python benchmarks/studies/transfer/ranks.py --page     # only writes the page
    python benchmarks/studies/transfer/ranks.py --short    # a quick look in a minute, which keeps nothing
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "finetune"))  # the tasks and how they are trained
from tasks import TASKS, Setting, Task
from training import score, train

import lora_plus

RESULTS = Path(__file__).parents[2] / "results"
RANKS = (2, 8, 32, 128)
SCALES: dict[str, Callable[[int], float]] = {
    "16/r": lambda r: 16 / r,
    "8/√r": lambda r: 8 / math.sqrt(r),
    "2": lambda r: 2.0,
}
"""How the scale depends on the rank: `alpha / r`, `alpha / sqrt(r)`, and fixed."""
EXPONENTS = {"16/r": 0.0, "8/√r": -0.25, "2": -0.5}
"""By which power of the rank the best rate goes, by the rule."""
RATIOS = (1, 8)
SEEDS = (0, 1, 2)
OCTAVES = (-3, -2, -1, 0, 1, 2, 3)
"""The rates that are tried, in octaves from `CENTRE` over sqrt(r * s)."""
CENTRE = 2.0**-8
"""g * sqrt(r * s) in the middle of the grid."""
EXTRA = 3
"""By how many octaves a grid is extended at most, at the end where the best rate lies."""


@dataclass(frozen=True)
class Point:
    """An adapter and its ratio, whose best rate is looked for."""

    r: int
    scale: str
    ratio: int

    @property
    def alpha(self) -> float:
        return SCALES[self.scale](self.r) * self.r

    def settings(self) -> dict[str, Any]:
        """As `transfer_lr` takes them."""
        return {"r": self.r, "alpha": self.alpha, "lr_ratio": self.ratio, "lr_mode": "geometric"}

    def rate(self, octave: float) -> float:
        """The geometric mean of both rates, so many octaves from the centre."""
        return CENTRE * 2.0**octave / math.sqrt(self.alpha)


POINTS = tuple(Point(*each) for each in itertools.product(RANKS, SCALES, RATIOS))


@dataclass(frozen=True)
class Run:
    """The key of a record."""

    task: str
    point: Point
    octave: int
    seed: int


@dataclass(frozen=True)
class Record:
    """A run, its validation loss, and its CPU time."""

    run: Run
    loss: float
    seconds: float


def read(path: Path) -> list[Record]:
    """All records of the file; none if there is no file."""
    if not path.is_file():
        return []
    plain = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [
        Record(Run(**{**each["run"], "point": Point(**each["run"]["point"])}), each["loss"], each["seconds"])
        for each in plain
    ]


def perform(task: Task, setting: Setting, wanted: Run) -> Record:
    """Train an adapter at its rate; the head and all else stay as they are."""
    start, point = time.process_time(), wanted.point
    model = lora_plus.inject_lora(
        task.model(),
        setting.targets,
        r=point.r,
        alpha=point.alpha,
        generator=torch.Generator().manual_seed(wanted.seed),
    )
    optimizer = lora_plus.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=point.rate(wanted.octave), lr_ratio=point.ratio, lr_mode="geometric"
    )
    for _ in train(model, optimizer, task, setting, wanted.seed):
        pass
    return Record(wanted, score(model, task.validation).loss, time.process_time() - start)


def planned(
    name: str, points: Sequence[Point], seeds: Sequence[int], records: Callable[[], list[Record]]
) -> Iterator[Run]:
    """The grid, seeds as the outer loop; then octaves beyond its ends, which follow from the records."""
    for seed, octave, point in itertools.product(seeds, OCTAVES, points):
        yield Run(name, point, octave, seed)
    for point in points:
        for _ in range(EXTRA):
            losses = mean_losses(records(), name, point)
            best = min(losses, key=losses.__getitem__)
            ends = {min(losses): min(losses) - 1, max(losses): max(losses) + 1}
            if best not in ends:
                break
            yield from (Run(name, point, ends[best], seed) for seed in seeds)


def mean_losses(
    records: Iterable[Record], task: str, point: Point, seeds: Iterable[int] | None = None
) -> dict[int, float]:
    """Mean validation loss by octave, in ascending order."""
    chosen, losses = None if seeds is None else set(seeds), dict[int, list[float]]()
    for record in records:
        run = record.run
        if (run.task, run.point) == (task, point) and (chosen is None or run.seed in chosen):
            losses.setdefault(run.octave, []).append(record.loss)
    return {octave: statistics.mean(losses[octave]) for octave in sorted(losses)}


@dataclass(frozen=True)
class Best:
    """The minimum of a parabola through the best octave and its neighbours."""

    octave: float
    loss: float
    at_end: bool
    """Whether the best octave is the first or the last one, so that there is no parabola."""


def best_of(losses: Mapping[int, float]) -> Best:
    """Where the loss is least."""
    middle = min(losses, key=losses.__getitem__)
    if middle - 1 not in losses or middle + 1 not in losses:
        return Best(middle, losses[middle], True)
    left, here, right = losses[middle - 1], losses[middle], losses[middle + 1]
    bend = left - 2 * here + right
    shift = 0.0 if bend <= 0 else (left - right) / (2 * bend)
    return Best(middle + shift, here - (left - right) * shift / 4, False)


def loss_at(losses: Mapping[int, float], octave: float) -> float:
    """The loss between two tried octaves, linear in the octave; outside of them that of the nearest."""
    octave = min(max(octave, min(losses)), max(losses))
    below = min(math.floor(octave), max(losses) - 1)
    share = octave - below
    return (1 - share) * losses[below] + share * losses[below + 1]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line that fits best."""
    xs, ys = zip(*points, strict=True)
    return statistics.linear_regression(xs, ys).slope


def transferred_octave(source: Point, octave: float, target: Point) -> float:
    """Where in the target's grid the source's rate comes to lie."""
    rate = lora_plus.transfer_lr(source.rate(octave), source.settings(), target.settings())
    return math.log2(rate / target.rate(0))


def section(name: str, setting: Setting, records: Sequence[Record], points: Sequence[Point], start: float) -> list[str]:
    """The part of the page for one task."""
    own = [record for record in records if record.run.task == name]
    seeds = sorted({record.run.seed for record in own})
    losses = {point: mean_losses(own, name, point) for point in points}
    best = {point: best_of(each) for point, each in losses.items()}
    apart = {point: [best_of(mean_losses(own, name, point, [seed])).octave for seed in seeds] for point in points}
    lines = [
        f"## {name.capitalize()}",
        "",
        setting.words,
        "",
        f"{setting.steps} steps of {setting.batch}; {len(own)} runs, {sum(each.seconds for each in own) / 60:.0f} CPU "
        f"minutes, seeds {', '.join(map(str, seeds))}. The linear probe alone: {start:.4f}.",
        "",
        "Best g, the lowest and highest of single seeds in brackets, the mean validation loss there, and g·√(r·s):",
        "",
        "| scale | ratio | r | best g | loss | g·√(r·s) |",
        "|---|---|---|---|---|---|",
    ]
    for point in points:
        found = best[point]
        octaves = (found.octave, min(apart[point]), max(apart[point]))
        g, low, high = (point.rate(octave) for octave in octaves)
        mark = " (end of the grid)" if found.at_end else ""
        lines.append(
            f"| {point.scale} | {point.ratio} | {point.r} | {g:.2e} ({low:.1e} - {high:.1e}){mark} | {found.loss:.4f} "
            f"| {g * math.sqrt(point.alpha):.2e} |"
        )
    lines += [
        "",
        "Exponent of the best g in r:",
        "",
        "| scale | ratio | all ranks | from r = 8 | the rule |",
        "|---|---|---|---|---|",
    ]
    for scale, ratio in itertools.product(SCALES, RATIOS):
        line = [point for point in points if (point.scale, point.ratio) == (scale, ratio)]
        logs = [(math.log2(point.r), math.log2(point.rate(best[point].octave))) for point in line]
        if len(logs) > 2:
            lines.append(
                f"| {scale} | {ratio} | {slope(logs):+.2f} | {slope(logs[1:]):+.2f} | {EXPONENTS[scale]:+.2f} |"
            )
    costs = {
        (source, target): loss_at(losses[target], transferred_octave(source, best[source].octave, target))
        - min(losses[target].values())
        for source, target in itertools.permutations(points, 2)
    }
    gained = {point: start - min(losses[point].values()) for point in points}
    lines += [
        "",
        "A transferred rate instead of a search, over all pairs of settings: what it adds to the loss, and as a share "
        "of what the search takes off the probe's loss. *Same* keeps g as it is.",
        "",
        "| from r | median | worst | median share | worst share | same g: median share | worst share |",
        "|---|---|---|---|---|---|---|",
    ]
    same = {
        (source, target): loss_at(losses[target], math.log2(source.rate(best[source].octave) / target.rate(0)))
        - min(losses[target].values())
        for source, target in costs
    }
    for chosen in ("all", *sorted({point.r for point in points})):
        pairs = [pair for pair in costs if chosen in ("all", pair[0].r)]
        own_costs = [costs[pair] for pair in pairs]
        shares = [costs[pair] / gained[pair[1]] for pair in pairs]
        kept = [same[pair] / gained[pair[1]] for pair in pairs]
        lines.append(
            f"| {chosen} | {statistics.median(own_costs):.4f} | {max(own_costs):.4f} | {statistics.median(shares):.1%} "
            f"| {max(shares):.1%} | {statistics.median(kept):.1%} | {max(kept):.1%} |"
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["glosses"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--runs", type=Path, default=RESULTS / "transfer.jsonl", help="the file of all runs")
    parser.add_argument("--page", action="store_true", help="write the page from the runs that are there")
    parser.add_argument("--short", action="store_true", help="few examples, steps and settings; prints the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        points, seeds, path = POINTS, options.seeds, options.runs
        settings = {name: TASKS[name] for name in options.tasks}
        if options.short:
            points, seeds, path = POINTS[:: len(POINTS) // 4], [0], Path(folder, "transfer.jsonl")
            settings = {name: replace(each, sizes=(300, 60, 60), steps=6) for name, each in settings.items()}
        lines = [HEAD]
        for name, setting in settings.items():
            task = setting.load(*setting.sizes)
            if not options.page:
                do(name, task, setting, points, seeds, path)
            lines += section(name, setting, read(path), points, score(task.start, task.validation).loss)
        if options.short:
            print("\n".join(lines))
        else:
            path.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
            print(f"written to {path.with_suffix('.md')}")


def do(name: str, task: Task, setting: Setting, points: Sequence[Point], seeds: Sequence[int], path: Path) -> None:
    """The runs that are not in the file yet."""
    done = {record.run for record in read(path)}
    for wanted in planned(name, points, seeds, lambda: read(path)):
        if wanted in done:
            continue
        record = perform(task, setting, wanted)
        done.add(wanted)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")


HEAD = """# Does a tuned rate transfer? The rule g·√(r·s) on pretrained models

`python benchmarks/studies/transfer/ranks.py` does the runs, keeps each in `transfer.jsonl`, and writes this page. g is
the geometric mean of the rates of A and B, s the scale of B A. AdamW without decay, rates that fall linearly to zero,
the same batches for the same seed. The head is the linear probe and stays as it is. The best g is the minimum of a
parabola through the best of rates an octave apart and its neighbours, of the mean over the seeds.
"""

if __name__ == "__main__":
    main()

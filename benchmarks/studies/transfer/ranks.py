"""Does the best rate follow g * sqrt(r * s), on a toy and on pretrained models, and what does a transferred rate cost?

For each rank, scale and ratio the best geometric mean g of the rates of A and B is looked for: the mean validation
loss over the seeds at rates an octave apart, and the minimum of the parabola through the best one and its neighbours.
Then each setting's best rate is carried to every other one by `transfer_lr`, and the loss there is compared with that
of the search. Every run is kept in a file of JSON lines and is not repeated; the page is written from that file.

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
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from subjects import SUBJECTS, Rates, Subject

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
"""The rates that are tried, in octaves from the middle of the grid, at the same g * sqrt(r * s) for all settings."""
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

    def rate(self, centre: float, octave: float) -> float:
        """The geometric mean of both rates, so many octaves from the middle of the grid."""
        return centre * 2.0**octave / math.sqrt(self.alpha)


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
    rate = lora_plus.transfer_lr(source.rate(1.0, octave), source.settings(), target.settings())
    return math.log2(rate / target.rate(1.0, 0))


def same_octave(source: Point, octave: float, target: Point) -> float:
    """Where in the target's grid the source's rate lies as it is."""
    return math.log2(source.rate(1.0, octave) / target.rate(1.0, 0))


def section(
    name: str, subject: Subject, records: Sequence[Record], points: Sequence[Point], centre: float
) -> list[str]:
    """The part of the page for one subject."""
    own = [record for record in records if record.run.task == name]
    seeds = sorted({record.run.seed for record in own})
    losses = {point: mean_losses(own, name, point) for point in points}
    best = {point: best_of(each) for point, each in losses.items()}
    rows = []
    for point in points:
        apart = [best_of(mean_losses(own, name, point, [seed])).octave for seed in seeds]
        g, low, high = (point.rate(centre, octave) for octave in (best[point].octave, min(apart), max(apart)))
        mark = " (end of the grid)" if best[point].at_end else ""
        kept = g * math.sqrt(point.alpha)
        rows.append(
            (point.scale, point.ratio, point.r, f"{g:.2e} ({low:.1e} - {high:.1e}){mark}", f"{kept:.2e}",
             f"{best[point].loss:.4f}")
        )  # fmt: skip
    slopes = []
    for scale, ratio in itertools.product(SCALES, RATIOS):
        line = [point for point in points if (point.scale, point.ratio) == (scale, ratio)]
        logs = [(math.log2(point.r), math.log2(point.rate(centre, best[point].octave))) for point in line]
        if len(logs) > 2:
            slopes.append((scale, ratio, f"{slope(logs):+.2f}", f"{slope(logs[1:]):+.2f}", f"{EXPONENTS[scale]:+.2f}"))
    minutes = sum(each.seconds for each in own) / 60
    return [
        f"## {name.capitalize()}",
        "",
        f"{subject.words} {len(own)} runs, {minutes:.0f} CPU minutes, seeds {', '.join(map(str, seeds))}. Before "
        f"training the loss is {subject.start:.4f}.",
        "",
        "Best g, with the lowest and highest of single seeds, and the mean loss there:",
        "",
        *table(("scale", "ratio", "r", "best g", "g·√(r·s)", "loss"), rows),
        "Exponent of the best g in r:",
        "",
        *table(("scale", "ratio", "all ranks", "without the lowest", "the rule"), slopes),
        "A rate from another setting instead of a search, over all pairs of settings. *Times*: its loss divided by "
        "that of the best rate of the grid. *Share*: the part of the search's improvement of the loss that it loses.",
        "",
        *table(
            ("from r", "the rate", "times: median", "worst", "share: median", "worst"),
            list(costs(losses, best, subject.start)),
        ),
    ]


def costs(
    losses: Mapping[Point, Mapping[int, float]], best: Mapping[Point, Best], start: float
) -> Iterator[tuple[object, ...]]:
    """What a rate from another setting costs, by the rank it comes from, transferred and as it was."""
    for chosen in ("all", *sorted({point.r for point in losses})):
        for words, carried in (("transferred", transferred_octave), ("as it is", same_octave)):
            times, shares = [], []
            for source, target in itertools.permutations(losses, 2):
                if chosen in ("all", source.r):
                    loss = loss_at(losses[target], carried(source, best[source].octave, target))
                    least = min(losses[target].values())
                    times.append(loss / least)
                    shares.append((loss - least) / (start - least))
            yield (
                chosen, words, f"{statistics.median(times):.3f}", f"{max(times):.3f}",
                f"{statistics.median(shares):.1%}", f"{max(shares):.1%}",
            )  # fmt: skip


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """In Markdown, with an empty line after it."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [*(f"| {' | '.join(map(str, line))} |" for line in lines), ""]


HEAD = """# Does a tuned rate transfer? The rule g·√(r·s), on a toy and on pretrained models

`python benchmarks/studies/transfer/ranks.py` does the runs, saves each in `transfer.jsonl`, and writes this page.

g is the geometric mean of the rates of A and B, s the scale of B A. Training uses AdamW without decay, rates that fall
linearly to zero, and the same batches for the same seed. To find the best g, rates an octave apart are tried, and a
parabola is put through the losses of the best rate and its two neighbours, each the mean over the seeds. The best g is
its minimum.
"""


def do(name: str, subject: Subject, points: Sequence[Point], seeds: Sequence[int], centre: float, path: Path) -> None:
    """The runs that are not in the file yet."""
    done = {record.run for record in read(path)}
    for wanted in planned(name, points, seeds, lambda: read(path)):
        if wanted in done:
            continue
        start, point = time.process_time(), wanted.point
        loss = subject.run(Rates(point.r, point.alpha, point.rate(centre, wanted.octave), point.ratio), wanted.seed)
        done.add(wanted)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(Record(wanted, loss, time.process_time() - start))) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=["toy", "glosses"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--runs", type=Path, default=RESULTS / "transfer.jsonl", help="the file of all runs")
    parser.add_argument("--page", action="store_true", help="write the page from the runs that are there")
    parser.add_argument("--short", action="store_true", help="few examples, steps and settings; prints the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        points, seeds, path = POINTS, options.seeds, options.runs
        if options.short:
            points, seeds, path = POINTS[:: len(SCALES) * len(RATIOS)], [0], Path(folder, "transfer.jsonl")
        lines = [HEAD]
        for name in options.subjects:
            plan = SUBJECTS[name]
            subject = plan.load(options.short)
            if not options.page:
                do(name, subject, points, seeds, plan.centre, path)
            lines += section(name, subject, read(path), points, plan.centre)
        if left := [name for name in SUBJECTS if name not in options.subjects]:
            lines.append(f"Not in this page: {', '.join(left)}.\n")
        page = "\n".join(lines)
        if options.short:
            print(page)
            return
        path.with_suffix(".md").write_text(page, encoding="utf-8")
        print(f"written to {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()

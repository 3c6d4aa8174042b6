"""What does merging cost beside copying the same weights, here and in PEFT?

The floor is a copy of every weight into fresh memory, which any merge that keeps the original has to do. A model has as
many layers of one shape as make ``--mebibytes``. "Peak" and "kept" are the bytes that a merge takes up beyond the
model, at most and afterwards, over those of the weights: lora_plus keeps the original beside the merged weight, PEFT
adds in place and subtracts again. lora_plus and "peft, safe" check that the result is finite.

    python benchmarks/merge.py --dtype float32 bfloat16
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from allocations import memory
from measuring import Task, interleaved
from options import DTYPES, common_parser, parse
from peers import build
from report import Cell, Report
from torch import nn
from workloads import sizes

import lora_plus

SHAPES = ((576, 576), (1536, 576), (4096, 4096), (4096, 14336))
MERGES: dict[str, tuple[str, Callable[[Any], object], Callable[[Any], object]]] = {
    "lora_plus": ("lora_plus", lora_plus.merge_lora, lora_plus.unmerge_lora),
    "peft": ("peft", lambda model: model.merge_adapter(), lambda model: model.unmerge_adapter()),
    "peft, safe": ("peft", lambda model: model.merge_adapter(safe_merge=True), lambda model: model.unmerge_adapter()),
}
"""The peer, how it merges, how it takes that back."""


def compare(shape: tuple[int, int], dtype: str, r: int, options: argparse.Namespace) -> list[list[Cell]]:
    """A row for each way of merging, and of taking the merge back."""
    outputs, inputs = shape
    size = outputs * inputs * DTYPES[dtype].itemsize
    where: Any = {"device": options.device, "dtype": DTYPES[dtype]}
    layers = [nn.Linear(inputs, outputs, bias=False, **where) for _ in range(max(1, options.mebibytes * 2**20 // size))]
    model, total = nn.Sequential(*layers), len(layers) * size
    targets, weights = tuple(map(str, range(len(layers)))), [layer.weight.detach() for layer in layers]
    tasks = {"clone": Task(lambda: [weight.clone() for weight in weights], lambda: None)}
    for name, (peer, merge, unmerge) in MERGES.items():
        plain, merged = (build(peer, copy.deepcopy(model), targets, r) for _ in range(2))
        merge(merged)
        tasks[f"{name}, merge"] = Task(partial(merge, plain), partial(unmerge, plain))
        tasks[f"{name}, unmerge"] = Task(partial(unmerge, merged), partial(merge, merged))
    seconds = interleaved(tasks, options)
    rows: list[list[Cell]] = []
    for name, task in tasks.items():
        taken_up = [spread.per(total, "x") for spread in memory(task, options.device)]
        taken = seconds[name]
        rows.append([name, taken, taken.per(total, "s/B"), taken.over(seconds["clone"]), *taken_up])
    return rows


COLUMNS = ("what", "time", "per byte", "time / clone (quartiles)", "peak / weights", "kept / weights")


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", type=sizes, default=SHAPES, metavar="OUTxIN", help="of the weights")
    parser.add_argument("--mebibytes", type=int, default=64, help="of all weights; one layer if that is more")
    parser.add_argument("--r", type=int, default=8)
    options = parse(parser, shapes=[(576, 576), (2048, 2048)], mebibytes=16)
    report = Report(__doc__, options, ceilings=True)
    for shape in options.shapes:
        for dtype in options.dtype:
            with torch.no_grad():
                rows = compare(shape, dtype, options.r, options)
            report.table(f"{shape[0]} x {shape[1]}, {dtype}, r = {options.r}", COLUMNS, rows, drawn=COLUMNS[3:4])
    report.close()


if __name__ == "__main__":
    main()

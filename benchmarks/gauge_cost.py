"""What does a LoRAPlusGauge add to a training step?

Forward, backward and AdamW's step of one model, with the gauge and without it, in turns. The ratio is taken round by
round.

    python benchmarks/gauge_cost.py --model smollm2 bert --tokens 1x128 --random-weights
"""

from __future__ import annotations

import argparse
import itertools

import torch
import workloads
from measuring import interleaved
from options import common_parser, parse
from report import Cell, Report

from lora_plus import LoRAPlusGauge, create_loraplus_optimizer, inject_lora

COLUMNS = ("gauge", "layers", "step", "step / without (quartiles)")


def compare(name: str, dtype: str, options: argparse.Namespace) -> list[list[Cell]]:
    """A row without the gauge, and one with it."""
    workload, model, x = workloads.prepared(name, dtype, options)
    inject_lora(model, list(workload.targets), r=options.r)
    optimizers = [create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-6) for _ in range(2)]
    without, gauged = (workloads.step(workload, model, x, optimizer) for optimizer in optimizers)
    with LoRAPlusGauge(model, optimizers[1], every=options.every) as gauge:
        seconds = interleaved({"without": without, "with": gauged}, options)
    layers = len(gauge.report().rows)
    return [[what, layers, taken, taken.over(seconds["without"])] for what, taken in seconds.items()]


def main() -> None:
    parser = common_parser(__doc__)
    workloads.add_options(parser, "smollm2", "bert")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--every", type=int, default=1, help="measure one of so many steps")
    options = parse(parser, tokens=(1, 128))
    report = Report(__doc__, options)
    for name, dtype in itertools.product(options.model, options.dtype):
        report.table(f"{name}, {dtype}, r = {options.r}", COLUMNS, compare(name, dtype, options), drawn=COLUMNS[3:])
    report.close()


if __name__ == "__main__":
    main()

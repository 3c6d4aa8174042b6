"""Which way to the row norms of ``W + s B A``, which DoRA needs in every step, is the fastest?

"Summed" makes the matrix; "in blocks" makes some rows of it at a time and is what the library does; "expanded" makes
none of it, by ``||w + s A^T b||^2 = ||w||^2 + 2 s b.(A w) + s^2 b.(A A^T) b``. Relative errors are against float64.

    python benchmarks/dora_norm.py --layers 576x576 2048x5632 5632x2048 --dtype float32 bfloat16
"""

from __future__ import annotations

import argparse
import itertools

import torch
from measuring import Call, Task, interleaved
from options import DTYPES, common_parser, parse
from report import Cell, Report
from torch import Tensor
from workloads import sizes

from lora_plus.tensors.matrix import add_delta, row_norm, sum_row_norm

LAYERS = ((576, 576), (2048, 5632), (5632, 2048))
SCALE = 2.0
BLOCKS = "in blocks"


def expanded(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The norms without the sum."""
    wide, scaled = W.to(A.dtype), SCALE * B
    cross, own = (wide @ A.T) * scaled, (scaled @ (A @ A.T)) * scaled
    return (row_norm(wide).square() + (2 * cross + own).sum(-1)).clamp(min=0).sqrt()


def compare(layer: tuple[int, int], r: int, dtype: str, options: argparse.Namespace) -> list[list[Cell]]:
    """A row for each way."""
    inputs, outputs = layer
    W = torch.randn(outputs, inputs, device=options.device, dtype=DTYPES[dtype])
    A = torch.randn(r, inputs, device=options.device) / inputs**0.5
    B = torch.randn(outputs, r, device=options.device) / 10
    exact = row_norm(add_delta(W.double(), A.double(), B.double(), SCALE))
    ways: dict[str, Task | Call] = {
        BLOCKS: lambda: sum_row_norm(W, A, B, SCALE),
        "summed": lambda: row_norm(add_delta(W, A, B, SCALE)),
        "expanded": lambda: expanded(W, A, B),
    }
    errors = {
        BLOCKS: sum_row_norm(W, A, B, SCALE),
        "summed": row_norm(add_delta(W, A, B, SCALE)),
        "expanded": expanded(W, A, B),
    }
    seconds = interleaved(ways, options, least=0.005)
    return [
        [way, spread, spread.over(seconds[BLOCKS]), f"{float(((errors[way] - exact).abs() / exact).max()):.1e}"]
        for way, spread in seconds.items()
    ]


COLUMNS = ("way", "time", "time / in blocks (quartiles)", "largest relative error")


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--layers", nargs="+", type=sizes, default=LAYERS, metavar="INxOUT")
    parser.add_argument("--r", type=int, nargs="+", default=[16])
    options = parse(parser, layers=LAYERS[:2])
    report = Report(__doc__, options)
    for layer, dtype, r in itertools.product(options.layers, options.dtype, options.r):
        table = compare(layer, r, dtype, options)
        report.table(f"in = {layer[0]}, out = {layer[1]}, r = {r}, {dtype}", COLUMNS, table, drawn=COLUMNS[2:3])
    report.close()


if __name__ == "__main__":
    with torch.no_grad():
        main()

"""Which way round is each product with a factor of rank r fastest, and how far is it from free?

A layer ``y = W x + s B A x`` with the rows of x and y in memory needs six products besides the frozen layer's: ``A x``
and ``+= s B h`` in the forward; ``B^T dy``, ``dA``, ``dB`` and ``dx += A^T dh`` in the backward. The result of rank r
can lie as (rows, r) or as (r, rows), and either serves the products that read it. Compared with the frozen layer's
forward product. "Traffic" counts the large tensor only, (rows, in) or (rows, out), as often as it must be read or
written. ``lora_plus/tensors/fused.py`` takes its choices from here.

    python benchmarks/products.py --layers 576x1536 --r 8 64
"""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F
from measuring import Call, Task, interleaved
from options import DTYPES, common_parser, parse
from report import Cell, Report
from torch import Tensor
from workloads import sizes

LAYERS = ((576, 576), (576, 1536), (1536, 576), (4096, 4096), (4096, 11008))


def candidates(rows: int, inputs: int, outputs: int, r: int, dtype: str, device: str) -> dict[str, dict[str, Call]]:
    """For each product, the ways of computing it; the names say the operands, h and dh with their shapes."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=DTYPES[dtype])

    x, dx, y, dy = random(rows, inputs), random(rows, inputs), random(rows, outputs), random(rows, outputs)
    W, A, B = random(outputs, inputs), random(r, inputs), random(outputs, r)
    tall, flat = random(rows, r), random(r, rows)
    return {
        "frozen": {"x W^T": lambda: F.linear(x, W), "dy W": lambda: dy @ W},
        "h = A x": {"(n, r): x A^T": lambda: x @ A.t(), "(r, n): A x^T": lambda: A @ x.t()},
        "y += s B h": {
            "(n, r): addmm_(h, B^T)": lambda: y.addmm_(tall, B.t(), alpha=0.5),
            "(r, n): addmm_(h^T, B^T)": lambda: y.addmm_(flat.t(), B.t(), alpha=0.5),
            "(n, r): y + s (h B^T)": lambda: y + 0.5 * (tall @ B.t()),
        },
        "dh = B^T dy": {"(n, r): dy B": lambda: dy @ B, "(r, n): B^T dy^T": lambda: B.t() @ dy.t()},
        "dA": {
            "(n, r): dh^T x": lambda: tall.t() @ x,
            "(r, n): dh x": lambda: flat @ x,
            "(n, r): (x^T dh)^T": lambda: (x.t() @ tall).t(),
        },
        "dB": {
            "(n, r): dy^T h": lambda: dy.t() @ tall,
            "(n, r): (h^T dy)^T": lambda: (tall.t() @ dy).t(),
            "(r, n): dy^T h^T": lambda: dy.t() @ flat.t(),
            "(r, n): (h dy)^T": lambda: (flat @ dy).t(),
        },
        "dx += A^T dh": {
            "(n, r): addmm_(dh, A)": lambda: dx.addmm_(tall, A),
            "(r, n): addmm_(dh^T, A)": lambda: dx.addmm_(flat.t(), A),
            "(n, r): dx + dh A": lambda: dx + tall @ A,
        },
    }


NEEDS = {
    "h = A x": (0, 1),
    "y += s B h": (1, 2),
    "dh = B^T dy": (1, 1),
    "dA": (0, 1),
    "dB": (1, 1),
    "dx += A^T dh": (0, 2),
}
"""Whether a product is with (rows, in), 0, or (rows, out), 1, and how often that must pass through memory."""


def compare(rows: int, layer: tuple[int, int], r: int, dtype: str, options: argparse.Namespace) -> list[list[Cell]]:
    """A row for each way of computing each product."""
    ways = candidates(rows, *layer, r, dtype, options.device)
    tasks: dict[str, Task | Call] = {
        f"{product}|{way}": call for product, calls in ways.items() for way, call in calls.items()
    }
    seconds = interleaved(tasks, options, least=0.005)
    floor = seconds["frozen|x W^T"]
    table: list[list[Cell]] = []
    for name, spread in seconds.items():
        product, way = name.split("|")
        side, passes = NEEDS.get(product, (0, 1))
        other = r if product in NEEDS else layer[1]
        work, moved = 2 * rows * other * layer[side], passes * rows * layer[side] * DTYPES[dtype].itemsize
        rates = spread.rate(work, "FLOP/s"), spread.rate(moved, "B/s")
        fastest = min(seconds[f"{product}|{candidate}"].median for candidate in ways[product]) == spread.median
        table.append([product, way + (" *" if fastest else ""), spread, spread.over(floor), *rates])
    return table


COLUMNS = ("product", "way (* fastest)", "time", "time / x W^T (quartiles)", "arithmetic", "traffic")


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--layers", nargs="+", type=sizes, default=LAYERS, metavar="INxOUT")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], help="rows of x")
    parser.add_argument("--r", type=int, nargs="+", default=[8])
    options = parse(parser, layers=LAYERS[:1])
    report = Report(__doc__, options, ceilings=True)
    cases = itertools.product(options.layers, options.dtype, options.tokens, options.r)
    for (inputs, outputs), dtype, rows, r in cases:
        title = f"in = {inputs}, out = {outputs}, rows n = {rows}, r = {r}, {dtype}"
        table = compare(rows, (inputs, outputs), r, dtype, options)
        report.table(title, COLUMNS, table, drawn=COLUMNS[3:4])
    report.close()


if __name__ == "__main__":
    with torch.no_grad():
        main()

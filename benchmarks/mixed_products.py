"""How are the updates of a batch computed fastest, if each sample has one of several adapters?

``y_i + s_i B_i A_i x_i`` in three ways that need no kernel of their own: two batched products with the factors that
each sample gathers from a stack ("gathered"; "kept" is without the gathering, which inference does once); two products
with the factors of all adapters, and a mask between them ("masked"); the samples of each adapter in turn ("in turn").
``lora_plus/layers/sample_adapters.py`` takes its choice from here.

    python benchmarks/mixed_products.py --batches 8x8 8x64 64x64 --tokens 1 16 128 --layers 512 1024 2048 --r 8 16
"""

from __future__ import annotations

import argparse
import itertools

import torch
from measuring import Call, interleaved
from options import DTYPES, common_parser, parse
from report import Cell, Report
from torch import Tensor
from workloads import sizes

FLOOR = "W x"


def candidates(
    adapters: int, samples: int, tokens: int, width: int, r: int, dtype: str, device: str
) -> dict[str, Call]:
    """The ways, and the product of the frozen layer."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=DTYPES[dtype])

    x, y, W = random(samples, tokens, width), random(samples, tokens, width), random(width, width)
    A, B = random(adapters, r, width), random(adapters, r, width)  # B transposed
    which = torch.arange(samples, device=device) % adapters
    kept = A[which], B[which]
    own = torch.arange(adapters, device=device) == which[:, None]
    mask = own.repeat_interleave(r, 1).to(DTYPES[dtype]).unsqueeze(1)  # (samples, 1, adapters * r)
    rows = [(which == n).nonzero().flatten() for n in range(adapters)]
    back = torch.cat(rows).argsort()

    def batched(A: Tensor, B: Tensor) -> Tensor:
        return y + torch.bmm(0.5 * torch.bmm(x, A.mT), B)

    def in_turn() -> Tensor:
        parts = [y[own] + 0.5 * (x[own] @ A[n].t()) @ B[n] for n, own in enumerate(rows)]
        return torch.cat(parts).index_select(0, back)

    return {
        FLOOR: lambda: x @ W.t(),
        "gathered": lambda: batched(A.index_select(0, which), B.index_select(0, which)),
        "kept": lambda: batched(*kept),
        "masked": lambda: y + 0.5 * (x @ A.flatten(0, 1).t() * mask) @ B.flatten(0, 1),
        "in turn": in_turn,
    }


COLUMNS = ("way", "time", "time / W x (quartiles)")


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument(
        "--batches", nargs="+", type=sizes, default=[(8, 8), (8, 64), (64, 64)], help="adapters x samples"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128], help="of each sample")
    parser.add_argument("--layers", nargs="+", type=int, default=[512, 2048], help="inputs and outputs")
    parser.add_argument("--r", type=int, nargs="+", default=[8])
    options: argparse.Namespace = parse(parser, layers=[512], tokens=[1, 16])
    report = Report(__doc__, options, ceilings=True)
    cases = itertools.product(options.batches, options.tokens, options.layers, options.r, options.dtype)
    for (adapters, samples), tokens, width, r, dtype in cases:
        ways = candidates(adapters, samples, tokens, width, r, dtype, options.device)
        seconds = interleaved(ways, options, least=0.005)
        title = f"{adapters} adapters, {samples} samples of {tokens} tokens, {width} x {width}, r = {r}, {dtype}"
        rows: list[list[Cell]] = [[name, spread, spread.over(seconds[FLOOR])] for name, spread in seconds.items()]
        report.table(title, COLUMNS, rows, drawn=COLUMNS[2:])
    report.close()


if __name__ == "__main__":
    with torch.no_grad():
        main()

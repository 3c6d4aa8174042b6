"""What memory does a training step with LoRA need beyond the model, here and in other implementations?

Exact, not timed. "Saved" is what the forward keeps for the backward: every storage once, parameters left out. "Peak" is
the most that tensors take up during a whole step (forward, backward, gradients) beyond model and input: on a CPU from
the profiler's record of every allocation and release, on a GPU from the allocator's statistics.

    python benchmarks/memory.py                                            # an MLP of 8 x 256 in bfloat16
    python benchmarks/memory.py --model smollm2 bert vit --dtype float32
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial

import workloads
from allocations import memory
from measuring import Call, Spread, count
from options import common_parser, parse
from peers import PEERS, adapter_dtype, build
from report import Cell, Report
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def saved(forward: Call, model: nn.Module) -> Spread:
    """Bytes kept for the backward of ``forward``."""
    storages = {}
    left_out = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()  # held until all is counted, so that no storage is released and its address used again
    assert output is not None
    return count(sum(storages.values()))


def compare(name: str, dtype: str, r: int, options: argparse.Namespace) -> list[list[Cell]]:
    """A row for each implementation."""
    workload, base, x = workloads.prepared(name, dtype, options)
    rows: list[list[Cell]] = []
    for peer in options.peers:
        model = build(peer, base, workload.targets, r)
        step = workloads.step(workload, model, x)
        kept = saved(partial(workload.output, model, x), model)
        peak, _ = memory(step, options.device)
        rows.append([peer, adapter_dtype(model), kept, peak])
    floor = rows[0]
    return [[*row, *(row[n].over(floor[n]) for n in (2, 3))] for row in rows]  # type: ignore[union-attr, arg-type]


def main() -> None:
    parser = common_parser(__doc__)
    workloads.add_options(parser, "mlp-relu", "mlp-gelu")
    parser.set_defaults(dtype=["bfloat16"])
    parser.add_argument("--r", type=int, nargs="+", default=[8])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="ratios are to the first one")
    options = parse(parser, tokens=(1, 128))
    report = Report(__doc__, options)
    for name, dtype, r in itertools.product(options.model, options.dtype, options.r):
        rows = compare(name, dtype, r, options)
        floor = rows[0][0]
        columns = ("implementation", "adapters", "saved", "peak", f"saved / {floor}", f"peak / {floor}")
        report.table(f"{name}, {dtype}, r = {r}", columns, rows, drawn=("peak",))
    report.close()


if __name__ == "__main__":
    main()

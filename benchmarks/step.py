"""What does a training step with LoRA cost over the frozen model's own, here and in other implementations?

The floor is the same model without adapters: its forward, and its backward to the input. The ratio is taken round by
round. "FLOPs" are those of the step over those of the floor, as torch counts them; for a linear layer the least is
``1 + 3 r (in + out) / (2 in out)``.

    python benchmarks/step.py --model smollm2 bert vit
    python benchmarks/step.py --layer 4096 11008 --r 8 64 --dtype float32 bfloat16
    python benchmarks/step.py --layers 20 --layer 32 32 --tokens 8x1 --rounds 51
    python benchmarks/step.py --model linear bert --peers lora_plus peft --dora
    python benchmarks/step.py --device cuda --model block smollm2 --compile
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
import workloads
from measuring import Call, count, interleaved
from options import common_parser, parse
from peers import FLOOR, PEERS, adapter_dtype, build, trainable
from report import Cell, Report
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

DORA: dict[str, tuple[str, dict[str, Any]]] = {
    "lora_plus, DoRA": ("lora_plus", {"variant": "dora"}),
    "peft, DoRA": ("peft", {"use_dora": True}),
}
"""The peer and its settings."""


def flops(step: Call) -> int:
    """What torch counts in a step, matrix products and attention."""
    counter = FlopCounterMode(display=False)
    counter.flop_registry.setdefault(torch.ops.aten.addmm_, counter.flop_registry[torch.ops.aten.addmm])
    with counter:
        step()
    return counter.get_total_flops()


def check_alike(outputs: dict[str, Tensor]) -> None:
    """In float32 all implementations must compute the same, and not what the frozen model does."""
    frozen, *others = (outputs[name].double() for name in outputs)
    for name, other in zip(list(outputs)[1:], others, strict=True):
        off, effect = (other - others[0]).norm(), (others[0] - frozen).norm()
        assert off < 1e-2 * effect, f"{name} is off by {off:.1e}, where adapters have an effect of {effect:.1e}"


def compare(name: str, dtype: str, r: int, options: argparse.Namespace) -> list[list[Cell]]:
    """A row for each implementation, the floor first."""
    workload, base, x = workloads.prepared(name, dtype, options)
    groups = [[peer for peer in options.peers if peer != FLOOR], [*DORA] if options.dora else []]
    names = [FLOOR, *itertools.chain(*groups)]
    settings = {peer: DORA.get(peer, (peer, {})) for peer in names}
    models = {peer: build(of, base, workload.targets, r, **own) for peer, (of, own) in settings.items()}
    if dtype == "float32":
        with torch.no_grad():
            outputs = {peer: workload.output(model, x) for peer, model in models.items()}
        for group in filter(None, groups):
            check_alike({peer: outputs[peer] for peer in (FLOOR, *group)})
    counted = {peer: flops(workloads.step(workload, model, x)) for peer, model in models.items()}
    steps = {}
    for peer, model in models.items():
        parameters = trainable(model)
        optimizer = torch.optim.AdamW(parameters, lr=1e-6) if options.optimizer and parameters else None
        run = torch.compile(model) if options.compile else model
        steps[peer] = workloads.step(workload, run, x, optimizer)  # type: ignore[arg-type]
    seconds = interleaved(steps, options)
    return [
        [peer, adapter_dtype(models[peer]), seconds[peer], seconds[peer].over(seconds[FLOOR]),
         count(counted[peer] / counted[FLOOR], "x")]
        for peer in names
    ]  # fmt: skip


COLUMNS = ("implementation", "adapters", "step", "step / frozen (quartiles)", "FLOPs / frozen")


def main() -> None:
    parser = common_parser(__doc__)
    workloads.add_options(parser)
    parser.add_argument("--r", type=int, nargs="+", default=[8])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--dora", action="store_true", help="DoRA, too, here and in PEFT")
    parser.add_argument("--optimizer", action="store_true", help="AdamW's step too")
    parser.add_argument("--compile", action="store_true", help="all models through torch.compile")
    options = parse(parser, tokens=(1, 128))
    models = options.model or (["linear"] if options.layer else ["smollm2", "bert"])
    report = Report(__doc__, options, ceilings=True)
    for name, dtype, r in itertools.product(models, options.dtype, options.r):
        title = f"{name}, {dtype}, r = {r}"
        if name == "linear":
            inputs, outputs = options.layer or workloads.LAYER
            least = 1 + 3 * r * (inputs + outputs) / (2 * inputs * outputs)
            title += f", in = {inputs}, out = {outputs}: by arithmetic at least {least:.3f}"
        report.table(title, COLUMNS, compare(name, dtype, r, options), drawn=COLUMNS[3:4])
    report.close()


if __name__ == "__main__":
    main()

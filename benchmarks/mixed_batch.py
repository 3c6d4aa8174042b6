"""What does a batch cost in which each sample has an adapter of its own, here and in PEFT?

A stack of residual blocks of linear layers; the batch has one sample for each adapter. "Inference" is a forward
without gradients, "step" a forward and a backward pass to the input and all adapters. The floor is the frozen model;
"one block" is the same with one ``adapter_per_sample`` block around all forwards, as in generating text token by token.
PEFT takes ``adapter_names`` in eval mode only, which is what all are in; there is no dropout.

    python benchmarks/mixed_batch.py --adapters 8 64 --tokens 1 128 --width 512
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from measuring import Call, interleaved
from options import DTYPES, common_parser, parse
from report import Cell, Report
from torch import Tensor, nn

import lora_plus
from lora_plus.layers import LoRALayer

LINEARS = ("v", "o", "up", "down")
FLOOR = "frozen"


class Block(nn.Module):
    """The linear layers of a transformer's block, without attention between tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.v, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.v(self.norms[0](x)))
        y: Tensor = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return y


def with_lora_plus(base: nn.Module, names: list[str], r: int) -> nn.Module:
    """The model with these adapters, all trainable and random."""
    for name in names:
        lora_plus.inject_lora(base, list(LINEARS), r=r, alpha=2 * r, adapter=name)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in base.named_parameters():
        if name.rpartition(".")[2] in names:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            parameter.requires_grad_()
    return base.eval()


def with_peft(base: nn.Module, names: list[str], r: int, ours: nn.Module) -> nn.Module:
    """PEFT's model with the same adapters, of the same values."""
    import peft

    config: Any = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(LINEARS))
    made: Any = peft.get_peft_model(base, config, adapter_name=names[0])  # type: ignore[arg-type]
    for name in names[1:]:
        made.add_adapter(name, config)
    for path, layer in ours.named_modules():
        if isinstance(layer, LoRALayer):
            theirs = made.base_model.model.get_submodule(path)
            for name, tensors in itertools.product(names, ("lora_A", "lora_B")):
                weight = getattr(theirs, tensors)[name].weight
                weight.data.copy_(getattr(layer, tensors)[name])
                weight.requires_grad_()
    model: nn.Module = made.eval()
    return model


def stepped(model: nn.Module, output: Callable[[], Tensor], x: Tensor) -> Call:
    """A forward and a backward pass."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    direction = torch.randn_like(output())

    def run() -> None:
        output().backward(direction)
        for tensor in (x, *parameters):
            tensor.grad = None

    return run


def compare(count: int, tokens: int, dtype: str, options: argparse.Namespace) -> list[list[Cell]]:
    """A row for each implementation and each kind of pass."""
    torch.manual_seed(0)
    where = {"device": options.device, "dtype": DTYPES[dtype]}
    base = nn.Sequential(*[Block(options.width) for _ in range(options.blocks)]).to(**where).requires_grad_(False)
    names = [f"task{n}" for n in range(count)]
    ours = with_lora_plus(copy.deepcopy(base), names, options.r)
    theirs = with_peft(copy.deepcopy(base), names, options.r, ours)
    x = torch.randn(count, tokens, options.width, **where).requires_grad_()

    def mixed() -> Tensor:
        with lora_plus.adapter_per_sample(ours, names):
            y: Tensor = ours(x)
        return y

    def peft_mixed() -> Tensor:
        y: Tensor = theirs(x, adapter_names=names)
        return y

    with torch.no_grad():
        frozen, y, theirs_y = base(x).double(), mixed().double(), peft_mixed().double()
    if dtype == "float32":
        assert (y - theirs_y).norm() < 1e-3 * (y - frozen).norm()
    outputs: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        FLOOR: (base, lambda: base(x)),
        "lora_plus": (ours, mixed),
        "peft": (theirs, peft_mixed),
    }
    steps = interleaved({name: stepped(model, output, x) for name, (model, output) in outputs.items()}, options)
    with torch.no_grad(), ExitStack() as stack:
        forwards: dict[str, Call] = {name: output for name, (_, output) in outputs.items()}
        inside = copy.deepcopy(ours)
        stack.enter_context(lora_plus.adapter_per_sample(inside, names))
        inference = interleaved({**forwards, "lora_plus, one block": lambda: inside(x)}, options)
    return [
        [kind, name, spread, spread.over(seconds[FLOOR]), seconds["peft"].over(spread)]
        for kind, seconds in (("inference", inference), ("step", steps))
        for name, spread in seconds.items()
    ]


COLUMNS = ("pass", "implementation", "time", "time / frozen (quartiles)", "times as fast as PEFT (quartiles)")


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 64], help="and samples, one for each")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128], help="of each sample")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--r", type=int, default=8)
    options = parse(parser, adapters=[8], width=256, tokens=[1, 32])
    report = Report(__doc__, options)
    for count, tokens, dtype in itertools.product(options.adapters, options.tokens, options.dtype):
        title = f"{count} adapters, {tokens} tokens a sample, width {options.width}, r = {options.r}, {dtype}"
        report.table(title, COLUMNS, compare(count, tokens, dtype, options), drawn=COLUMNS[3:4])
    report.close()


if __name__ == "__main__":
    main()

"""What does training several adapters in one mixed batch save, against a model for each of them?

A stack of residual blocks of linear layers. Each of k tenants has an adapter, an optimizer with LoRA+ groups, and
samples of its own; a step is a forward and a backward pass and an optimizer step for all tenants. "One batch" is one
model in an ``adapter_per_sample`` block, "in turn" the same model with `set_adapter` for one tenant after another, "a
model each" k models, one after another, as k processes on one machine would share its cores. Memory is that of the
models, of the optimizers' state, and the peak of a step; processes of their own would add what Python and torch take.

    python benchmarks/tenants.py --tenants 4 16 --samples 1 4 --tokens 16 128
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from allocations import memory
from measuring import Call, count, interleaved
from mixed_batch import LINEARS, Block
from options import DTYPES, common_parser, parse
from report import Cell, Report
from torch import Tensor, nn

import lora_plus

Optimizers = Mapping[str, torch.optim.Optimizer]


def with_adapters(base: nn.Module, names: list[str], r: int) -> tuple[nn.Module, Optimizers]:
    """The model with these adapters, all trainable, and the optimizer of each."""
    for name in names:
        generator = torch.Generator().manual_seed(int(name.removeprefix("task")))
        lora_plus.inject_lora(base, list(LINEARS), r=r, alpha=2 * r, adapter=name, generator=generator)
    lora_plus.set_adapter(base, names, trainable=True)
    make = lora_plus.create_loraplus_optimizer
    return base, {name: make(base, torch.optim.AdamW, lr=1e-4, lr_ratio=8, adapter=name) for name in names}


@dataclass(frozen=True)
class Tenants:
    """The same tenants and samples for each way of training them."""

    base: nn.Module
    names: list[str]
    r: int
    x: Tensor
    """``(tenants, samples, tokens, width)``."""

    def loss(self, y: Tensor) -> Tensor:
        """The mean over the samples of each tenant in ``y``, summed over the tenants."""
        return y.square().mean() * (len(y) / self.x.shape[1])

    def one_batch(self) -> tuple[list[nn.Module], list[Optimizers], Call]:
        model, optimizers = with_adapters(copy.deepcopy(self.base), self.names, self.r)
        of_samples = [name for name in self.names for _ in range(self.x.shape[1])]

        def step() -> None:
            with lora_plus.adapter_per_sample(model, of_samples):
                self.loss(model(self.x.flatten(0, 1))).backward()
            move(optimizers)

        return [model], [optimizers], step

    def in_turn(self) -> tuple[list[nn.Module], list[Optimizers], Call]:
        model, optimizers = with_adapters(copy.deepcopy(self.base), self.names, self.r)

        def step() -> None:
            for name, x in zip(self.names, self.x, strict=True):
                lora_plus.set_adapter(model, name)
                self.loss(model(x)).backward()
            move(optimizers)

        return [model], [optimizers], step

    def a_model_each(self) -> tuple[list[nn.Module], list[Optimizers], Call]:
        made = [with_adapters(copy.deepcopy(self.base), [name], self.r) for name in self.names]

        def step() -> None:
            for (model, optimizers), x in zip(made, self.x, strict=True):
                self.loss(model(x)).backward()
                move(optimizers)

        return [model for model, _ in made], [optimizers for _, optimizers in made], step


def move(optimizers: Optimizers) -> None:
    """A step of each."""
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()


def held(models: list[nn.Module], optimizers: list[Optimizers]) -> int:
    """Bytes of the models and of the optimizers' state."""
    states = [state for each in optimizers for one in each.values() for state in one.state.values()]
    tensors = [*(p for model in models for p in model.parameters()), *(t for state in states for t in state.values())]
    return sum(tensor.nbytes for tensor in tensors)


def compare(tenants: int, samples: int, tokens: int, dtype: str, options: argparse.Namespace) -> list[list[Cell]]:
    """A row for each way, after the same three steps have given each of them the same adapters."""
    torch.manual_seed(0)
    where = {"device": options.device, "dtype": DTYPES[dtype]}
    base = nn.Sequential(*[Block(options.width) for _ in range(options.blocks)]).to(**where).requires_grad_(False)
    names = [f"task{n}" for n in range(tenants)]
    shared = Tenants(base, names, options.r, torch.randn(tenants, samples, tokens, options.width, **where))
    ways = {"one batch": shared.one_batch(), "in turn": shared.in_turn(), "a model each": shared.a_model_each()}
    trained = []
    for models, _, step in ways.values():
        for _ in range(3):
            step()
        own = {key: held for model in models for key, held in model.named_parameters() if held.requires_grad}
        trained.append({key: own[key].detach().clone() for key in sorted(own)})
    if dtype == "float32":
        for key, ours in trained[0].items():
            assert all((other[key] - ours).norm() < 1e-2 * ours.norm() for other in trained[1:]), key
    facts: dict[str, list[Cell]] = {}
    for name, (models, optimizers, step) in ways.items():
        own_bytes, (peak, _) = held(models, optimizers), memory(step, options.device)
        facts[name] = [count(own_bytes), count(peak.median), count(own_bytes + peak.median)]
    seconds = interleaved({name: step for name, (_, _, step) in ways.items()}, options)
    last = seconds["a model each"]
    return [[name, spread, last.over(spread), *facts[name]] for name, spread in seconds.items()]


COLUMNS = ("way", "step of all", "times as fast as a model each (quartiles)", "models and optimizers", "peak", "in all")


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--tenants", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4], help="of each tenant in a batch")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 128], help="of each sample")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--r", type=int, default=8)
    options = parse(parser, tenants=[4], samples=[1], tokens=[16], width=256)
    report = Report(__doc__, options)
    sizes = itertools.product(options.tenants, options.samples, options.tokens, options.dtype)
    for tenants, samples, tokens, dtype in sizes:
        title = f"{tenants} tenants, {samples} samples of {tokens} tokens each, width {options.width}, {dtype}"
        report.table(title, COLUMNS, compare(tenants, samples, tokens, dtype, options), drawn=COLUMNS[2:3])
    report.close()


if __name__ == "__main__":
    main()

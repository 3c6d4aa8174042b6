"""What does a large tree cost? CPU seconds of each operation on thousands of small layers, beside a hand-made wrapper.

The figures are the smallest of several runs. "Per layer" divides by the number of layers, and stays the same from size
to size where an operation is linear. PEFT does the same in the same process at one size, once, asked for
``"all-linear"``, which costs it least.

    python benchmarks/tree.py --layers 1000 10000 50000
"""

from __future__ import annotations

import copy
import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from measuring import CLOCKS, Call, Spread
from options import common_parser, parse
from report import Cell, Report
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_plus

RANK = 4
Operations = Iterator[tuple[str, Call]]
"""Names and calls; each is timed before the next is asked for."""


def tree(layers: int) -> nn.Module:
    """A model of that many ``nn.Linear(16, 16)``, in blocks of four."""
    return nn.ModuleList([nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)]) for _ in range(layers // 4)])


class Wrapper(nn.Module):
    """The least that a hand-made LoRA layer does."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        bound = 1 / math.sqrt(base.in_features)
        self.A = nn.Parameter(torch.empty(r, base.in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + x @ self.A.T @ self.B.T
        return y


def wrap(module: nn.Module) -> None:
    """Replace every linear layer by a `Wrapper`."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Wrapper(child, RANK))
        else:
            wrap(child)


def save_by_hand(model: nn.Module, path: Path) -> None:
    """Save the tensors of all wrappers."""
    save_file({name: tensor for name, tensor in model.state_dict().items() if name.endswith((".A", ".B"))}, path)


@torch.no_grad()
def load_by_hand(model: nn.Module, path: Path) -> None:
    """Copy what `save_by_hand` saved into a model that has the wrappers."""
    parameters = dict(model.named_parameters())
    for name, tensor in load_file(path).items():
        parameters[name].copy_(tensor)


def ours(layers: int, folder: Path) -> Operations:
    """The operations of this library, after those of wrappers made by hand."""
    model, fresh, other, plain, path = *(tree(layers) for _ in range(4)), folder / "adapter.safetensors"

    def inject(adapter: str) -> None:
        lora_plus.inject_lora(model, "all-linear", r=RANK, adapter=adapter)

    disabled = lora_plus.disabled(model)
    yield "wrap by hand", lambda: wrap(plain)
    yield "save by hand", lambda: save_by_hand(plain, folder / "plain.safetensors")
    yield "load by hand", lambda: load_by_hand(plain, folder / "plain.safetensors")
    yield "inject", lambda: inject("default")
    yield "LoRA+ groups", lambda: lora_plus.loraplus_param_groups(model, lr=1e-3)
    yield "summary", lambda: lora_plus.lora_summary(model)
    yield "save", lambda: lora_plus.save_adapter(model, path)
    yield "load", lambda: lora_plus.load_adapter(fresh, path)
    yield "save PEFT folder", lambda: lora_plus.save_adapter(model, folder / "peft")
    yield "load PEFT folder", lambda: lora_plus.load_adapter(other, folder / "peft")
    yield "merge", lambda: lora_plus.merge_lora(model)
    yield "unmerge", lambda: lora_plus.unmerge_lora(model)
    yield "disable", disabled.__enter__
    yield "enable", lambda: disabled.__exit__(None, None, None)
    yield "second adapter", lambda: inject("second")
    yield "set_adapter", lambda: lora_plus.set_adapter(model, "default")
    for n in range(3, 10):
        inject(f"adapter {n}")
    yield "tenth adapter", lambda: inject("tenth")
    yield "set_adapter of ten", lambda: lora_plus.set_adapter(model, "default")
    yield "remove", lambda: lora_plus.remove_lora(model)


def peft(layers: int, folder: Path) -> Operations:
    """The same operations in PEFT."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config, made = LoraConfig(r=RANK, target_modules="all-linear"), list[Any]()

    def add(adapter: str) -> None:
        made[0].add_adapter(adapter, copy.deepcopy(config))

    plain, fresh = tree(layers), tree(layers)
    yield "inject", lambda: made.append(get_peft_model(plain, copy.deepcopy(config)))  # type: ignore[arg-type]
    model = made[0]
    disabled = model.disable_adapter()
    yield "save", lambda: model.save_pretrained(str(folder))
    yield "load", lambda: PeftModel.from_pretrained(fresh, str(folder))  # type: ignore[arg-type]
    yield "merge", model.merge_adapter
    yield "unmerge", model.unmerge_adapter
    yield "disable", disabled.__enter__
    yield "enable", lambda: disabled.__exit__(None, None, None)
    yield "second adapter", lambda: add("second")
    yield "set_adapter", lambda: model.set_adapter("default")
    for n in range(3, 10):
        add(f"adapter_{n}")
    yield "tenth adapter", lambda: add("tenth")
    yield "set_adapter of ten", lambda: model.set_adapter("default")
    yield "remove", model.unload


def once(operations: Callable[[int, Path], Operations], layers: int, clock: str) -> dict[str, float]:
    """Seconds of each operation."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, call in operations(layers, Path(folder)):
            gc.collect()
            seconds[name] = CLOCKS[clock](call, 1)
    return seconds


def best(operations: Callable[[int, Path], Operations], layers: int, runs: int, clock: str = "cpu") -> dict[str, float]:
    """The smallest of several measurements of each operation, after a run that is not counted."""
    once(operations, 100, clock)
    measured = [once(operations, layers, clock) for _ in range(runs)]
    return {name: min(run[name] for run in measured) for name in measured[0]}


BY_HAND = {
    "inject": (("inject",), ("wrap by hand",)),
    "save + load": (("save", "load"), ("save by hand", "load by hand")),
    "save + load, PEFT folder": (("save PEFT folder", "load PEFT folder"), ("save by hand", "load by hand")),
}
"""Operations of this library, and those by hand that do the same."""


def by_hand(cost: Mapping[str, float]) -> Iterator[str]:
    """How many times as long as by hand each entry of `BY_HAND` takes."""
    for ours, theirs in BY_HAND.values():
        yield f"{sum(cost[name] for name in ours) / sum(cost[name] for name in theirs):.2f}"


def main() -> None:
    parser = common_parser(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[1_000, 10_000, 50_000])
    parser.add_argument("--peft-layers", type=int, default=1_000, help="PEFT's size; 0 to leave it out")
    options = parse(parser, layers=[1_000, 3_000], peft_layers=200, rounds=1)
    report = Report(__doc__, options)
    sizes = {f"lora_plus, {layers:,}": layers for layers in options.layers}
    costs = {name: best(ours, layers, options.rounds, options.clock) for name, layers in sizes.items()}
    ratios = {name: list(by_hand(cost)) for name, cost in costs.items()}
    if options.peft_layers:
        name = f"PEFT, {options.peft_layers:,}"
        sizes[name], costs[name] = options.peft_layers, best(peft, options.peft_layers, 1, options.clock)
    seconds = {name: {operation: Spread((value,)) for operation, value in cost.items()} for name, cost in costs.items()}
    per_layer = {name: {o: s.per(sizes[name], "s") for o, s in cost.items()} for name, cost in seconds.items()}
    columns = ("operation", *costs)
    for title, shown, drawn in (("in all", seconds, ()), ("per layer", per_layer, columns[1:])):
        rows: list[list[Cell]] = [
            [operation, *(cost.get(operation, "") for cost in shown.values())]
            for operation in next(iter(costs.values()))
        ]
        report.table(f"{title}, {options.clock} time", columns, rows, drawn=drawn)
    report.table("times as long as by hand", ("operation", *ratios), list(zip(BY_HAND, *ratios.values(), strict=True)))
    report.close()


if __name__ == "__main__":
    main()

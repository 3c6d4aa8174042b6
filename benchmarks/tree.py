"""What does a large tree cost? CPU seconds of each operation on thousands of small layers, beside a hand-made wrapper.

Run ``python benchmarks/tree.py``; with ``--peft`` PEFT does the same in the same run. All figures are the process's CPU
time, the best of several runs, on one thread; quote ratios, since machines differ.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import lora_plus

RANK = 4


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
        return self.base(x) + x @ self.A.T @ self.B.T


def wrap(module: nn.Module) -> None:
    """Replace every linear layer by a `Wrapper`."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Wrapper(child, RANK))
        else:
            wrap(child)


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of the process during the call."""
    gc.collect()
    start = time.process_time()
    call()
    return time.process_time() - start


def ours(layers: int, folder: Path) -> dict[str, float]:
    """CPU seconds of each operation of this library, and of wrapping by hand."""
    model, fresh, by_hand = tree(layers), tree(layers), tree(layers)
    path = folder / "adapter.safetensors"
    return {
        "wrap by hand": cpu_seconds(lambda: wrap(by_hand)),
        "inject": cpu_seconds(lambda: lora_plus.inject_lora(model, "all-linear", r=RANK)),
        "second adapter": cpu_seconds(lambda: lora_plus.inject_lora(model, "all-linear", r=RANK, adapter="second")),
        "LoRA+ groups": cpu_seconds(lambda: lora_plus.loraplus_param_groups(model, lr=1e-3)),
        "summary": cpu_seconds(lambda: lora_plus.lora_summary(model)),
        "save": cpu_seconds(lambda: lora_plus.save_adapter(model, path)),
        "load": cpu_seconds(lambda: lora_plus.load_adapter(fresh, path)),
        "merge": cpu_seconds(lambda: lora_plus.merge_lora(model)),
        "unmerge": cpu_seconds(lambda: lora_plus.unmerge_lora(model)),
        "remove": cpu_seconds(lambda: lora_plus.remove_lora(model)),
    }


def peft(layers: int, folder: Path) -> dict[str, float]:
    """CPU seconds of the same operations in PEFT."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = tree(layers)
    made: dict[str, PeftModel] = {}
    cost = {
        "inject": cpu_seconds(
            lambda: made.update(model=get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear")))  # type: ignore[arg-type, call-overload]
        )
    }
    cost["save"] = cpu_seconds(lambda: made["model"].save_pretrained(str(folder)))
    cost["load"] = cpu_seconds(lambda: PeftModel.from_pretrained(tree(layers), str(folder)))  # type: ignore[arg-type]
    cost["merge"] = cpu_seconds(lambda: made["model"].merge_adapter())
    cost["unmerge"] = cpu_seconds(lambda: made["model"].unmerge_adapter())
    return cost


def best(measure: Callable[[int, Path], dict[str, float]], layers: int, runs: int) -> dict[str, float]:
    """The smallest of several measurements of each operation, after one that is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        measure(400, Path(folder))
        measured = [measure(layers, Path(folder)) for _ in range(runs)]
    return {name: min(run[name] for run in measured) for name in measured[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[10_000, 20_000])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peft", action="store_true", help="measure PEFT too, at the first size")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {f"lora_plus, {n:,}": best(ours, n, options.runs) for n in options.layers}
    if options.peft:
        results[f"PEFT, {options.layers[0]:,}"] = best(peft, options.layers[0], 1)
    print(f"CPU seconds; torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    width = max(map(len, results)) + 2
    print(" " * 16 + "".join(name.rjust(width) for name in results))
    for operation in next(iter(results.values())):
        cells = [f"{run[operation]:.2f}" if operation in run else "-" for run in results.values()]
        print(operation.ljust(16) + "".join(cell.rjust(width) for cell in cells))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

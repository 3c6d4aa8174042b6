"""The cost of a large tree, in counts and in ratios measured in one run, never in absolute times."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora_plus


def tree(layers: int) -> nn.Module:
    return nn.ModuleList([nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)]) for _ in range(layers // 4)])


class Wrapper(nn.Module):
    """The least that a hand-made LoRA does."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        bound = 1 / math.sqrt(base.in_features)
        self.A = nn.Parameter(torch.empty(r, base.in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


def wrap(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Wrapper(child, 4))
        else:
            wrap(child)


def cpu_seconds(call: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    call()
    return time.process_time() - start


def costs(layers: int, path: Path) -> dict[str, float]:
    model, fresh, by_hand = tree(layers), tree(layers), tree(layers)
    return {
        "by hand": cpu_seconds(lambda: wrap(by_hand)),
        "inject": cpu_seconds(lambda: lora_plus.inject_lora(model, "all-linear", r=4)),
        "second": cpu_seconds(lambda: lora_plus.inject_lora(model, "all-linear", r=4, adapter="second")),
        "groups": cpu_seconds(lambda: lora_plus.loraplus_param_groups(model, lr=1e-3)),
        "save": cpu_seconds(lambda: lora_plus.save_adapter(model, path)),
        "load": cpu_seconds(lambda: lora_plus.load_adapter(fresh, path)),
        "merge": cpu_seconds(lambda: lora_plus.merge_lora(model)),
        "unmerge": cpu_seconds(lambda: lora_plus.unmerge_lora(model)),
        "remove": cpu_seconds(lambda: lora_plus.remove_lora(model)),
    }


@pytest.mark.slow
def test_twice_the_layers_cost_about_twice_as_much(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    costs(1000, path)
    small = [costs(5_000, path) for _ in range(3)]
    large = [costs(10_000, path) for _ in range(3)]
    for name in small[0]:
        ratio = min(run[name] for run in large) / min(run[name] for run in small)
        assert ratio < 3, f"{name}: 10,000 layers take {ratio:.2f} times as long as 5,000"
    by_hand = min(run["by hand"] for run in small)
    assert min(run["inject"] for run in small) < 4 * by_hand
    assert min(run["second"] for run in small) < 4 * by_hand


def test_a_file_that_fits_nothing_is_refused_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora_plus.save_adapter(lora_plus.inject_lora(tree(4000), "all-linear", r=1), path)
    start = time.process_time()
    with pytest.raises(ValueError, match="and 3970 more"):
        lora_plus.load_adapter(nn.ModuleDict({f"x{i}": nn.Linear(2, 2) for i in range(4000)}), path)
    assert time.process_time() - start < 30

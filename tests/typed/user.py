"""What a user writes, for the type checkers: mypy --strict and pyright must find the user's own types in it."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import lora_plus as lp
from lora_plus.files import adapter_state_dict
from lora_plus.training import split_loraplus_groups


class Net(nn.Module):
    """A model of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.q(x)
        return y


class Half(torch.optim.AdamW):
    """An optimizer of the user's own."""


def train(folder: Path) -> None:
    model = lp.inject_lora(Net(), ["q"], r=4, scaling="rslora", init="pissa", variant="dora")
    assert_type(model, Net)
    assert_type(model.q, nn.Linear)
    optimizer = lp.create_loraplus_optimizer(model, Half, lr=1e-3, lr_ratio=4, lr_mode="geometric")
    assert_type(optimizer, Half)
    groups = lp.loraplus_param_groups(model, lr=1e-3)
    assert_type(split_loraplus_groups(groups, model, lr_ratio=4), list[dict[str, Any]])
    assert_type(lp.add_adapter(model, "second"), Net)
    lp.set_adapter(model, ["default", "second"])
    with lp.disabled(model) as base:
        assert_type(base, Net)
    with lp.merged(model) as whole:
        assert_type(whole, Net)
    lp.save_adapter(model, folder / "a.safetensors", format="native")
    assert_type(lp.load_adapter(Net(), folder / "a.safetensors"), Net)
    assert_type(adapter_state_dict(model), dict[str, Tensor])
    assert_type(lp.merge_and_unload(model), Net)
    assert_type(lp.remove_lora(Net()), Net)


def wrong() -> None:
    lp.inject_lora(Net(), ["q"], scaling="sqrt")  # type: ignore[arg-type]
    lp.create_loraplus_optimizer(Net(), Half, lr=1e-3, lr_mode="C")  # type: ignore[arg-type]

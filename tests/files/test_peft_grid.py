"""Every kind of layer that PEFT adapts, with every option of its own: both ways, with equal outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from peft_support import count, floats, gpt2_linear, made_by_peft, move, opened_by_peft, same
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_plus
from lora_plus.files import adapter_state_dict
from lora_plus.model.tree import adapted_weights

pytestmark = pytest.mark.peers


@dataclass(frozen=True)
class Kind:
    """A kind of layer, and an input for it."""

    make: Callable[[], nn.Module]
    make_input: Callable[[torch.Generator, torch.dtype], Tensor]


KINDS = {
    "Linear": Kind(lambda: nn.Linear(5, 6), floats(2, 5)),
    "GPT-2's Conv1D": Kind(lambda: gpt2_linear(6, 5), floats(2, 5)),
    "Embedding": Kind(lambda: nn.Embedding(7, 6), lambda generator, dtype: torch.tensor([3, 6])),
    "Conv1d": Kind(lambda: nn.Conv1d(3, 6, 2), floats(2, 3, 4)),
    "Conv2d": Kind(lambda: nn.Conv2d(3, 6, (2, 1), stride=2), floats(2, 3, 4, 3)),
    "Conv3d": Kind(lambda: nn.Conv3d(2, 6, (1, 2, 2), padding=(1, 0, 0)), floats(2, 2, 2, 3, 2)),
}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rslora": ({"scaling": "rslora"}, {"use_rslora": True}),
    "dora": ({"variant": "dora"}, {"use_dora": True}),
    "ranks": ({"rank_pattern": {"second": 3}}, {"rank_pattern": {"second": 3}}),
    "alphas": ({"alpha_pattern": {"first": 7}}, {"alpha_pattern": {"first": 7}}),
    "ranks and alphas, rslora": (
        {"scaling": "rslora", "rank_pattern": {"first": 1}, "alpha_pattern": {"first": 7, "second": 0.5}},
        {"use_rslora": True, "rank_pattern": {"first": 1}, "alpha_pattern": {"first": 7, "second": 0.5}},
    ),
    "ranks, dora": (
        {"variant": "dora", "rank_pattern": {"second": 3}}, {"use_dora": True, "rank_pattern": {"second": 3}}
    ),
    "a head": ({"train_also": ["head"]}, {"modules_to_save": ["head"]}),
}  # fmt: skip
"""In our words and in PEFT's."""


class Two(nn.Module):
    """Two layers of one kind, and a head."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.first, self.second, self.head = kind.make(), kind.make(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        product = self.first(x) * self.second(x)
        return self.head(product.flatten(2).mean(2) if product.ndim > 2 else product)


def base(kind: str) -> Two:
    torch.manual_seed(0)
    model = Two(KINDS[kind]).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def input_of(kind: str) -> Tensor:
    return KINDS[kind].make_input(torch.Generator().manual_seed(1), torch.float64)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_ours_goes_to_peft_and_comes_back(kind: str, option: str, tmp_path: Path) -> None:
    x, options = input_of(kind), {"r": 2, "alpha": 3, **OPTIONS[option][0]}
    model = randomise(lora_plus.inject_lora(base(kind), ["first", "second"], **options))
    for head in options.get("train_also", ()):
        move(model.get_submodule(head))
    assert (model(x) - base(kind)(x)).abs().max() > 1e-2
    lora_plus.save_adapter(model, tmp_path / "ours")
    theirs = opened_by_peft(base(kind), tmp_path / "ours")
    same(theirs(x), model(x))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    same(lora_plus.load_adapter(base(kind), tmp_path / "theirs")(x), model(x))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_pefts_opens_here_and_goes_back(kind: str, option: str, tmp_path: Path) -> None:
    x = input_of(kind)
    theirs = made_by_peft(
        base(kind), target_modules=["first", "second"], r=2, lora_alpha=3,
        fan_in_fan_out=kind == "GPT-2's Conv1D", **OPTIONS[option][1],
    )  # fmt: skip
    assert (theirs(x) - base(kind)(x)).abs().max() > 1e-2
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = lora_plus.load_adapter(base(kind), tmp_path / "theirs")
    same(model(x), theirs(x))
    assert [name for name, _ in adapted_weights(model)] == ["first", "second"]
    assert count(adapter_state_dict(model)) == count(load_file(tmp_path / "theirs/adapter_model.safetensors"))
    lora_plus.save_adapter(model, tmp_path / "ours")
    same(opened_by_peft(base(kind), tmp_path / "ours")(x), theirs(x))
    same(lora_plus.merge_and_unload(model)(x), theirs(x))

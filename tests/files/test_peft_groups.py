"""LoRA+ groups of PEFT models: PEFT's own function is the reference, where it does what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_support import Later, peft
from torch import nn

import lora_plus
from lora_plus import loraplus_param_groups

pytestmark = pytest.mark.peers

RATIO, LR, DECAY = 8.0, 1e-3, 0.1
optimizers, integration = Later("peft.optimizers"), Later("lora_plus.engines.peft")  # which import PEFT


def peft_roles(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    return integration.peft_roles(model)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.zeros(3, 6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.stack.sum(0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.q, self.v = nn.Linear(6, 6), nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 3)
        self.experts = Experts()
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(tokens))
        x = self.experts(torch.tanh(self.q(x)) + self.v(x)).transpose(-1, -2)
        return self.head(self.conv(x).transpose(-1, -2))


def peft_model(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(Net(), peft.LoraConfig(r=2, **{"target_modules": ["q", "v"]} | settings))


CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "embedding": {"target_modules": ["embed", "q"]},
    "conv": {"target_modules": ["conv", "q"]},
    "lora_bias": {"lora_bias": True},
    "experts": {"target_parameters": ["experts.stack"]},
    "rslora": {"use_rslora": True},
}
"""Configurations whose every trainable parameter PEFT's function puts where LoRA+ says."""


def settings_by_parameter(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_rates_and_decays_are_those_of_pefts_own_function(config: dict[str, Any]) -> None:
    model = peft_model(**config)
    groups = loraplus_param_groups(
        model, lr=LR, lr_ratio=RATIO, weight_decay=DECAY, embedding_lr=1e-6, roles=peft_roles(model)
    )
    theirs = optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY
    )
    ours = settings_by_parameter(model, groups)
    assert ours == settings_by_parameter(model, theirs.param_groups)
    assert set(ours) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(group["params"] for group in groups)


def test_where_pefts_function_goes_by_names_and_sizes() -> None:
    """Magnitudes, heads and their biases are neither A nor B; they learn at the plain rate."""
    model = peft_model(target_modules=["embed", "q", "conv"], use_dora=True, modules_to_save=["head"])
    groups = loraplus_param_groups(model, lr=LR, lr_ratio=RATIO, weight_decay=DECAY, roles=peft_roles(model))
    kinds = {group["name"]: (len(group["params"]), group["lr"], group["weight_decay"]) for group in groups}
    assert kinds == {
        "lora_A": (2, LR, DECAY),
        "lora_B": (2, RATIO * LR, DECAY),
        "lora_embedding": (2, LR, DECAY),
        "lora_magnitude": (3, LR, 0.0),
        "other": (1, LR, DECAY),
        "other_no_decay": (1, LR, 0.0),
    }


def test_the_original_codes_groups_are_two_changes_of_ours() -> None:
    """One dimension is B's to the original code, so heads' biases, norms and magnitudes learn at the ratio there."""
    model = peft_model(use_dora=True, modules_to_save=["head", "norm"])
    groups = loraplus_param_groups(model, lr=LR, lr_ratio=RATIO, weight_decay=DECAY, roles=peft_roles(model))
    for group in groups:
        if group["name"] in ("lora_magnitude", "other_no_decay"):
            group["lr"] *= RATIO
        if group["name"] == "lora_magnitude":
            group["weight_decay"] = DECAY
    theirs = optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY
    )
    assert settings_by_parameter(model, groups) == settings_by_parameter(model, theirs.param_groups)


def test_a_bias_of_B_learns_with_B_and_is_not_decayed() -> None:
    model = peft_model(lora_bias=True)
    groups = loraplus_param_groups(model, lr=LR, lr_ratio=RATIO, weight_decay=DECAY, roles=peft_roles(model))
    assert [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("lora_A", LR, DECAY, 2), ("lora_B", RATIO * LR, DECAY, 2), ("lora_B_no_decay", RATIO * LR, 0.0, 2)
    ]  # fmt: skip


def test_adalora_whose_matrices_are_bare_parameters() -> None:
    config = peft.AdaLoraConfig(target_modules=["q"], total_step=10, init_r=2, target_r=1, tinit=1, tfinal=1)
    model = peft.get_peft_model(Net(), config)
    groups = {g["name"]: g["params"] for g in loraplus_param_groups(model, lr=LR, roles=peft_roles(model))}
    layer = model.base_model.model.q
    assert [id(p) for p in groups["lora_A"]] == [id(layer.lora_A["default"])]
    assert [id(p) for p in groups["lora_B"]] == [id(layer.lora_B["default"])]
    assert [id(p) for p in groups["other"]] == [id(layer.lora_E["default"])]


def test_training_equals_our_own_adapter(tmp_path: Path) -> None:
    """The same values and rates, so the same run, whoever's layers hold them."""
    theirs = peft_model(target_modules=["embed", "q", "v"], lora_alpha=4)
    with torch.no_grad():
        for _, role, parameter in peft_roles(theirs):
            if role.endswith("B"):
                parameter.normal_(std=0.1)
    theirs.save_pretrained(str(tmp_path))
    torch.manual_seed(0)
    ours = lora_plus.load_adapter(Net(), tmp_path, trainable=True)
    settings: dict[str, Any] = {"lr": 1e-2, "lr_ratio": RATIO, "weight_decay": DECAY, "embedding_lr": 1e-3}
    for model, roles in ((theirs.double(), list(peft_roles(theirs))), (ours.double(), [])):
        optimizer = lora_plus.create_loraplus_optimizer(model, torch.optim.AdamW, roles=roles, **settings)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            model(torch.randint(7, (4, 8), generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    tokens = torch.arange(7)[None]
    assert (theirs(tokens) - ours(tokens)).abs().max() <= 1e-12


def test_a_model_without_adapters_of_either_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has no LoRA adapter"):
        loraplus_param_groups(Net(), lr=LR, roles=peft_roles(Net()))

"""Layers whose weight torch computes: parametrizations, the older hooks and pruning, before and after injecting."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from cases import Holder, randomise
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

import lora_plus
from lora_plus.layers import LoRALayer


def unparametrize(layer: nn.Module) -> None:
    parametrize.remove_parametrizations(layer, "weight")


RULES: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
    "weight_norm": (parametrizations.weight_norm, unparametrize),
    "spectral_norm": (parametrizations.spectral_norm, unparametrize),
    "orthogonal": (parametrizations.orthogonal, unparametrize),
    "old weight_norm": (old_weight_norm, remove_weight_norm),
    "old spectral_norm": (old_spectral_norm, remove_spectral_norm),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), lambda layer: prune.remove(layer, "weight")),
}
"""How a weight comes to be computed, and how that ends with the weight as it then is."""


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> str:
    return request.param


def impose(rule: str, layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of the older weight_norm
        RULES[rule][0](layer)


def model_with(rule: str, when: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """An adapted model, an input, and the base's output for it."""
    model, x = Holder(nn.Linear(4, 4).double()), torch.randn(3, 4, dtype=torch.float64)
    if when == "before":
        impose(rule, model.layer)
    lora_plus.inject_lora(model, ["layer"], r=2)
    if when == "after":
        impose(rule, model.layer)
    return model.eval(), x, model(x).detach()


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_adapter_works_and_goes_again(rule: str, when: str) -> None:
    model, x, base = model_with(rule, when)
    randomise(model)
    layer, weight = model.layer, model.layer.weight.detach()
    update = layer.lora_adapters["default"].spec.scale * layer.lora_B["default"] @ layer.lora_A["default"]
    torch.testing.assert_close(model(x), nn.functional.linear(x, weight + update, layer.bias), rtol=1e-12, atol=1e-12)
    model(x).sum().backward()
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if "lora_" in name)
    lora_plus.remove_lora(model)
    torch.testing.assert_close(model(x), base, rtol=1e-12, atol=1e-12)
    assert not isinstance(model.layer, LoRALayer)


@pytest.mark.parametrize("when", ["before", "after"])
def test_merging_is_refused_until_the_weight_is_a_plain_one(rule: str, when: str) -> None:
    model, x, _ = model_with(rule, when)
    y = randomise(model)(x).detach()
    with pytest.raises(ValueError, match="'layer': its weight is computed by a parametrization or a hook; remove that"):
        lora_plus.merge_lora(model)
    assert torch.equal(model(x), y)
    RULES[rule][1](model.layer)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    with lora_plus.merged(model):
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    lora_plus.merge_and_unload(model)
    assert type(model.layer) is nn.Linear
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


def test_only_the_adapter_is_trained(rule: str) -> None:
    model, _, _ = model_with(rule, "before")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"layer.lora_A.default", "layer.lora_B.default"}


def test_taking_a_copy_apart_leaves_the_original_whole() -> None:
    model, x, _ = model_with("spectral_norm", "before")
    y = randomise(model)(x).detach()
    twin = copy.deepcopy(model)
    unparametrize(lora_plus.remove_lora(twin).layer)
    assert torch.equal(model(x), y)


def test_a_class_put_on_top_by_another_tool_is_not_lost_silently() -> None:
    model = lora_plus.inject_lora(Holder(nn.Linear(4, 4)), ["layer"])

    class Traced(type(model.layer)):  # type: ignore[misc]
        pass

    model.layer.__class__ = Traced
    for undo in (lora_plus.remove_lora, lora_plus.merge_and_unload):
        with pytest.raises(
            ValueError, match="'layer' cannot be restored: another tool has changed its class to Traced"
        ):
            undo(model)
    assert type(model.layer) is Traced and model.layer.lora_merge is None

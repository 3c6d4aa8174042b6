"""DoRA on a forward that adds something of its own to what the weight does: only the weight's part is rescaled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DORA_CASES, Case
from torch import Tensor, nn

import lora_plus
from lora_plus.adapted_weight import adapted_weights
from lora_plus.lora_layer import LoRALayer

STOCK_CASES = [case for case in DORA_CASES if type(case.layer()).__module__.startswith("torch.")]


def own_class(case: Case) -> nn.Module:
    """The case's model, with a subclass of the layer that adds a function of the input."""
    model = case.model()
    base: Any = type(model.layer)

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        return base.forward(self, input) + extra(input)

    model.layer.__class__ = type("Own", (base,), {"forward": forward})
    return model


def extra(x: Tensor) -> Tensor:
    return 2 + x.double().mean()


def assign(model: nn.Module) -> nn.Module:
    """A function on the layer object that does the same, and says nothing of what it calls."""
    layer, base = model.layer, getattr(type(model.layer), "base_class", type(model.layer))
    model.layer.forward = lambda input: base.forward(layer, input) + extra(input)
    return model


def settle(model: nn.Module, seed: int = 7) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for _, weight in adapted_weights(model):
        for _, _, parameter in weight.lora_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += noise
    return model


MAKERS: dict[str, Callable[[Case], nn.Module]] = {
    "class": lambda case: inject(own_class(case), case),
    "assigned before": lambda case: inject(assign(case.model()), case),
    "assigned after": lambda case: assign(inject(case.model(), case)),
}


def inject(model: nn.Module, case: Case) -> nn.Module:
    return lora_plus.inject_lora(model, ["layer"], **case.settings)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("case", STOCK_CASES, ids=lambda case: case.name)
def test_only_the_weight_s_part_is_rescaled(case: Case, make: Callable[[Case], nn.Module]) -> None:
    model, x, plain_x = settle(make(case)).eval(), case.input(), case.input()
    layer = model.layer
    assert isinstance(layer, LoRALayer)
    dora = copy.deepcopy(case.model())
    with torch.no_grad():
        dora.layer.weight.copy_(layer.effective_weight(("default",)))
    if x.is_floating_point():
        x.requires_grad_()
        plain_x.requires_grad_()
    y, expected = model(x), dora(plain_x) + extra(plain_x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    if x.is_floating_point():
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, plain_x.grad, rtol=0, atol=1e-10)
    lora_plus.merge_lora(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", STOCK_CASES, ids=lambda case: case.name)
def test_the_start_is_the_base_bit_for_bit(case: Case) -> None:
    torch.manual_seed(0)
    assert torch.equal(inject(own_class(case), case)(case.input()), own_class(case)(case.input()))


def test_gpt2_s_layer_is_known_to_add_the_bias_only(monkeypatch: pytest.MonkeyPatch) -> None:
    known = pytest.importorskip("transformers.pytorch_utils").Conv1D
    own = type("Own", (known,), {"forward": lambda self, x: known.forward(self, x) + extra(x)})

    def fail(*args: Any) -> Tensor:
        raise AssertionError("W x was computed twice")

    x = torch.randn(3, 6, dtype=torch.float64)
    models = [lora_plus.inject_lora(nn.Sequential(kind(5, 6)).double(), ["0"], variant="dora") for kind in (known, own)]
    monkeypatch.setattr(LoRALayer, "product", fail)
    torch.testing.assert_close(settle(models[0])(x), lora_plus.merge_and_unload(models[0])(x), rtol=0, atol=1e-12)
    with pytest.raises(AssertionError, match="computed twice"):
        models[1](x)

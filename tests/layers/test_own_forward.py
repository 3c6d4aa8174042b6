"""A forward of a user's own: DoRA rescales the weight's part alone, the update comes once, and merging is tried out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DORA_CASES, Case, parameters_of, randomise
from torch import Tensor, nn

import lora_plus
from lora_plus.layers.layer import LoRALayer
from lora_plus.model.tree import adapted_weights

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
        for parameter in parameters_of(weight):
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
        dora.layer.weight.copy_(layer.effective_weight(layer.lora_active))
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


# ---- forwards that call their own layer, or change its convolution ---------------------------------------------------


class Flattened(nn.Linear):
    """Computes on two dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim > 2:
            return self(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return super().forward(x)


class Chunked(nn.Embedding):
    """Looks up one row of indices at a time."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.forward(row) for row in x]) if x.ndim > 1 else super().forward(x)


class Standardised(nn.Conv2d):
    """Convolves with a weight of norm 1."""

    def _conv_forward(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return super()._conv_forward(x, w / w.square().sum((1, 2, 3), keepdim=True).sqrt(), b)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("layer", [Flattened(5, 4), Chunked(7, 4)], ids=lambda layer: type(layer).__name__)
def test_a_forward_that_calls_its_layer_gets_the_update_once(layer: nn.Module, variant: str) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).double()
    x = torch.randint(7, (2, 3)) if isinstance(layer, nn.Embedding) else torch.randn(2, 3, 5, dtype=torch.float64)
    randomise(lora_plus.inject_lora(model, ["0"], r=2, variant=variant))
    y = model(x)
    plain = lora_plus.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(y, plain(x), rtol=1e-12, atol=1e-12)
    with lora_plus.merged(model.eval()):
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


class Scaled(nn.Embedding):
    """Looks up rows and scales them."""

    def forward(self, x: Tensor) -> Tensor:
        return 4 * super().forward(x)


def test_an_embedding_that_does_more_to_rows_with_a_norm_is_refused() -> None:
    model = nn.Sequential(Scaled(9, 4, max_norm=1.0))
    with pytest.raises(ValueError, match="Scaled with max_norm and a forward of its own"):
        lora_plus.inject_lora(model, ["0"], r=2)
    model[0].max_norm = None
    x, y = torch.arange(9), model(torch.arange(9))
    assert torch.equal(lora_plus.inject_lora(model, ["0"], r=2)(x), y)


def test_a_convolution_that_changes_its_weight_is_not_merged() -> None:
    model = nn.Sequential(Standardised(4, 6, 3)).double()
    randomise(lora_plus.inject_lora(model, ["0"], r=2))
    model(torch.randn(2, 4, 5, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="its own forward changes its weight before using it"):
        lora_plus.merge_lora(model)


class Normed(nn.Linear):
    """Has a part that draws numbers and one that keeps statistics."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(super().forward(x)))


def test_merging_tries_a_forward_out_in_eval_mode_and_without_a_trace() -> None:
    model = randomise(lora_plus.inject_lora(nn.Sequential(Normed()).double(), ["0"], r=2))
    state, draws = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    lora_plus.merge_lora(model)
    lora_plus.unmerge_lora(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), draws) and all(module.training for module in model.modules())

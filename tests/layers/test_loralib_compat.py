"""loralib, the reference of the paper's authors, computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import Holder, randomise
from torch import nn

import lora_plus

pytestmark = pytest.mark.peers

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
DTYPES = list(TOLERANCE)


def same_numbers(layer: nn.Module, reference: nn.Module, A: str = "lora_A", B: str = "lora_B") -> None:
    """Give loralib's layer the base weight and the adapter of ours."""
    with torch.no_grad():
        reference.weight.copy_(layer.weight)
        if getattr(layer, "bias", None) is not None:
            reference.bias.copy_(layer.bias)
        getattr(reference, A).copy_(layer.lora_A["default"])
        getattr(reference, B).copy_(layer.lora_B["default"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"])
def test_loralib_computes_the_same(kind: str, dtype: torch.dtype) -> None:
    loralib = pytest.importorskip("loralib")
    generator = torch.Generator().manual_seed(0)
    options = {"r": 3, "lora_alpha": 5}
    x = torch.randn(2, 6, generator=generator, dtype=dtype)
    if kind == "Linear":
        base, reference = nn.Linear(6, 5), loralib.Linear(6, 5, **options)
    elif kind == "Embedding":
        base, reference = nn.Embedding(9, 4), loralib.Embedding(9, 4, **options)
        x = torch.randint(9, (2, 5), generator=generator)
    else:
        # loralib's own update has r * k rows; a kernel of one gives it the shape of ours
        base, reference = getattr(nn, kind)(4, 6, 1), getattr(loralib, kind)(4, 6, 1, **options)
        x = torch.randn(2, 4, *[5] * int(kind[-2]), generator=generator, dtype=dtype)
    model = randomise(lora_plus.inject_lora(Holder(base.to(dtype)), ["layer"], r=3, alpha=5))
    reference = reference.to(dtype)
    same_numbers(model.layer, reference if kind in ("Linear", "Embedding") else _with_weight(reference))
    plain = lora_plus.remove_lora(copy.deepcopy(model))(x)
    assert (plain - model(x)).abs().max() > 1e-2
    torch.testing.assert_close(reference(x), model(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def _with_weight(reference: nn.Module) -> nn.Module:
    """loralib's convolutions hold the base layer as ``conv``."""
    outer = nn.Module()
    outer.weight, outer.bias = reference.conv.weight, reference.conv.bias
    outer.lora_A, outer.lora_B = reference.lora_A, reference.lora_B
    return outer

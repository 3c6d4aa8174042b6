"""What a forward costs besides arithmetic: the calls of Python functions, which a small layer spends its time on."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import lora_plus
from lora_plus.tensors import fused_linear

OURS = str(Path(lora_plus.__file__).parent)


def python_calls(run: Callable[[], Any]) -> list[str]:
    """The Python functions that it calls, itself not counted: ``file:name``."""
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            calls.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")

    gc.disable()  # what a collection calls is no part of it
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls[1:]


@pytest.fixture(params=[(8, 32), (2, 4, 32)], ids=str)
def x(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.randn(request.param).requires_grad_()


class OfAUser(nn.Linear):
    """A class with the forward of ``nn.Linear``."""


@pytest.fixture(params=["constructed", "injected"])
def layer(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "constructed":
        return lora_plus.LoRALinear(32, 32)
    return injected(nn.Linear(32, 32))


def injected(layer: nn.Module) -> nn.Module:
    return lora_plus.inject_lora(nn.Sequential(layer), ["0"])[0]


@pytest.mark.parametrize("gradients", [True, False])
def test_a_small_layer(layer: nn.Module, x: torch.Tensor, gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "_LEAST_WORK", 2**30)
    with torch.set_grad_enabled(gradients):
        calls = python_calls(lambda: layer(x))
    assert len(calls) <= 18, calls
    assert not any(call.endswith(("<genexpr>", "comp>", "__enter__")) for call in calls), calls


def test_a_class_of_a_user_costs_the_question_of_its_forward(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "_LEAST_WORK", 2**30)
    layer = injected(OfAUser(32, 32))
    calls = python_calls(lambda: layer(x))
    assert len(calls) <= 19 and not any(call.endswith(("<genexpr>", "comp>", "__enter__")) for call in calls), calls


@pytest.mark.parametrize("gradients", [True, False])
def test_a_large_layer(layer: nn.Module, x: torch.Tensor, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        calls = python_calls(lambda: layer(x))
    ours = [call for call in calls if call.startswith(OURS)]
    assert len(ours) <= 14 and len(calls) <= (33 if gradients else 18), calls  # torch's autograd.Function has its own
    assert not any(call.endswith(("<genexpr>", "comp>", "__enter__")) for call in ours), ours


def test_the_backward_pass_of_a_small_layer_is_torchs_own(
    layer: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_linear, "_LEAST_WORK", 2**30)
    loss = layer(x).sum()
    assert not [call for call in python_calls(lambda: loss.backward()) if call.startswith(OURS)]

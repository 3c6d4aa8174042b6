"""A call that fails has drawn no random number, from torch's global generator or from the one that it was given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randomise
from torch import Tensor, nn

import lora_plus
from lora_plus import LoRALinear
from lora_plus.surgery import combine_adapters, resize_adapter
from lora_plus.training import init_from_gradients, reset_lora_parameters


def wide() -> nn.Module:
    """Two layers, of which the second one has a row of zeros and is too narrow for a rank of 4."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    model[1].weight.data[0] = 0
    return model


def failing_init() -> Callable[..., tuple[Tensor, Tensor]]:
    """An init whose second pair of factors has a wrong shape."""
    seen = []

    def init(weight: Tensor, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        seen.append(weight)
        A = torch.randn(r, weight.shape[1], generator=generator, dtype=weight.dtype)
        return A, weight.new_zeros(len(weight) + (len(seen) > 1), r)

    return init


def adapted(**settings: Any) -> nn.Module:
    return randomise(lora_plus.inject_lora(wide(), ["0", "1"], r=2, **settings))


def not_finite() -> nn.Module:
    model = lora_plus.add_adapter(adapted(), "other")
    model[1].lora_A["default"].data.fill_(torch.inf)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], Any]]] = {
    "inject, DoRA": (wide, lambda m, g: lora_plus.inject_lora(m, ["0", "1"], variant="dora", generator=g)),
    "inject, init": (wide, lambda m, g: lora_plus.inject_lora(m, ["0", "1"], init=failing_init(), generator=g)),
    "inject, fixed A": (
        wide,
        lambda m, g: lora_plus.inject_lora(m, ["0", "1"], variant="lora_fa", init="kaiming_B", generator=g),
    ),
    "add": (adapted, lambda m, g: lora_plus.add_adapter(m, "b", variant="dora", generator=g)),
    "reset": (adapted, lambda m, g: reset_lora_parameters(m, init=failing_init(), generator=g)),
    "reset, pissa": (adapted, lambda m, g: reset_lora_parameters(m, init="pissa", generator=g)),
    "resize": (not_finite, lambda m, g: resize_adapter(m, r=4, generator=g)),
    "combine": (
        not_finite,
        lambda m, g: combine_adapters(m, ["default", "other"], method="dare", r=2, density=0.5, generator=g),
    ),
    "constructor": (lambda: None, lambda _, g: LoRALinear(4, 3, variant="lora_fa", init="kaiming_B", generator=g)),
    "constructor, name": (lambda: None, lambda _, g: LoRALinear(4, 3, adapter="a.b", generator=g)),
    "gradients": (
        adapted,
        lambda m, g: init_from_gradients(m, lambda x: m(x * torch.rand(())).sum(), [torch.zeros(1, 6)]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("given", [False, True], ids=["global", "generator"])
@pytest.mark.parametrize(("make", "call"), REFUSED.values(), ids=REFUSED)
def test_a_call_that_fails_draws_nothing(make: Callable[[], Any], call: Callable[[Any, Any], Any], given: bool) -> None:
    model, generator = make(), torch.Generator().manual_seed(3)
    before = None if model is None else copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), generator.get_state()
    with pytest.raises((ValueError, TypeError)):
        call(model, generator if given else None)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(generator.get_state(), states[1])
    if before is not None:
        assert list(model.state_dict()) == list(before)


def test_a_call_that_succeeds_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    lora_plus.inject_lora(wide(), ["0"])
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("every", [True, False])
def test_the_states_of_an_accelerator_are_brought_back(monkeypatch: pytest.MonkeyPatch, every: bool) -> None:
    from lora_plus.tensors import random_state

    class Accelerator:
        states = [1, 2]

        @classmethod
        def is_initialized(cls) -> bool:
            return True

    def read() -> list[int]:
        return list(Accelerator.states)

    def write(states: list[int]) -> None:
        Accelerator.states = states

    ending = "_all" if every else ""
    monkeypatch.setattr(Accelerator, f"get_rng_state{ending}", staticmethod(read), raising=False)
    monkeypatch.setattr(Accelerator, f"set_rng_state{ending}", staticmethod(write), raising=False)
    monkeypatch.setattr(random_state, "_accelerator", lambda: Accelerator)
    bring_back = random_state.random_state()
    Accelerator.states = [3, 4]
    bring_back()
    assert Accelerator.states == [1, 2]

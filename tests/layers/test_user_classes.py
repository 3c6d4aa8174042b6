"""A model is let go when nothing refers to it, and a user's class with its models, whatever was made of it."""

from __future__ import annotations

import copy
import gc
import importlib.util
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import lora_plus


@pytest.fixture(autouse=True)
def what_is_there_already_is_not_collected() -> Iterator[None]:
    """Or each collection looks through all that other tests have imported, which takes most of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def own_linear() -> nn.Module:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    return Own(4, 4)


def own_holder() -> nn.Module:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w @ self.v

    return Own()


CASES = {"layer": (own_linear, ["0"]), "parameters": (own_holder, ["w", "v"])}


@pytest.mark.parametrize(("make", "targets"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("end", ["removed", "merged", "dropped"])
def test_a_class_is_let_go(make: Callable[[], nn.Module], targets: list[str], end: str) -> None:
    model = nn.Sequential(make())
    kind = weakref.ref(type(model[0]))
    for _ in range(1 if end == "dropped" else 2):
        lora_plus.inject_lora(model, targets, r=2)
        model(torch.randn(3, 4))
        if end == "removed":
            lora_plus.remove_lora(model)
        if end == "merged":
            lora_plus.merge_and_unload(model)
    del model
    for _ in range(2):  # what was made of the class goes first
        gc.collect()
    assert kind() is None


@pytest.mark.parametrize(("make", "targets"), CASES.values(), ids=CASES)
def test_a_model_is_let_go_at_once(make: Callable[[], nn.Module], targets: list[str]) -> None:
    make()  # a class is in a cycle with itself
    gc.collect()
    gc.disable()
    try:
        model = lora_plus.inject_lora(nn.Sequential(make()), targets, r=2)
        lora_plus.loraplus_param_groups(model, lr=1e-3)
        lora_plus.merge_lora(model)
        module = weakref.ref(model[0])
        del model
        assert module() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("make", "targets"), CASES.values(), ids=CASES)
def test_layers_of_one_class_become_layers_of_one_class(make: Callable[[], nn.Module], targets: list[str]) -> None:
    first = make()
    model = lora_plus.inject_lora(
        nn.Sequential(first, copy.deepcopy(first)), targets[:1] if targets[0] == "w" else ["0", "1"]
    )
    gc.collect()
    assert type(model[0]) is type(model[1]) is type(copy.deepcopy(model)[0])
    other = lora_plus.inject_lora(
        nn.Sequential(copy.deepcopy(lora_plus.remove_lora(copy.deepcopy(model))[0])), targets[:1]
    )
    assert type(other[0]) is type(model[0])


class Scaled(nn.Linear):
    """With a type stated in the class, in a file of annotations that are texts."""

    gain: float = 0.5

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.gain * super().forward(input)


def test_a_layer_that_states_types_is_adapted() -> None:
    model = lora_plus.inject_lora(nn.Sequential(Scaled(4, 4)), ["0"], r=2)
    assert type(model[0]).__name__ == "LoRAScaled"


def test_the_annotations_of_a_class_are_no_attributes_of_a_lora_layer() -> None:
    # Python 3.14 keeps them as __annotations__ in classes of files such as this one, and of torch's under another name
    spec = importlib.util.find_spec("lora_plus.layers.kinds")
    assert spec is not None and spec.loader is not None
    kinds = importlib.util.module_from_spec(spec)
    vars(kinds)["dir"] = lambda held: sorted({*dir(held)} - ({"__annotations__"} if held is nn.Module else set()))
    spec.loader.exec_module(kinds)
    assert "__annotations__" in kinds.dir(Scaled)
    assert kinds.why_unsupported(Scaled(4, 4), lora_plus.LoRALinear) is None

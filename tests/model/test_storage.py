"""How engines hold parameters: one entry in a table, asked once an operation, and said in one form of message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import lora_plus
from lora_plus import inject_lora
from lora_plus.files import adapter_state_dict
from lora_plus.model.state import NEEDS, Need, require
from lora_plus.model.storage import FINDERS, Storage
from lora_plus.model.tree import Tree
from lora_plus.training import reset_lora_parameters


class Negated(Storage):
    """An engine that keeps every parameter with the other sign between forwards."""

    engine = "Negation"
    sharded = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def gathered(self, tensors: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
        held = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
        for tensor in held:
            tensor.data.neg_()
        yield
        for tensor in held:
            tensor.data.neg_()

    def read(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        with self.gathered(tensors.values()):
            return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.fixture
def asked() -> Iterator[list[nn.Module]]:
    """The models about which the finder of `Negated` has been asked."""
    models: list[nn.Module] = []

    def find(tree: Tree) -> Storage | None:
        models.append(tree.model)
        return Negated(tree.model) if getattr(tree.model, "negated", False) else None

    FINDERS["torch"] = find
    yield models
    del FINDERS["torch"]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def test_an_engine_from_outside_is_one_entry(asked: list[nn.Module]) -> None:
    plain = inject_lora(net(), ["0"], r=2, train_also=["1"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain[0].lora_B["default"].fill_(0.5)
    wanted = {name: tensor.clone() for name, tensor in adapter_state_dict(plain).items()}
    plain.negated = True
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.neg_()
    assert adapter_state_dict(plain).keys() == wanted.keys()
    for name, tensor in adapter_state_dict(plain).items():
        assert torch.equal(tensor, wanted[name])
    reset_lora_parameters(plain, init="gaussian", generator=torch.Generator().manual_seed(1))
    assert not adapter_state_dict(plain)["0.lora_B"].any()
    original = plain[1]._lora_trained[""].held[None]["weight"].clone()
    lora_plus.remove_lora(plain)
    assert torch.equal(plain[1].weight, -original)


@pytest.mark.parametrize("operation", ["inject", "add", "merge", "disable", "remove"])
def test_an_operation_asks_once_how_parameters_are_held(operation: str, asked: list[nn.Module]) -> None:
    model = net() if operation == "inject" else inject_lora(net(), ["0"], train_also=["1"])
    asked.clear()
    if operation == "inject":
        inject_lora(model, ["0"], train_also=["1"])
    elif operation == "add":
        lora_plus.add_adapter(model, "b")
    elif operation == "merge":
        lora_plus.merge_lora(model)
    elif operation == "disable":
        with lora_plus.disabled(model):
            pass
    else:
        lora_plus.remove_lora(model)
    assert asked == [model]


LIMITS = {"fixed": Need.UNSHARDED, "flat": Need.WHOLE, "copied": Need.UNCOPIED}


@pytest.mark.parametrize("limit", LIMITS)
def test_what_an_engine_cannot_do_is_said_in_one_form(limit: str) -> None:
    model = net()
    storage = type("Limited", (Storage,), {"engine": "Limited", limit: True})()
    FINDERS["torch"] = lambda each: storage if each.model is model else None
    try:
        with pytest.raises(
            ValueError, match=f"^trying needs {NEEDS[LIMITS[limit]][0]}: .*Limited.*; do it before .*, or not$"
        ):
            require(model, "trying", LIMITS[limit], instead=", or not")
        require(model, "trying", ~LIMITS[limit] & ~Need.ADAPTED)
    finally:
        del FINDERS["torch"]


def test_every_need_is_in_the_table() -> None:
    assert set(NEEDS) == {need for need in Need if bin(need.value).count("1") == 1}

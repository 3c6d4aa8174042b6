"""Adapters in memory: what is loaded is never the caller's own memory, and what is no adapter is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from torch import Tensor, nn

import lora_plus as lp
from lora_plus.files import to_peft, write_adapter
from lora_plus.files.save import describe
from lora_plus.files.saved_adapter import SavedAdapter
from lora_plus.model.state import State

Source = Any
SOURCES: dict[str, Callable[[nn.Module], Source]] = {
    "as PEFT's": to_peft,
    "as plain data": lambda model: describe(State(model), "default"),
}


def plain(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(4, 4, dtype=dtype) for name in ("a", "b", "c", "d")})


def adapted(seed: int = 0, **settings: Any) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return randomise(lp.inject_lora(plain(), ["a", "b"], r=2, train_also=["c", "d"], **settings), seed=seed)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def storages(model: nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_what_is_loaded_has_memory_of_its_own(source: Callable[[nn.Module], Source]) -> None:
    model = adapted()
    before, other = values(model), plain()
    lp.load_adapter(other, source(model), trainable=True)
    assert storages(other).isdisjoint(storages(model))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_model_takes_its_own_values_in_other_places(source: Callable[[nn.Module], Source]) -> None:
    model = adapted()
    before = values(model)
    swapped = {"a": "b", "b": "a", "c": "d", "d": "c"}
    lp.load_adapter(model, source(model), names=swapped, replace=True)
    for name, tensor in model.state_dict().items():
        if "lora_" in name or name[0] in "cd":
            assert torch.equal(tensor, before[swapped[name[0]] + name[1:]]), name


def test_values_with_gradients_are_taken_without_them() -> None:
    config, tensors = to_peft(adapted(1))
    grown = {name: tensor.clone().requires_grad_() * 2 for name, tensor in tensors.items()}
    for model in (plain(), adapted()):
        lp.load_adapter(model, (config, grown), replace=True)
        assert all(parameter.is_leaf for parameter in model.parameters())


@pytest.mark.parametrize(("alpha", "dtype", "value"), [(2.0, torch.float64, 1e300), (4e6, torch.float32, 1.0)])
@pytest.mark.parametrize("on_disk", [False, True])
def test_values_that_the_dtype_cannot_hold_are_refused(
    alpha: float, dtype: torch.dtype, value: float, on_disk: bool, tmp_path: Path
) -> None:
    source, model = adapted(alpha=alpha, dtype=dtype), adapted(alpha=1.0, dtype=torch.float16)
    with torch.no_grad():
        source["b"].lora_B["default"].fill_(value)
    before = values(model)
    lp.save_adapter(source, tmp_path / "a.safetensors")
    given = tmp_path / "a.safetensors" if on_disk else describe(State(source), "default")
    with pytest.raises(ValueError, match=r"'b.lora_B' has values that are not finite in torch.float16"):
        lp.load_adapter(model, given, replace=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_module_trained_in_full_must_hold_its_values_too(tmp_path: Path) -> None:
    source = adapted()
    with torch.no_grad():
        source["d"].weight.fill_(1e6)
    lp.save_adapter(source, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"'d\.weight': values that are not finite"):
        lp.load_adapter(plain(torch.float16), tmp_path / "a.safetensors")


def test_an_adapter_without_values_takes_none() -> None:
    with pytest.raises(ValueError, match="'a': the model's adapter has no values"):
        lp.load_adapter(adapted().to("meta"), to_peft(adapted()), replace=True)


Broken = Callable[[dict[str, Any], dict[str, Tensor]], Any]
BROKEN: dict[str, tuple[Broken, str]] = {
    "no config": (lambda config, tensors: (None, tensors), "must be a JSON object, got NoneType"),
    "the config as a text": (lambda config, tensors: ("{}", tensors), "must be a JSON object, got str"),
    "a number as a field": (lambda config, tensors: ({**config, 3: 4}, tensors), "must be a JSON object"),
    "no tensors": (lambda config, tensors: (config, None), "must be a mapping from names to tensors, got NoneType"),
    "a list": (lambda config, tensors: (config, [*tensors.values()]), "must be a mapping from names to tensors"),
    "arrays": (lambda config, tensors: (config, {k: v.numpy() for k, v in tensors.items()}), "got ndarray"),
    "sparse": (lambda config, tensors: (config, {k: v.to_sparse() for k, v in tensors.items()}), "dense tensor"),
    "meta": (lambda config, tensors: (config, {k: v.to("meta") for k, v in tensors.items()}), "has no values"),
    "a number as a name": (lambda config, tensors: (config, {**tensors, 3: torch.ones(1)}), "3 is no name"),
    "swapped": (lambda config, tensors: (tensors, config), "must be a dense tensor"),
}


@pytest.mark.parametrize("names", [None, {"a": "a"}])
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(("broken", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_adapter_is_refused(broken: Broken, message: str, replace: bool, names: Any) -> None:
    model = adapted() if replace else plain()
    before = values(model)
    with pytest.raises(ValueError, match=message):
        lp.load_adapter(model, broken(*to_peft(adapted(1))), replace=replace, names=names)
    after = values(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("edit", [lambda parts: parts.pop("lora_B"), lambda parts: parts.update(more=torch.ones(2))])
def test_plain_data_has_just_the_tensors_of_its_variant(edit: Callable[[dict[str, Tensor]], Any]) -> None:
    saved: SavedAdapter = describe(State(adapted()), "default")
    edit(saved.layers["b"].tensors)
    model = plain()
    with pytest.raises(ValueError, match=r"'b': (lora_B has shape None, expected \(4, 2\)|more has shape \(2,\))"):
        lp.load_adapter(model, saved)
    assert not any("lora_" in name for name, _ in model.named_parameters())


NO_VALUES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "an array": (lambda tensor: tensor.detach().numpy(), "must be a dense tensor, got ndarray"),
    "sparse": (lambda tensor: tensor.detach().to_sparse(), r"must be a dense tensor, got torch\.sparse_coo"),
    "on meta": (lambda tensor: tensor.to("meta"), r"has no values \(it is on the meta device\); load them first"),
}


def test_plain_data_that_is_a_list_is_refused() -> None:
    saved = describe(State(adapted()), "default")
    saved.layers["a"].tensors["lora_B"] = saved.layers["a"].tensors["lora_B"].tolist()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"'a': lora_B has shape \(\), expected \(4, 2\)"):
        lp.load_adapter(plain(), saved)


@pytest.mark.parametrize("part", ["a.lora_B", "c.weight"])
@pytest.mark.parametrize(("change", "message"), NO_VALUES.values(), ids=NO_VALUES)
def test_plain_data_that_is_no_dense_tensor_is_refused_by_name(
    change: Callable[[Tensor], Any], message: str, part: str, tmp_path: Path
) -> None:
    saved, model = describe(State(adapted()), "default"), plain()
    owner, _, name = part.partition(".")
    held = saved.layers[owner].tensors if owner in saved.layers else saved.trained[owner]
    held[name] = change(held[name])
    before = values(model)
    with pytest.raises(ValueError, match=f"'{part}':? {message}"):
        lp.load_adapter(model, saved)
    assert values(model).keys() == before.keys()
    with pytest.raises(ValueError, match=f"'{part}' {message}"):
        write_adapter(saved, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_values_is_not_saved(tmp_path: Path) -> None:
    model = adapted().to("meta")
    line = r"'a\.lora_A' has no values \(it is on the meta device\); load them first"
    for taken in (lambda: lp.save_adapter(model, tmp_path / "a"), lambda: to_peft(model)):
        with pytest.raises(ValueError, match=line):
            taken()
    assert not list(tmp_path.iterdir())


def test_what_peft_holds_in_another_way_does_not_come_back_in_place() -> None:
    model = adapted(variant="lora_fa")
    before = values(model)
    with pytest.raises(ValueError, match="cannot be loaded; the model is unchanged"):
        lp.load_adapter(model, to_peft(model), replace=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_started_from_the_weight_comes_back_in_place(init: Any) -> None:
    model, fresh = adapted(init=init), adapted(init=init)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if "lora_A." in name or "lora_B." in name:
                parameter.mul_(2)
    lp.load_adapter(fresh, to_peft(model), replace=True)
    after = fresh.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("alpha", "same"), [(16, True), (8, False)])
def test_a_state_dict_has_no_scale_and_what_is_taken_in_peft_s_format_has(alpha: float, same: bool) -> None:
    model, other, x = adapted(), adapted(alpha=alpha), torch.randn(3, 4)
    randomise(model, seed=1)
    lp.load_adapter(other, to_peft(model), replace=True)
    torch.testing.assert_close(other["a"](x), model["a"](x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other["a"](x), model["a"](x)) is same

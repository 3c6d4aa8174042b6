"""Whatever a file says, it loads right or is a ValueError."""

from __future__ import annotations

import copy
import json
import math
import shutil
import struct
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from files_support import (
    DTYPES,
    TRAINED,
    assemble,
    assert_same_tensors,
    bits,
    net,
    parts,
    plain_net,
    settings_of,
    snapshot,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lora_plus
from lora_plus.files import FORMATS, adapter_state_dict, read_adapter, write_adapter

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.sampled_from([10**400, -(2**70), 0.5, 1e308, -0.0, math.nan, math.inf])
    | st.sampled_from(["", "lora", "dora", "rslora", "proj", "head", "embed", "lora_A", "0.bias", "q(", ".*", "\0"])
    | st.text(max_size=4)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every ``(container, key)`` in a JSON value."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def mutate(value: Any, data: st.DataObject) -> Any:
    """A copy with one to three entries replaced, removed, added or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 3))):
        spots = list(places(value))
        if not spots:
            return value
        container, key = data.draw(st.sampled_from(spots))
        action = data.draw(st.sampled_from(["replace", "remove", "add", "swap"]))
        if action == "replace":
            container[key] = data.draw(VALUES)
        elif action == "remove":
            del container[key]
        elif action == "add" and isinstance(container, dict):
            container[data.draw(st.sampled_from(["r", "alpha", "groups", "proj", "head", "x"]))] = data.draw(VALUES)
        elif action == "swap":
            other, place = data.draw(st.sampled_from(spots))
            container[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(container[key])
    return value


FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def is_rewritten_or_refused(path: Path) -> None:
    """Reading it without a model, and writing it in each format, is a ValueError or works."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            saved = read_adapter(path)
        except ValueError as error:
            assert f"adapter {str(path)!r} cannot be read:" in str(error)
            return
        for format in FORMATS:
            try:
                write_adapter(saved, Path(folder) / format, format=format)  # type: ignore[arg-type]
            except ValueError as error:
                assert "the adapter cannot be written in" in str(error)
                assert not (Path(folder) / format).exists()
        again = read_adapter(Path(folder) / "native")
        assert again.layers.keys() == saved.layers.keys()


def loads_right_or_is_refused(model: nn.Module, path: Path) -> bool:
    """Whether it loaded; asserts that a refusal is a ValueError and leaves the model bit for bit as it was."""
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        is_rewritten_or_refused(path)
        try:
            lora_plus.load_adapter(model, path)
        except ValueError as error:
            assert snapshot(model) == before
            assert f"adapter {str(path)!r} cannot be loaded; the model is unchanged:" in str(error)
            return False
    return True


@FUZZ
@given(data=st.data())
def test_any_native_document_loads_right_or_is_refused(data: st.DataObject, native_bytes: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(native_bytes)
        file = parts(path)
        file.document = mutate(file.document, data)
        path.write_bytes(file.bytes())
        model = net()
        if not loads_right_or_is_refused(model, path):
            return
    state = adapter_state_dict(model)
    assert {name: bits(tensor) for name, tensor in state.items()} == {
        name: raw for name, (_, _, raw) in file.tensors.items()
    }
    for name, spec in settings_of(model).items():
        del spec["scale"]
        assert spec == {key: file.document["layers"][name].get(key, file.document.get(key)) for key in spec}


@FUZZ
@given(data=st.data())
def test_any_header_bytes_load_right_or_are_refused(data: st.DataObject, native_bytes: bytes) -> None:
    raw = bytearray(native_bytes)
    (length,) = struct.unpack("<Q", raw[:8])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(raw)
        loads_right_or_is_refused(net(), path)


@pytest.fixture(scope="module")
def peft_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A model and its PEFT folder, which nobody changes."""
    model, folder = plain_net(), tmp_path_factory.mktemp("peft")
    lora_plus.inject_lora(
        model, TRAINED, r=2, alpha=3, rank_pattern={"proj": 3}, alpha_pattern={"conv": 5}, train_also=["head"]
    )
    lora_plus.save_adapter(randomise(model), folder)
    return model, folder


@FUZZ
@given(data=st.data())
def test_any_peft_config_loads_right_or_is_refused(data: st.DataObject, peft_model: tuple[nn.Module, Path]) -> None:
    saved, original = peft_model
    config = json.loads((original / "adapter_config.json").read_text())
    mutated = mutate(config, data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(original, Path(name) / "adapter"))
        (folder / "adapter_config.json").write_text(json.dumps(mutated))
        loaded = plain_net()
        if not loads_right_or_is_refused(loaded, folder):
            return
    assert_same_tensors(adapter_state_dict(loaded), adapter_state_dict(saved))
    deciding = ("lora_alpha", "alpha_pattern", "use_rslora")
    if all(mutated.get(key, "none") == config[key] for key in deciding):
        scales = {name: spec["scale"] for name, spec in settings_of(saved).items()}
        assert {name: spec["scale"] for name, spec in settings_of(loaded).items()} == scales


@FUZZ
@given(data=st.data())
def test_any_peft_tensors_load_right_or_are_refused(data: st.DataObject, peft_model: tuple[nn.Module, Path]) -> None:
    _, original = peft_model
    file = parts(original / "adapter_model.safetensors")
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(sorted(file.tensors)))
        shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
        file.put(key, torch.ones(shape, dtype=data.draw(st.sampled_from(list(DTYPES)))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(original, Path(name) / "adapter"))
        (folder / "adapter_model.safetensors").write_bytes(assemble(file.tensors, {"format": "pt"}))
        loads_right_or_is_refused(plain_net(), folder)

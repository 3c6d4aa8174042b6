"""What is wrong with a native file is refused with the reason, and the model is untouched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from files_support import (
    FLOATS,
    TRAINED,
    Edit,
    Parts,
    Shared,
    adapted_net,
    assemble,
    assert_same_tensors,
    both,
    drop,
    net,
    parts,
    put,
    refused,
    snapshot,
)
from torch import nn

import lora_plus
from lora_plus.files import adapter_state_dict


@pytest.fixture
def native_parts(native_bytes: bytes, tmp_path: Path) -> Parts:
    path = tmp_path / "original.safetensors"
    path.write_bytes(native_bytes)
    return parts(path)


def write(*keys_and_value: Any) -> Edit:
    """Set an entry of the document: the keys that lead to it, and its value."""
    *keys, last, value = keys_and_value

    def edit(file: Parts) -> None:
        entry = file.document
        for key in keys:
            entry = entry[key]
        entry[last] = value

    return edit


def erase(*keys: Any) -> Edit:
    def edit(file: Parts) -> None:
        entry = file.document
        for key in keys[:-1]:
            entry = entry[key]
        del entry[keys[-1]]

    return edit


def replace_document(value: Any) -> Edit:
    return lambda file: setattr(file, "document", value)


def shifted(old: str, new: str) -> Edit:
    """Rename a layer, its tensors and all."""

    def edit(file: Parts) -> None:
        file.document["layers"][new] = file.document["layers"].pop(old)
        for part in ("lora_A", "lora_B"):
            file.tensors[f"{new}.{part}"] = file.tensors.pop(f"{old}.{part}")

    return edit


CORRUPTIONS: dict[str, tuple[Edit, list[str]]] = {
    "unknown tensor": (
        put("proj.lora_C", torch.ones(2)), ["tensor 'proj.lora_C' belongs to no layer that the file describes"]
    ),
    "base weight": (
        put("proj.weight", torch.ones(5, 6)), ["tensor 'proj.weight' belongs to no layer that the file describes"]
    ),
    "base weight as trained": (
        both(put("proj.weight", torch.ones(5, 6)), put("proj.bias", torch.ones(5)),
             write("train_also", "proj", ["weight", "bias"])),
        ["'proj' is trained in full, but 'proj' in it has an adapter"],
    ),
    "whole model as trained": (
        both(write("train_also", "", ["more"]), put("more", torch.ones(1))),
        ["'' is trained in full, but 'embed' in it has an adapter"],
    ),
    "nothing of a module as trained": (
        write("train_also", "proj", []), ["train_also 'proj': expected a list of different tensor names, got []"]
    ),
    "missing tensor": (drop("proj.lora_B"), ["tensor 'proj.lora_B' is missing"]),
    "missing head tensor": (drop("head.0.bias"), ["tensor 'head.0.bias' is missing"]),
    "head tensor not listed": (
        write("train_also", "head", ["0.bias"]),
        [f"tensor 'head.{name}' belongs to no layer that the file describes" for name in
         ("0.weight", "1.bias", "1.num_batches_tracked", "1.running_mean", "1.running_var", "1.weight")]
        + [f"'head.{name}' is missing" for name in
           ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked")],
    ),
    "head tensor twice": (
        write("train_also", "head", ["0.bias", "0.bias"]),
        ["train_also 'head': expected a list of different tensor names, got ['0.bias', '0.bias']"],
    ),
    "head unknown": (
        both(write("train_also", "haed", ["w"]), put("haed.w", torch.ones(1))),
        ["'haed': the model has no such module (did you mean 'head'?)"],
    ),
    "head tensor unknown": (
        both(lambda file: file.document["train_also"]["head"].append("2.w"), put("head.2.w", torch.ones(1))),
        ["'head.2.w': 'head' has no such tensor"],
    ),
    "head shape": (put("head.0.bias", torch.ones(6)), ["'head.0.bias': shape (6,) in the file, (5,) in the model"]),
    "head dtype": (
        put("head.0.bias", torch.ones(5, dtype=torch.int32)),
        ["'head.0.bias': torch.int32 in the file, torch.float32 in the model"],
    ),
    "counter dtype": (
        put("head.1.num_batches_tracked", torch.tensor(1.5)),
        ["'head.1.num_batches_tracked': torch.float32 in the file, torch.int64 in the model"],
    ),
    "head not finite": (put("head.0.bias", torch.full((5,), math.nan)), ["'head.0.bias': values that are not finite"]),
    "wrong shape of A": (put("proj.lora_A", torch.ones(3, 7)), ["'proj': lora_A has shape (3, 7), expected (3, 6)"]),
    "wrong shape of B": (put("proj.lora_B", torch.ones(3, 5)), ["'proj': lora_B has shape (3, 5), expected (5, 3)"]),
    "one dimension": (put("proj.lora_B", torch.ones(15)), ["'proj': lora_B has shape (15,), expected (5, 3)"]),
    "wrong rank": (
        write("layers", "proj", "r", 4),
        ["'proj': lora_A has shape (3, 6), expected (4, 6)", "'proj': lora_B has shape (5, 3), expected (5, 4)"],
    ),
    "integers": (
        put("proj.lora_A", torch.ones(3, 6, dtype=torch.int32)),
        [f"'proj.lora_A' is torch.int32, expected one of {FLOATS}"],
    ),
    "float8": (
        lambda file: file.tensors.update({"proj.lora_A": ("F8_E4M3", [3, 6], bytes(18))}),
        [f"'proj.lora_A' is torch.float8_e4m3fn, expected one of {FLOATS}"],
    ),
    "float8 head": (
        lambda file: file.tensors.update({"head.0.bias": ("F8_E4M3", [5], bytes(5))}),
        ["'head.0.bias': torch.float8_e4m3fn in the file, torch.float32 in the model"],
    ),
    "NaN": (put("proj.lora_A", torch.full((3, 6), math.nan)), ["'proj.lora_A' has values that are not finite"]),
    "infinity": (put("proj.lora_B", torch.full((5, 3), -math.inf)), ["'proj.lora_B' has values that are not finite"]),
    "unknown layer": (shifted("proj", "porj"), ["'porj': the model has no such module (did you mean 'proj'?)"]),
    "layer of a kind without adapters": (shifted("proj", "head.1"), [
        "'head.1' cannot be adapted: it is BatchNorm1d", "'head' is trained in full, but 'head.1' in it has an adapter",
    ]),
    "wrong kind": (
        write("layers", "proj", "kind", "Embedding"), ["'proj': kind 'Embedding' in the file, 'Linear' in the model"]
    ),
    "wrong layout": (
        write("layers", "proj", "layout", "i o -> o i"),
        ["'proj': layout 'i o -> o i' in the file, 'o i -> o i' in the model"],
    ),
    "wrong base shape": (
        write("layers", "proj", "shape", [6, 5]), ["'proj': shape (6, 5) in the file, (5, 6) in the model"]
    ),
    "wrong groups": (
        write("layers", "conv", "groups", 4), ["'conv': facts {'groups': 4} in the file, {'groups': 2} in the model"]
    ),
    "no groups": (erase("layers", "conv", "groups"), ["'conv': facts {} in the file, {'groups': 2} in the model"]),
    "max_norm": (
        write("layers", "embed", "max_norm", 1.0), ["'embed': facts {'max_norm': 1.0} in the file, {} in the model"]
    ),
    "not JSON": (
        replace_document("{"),
        ["metadata 'lora_plus' is not valid JSON: Expecting property name enclosed in double quotes: "
         "line 1 column 2 (char 1)"],
    ),
    "a list": (replace_document([]), ["metadata 'lora_plus' must be a JSON object, got list"]),
    "a number": (replace_document(3), ["metadata 'lora_plus' must be a JSON object, got int"]),
    "newer version": (write("format_version", 2), ["format_version is 2, this library reads 1"]),
    "no version": (erase("format_version"), ["format_version is None, this library reads 1"]),
    "version of another type": (write("format_version", True), ["format_version is True, this library reads 1"]),
    "unknown entry": (write("extra", 1), ["unknown entry 'extra'"]),
    "unknown layer entry": (write("layers", "proj", "bias", True), ["layer 'proj': unknown entry 'bias'"]),
    "no alpha": (
        erase("alpha"),
        ["entry 'alpha' is missing"]
        + [f"layer {name!r}: alpha must be a number, got None" for name in sorted(TRAINED)],
    ),
    "layers a list": (write("layers", []), ["entry 'layers' must be an object, got []"]),
    "layer a number": (write("layers", "proj", 1), ["layer 'proj': expected an object, got 1"]),
    "metadata a list": (write("metadata", []), ["entry 'metadata' must be an object, got []"]),
    "metadata of numbers": (write("metadata", {"a": 1}), ["metadata 'a' must be a text, got 1"]),
    "train_also a list": (write("train_also", ["head"]), ["entry 'train_also' must be an object, got ['head']"]),
    "train_also of texts": (
        write("train_also", "head", "bias"),
        ["train_also 'head': expected a list of different tensor names, got 'bias'"],
    ),
    "no kind": (
        erase("layers", "proj", "kind"),
        ["layer 'proj': kind, layout and shape must be there, got None, 'o i -> o i', [5, 6]"],
    ),
    "rank a text": (write("layers", "proj", "r", "8"), ["layer 'proj': r must be an int, got '8'"]),
    "rank zero": (write("layers", "proj", "r", 0), ["layer 'proj': r must be positive, got 0"]),
    "alpha zero": (
        write("layers", "proj", "alpha", 0),
        ["layer 'proj': alpha must be finite and not zero (zero would switch the adapter off), got 0"],
    ),
    "alpha not a number": (
        write("layers", "proj", "alpha", math.nan),
        ["layer 'proj': alpha must be finite and not zero (zero would switch the adapter off), got nan"],
    ),
    "alpha beyond all floats": (
        write("layers", "proj", "alpha", 10**400), ["layer 'proj': int too large to convert to float"]
    ),
    "dropout one": (write("layers", "proj", "dropout", 1), ["layer 'proj': dropout must be in [0, 1), got 1"]),
    "unknown scaling": (
        write("layers", "proj", "scaling", "x"),
        ["layer 'proj': unknown scaling 'x'; choose one of ['rslora', 'standard']"],
    ),
    "unknown variant": (
        write("layers", "proj", "variant", "x"),
        ["layer 'proj': unknown variant 'x'; choose one of ['dora', 'lora', 'lora_fa']"],
    ),
    "DoRA without magnitude": (write("layers", "proj", "variant", "dora"), ["tensor 'proj.lora_magnitude' is missing"]),
    "nothing adapted": (
        both(replace_document({"format_version": 1, "library_version": "", "r": 1, "alpha": 1, "scaling": "standard",
                               "variant": "lora", "dropout": 0, "layers": {}}),
             lambda file: file.tensors.clear()),
        ["it has no adapted layer"],
    ),
    "several at once": (
        both(put("proj.lora_A", torch.ones(3, 7)), put("conv.lora_B", torch.full((6, 2), math.inf)),
             put("head.0.bias", torch.ones(1)), shifted("embed", "embedding")),
        ["'conv.lora_B' has values that are not finite", "'proj': lora_A has shape (3, 7), expected (3, 6)",
         "'embedding': the model has no such module (did you mean 'embed'?)",
         "'head.0.bias': shape (1,) in the file, (5,) in the model"],
    ),
}  # fmt: skip
"""How a native file can be wrong, and all that the error then says, in full."""


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_wrong_native_file_is_refused_with_the_reason(corruption: str, native_parts: Parts, tmp_path: Path) -> None:
    edit, lines = CORRUPTIONS[corruption]
    edit(native_parts)
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(native_parts.bytes())
    assert refused(net(), path) == lines


def test_the_file_that_is_corrupted_is_right_before(native_parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(native_parts.bytes())
    model = lora_plus.load_adapter(net(), tmp_path / "a.safetensors")
    assert_same_tensors(adapter_state_dict(model), adapter_state_dict(adapted_net()))


def test_many_problems_are_counted(native_parts: Parts, tmp_path: Path) -> None:
    for number in range(100):
        native_parts.put(f"x{number:03}", torch.ones(1))
    (tmp_path / "a.safetensors").write_bytes(native_parts.bytes())
    lines = refused(net(), tmp_path / "a.safetensors")
    assert lines[0] == "tensor 'x000' belongs to no layer that the file describes"
    assert (len(lines), lines[-1]) == (31, "and 70 more")


def test_deeply_nested_json_is_refused(native_parts: Parts, tmp_path: Path) -> None:
    native_parts.document = "[" * 100_000
    (tmp_path / "a.safetensors").write_bytes(native_parts.bytes())
    (line,) = refused(net(), tmp_path / "a.safetensors")
    assert line.startswith("metadata 'lora_plus' is not valid JSON: ")


def test_every_truncation_is_refused(native_bytes: bytes, tmp_path: Path) -> None:
    path, model = tmp_path / "short.safetensors", net()
    near_ends = {*range(12), len(native_bytes) - 1, *range(0, len(native_bytes), 37)}
    for length in sorted(near_ends):
        path.write_bytes(native_bytes[:length])
        (line,) = refused(model, path)
        assert line.startswith("short.safetensors is not a whole safetensors file: "), length
    path.write_bytes(native_bytes + b"\0")
    assert len(refused(model, path)) == 1


@pytest.mark.parametrize("garbage", [b"", b"\0" * 8, b"garbage" * 100, b"\xff" * 64, b"\x80\x02}q\0.", b"PK\3\4" * 9])
def test_garbage_is_refused(garbage: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(garbage)
    (line,) = refused(net(), tmp_path / "a.safetensors")
    assert line.startswith("a.safetensors is not a whole safetensors file: ")


def test_a_file_of_something_else_is_refused(native_parts: Parts, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for metadata in ({}, {"format": "pt"}):
        path.write_bytes(assemble(native_parts.tensors, metadata))
        lines = refused(net(), path)
        assert lines == ["it is a safetensors file, but its header does not describe an adapter"]
    lora_plus.save_adapter(adapted_net(), tmp_path / "peft")
    (line,) = refused(net(), tmp_path / "peft" / "adapter_model.safetensors")
    assert line == (
        "it is a safetensors file, but its header does not describe an adapter; "
        f"give the folder {str(tmp_path / 'peft')!r}"
    )


def test_no_file_at_all(tmp_path: Path) -> None:
    model, before = net(), snapshot(net())
    with pytest.raises(FileNotFoundError) as error:
        lora_plus.load_adapter(model, tmp_path / "nowhere")
    assert str(error.value) == f"there is no adapter at {str(tmp_path / 'nowhere')!r}"
    assert snapshot(model)["repr"] == before["repr"]


def test_one_layer_under_two_names_in_the_file(tmp_path: Path) -> None:
    """A file made for two layers does not fit a model in which they are one."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    lora_plus.save_adapter(randomise(lora_plus.inject_lora(model, ["a", "b"])), tmp_path / "a.safetensors")
    assert refused(Shared("a", "b"), tmp_path / "a.safetensors") == ["'b' and 'a' are one module in this model"]
    heads = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "q": nn.Linear(4, 4)})
    lora_plus.inject_lora(heads, ["q"], train_also=["a", "b"])
    lora_plus.save_adapter(randomise(heads), tmp_path / "b.safetensors")
    tied = nn.ModuleDict({**Shared("a", "b")._modules, "q": nn.Linear(4, 4)})
    assert refused(tied, tmp_path / "b.safetensors") == ["'b' and 'a' are one module in this model"]


def test_a_model_that_cannot_take_the_adapter_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora_plus.save_adapter(adapted_net(), path)
    model = adapted_net()
    before = snapshot(model)
    for name, message in {
        "default": "the model has an adapter 'default' already (on 'embed'); load_adapter adds one itself: "
        "leave inject_lora out, or pass replace=True (or another name)",
        "a.b": "an adapter's name must not be empty or contain a dot, got 'a.b'",
    }.items():
        with pytest.raises(ValueError) as error:
            lora_plus.load_adapter(model, path, adapter=name)
        assert str(error.value) == message
        assert snapshot(model) == before

"""The table of formats: what is in it is read, written and documented, and so is an entry from outside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from cases import CASES, Case
from files_support import adapted_net
from parameter_cases import PARAMETER_CASES, ParameterCase

import lora_plus
from lora_plus.errors import Problems
from lora_plus.files import (
    FORMATS,
    Contents,
    Files,
    Format,
    SavedAdapter,
    SavedLayer,
    Target,
    adapter_state_dict,
    read_adapter,
    write_adapter,
)
from lora_plus.files.save import FormatName, describe, write_files
from lora_plus.model.state import State
from lora_plus.tensors.variant import AdapterSpec


def test_the_documentation_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", page, re.MULTILINE)
    assert dict(rows) == {name: format.about for name, format in FORMATS.items()}
    assert get_args(FormatName) == tuple(FORMATS)


def update_of(layer: SavedLayer) -> torch.Tensor:
    return layer.spec.scale * layer.tensors["lora_B"] @ layer.tensors["lora_A"]


def read(files: Files, target: Target, problems: list[str]) -> SavedAdapter:
    """Whole updates, as a program may keep them that factors them itself."""
    layers = {}
    for name, update in files[""].tensors.items():
        base = target.base(name.removesuffix(".delta"))
        if base is None:
            problems.append(f"{name!r} belongs to no layer")
            continue
        out, r = update.shape
        spec = AdapterSpec(r, r)
        layers[name.removesuffix(".delta")] = SavedLayer(base, spec, {"lora_A": torch.eye(r), "lora_B": update + 0})
        assert out == base.shape[0]
    return SavedAdapter(layers, {})


def write(adapter: SavedAdapter, target: Target, problems: list[str]) -> Files:
    problems += [f"train_also {name!r}" for name in adapter.trained]
    return {"": Contents({f"{name}.delta": update_of(layer) for name, layer in adapter.layers.items()}, {"a": "delta"})}


DELTA = Format("the format of deltas", "whole updates", read, write, lambda file: file.metadata.get("a") == "delta")


def test_a_format_from_outside_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "delta", DELTA)
    model, path = torch.nn.Sequential(torch.nn.Linear(3, 4)), tmp_path / "a.safetensors"
    lora_plus.inject_lora(model, ["0"], r=2)
    torch.nn.init.normal_(model[0].lora_B["default"])
    lora_plus.save_adapter(model, path, format="delta")  # type: ignore[arg-type]
    again = lora_plus.load_adapter(torch.nn.Sequential(torch.nn.Linear(3, 4)), path)
    ours, theirs = (update_of(describe(State(each), "default").layers["0"]) for each in (model, again))
    torch.testing.assert_close(theirs, ours)
    with pytest.raises(Problems, match="the adapter cannot be written in the format of deltas"):
        lora_plus.save_adapter(adapted_net(), tmp_path / "b", format="delta")  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [*CASES, *PARAMETER_CASES], ids=lambda case: case.name)
def test_a_file_is_read_and_written_without_its_model(case: Case | ParameterCase, tmp_path: Path) -> None:
    model, path, copy = case.adapted(), tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    lora_plus.save_adapter(model, path, metadata={"note": "kept"})
    write_adapter(read_adapter(path), copy)
    assert copy.read_bytes() == path.read_bytes()


def layers() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Conv1d(2, 4, 3))


@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya"])
def test_other_formats_are_written_without_a_model_as_with_it(form: FormatName, tmp_path: Path) -> None:
    model = lora_plus.inject_lora(layers(), ["0", "1"], r=2)
    lora_plus.save_adapter(model, tmp_path / "native.safetensors")
    lora_plus.save_adapter(model, tmp_path / "with" / "x", format=form)
    write_adapter(read_adapter(tmp_path / "native.safetensors"), tmp_path / "without" / "x", format=form)
    ours, theirs = (
        adapter_state_dict(lora_plus.load_adapter(layers(), tmp_path / folder / "x")) for folder in ("without", "with")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_wrong_with_a_file_is_told_without_its_model(tmp_path: Path) -> None:
    saved = read_from(tmp_path)
    layer = saved.layers["0"]
    saved.layers["1"] = SavedLayer(layer.base, layer.spec, {**layer.tensors, "lora_B": torch.full((4, 2), torch.nan)})
    saved.layers["2"] = SavedLayer(layer.base, layer.spec, {**layer.tensors, "lora_B": torch.zeros(4, 3)})
    lines = ["'1.lora_B' has values that are not finite", "'2': lora_B has shape (4, 3), expected (4, 2)"]
    path = tmp_path / "b.safetensors"
    with pytest.raises(Problems) as error:
        write_adapter(saved, path)
    assert error.value.problems == lines and not path.exists()
    write_files(path, FORMATS["native"].write(saved, Target(), []))
    with pytest.raises(Problems) as error:
        read_adapter(path)
    assert error.value.problems == lines


def read_from(folder: Path) -> SavedAdapter:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    lora_plus.save_adapter(lora_plus.inject_lora(model, ["0"], r=2), folder / "a.safetensors")
    return read_adapter(folder / "a.safetensors")

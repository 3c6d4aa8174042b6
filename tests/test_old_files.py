"""Adapter files of version 0.1.0 give the same outputs today. ``data/adapters/write.py`` says how they were written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_models import Bounded, Fused, Net, Parameters, Pipeline, built
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_plus

FOLDER = Path(__file__).parent / "data" / "adapters"
EXPECTED = load_file(FOLDER / "expected.safetensors")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}
FILES: dict[str, Callable[[], nn.Module]] = {
    "lora.safetensors": Net,
    "float32.safetensors": Net,
    "bfloat16.safetensors": Net,
    "rslora.safetensors": Net,
    "dora.safetensors": Net,
    "lora_fa.safetensors": Net,
    "pissa.safetensors": Net,
    "folded.safetensors": Net,
    "max_norm.safetensors": Bounded,
    "fused.safetensors": Fused,
    "parameters.safetensors": Parameters,
    "peft": Net,
    "peft-dora": Net,
    "peft-parameters": Parameters,
    "kohya.safetensors": Pipeline,
    "diffusers.safetensors": Pipeline,
}
"""The model that each file belongs to."""


def base(file: str) -> nn.Module:
    return built(FILES[file], EXPECTED[f"{file}.output"].dtype)


def distance(file: str, model: nn.Module) -> float:
    """How far the model's output is from what it was when the file was written, in tolerances of its dtype."""
    wanted = EXPECTED[f"{file}.output"]
    with torch.no_grad():
        output: Tensor = model(EXPECTED[f"{file}.input"])
    assert (output.dtype, output.shape) == (wanted.dtype, wanted.shape)
    return ((output - wanted).abs().max() / TOLERANCES[wanted.dtype]).item()


def test_every_file_is_in_the_table() -> None:
    files = {path.name for path in FOLDER.glob("*.safetensors")}
    folders = {path.parent.name for path in FOLDER.glob("*/adapter_config.json")}
    assert files | folders == {*FILES, "expected.safetensors"}
    assert {name.rpartition(".")[0] for name in EXPECTED} == set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_the_output_is_what_it_was(file: str) -> None:
    assert distance(file, base(file)) > 1000  # the adapter has an effect
    model = lora_plus.load_adapter(base(file), FOLDER / file)
    assert distance(file, model) < 1
    lora_plus.merge_lora(model)
    assert distance(file, model) < 1


# a PEFT folder does not say how the weights are stored
@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("peft")])
def test_a_checkpoint_gets_the_same_weights(file: str, tmp_path: Path) -> None:
    model = base(file)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    lora_plus.merge_checkpoint(tmp_path / "base.safetensors", FOLDER / file, tmp_path / "merged.safetensors")
    model.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    assert distance(file, model) < 1

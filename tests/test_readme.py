"""The README's code runs as it stands."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_plus

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_first_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    model = names["model"]
    assert isinstance(model, nn.Sequential) and [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert os.listdir(tmp_path) == ["adapter.safetensors"]
    fresh = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    lora_plus.load_adapter(fresh, "adapter.safetensors")
    assert all(torch.count_nonzero(fresh[i].lora_B["default"]) for i in (0, 2))


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_the_other_examples_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_the_readme_names_only_files_and_functions_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"\blp\.([a-z_]+)", text):
        assert hasattr(lora_plus, name), name

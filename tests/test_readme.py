"""The README's code runs as it stands."""

from __future__ import annotations

import inspect
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
    assert isinstance(model, nn.Sequential)
    assert [type(layer) for layer in model] == [nn.Linear, nn.TransformerEncoderLayer, nn.Linear]
    assert os.listdir(tmp_path) == ["adapter.safetensors"]
    fresh = nn.Sequential(nn.Linear(32, 64), nn.TransformerEncoderLayer(64, 4), nn.Linear(64, 8))
    lora_plus.load_adapter(fresh, "adapter.safetensors")
    assert len(lora_plus.lora_summary(fresh).rows) == 6
    assert all(B.count_nonzero() for name, B in fresh.named_parameters() if ".lora_B." in name)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_the_example_of_transformers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model of the same class in place of the download; PEFT opens what it saves."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )

    def small(_: str) -> nn.Module:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        assert isinstance(model, nn.Module)
        return model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", small)
    names: dict[str, nn.Module] = {}
    exec(compile(BLOCKS[1], "README.md", "exec"), names)
    tokens = torch.arange(10)[None]
    opened = peft.PeftModel.from_pretrained(small(""), "adapter").eval()
    outputs = [model(input_ids=tokens).logits for model in (names["model"].eval(), names["fresh"].eval(), opened)]
    assert not torch.equal(outputs[0], small("").eval()(input_ids=tokens).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=0, atol=1e-6)
    assert len(BLOCKS) == 2


def test_the_readme_is_short() -> None:
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(text.split()) <= 1300


def test_the_glance_at_the_api_names_every_verb() -> None:
    text = (ROOT / "README.md").read_text().split("## The API at a glance")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", text)) >= set(lora_plus.__all__) - {"__version__"}


def test_every_option_that_the_table_for_users_of_peft_names_exists() -> None:
    """Both sides, by the signatures of the functions."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    text = (ROOT / "README.md").read_text().split("## Coming from PEFT")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    theirs = {name for row in rows for name in re.findall(r"\b(\w+)(?:=|`)", row[0]) if name != "True"}
    ours = {name for row in rows for name in re.findall(r"`(\w+)=", row[1])}
    known = {"loraplus_lr_ratio", *inspect.signature(peft.LoraConfig).parameters}
    known |= set(inspect.signature(create_loraplus_optimizer).parameters)
    assert theirs <= known and len(theirs) >= 9
    assert ours <= set(inspect.signature(lora_plus.inject_lora).parameters)


def test_the_readme_names_only_files_and_functions_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"\blp\.([a-z_]+)", text):
        assert hasattr(lora_plus, name), name


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {lora_plus.__version__}\n" in (ROOT / "CITATION.cff").read_text()

"""Trained biases in PEFT's format, and the bias that B has with ``lora_bias``, both ways."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from files_support import snapshot
from peft_support import made_by_peft, opened_by_peft, peft, read_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_plus as lp
from lora_plus.files import read_adapter

pytestmark = pytest.mark.peers


class Net(nn.Module):
    """Layers with and without a bias, some inside others, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.block = nn.ModuleDict({"q": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 1), "norm": nn.LayerNorm(4)})
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = (self.q(x) + self.v(x)).tanh()
        x = self.block["conv"](self.block["q"](x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.block["norm"](x)).mean(1)


TOKENS = torch.arange(6).reshape(2, 3)
TARGETS = ["q", "v", "conv"]
ADAPTED = ["q.bias", "block.q.bias", "conv.bias"]


def base(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        [parameter.normal_() for parameter in model.parameters()]
    return model.to(dtype)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "of adapted layers": ({"train_also": ["q.bias", "conv.bias"]}, {"bias": "lora_only"}),
    "all": ({"train_also": ["bias"]}, {"bias": "all"}),
    "all, and a head": ({"train_also": ["*.bias", "head"]}, {"bias": "all", "modules_to_save": ["head"]}),
    "of adapted layers, and a head": (
        {"train_also": [*ADAPTED, "head"], "scaling": "rslora"},
        {"bias": "lora_only", "modules_to_save": ["head"], "use_rslora": True},
    ),
}
"""Our words and PEFT's."""


def trained(model: nn.Module) -> set[str]:
    prefixes = ("base_model.model.", "base_layer.", "modules_to_save.default.")
    names = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    for prefix in prefixes:
        names = {name.replace(prefix, "") for name in names}
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_ours_goes_to_peft_and_comes_back(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ours, theirs = CASES[case]
    model = randomise(lp.inject_lora(base(dtype), TARGETS, r=2, alpha=3, **ours))
    with torch.no_grad():
        [p.add_(torch.randn_like(p)) for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
    lp.save_adapter(model, tmp_path / "ours")
    assert read_config(tmp_path / "ours")["bias"] == theirs["bias"]
    opened = opened_by_peft(base(dtype), tmp_path / "ours")
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(opened(TOKENS), model(TOKENS), rtol=tolerance, atol=tolerance)
    opened.save_pretrained(str(tmp_path / "theirs"))
    again = lp.load_adapter(base(dtype), tmp_path / "theirs", trainable=True)
    torch.testing.assert_close(again(TOKENS), model(TOKENS), rtol=tolerance, atol=tolerance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(base(dtype), peft.LoraConfig(target_modules=TARGETS, r=2, **theirs))
    assert trained(again) == trained(model) == trained(made)


@pytest.mark.parametrize("case", CASES)
def test_pefts_opens_here_and_goes_back(case: str, tmp_path: Path) -> None:
    theirs = made_by_peft(base(), target_modules=TARGETS, r=2, lora_alpha=3, **CASES[case][1])
    with torch.no_grad():
        [p.add_(torch.randn_like(p)) for n, p in theirs.named_parameters() if p.requires_grad and "lora_" not in n]
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = lp.load_adapter(base(), tmp_path / "theirs", trainable=True)
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS), rtol=1e-12, atol=1e-12)
    assert trained(model) == trained(theirs)
    lp.save_adapter(model, tmp_path / "native.safetensors")
    again = lp.load_adapter(base(), tmp_path / "native.safetensors")
    assert torch.equal(again(TOKENS), model(TOKENS))
    with lp.disabled(model):
        assert torch.equal(model(TOKENS), base()(TOKENS))


def test_names_that_differ_and_two_files_with_biases_of_their_own(tmp_path: Path) -> None:
    theirs = {}
    for seed, name in enumerate("ab"):
        theirs[name] = made_by_peft(base(), seed=seed, target_modules=TARGETS, r=2, bias="lora_only")
        with torch.no_grad():
            [p.add_(seed + 1) for n, p in theirs[name].named_parameters() if p.requires_grad and "lora_" not in n]
        theirs[name].save_pretrained(str(tmp_path / name))
    model = nn.ModuleDict({"inner": base()})
    for name in "ab":
        lp.load_adapter(model, tmp_path / name, adapter=name, names={"": "inner"})
    for name in "ab":
        lp.set_adapter(model, name)
        torch.testing.assert_close(model["inner"](TOKENS), theirs[name](TOKENS), rtol=1e-12, atol=1e-12)


# ---- the bias of B ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_the_bias_of_B_is_folded_into_the_layers(bias: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LoRA tensor.* have invalid shape")
        theirs = made_by_peft(base(), target_modules=["q", "conv"], r=2, lora_alpha=3, lora_bias=True, bias=bias)
        theirs.save_pretrained(str(tmp_path / "theirs"))
    assert any(name.endswith("lora_B.bias") for name in load_file(tmp_path / "theirs/adapter_model.safetensors"))
    model = lp.load_adapter(base(), tmp_path / "theirs")
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        lp.merge_and_unload(model)(TOKENS), theirs.merge_and_unload()(TOKENS), rtol=1e-12, atol=1e-12
    )


def biased(path: Path, targets: list[str], **changes: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(base(), peft.LoraConfig(target_modules=targets, r=2, lora_bias=True))
        made.save_pretrained(str(path))
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | changes))
    return path


def test_a_bias_of_B_that_has_no_place_is_refused(tmp_path: Path) -> None:
    whole = biased(tmp_path / "v", ["q", "v"])
    off = biased(tmp_path / "off", ["block.q"], lora_bias=False)
    part = biased(tmp_path / "part", ["q"])
    file = part / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if name != "base_model.model.q.lora_B.bias"}, file)
    for path, text in {
        whole: "'v': its lora_B has a bias (lora_bias), and the layer has no bias to add it to here",
        off: "tensor 'base_model.model.block.q.lora_B.bias' is there, but lora_bias is not set",
        part: "'q': lora_B.bias is missing, which the others have (lora_bias)",
    }.items():
        model = base()
        before = snapshot(model)
        with pytest.raises(ValueError, match=re.escape(text)):
            lp.load_adapter(model, path)
        assert all(
            torch.equal(value, before[key]) for key, value in snapshot(model).items() if isinstance(value, Tensor)
        )
    text = "'q': its lora_B has a bias (lora_bias), which is added to the layer's own; load the adapter into its model"
    with pytest.raises(ValueError, match=re.escape(text)):
        read_adapter(whole)
    save_file(base().state_dict(), tmp_path / "base.safetensors")
    text = "'v': its lora_B has a bias (lora_bias), and the layer has no bias to add it to here"
    with pytest.raises(ValueError, match=re.escape(text)):
        lp.merge_checkpoint(tmp_path / "base.safetensors", whole, tmp_path / "out.safetensors")


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("names", [None, {"": "model"}])
def test_the_bias_of_B_is_merged_into_a_checkpoint(bias: str, names: dict[str, str] | None, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LoRA tensor.* have invalid shape")
        theirs = made_by_peft(base(), target_modules=["q", "conv"], r=2, lora_alpha=3, lora_bias=True, bias=bias)
        theirs.save_pretrained(str(tmp_path / "theirs"))
    prefix = "model." if names else ""
    state = {prefix + name: tensor.contiguous() for name, tensor in base().state_dict().items()}
    save_file(state, tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    lp.merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "theirs", out, names=names)
    merged, wanted = load_file(out), theirs.merge_and_unload().state_dict()
    assert merged.keys() == state.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[prefix + name], tensor, rtol=1e-12, atol=1e-12)
    assert not torch.equal(wanted["q.bias"], base().q.bias)


# ---- what PEFT cannot say --------------------------------------------------------------------------------------------

REFUSED = {
    "one of two": (
        ["block.q.bias"],
        "train_also 'block.q.bias': PEFT trains all biases or those of all adapted layers, so 'block.conv.bias', "
        "'q.bias', too; train these as well, or save a .safetensors file",
    ),
    "one more": (
        [*ADAPTED, "norm.bias"],
        "train_also 'block.conv.bias', 'block.norm.bias', 'block.q.bias' and 1 more: PEFT trains all biases or those "
        "of all adapted layers, so 'head.bias', too; train these as well, or save a .safetensors file",
    ),
    "no bias": (
        ["norm.weight"], "train_also 'block.norm.weight': PEFT trains a single parameter only if it is called bias"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_has_no_setting_for_is_refused(case: str, tmp_path: Path) -> None:
    names, text = REFUSED[case]
    model = lp.inject_lora(base(), TARGETS, r=2, train_also=names)
    with pytest.raises(ValueError) as error:
        lp.save_adapter(model, tmp_path / "a")
    assert str(error.value) == f"the adapter cannot be written in PEFT's format:\n  {text}"
    assert not list(tmp_path.iterdir())


def test_a_bias_is_put_into_a_checkpoint(tmp_path: Path) -> None:
    model = randomise(lp.inject_lora(base(), TARGETS, r=2, train_also=["q.bias", "conv.bias"]))
    with torch.no_grad():
        [p.add_(torch.randn_like(p)) for n, p in model.named_parameters() if n.endswith("bias") and p.requires_grad]
    lp.save_adapter(model, tmp_path / "peft")
    lp.save_adapter(model, tmp_path / "native.safetensors")
    save_file(base().state_dict() | {"q.bias_of_another": torch.zeros(1)}, tmp_path / "base.safetensors")
    for source in ("peft", "native.safetensors"):
        lp.merge_checkpoint(tmp_path / "base.safetensors", tmp_path / source, tmp_path / f"{source}.out.safetensors")
        state = load_file(tmp_path / f"{source}.out.safetensors")
        del state["q.bias_of_another"]
        merged = base()
        merged.load_state_dict(state)
        torch.testing.assert_close(merged(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)

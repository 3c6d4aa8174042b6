"""What is exported computes the same in PEFT, and by the rules of vLLM and llama.cpp, which are restated here."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from peft_support import (
    TOKENS,
    Attention,
    Away,
    V,
    first,
    gpt2_linear,
    move,
    net,
    opened_by_peft,
    read_config,
    same,
    transformers,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_plus
from lora_plus import export_adapter, inject_lora, load_adapter

gguf = pytest.importorskip("gguf")

pytestmark = pytest.mark.peers

PREFIX = "base_model.model."


def assert_portable(folder: Path) -> dict[str, Any]:
    """One rank and one alpha: what a reader must know that has no patterns and no scaling rules."""
    config = read_config(folder)
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert config["lora_alpha"] == config["r"] and isinstance(config["lora_alpha"], int)
    return config


# ---- PEFT ------------------------------------------------------------------------------------------------------------

HARD = {
    "rank_pattern": {re.compile("q"): 3, "blocks.1.q": 5, "blocks.0.conv": 1},
    "alpha_pattern": {re.compile("q"): 64, "blocks.1.q": 0.75, "embed": -2, f"blocks.0.{V}": 3},
}
NETS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "mixed": (["q", "xq", "embed", "fc", "conv", V], HARD),
    "mixed, rslora": (["q", "xq", "embed", "fc", "conv", V], {**HARD, "scaling": "rslora"}),
    "mixed dora": (["q", "xq", "embed", "fc", "conv", V], {**HARD, "variant": "dora"}),
    "a head with buffers": (["q", "conv"], {"train_also": ["head"], "rank_pattern": {"blocks.0.q": 3}}),
}


@pytest.mark.parametrize("name", NETS)
def test_peft_computes_the_same(name: str, tmp_path: Path) -> None:
    targets, options = NETS[name]
    model = randomise(inject_lora(net(), targets, **{"r": 2, "alpha": 4, "dropout": 0.1, **options})).eval()
    for head in options.get("train_also", ()):
        move(model.get_submodule(head))
    report = export_adapter(model, tmp_path)
    assert assert_portable(tmp_path)["r"] == report.r == max([2, *options["rank_pattern"].values()])
    wanted = model(TOKENS)
    assert (wanted - net()(TOKENS)).abs().max() > 1e-3
    for reader in (opened_by_peft, load_adapter):
        torch.testing.assert_close(reader(net(), tmp_path).eval()(TOKENS), wanted, rtol=1e-11, atol=1e-11)


def test_layers_of_different_scaling_rules_and_dropout_become_one_kind(tmp_path: Path) -> None:
    model = net().requires_grad_(False)
    for layer, options in {
        model.q: {"r": 3, "alpha": 5, "scaling": "rslora", "dropout": 0.2},
        model.xq: {"r": 3, "alpha": 5},
        model.blocks[0].q: {"r": 2, "alpha": -7, "scaling": "rslora"},
    }.items():
        lora_plus.inject_lora(layer, "", **options)
    randomise(model.eval())
    with pytest.raises(ValueError, match="layers differ in dropout"):
        lora_plus.save_adapter(model, tmp_path / "saved")
    export_adapter(model, tmp_path)
    assert_portable(tmp_path)
    same(opened_by_peft(net(), tmp_path)(TOKENS), model(TOKENS))


class Fused(nn.Module):
    """A projection to q, k and v in one, with a layer of another rank behind it."""

    def __init__(self, c_attn: nn.Module) -> None:
        super().__init__()
        self.c_attn = c_attn
        self.mlp = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(torch.tanh(self.c_attn(x)))


class Experts(nn.Module):
    """A stack of matrices, a matrix and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4))
        self.mix = nn.Parameter(torch.randn(4, 6))
        self.gate = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("...i,eoi->...eo", x, self.up)
        return (torch.softmax(self.gate(x), -1)[..., None] * h).sum(-2) @ self.mix.T


ROWS = {"fused": {"part.c_attn": {"q": 4, "k": 2, "v": 2}}}
AWAY: dict[str, Away] = {
    "rows, and a layer": Away(
        lambda: Fused(nn.Linear(4, 8)), ["part.c_attn.q", "part.c_attn.v", "part.mlp"],
        {**ROWS, "rank_pattern": {"part.c_attn.v": 5}, "alpha_pattern": {"part.c_attn.q": -7}, "scaling": "rslora"},
    ),
    "rows of a transposed layer": Away(
        lambda: Fused(gpt2_linear(8, 4)), ["part.c_attn.k", "part.c_attn.v", "part.mlp"],
        {**ROWS, "rank_pattern": {"part.mlp": 7}},
    ),
    "attention, and a layer": Away(
        Attention, ["part.attn.q", "part.attn.v", "part.mlp"],
        {"rank_pattern": {"part.attn.v": 3}, "alpha_pattern": {"part.attn.q": 7}},
    ),
    "attention of lower rank": Away(Attention, ["part.attn.k", "part.mlp"], {"rank_pattern": {"part.mlp": 5}}),
    "experts": Away(
        Experts, ["part.up", "part.mix", "part.gate"],
        {"rank_pattern": {"part.up": 3, "part.mix": 1}, "alpha_pattern": {"part.up": -1}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AWAY)
def test_rows_attention_and_parameters_go_to_peft(name: str, tmp_path: Path) -> None:
    away = AWAY[name]
    model, arguments = away.adapted(), away.arguments()
    export_adapter(model, tmp_path)
    assert_portable(tmp_path)
    wanted = first(model(*arguments))
    assert (wanted - first(away.base()(*arguments))).abs().max() > 1e-2
    same(first(opened_by_peft(away.base(), tmp_path)(*arguments)), wanted)
    same(first(load_adapter(away.base(), tmp_path)(*arguments)), wanted)


def test_the_warning_that_peft_doubles_an_update_points_at_the_caller(tmp_path: Path) -> None:
    model = Away(Attention, ["part.attn.out_proj"]).adapted()
    with pytest.warns(UserWarning, match="halve their lora_B") as caught:
        export_adapter(model, tmp_path)
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]


# ---- vLLM ------------------------------------------------------------------------------------------------------------


def served_by_vllm(folder: Path, base: nn.Module, max_lora_rank: int) -> nn.Module:
    """The base with its weights as vLLM computes with them; its own checks are assertions here."""
    config = json.loads((folder / "adapter_config.json").read_text())
    known = {"r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora"}
    config = {name: value for name, value in config.items() if name in known}  # in silence, patterns too
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert not config["modules_to_save"] and not config["use_dora"] and config["bias"] == "none"
    assert 0 < config["r"] <= max_lora_rank
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = key.split(".")
        assert parts[:2] == ["base_model", "model"]
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            found.setdefault(".".join(parts[2:-2]), {})[parts[-2][-1]] = tensor
        else:
            assert parts[-1] in ("lora_embedding_A", "lora_embedding_B"), f"{key} is unsupported LoRA weight"
            found.setdefault(".".join(parts[2:-1]), {})[parts[-1][-1]] = tensor
    served = copy.deepcopy(base)
    for name, pair in found.items():
        A, B, layer = pair["A"], pair["B"], served.get_submodule(name)
        assert len(A) == B.shape[1] == config["r"]  # its buffers have this rank
        delta = scaling * B @ A
        # of GPT-2 it has weights as (in, out), of an embedding A of all tokens
        turned = isinstance(layer, (nn.Embedding, transformers.pytorch_utils.Conv1D))
        layer.weight.data += delta.T if turned else delta
    return served


class Served(nn.Module):
    """What vLLM adapts: an embedding, linear layers, one of them transposed, and one that is q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 4)
        self.c_attn = gpt2_linear(8, 4)
        self.qkv_proj = nn.Linear(8, 8)
        self.o_proj = nn.Linear(8, 7, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.o_proj(torch.tanh(self.qkv_proj(torch.tanh(self.c_attn(self.embed_tokens(tokens))))))


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_vllm_computes_the_same(scaling: str, tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return Served().double()

    model = inject_lora(
        base(), ["embed_tokens", "c_attn", "qkv_proj.q", "qkv_proj.v", "o_proj"], r=2, alpha=3, scaling=scaling,
        rank_pattern={"c_attn": 9, "qkv_proj.v": 4}, alpha_pattern={"o_proj": -5},
        fused={"qkv_proj": {"q": 4, "k": 2, "v": 2}},
    )  # fmt: skip
    randomise(model)
    report = export_adapter(model, tmp_path, for_="vllm")
    assert (report.r, report.options) == (9, "--enable-lora --max-lora-rank 16")
    served = served_by_vllm(tmp_path, base(), 16)
    assert (model(TOKENS) - base()(TOKENS)).abs().max() > 1e-2
    same(served(TOKENS), model(TOKENS))


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


@dataclass
class Converted:
    """What the converter writes: A and B by the names of llama.cpp's tensors, and one alpha."""

    alpha: float
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def converted_to_gguf(folder: Path, name_of: Callable[[str], str | None]) -> Converted:
    """What convert_lora_to_gguf.py makes of a folder for an architecture whose tensors it does not change."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"], "the config of the base model cannot be loaded"
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        ends = [f"lora_{part}.weight" for part in "AB"] + [f"lora_embedding_{part}" for part in "AB"]
        end = next((end for end in ends if key.endswith(f".{end}")), None)
        assert end is not None, f"Unexpected name {key!r}: Not a lora_A or lora_B tensor"
        name = f"{key.removeprefix(PREFIX).removesuffix(end)}weight"
        found.setdefault(name, {})["A" if "A" in end else "B"] = tensor
    converted = Converted(float(config["lora_alpha"]))
    for name, pair in found.items():
        dest, A, B = name_of(name), pair["A"], pair["B"]
        assert dest is not None, f"Can not map tensor {name!r}"
        assert A.ndim == B.ndim == 2 and A.shape[-2] == B.shape[-1]
        converted.pairs[dest] = (A.T if dest == "token_embd.weight" else A), B
    return converted


def run_by_llama_cpp(converted: Converted, base: nn.Module, name_of: Callable[[str], str | None]) -> nn.Module:
    """The base with its weights as llama.cpp computes with them, which it knows by the shapes of its tensors."""
    changed = copy.deepcopy(base)
    weights = {name_of(name): weight for name, weight in changed.state_dict(keep_vars=True).items()}
    for name, (a, b) in converted.pairs.items():
        weight = weights[name]
        scale = converted.alpha / b.shape[1] if converted.alpha else 1.0
        if name == "token_embd.weight":
            assert a.shape[0] == weight.shape[0] and b.shape[0] == weight.shape[1]
            weight.data += scale * a @ b.T
        else:
            assert a.shape[1] == weight.shape[1] and b.shape[0] == weight.shape[0] and a.shape[0] == b.shape[1]
            weight.data += scale * b @ a
    return changed


def llama() -> nn.Module:
    """A model of SmolLM2's class, with a head of its own."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def llama_name(name: str) -> str | None:
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2).get_name(name, try_suffixes=(".weight", ".bias"))


def test_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    model = inject_lora(
        llama(), ["embed_tokens", "q_proj", "v_proj", "down_proj", "lm_head"], r=2, alpha=3, scaling="rslora",
        rank_pattern={"q_proj": 5, "layers.1.mlp.down_proj": 1}, alpha_pattern={"v_proj": -7, "embed_tokens": 0.5},
    )  # fmt: skip
    randomise(model)
    report = export_adapter(model, tmp_path, for_="llama.cpp", base_model="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (report.r, report.options) == (5, "")
    assert assert_portable(tmp_path)["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    converted = converted_to_gguf(tmp_path, llama_name)
    blocks = {f"blk.{index}.{part}.weight" for index in range(2) for part in ("attn_q", "attn_v", "ffn_down")}
    assert converted.pairs.keys() == {"token_embd.weight", "output.weight", *blocks}
    tokens = torch.tensor([[1, 5, 9, 2, 0]])
    wanted = model(tokens).logits
    assert (wanted - llama()(tokens).logits).abs().max() > 1e-3
    torch.testing.assert_close(run_by_llama_cpp(converted, llama(), llama_name)(tokens).logits, wanted,
                               rtol=1e-11, atol=1e-11)  # fmt: skip


def test_every_linear_layer_of_a_llama_has_a_name_there(tmp_path: Path) -> None:
    model = randomise(inject_lora(llama(), "all-linear", r=2))
    export_adapter(model, tmp_path, for_="llama.cpp", base_model="base")
    assert len(converted_to_gguf(tmp_path, llama_name).pairs) == 15  # seven in each of two layers, and the head


def test_the_head_of_a_tied_model_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = inject_lora(transformers.LlamaForCausalLM(config), ["lm_head", "q_proj"], r=2)
    line = "'lm_head': its weight is also 'model.embed_tokens.weight', and llama.cpp has one tensor for both"
    with pytest.raises(ValueError, match=re.escape(line)):
        export_adapter(model, tmp_path / "a", for_="llama.cpp", base_model="base")
    assert not (tmp_path / "a").exists()

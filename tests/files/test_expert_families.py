"""Experts of transformers' models: adapters of single ones, as version 4 has them, and of stacks, also PEFT's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from peft_support import peft, transformers
from torch import Tensor, nn
from vllm_support import read_by_vllm, served_in_stacks, served_one_by_one

import lora_plus as lp
from lora_plus.files.experts import BLOCKS, FAMILIES
from lora_plus.files.vllm_experts import ONE_BY_ONE

pytestmark = [pytest.mark.peers, pytest.mark.slow]

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "initializer_range": 0.2,
}  # fmt: skip
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8},
    "DeepseekV3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 8,
        **LATENT,
    },
}  # fmt: skip
GPT_OSS: dict[str, Any] = {"num_local_experts": 4, "head_dim": 8}
LABELS = {"Mixtral": ("w1", "w3", "w2")}
IDS = torch.arange(14).reshape(2, 7) * 5 % 31 + 1


class Single(nn.Module):
    """One expert: linear layers for gate, up and down."""

    def __init__(self, gate_up: Tensor, down: Tensor, labels: tuple[str, str, str], act: nn.Module) -> None:
        super().__init__()
        for label, weight in zip(labels, (*gate_up.chunk(2), down), strict=True):
            linear = nn.Linear(*weight.shape[::-1], bias=False)
            linear.weight = nn.Parameter(weight.detach().clone())
            self.add_module(label, linear)
        self.labels, self.act = labels, act

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(label) for label in self.labels)
        return down(self.act(gate(x)) * up(x))


class SingleExperts(nn.ModuleList):
    """The experts one by one, called as transformers 5 calls stacked ones."""

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            weight = torch.where(index == number, weights, 0).sum(-1, keepdim=True)
            out = out + expert(hidden) * weight.to(hidden.dtype)
        return out


def new(family: str) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **CONFIGS.get(family, GPT_OSS)})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:
                parameter.normal_(std=0.2)
    return model


def old(family: str) -> nn.Module:
    """The same model with the modules that version 4 of transformers has."""
    model = new(family)
    labels = LABELS.get(family, ("gate_proj", "up_proj", "down_proj"))
    for layer in model.model.layers:
        block = layer.mlp
        if hasattr(block, "experts"):
            stacked = block.experts
            block.experts = SingleExperts(
                Single(gate_up, down, labels, stacked.act_fn)
                for gate_up, down in zip(stacked.gate_up_proj, stacked.down_proj, strict=True)
            )
            if family == "Mixtral":
                del layer.mlp
                layer.block_sparse_moe = block
                layer.__dict__["mlp"] = block  # what the layer's own code calls, under no name of the model
    return model


def same(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.eval()(IDS).logits, other.eval()(IDS).logits, rtol=0, atol=1e-12)


of_all_families = pytest.mark.parametrize("family", CONFIGS)
in_both_formats = pytest.mark.parametrize("path", ["a.safetensors", "folder"])
STACKED = ["experts.gate_up_proj", "experts.down_proj"]


@of_all_families
@in_both_formats
def test_single_experts_become_stacks_and_single_again(family: str, path: str, tmp_path: Path) -> None:
    same(new(family), old(family))
    labels = LABELS.get(family, ("gate_proj", "up_proj", "down_proj"))
    targets = ["o_proj", *(f"experts.*.{label}" for label in labels)]
    settings: dict[str, Any] = {"rank_pattern": {"*.experts.1.*": 3}, "alpha_pattern": {"*.experts.2.*": 5}}
    model = randomise(lp.inject_lora(old(family), targets, r=2, **settings))
    lp.save_adapter(model, tmp_path / path)
    loaded = lp.load_adapter(new(family), tmp_path / path)
    assert (loaded(IDS).logits - new(family)(IDS).logits).abs().max() > 1e-3
    same(loaded, model)
    lp.save_adapter(loaded, tmp_path / f"b{path}")
    same(lp.load_adapter(old(family), tmp_path / f"b{path}"), model)


@of_all_families
@in_both_formats
def test_stacks_become_single_experts(family: str, path: str, tmp_path: Path) -> None:
    model = randomise(lp.inject_lora(new(family), ["o_proj", *STACKED], r=2, alpha=3))
    lp.save_adapter(model, tmp_path / path)
    same(lp.load_adapter(old(family), tmp_path / path), model)


def trained(base: nn.Module, **config: Any) -> nn.Module:
    """A PEFT model with random adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers for what that deprecates
        model = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


@of_all_families
def test_what_peft_trained_on_single_experts(family: str, tmp_path: Path) -> None:
    labels = LABELS.get(family, ("gate_proj", "up_proj", "down_proj"))
    base = old(family)
    base.config.model_type = "of version 4"  # PEFT goes by it to find stacks
    theirs = trained(base, target_modules=rf".*\.experts\.\d\.({'|'.join(labels)})", r=3, lora_alpha=5)
    theirs.save_pretrained(tmp_path)
    same(lp.load_adapter(new(family), tmp_path), theirs)


@of_all_families
def test_what_peft_trained_on_stacks(family: str, tmp_path: Path) -> None:
    theirs = trained(new(family), target_modules=["o_proj"], target_parameters=STACKED, r=3, lora_alpha=5)
    theirs.save_pretrained(tmp_path)
    same(lp.load_adapter(old(family), tmp_path), theirs)
    same(lp.load_adapter(new(family), tmp_path), theirs)


@of_all_families
def test_vllm_gets_experts_one_by_one(family: str) -> None:
    model = randomise(lp.inject_lora(new(family), ["o_proj", *STACKED], r=2, alpha=3))
    config, tensors = lp.files.to_peft(model, for_="vllm")
    labels = LABELS.get(family, ("gate_proj", "up_proj", "down_proj"))
    served = served_one_by_one(old(family), read_by_vllm(tensors, config), labels)
    same(served, model)


def test_vllm_gets_the_stacks_of_gpt_oss() -> None:
    model = randomise(lp.inject_lora(new("GptOss"), ["o_proj", *STACKED], r=2, alpha=3))
    config, tensors = lp.files.to_peft(model, for_="vllm")
    assert "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight" in tensors
    same(served_in_stacks(new("GptOss"), read_by_vllm(tensors, config)), model)


def stacks_of(converters: list[Any]) -> set[tuple[str, tuple[str, ...]]]:
    """The stacked parameters that transformers makes, with the names of the layers of an expert whose rows each has."""
    loading = pytest.importorskip("transformers.core_model_loading")
    found = set()
    for each in converters:
        merges = any(isinstance(step, loading.MergeModulelist) for step in getattr(each, "operations", ()))
        if merges and len(each.target_patterns) == 1:
            labels = tuple(source.removesuffix(".weight").rpartition(".")[2] for source in sources(each))
            found.add((each.target_patterns[0].rpartition(".")[2], labels))
    return found


def test_the_table_is_that_of_transformers() -> None:
    mapping = pytest.importorskip("transformers.conversion_mapping")._build_checkpoint_conversion_mapping()
    found = set().union(*(stacks_of(converters) for converters in mapping.values()))
    assert found == {(stacked, labels) for family in FAMILIES for stacked, labels in family.items()}
    blocks = {
        each.target_patterns[0] for own in mapping.values() for each in own if ".block_sparse_moe." in sources(each)
    }
    assert {block.strip(".") for block in blocks} == {BLOCKS[1]} and BLOCKS[0] == "block_sparse_moe"
    for kind, (family, block) in ONE_BY_ONE.items():
        assert stacks_of(mapping[kind]) == set(family.items()), kind
        assert any(".block_sparse_moe." in sources(each) for each in mapping[kind]) == bool(block), kind


def sources(converter: Any) -> list[str]:
    return [converter.source_patterns] if isinstance(converter.source_patterns, str) else converter.source_patterns

"""Properties over random module trees with hostile names."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from cases import Conv1D, randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lora_plus
from lora_plus.files import adapter_state_dict
from lora_plus.model.tree import adapted_weights

NAMES = [
    "lora_Block", "debias_proj", "lora_A", "lora_B", "lora", "bias_", "weights", "0", "12", "default", "base_layer",
    "base_model", "model", "q", "head", "lm_head", "embedding_B", "lora_A_default", "magnitude", "A",
]  # fmt: skip
LAYERS = {
    "linear": lambda: nn.Linear(4, 3),
    "bare": lambda: nn.Linear(3, 4, bias=False),
    "embedding": lambda: nn.Embedding(5, 4, padding_idx=0),
    "conv": lambda: nn.Conv2d(2, 4, (1, 2), groups=2),
    "gpt2": lambda: Conv1D(3, 4),
    "norm": lambda: nn.LayerNorm(4),
    "batch": lambda: nn.BatchNorm1d(4),
}
ADAPTED = ("linear", "bare", "embedding", "conv", "gpt2")

names = st.sampled_from(NAMES)
trees = st.recursive(
    st.sampled_from(list(LAYERS)), lambda inner: st.dictionaries(names, inner, min_size=1, max_size=4), max_leaves=8
).filter(lambda tree: isinstance(tree, dict))
FILTERED = [HealthCheck.too_slow, HealthCheck.filter_too_much]
SLOW_DRAWS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=FILTERED)


def build(tree: object) -> nn.Module:
    if isinstance(tree, str):
        return LAYERS[tree]()
    module = nn.Module()
    for name, inner in tree.items():  # type: ignore[attr-defined]
        module.add_module(name, build(inner))
    return module


def leaves(tree: object, prefix: str = "") -> dict[str, str]:
    if isinstance(tree, str):
        return {prefix.removesuffix("."): tree}
    return {k: v for name, inner in tree.items() for k, v in leaves(inner, f"{prefix}{name}.").items()}  # type: ignore[attr-defined]


def split(tree: object, share: float) -> tuple[list[str], list[str]]:
    """Names of the layers to adapt and of the modules to train in full."""
    found = leaves(tree)
    targets = [name for name, kind in found.items() if kind in ADAPTED]
    keep = max(1, round(share * len(targets)))
    return targets[:keep], [name for name in found if name not in targets[:keep]]


adaptable = trees.filter(lambda tree: split(tree, 1)[0] != [])
adapters = st.sampled_from(["default", *NAMES])


def exactly(wanted: list[str]) -> object:
    return lambda name, module: name in wanted


@SLOW_DRAWS
@given(adaptable, adapters, st.floats(0, 1), st.booleans())
def test_each_trainable_parameter_is_in_exactly_one_group(tree: dict, adapter: str, share: float, full: bool) -> None:
    targets, rest = split(tree, share)
    model = lora_plus.inject_lora(
        build(tree), exactly(targets), r=2, adapter=adapter, train_also=[exactly(rest)] if full and rest else ()
    )
    groups = lora_plus.loraplus_param_groups(model, lr=1e-3, lr_ratio=4, weight_decay=0.1)
    members = [id(p) for g in groups for p in g["params"]]
    assert len(members) == len(set(members)) and all(g["params"] for g in groups)
    assert set(members) == {id(p) for p in model.parameters() if p.requires_grad}
    group_of = {id(p): g["name"] for g in groups for p in g["params"]}
    for _, layer in adapted_weights(model):
        wanted = ("lora_embedding",) * 2 if isinstance(layer, nn.Embedding) else ("lora_A", "lora_B")
        assert (group_of[id(layer.lora_A[adapter])], group_of[id(layer.lora_B[adapter])]) == wanted
    for name in rest if full else ():
        for parameter in model.get_submodule(name).parameters():
            assert group_of[id(parameter)] in ("other", "other_no_decay")


@SLOW_DRAWS
@given(adaptable, adapters, st.floats(0, 1))
def test_inject_and_remove_is_the_identity(tree: dict, adapter: str, share: float) -> None:
    model = build(tree)
    before, text = {k: v.clone() for k, v in model.state_dict().items()}, repr(model)
    types = [type(module) for module in model.modules()]
    targets, rest = split(tree, share)
    lora_plus.inject_lora(model, exactly(targets), r=2, adapter=adapter, train_also=[exactly(rest)] if rest else ())
    assert [name for name, _ in adapted_weights(model)] == targets
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    lora_plus.remove_lora(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], v) for k, v in before.items())
    assert repr(model) == text and [type(module) for module in model.modules()] == types
    assert all(parameter.requires_grad for parameter in model.parameters())


@SLOW_DRAWS
@given(adaptable, adapters, adapters, st.floats(0, 1), st.integers(0, 99))
def test_save_and_load_gives_equal_tensors(tree: dict, adapter: str, again: str, share: float, seed: int) -> None:
    base = build(tree)
    targets, rest = split(tree, share)
    model = lora_plus.inject_lora(
        copy.deepcopy(base), exactly(targets), r=2, alpha=3, adapter=adapter, train_also=[exactly(rest)] if rest else ()
    )
    randomise(model, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        lora_plus.save_adapter(model, path, adapter=adapter)
        loaded = lora_plus.load_adapter(copy.deepcopy(base), path, adapter=again)
    wanted = adapter_state_dict(model, adapter=adapter)
    got = adapter_state_dict(loaded, adapter=again)
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert {n: layer.lora_adapters[adapter].spec for n, layer in adapted_weights(model)} == {
        n: layer.lora_adapters[again].spec for n, layer in adapted_weights(loaded)
    }

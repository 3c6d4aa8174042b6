"""Adapters of experts as vLLM reads them: one matrix each for most models, stacks for some.

As of ``vllm/lora/model_manager.py`` at 01533aa. A model class that says ``is_3d_moe_weight`` gets what PEFT writes for
the stacked parameters: ``experts.base_layer.lora_A.weight`` is that of ``gate_up_proj``, ``experts.lora_A.weight`` that
of ``down_proj``. All others get a matrix for each expert by the checkpoint's names, ``experts.3.w1.lora_A.weight``
(``get_expert_mapping``). Either way a layer that has some experts adapted must have all, with gate, up and down.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from lora_plus.layers.base_layer import PARAMETER, BaseLayer
from lora_plus.tensors.matrix import matrix_shape
from lora_plus.tensors.variant import FACTORS, AdapterSpec
from lora_plus.text import some

from .experts import BLOCKS, FAMILIES, SINGLE, STACKED, Family, cut
from .read_layers import as_layers
from .saved_adapter import SavedAdapter, SavedLayer
from .target import ModelTarget

IN_STACKS = {"gpt_oss", "qwen3_vl_moe", "qwen3_5_moe", "qwen3_5_moe_text", "glm4_moe_lite"}
"""Types of models, as their config says, whose class in vLLM says ``is_3d_moe_weight``."""

_MIXTRAL, _QWEN, _, _NEMOTRON = FAMILIES

ONE_BY_ONE: dict[str, tuple[Family, str]] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2", "phimoe"), (_MIXTRAL, BLOCKS[0])),
    "lfm2_moe": (_MIXTRAL, ""),
    **dict.fromkeys(
        (
            "afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo",
            "glm4_moe", "glm_moe_dsa", "hunyuan_v1_moe", "jamba", "mimo_v2_flash", "olmoe", "qwen2_moe", "qwen3_moe",
            "qwen3_next",
        ),
        (_QWEN, ""),
    ),
    "nemotron_h": (_NEMOTRON, ""),
}  # fmt: skip
"""Types of models -> the names of their checkpoints: of an expert's layers, and of the block around the experts."""

_ROUTER = re.compile(r"(.*)\.(?:gate|router)\.weight")


class Experts(NamedTuple):
    """An adapter as a program takes its experts."""

    adapter: SavedAdapter
    stacks: set[str]
    """Those of its layers that are stacks of experts."""
    problems: list[str]
    """Why some cannot be taken."""


def vllm_experts(adapter: SavedAdapter, target: ModelTarget) -> Experts:
    """The adapter with its experts, and their routers, as vLLM takes them, and layers that are called there."""
    adapter = as_layers(adapter, target)
    layers, stacks, problems = dict(adapter.layers), set[str](), list[str]()
    blocks = {name.rpartition(".")[0] for name, layer in layers.items() if _is_stack(name, layer)}
    kind = getattr(getattr(target.modules.get(""), "config", None), "model_type", None)
    known = kind in IN_STACKS | ONE_BY_ONE.keys()
    family, around = ONE_BY_ONE.get(str(kind), (_QWEN, ""))
    if blocks and not known:
        stacks = {name for name, layer in layers.items() if _is_stack(name, layer)}
        problems.append(
            f"{some(sorted(stacks))}: vLLM's names for the experts of model type {kind!r} are not known; "
            "merge_and_unload gives a model that it reads"
        )
    for path in sorted(blocks) if known else ():
        whole = {f"{path}.{stacked}": layers.pop(f"{path}.{stacked}", None) for stacked in family}
        filled = {name: layer or _zeros(target.base(name), adapter) for name, layer in whole.items()}
        if kind in IN_STACKS:
            layers |= filled
            stacks |= filled.keys()
        else:
            for layer, labels in zip(filled.values(), family.values(), strict=True):
                layers |= _one_by_one(_called(path, around), layer, labels)
    for name in [*layers] if known and family is not _NEMOTRON else ():  # whose router vLLM passes over
        router = _ROUTER.fullmatch(name)
        if router is not None and layers[name].base.kind == PARAMETER and f"{router[1]}.experts" in target.modules:
            layer = layers.pop(name)
            base = BaseLayer("Linear", "o i -> o i", layer.base.shape)
            layers[_called(name.removesuffix(".weight"), around)] = replace(layer, base=base)
    layers |= {name: _zeros(target.base(name), adapter) for name in _absent(layers, target)}
    return Experts(replace(adapter, layers=dict(sorted(layers.items()))), stacks, problems)


def _is_stack(name: str, layer: SavedLayer) -> bool:
    path, _, last = name.rpartition(".")
    return layer.base.kind == PARAMETER and last in STACKED and path.rpartition(".")[2] == "experts"


def _one_by_one(path: str, layer: SavedLayer, labels: Sequence[str]) -> dict[str, SavedLayer]:
    """The adapter of a stack as one for each expert and label."""
    count, out, width = layer.base.shape
    single = BaseLayer("Linear", "o i -> o i", (out // len(labels), width))
    names = [f"{path}.{expert}.{label}" for expert in range(count) for label in labels]
    return dict(zip(names, cut(layer, labels, lambda expert, label: single), strict=True))


def _called(name: str, around: str) -> str:
    """A name in a block, with what checkpoints call the block."""
    return re.sub(rf"\b{BLOCKS[1]}(?=\.(experts|gate)\b)", around, name) if around else name


def _absent(layers: Collection[str], target: ModelTarget) -> Iterator[str]:
    """The layers of single experts in the model that have no adapter, while others of the same block have one."""
    found = {name: match for name in layers if (match := SINGLE.fullmatch(name)) is not None}
    paths = {match[1] for match in found.values()}
    for name in target.modules if paths else ():
        match = SINGLE.fullmatch(name)
        if match is not None and match[1] in paths and name not in found and target.base(name) is not None:
            yield name


def _zeros(base: BaseLayer | None, adapter: SavedAdapter) -> SavedLayer:
    """An adapter that adds nothing, for a layer that vLLM must have one of."""
    assert base is not None
    like = next(iter(adapter.layers.values())).tensors["lora_A"]
    shape = matrix_shape(base.layout, base.shape)
    tensors = {each.name: like.new_zeros(each.shape(shape, 1)) for each in FACTORS}
    return SavedLayer(base, AdapterSpec(r=1, alpha=1), tensors)

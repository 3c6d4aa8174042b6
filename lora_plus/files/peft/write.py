"""PEFT's checkpoint format: ``adapter_config.json`` and ``adapter_model.safetensors`` in one folder.

Written and read as peft 0.21 does. Of the config, only what decides the result is written; module names are written in
full, and pattern keys are anchored, so that nothing depends on their order. PEFT adapts whole linear layers, embeddings
and convolutions, attention modules as one, and parameters, the latter while the module that has them is called.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lora_plus.files.saved_adapter import SavedAdapter, SavedLayer, alpha_under, most_common
from lora_plus.layers.base import BaseLayer

from .config import CONFIG, USER_FIELDS, checked_config
from .limits import inexpressible, starts_transposed, units
from .names import PREFIX, Outline, anchored, endings, nesting
from .reader import DOUBLED, Reader
from .tensors import attention_to_peft, join_rows, layer_to_peft, parameter_to_peft

__all__ = ["CONFIG", "METADATA", "WEIGHTS", "Outline", "read", "refusals", "write"]

WEIGHTS = "adapter_model.safetensors"
METADATA = {"format": "pt"}


def refusals(adapter: SavedAdapter, outline: Outline) -> list[str]:
    """Every layer or setting that PEFT's format cannot express exactly, with the reason."""
    return inexpressible(adapter, units(adapter), outline)


def write(adapter: SavedAdapter, outline: Outline) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config of a PEFT folder, of an adapter for which there are no `refusals`."""
    found = units(adapter)
    modules = {name: layer_to_peft(_joined(layers)) for name, layers in found.modules.items()}
    modules |= {name: attention_to_peft(list(parts.values())) for name, parts in found.attentions.items()}
    parameters = {
        name: parameter_to_peft(_joined(layers), name.rpartition(".")[0] in outline.transposed)
        for name, layers in found.parameters.items()
    }
    layers = dict(sorted({**modules, **parameters}.items()))
    rslora = all(layer.spec.scaling == "rslora" for layer in layers.values())
    scaling = "rslora" if rslora else "standard"
    ranks = {name: layer.spec.r for name, layer in layers.items()}
    alphas = {name: alpha_under(layer, scaling) for name, layer in layers.items()}
    # PEFT says of a pattern that only a parameter matches that nothing does, so it is parameters that need none
    usual = parameters or layers
    r, alpha = (most_common([values[name] for name in layers if name in usual]) for values in (ranks, alphas))
    targets = sorted(modules)
    others = (ending for name in outline.names if name not in modules for ending in endings(name))
    accidents = not outline.whole or any(ending in modules for ending in others)
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        # PEFT also adapts modules whose name ends in a listed one; a regular expression matches whole names only
        "target_modules": "|".join(map(re.escape, targets)) if accidents else targets,
        "target_parameters": sorted(parameters) or None,
        "rank_pattern": {anchored(name): rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {anchored(name): value for name, value in alphas.items() if value != alpha},
        "modules_to_save": sorted(adapter.trained) or None,
        "lora_dropout": max(layer.spec.dropout for layer in layers.values()),  # attention has none in PEFT
        "use_rslora": rslora,
        "use_dora": any(layer.spec.variant == "dora" for layer in layers.values()),
        "fan_in_fan_out": starts_transposed(found),
        "init_lora_weights": True,
        "bias": "none",
        "inference_mode": True,
        **{name: adapter.metadata.get(name) for name in USER_FIELDS},
    }
    nested = nesting(parameters, outline)
    paths = {name: path for path, name in nested.paths().items()} | {name: nested.wrapped(name) for name in modules}
    tensors = {
        f"{PREFIX}{paths[name]}.{end}": tensor
        for name, layer in layers.items()
        for end, tensor in layer.tensors.items()
    }
    for path, trained in adapter.trained.items():
        tensors |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in trained.items()}
    parts = {name: part.base.facts for group in found.attentions.values() for name, part in group.items()}
    doubled = [name for name, facts in parts.items() if "rows" not in facts]
    if doubled:
        warnings.warn(
            f"the file says W + s B A of {', '.join(map(repr, sorted(doubled)))}, but {DOUBLED}; where that peft shall "
            "compute the same, halve their lora_B after loading there",
            stacklevel=7,  # the caller of save_adapter
        )
    return tensors, config


def _joined(layers: Mapping[str, SavedLayer]) -> SavedLayer:
    """The adapter of a whole weight."""
    several = list(layers.values())
    return join_rows(several) if "rows" in several[0].base.facts else several[0]


def read(
    tensors: dict[str, Tensor],
    config: Any,
    bases: Mapping[str, BaseLayer | None],
    outline: Outline,
    repeats: Callable[[str, Tensor], bool | None],
    problems: list[str],
) -> SavedAdapter:
    """The adapter that a PEFT folder describes; what is wrong with it is added to ``problems``.

    Args:
        tensors: all tensors of ``adapter_model.safetensors``.
        config: ``adapter_config.json``, parsed.
        bases: every module and every place for an adapter by name, with its base layer if it can be adapted.
        outline: the names of the model's parts.
        repeats: whether a tensor equals the base model's own of this name; None if that cannot be told.
        problems: list to add to.
    """
    checked = checked_config(config, problems)
    if checked is None:
        return SavedAdapter({}, {})
    return Reader(checked, bases, outline, repeats, problems).read(tensors)

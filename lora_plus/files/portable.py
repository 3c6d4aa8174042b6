"""An adapter in the form that most readers of PEFT's format understand: one rank, one alpha, and no pattern."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from lora_plus.tensors.matrix import accumulation_dtype
from lora_plus.tensors.variant import only_adds

from .peft.tensors import join_rows, rescaled
from .saved_adapter import SavedAdapter, SavedLayer
from .starts import without_starts
from .tied import spread
from .token_rows import is_rows, row_layers


def portable(adapter: SavedAdapter, dtype: torch.dtype | None = None) -> SavedAdapter:
    """The same adapter with one rank r on every layer and alpha = r, so that the update of each is just B A.

    Scales are multiplied into B. Lower ranks are filled up with rows of zeros in A and columns of zeros in B, which is
    exact, for DoRA too, whose magnitudes stay. Adapters of rows of one weight become one of all its rows, and
    one of tied layers becomes one for each. Dropout is
    gone. PEFT's rank of a grouped convolution is that of all its groups together, and it is that rank which is r.

    Args:
        adapter: the adapter.
        dtype: of A, B and the magnitudes; they are computed in float32 or better and rounded to it at the end. None
            for float32, or float64 where the adapter is. Modules trained in full keep theirs.
    """
    layers: dict[str, SavedLayer] = {}
    blocks: dict[str, list[SavedLayer]] = {}
    for name, each in spread(without_starts(adapter)).layers.items():
        spec = each.spec
        if is_rows(each):
            continue
        # how it was trained makes no difference to readers
        variant = "lora" if only_adds(spec.variant) else spec.variant
        at_one = replace(spec, alpha=spec.r, scaling="standard", variant=variant, dropout=0.0)
        layer = SavedLayer(each.base, at_one, {**each.tensors, "lora_B": rescaled(each, 1.0)})
        if "rows" in layer.base.facts:
            blocks.setdefault(layer.base.facts["parameter"], []).append(layer)
        else:
            layers[name] = layer
    for weight, several in blocks.items():
        whole = join_rows(several)
        facts = {**whole.base.facts, "rows": [0, len(whole.tensors["lora_B"])]}
        layers[weight] = replace(whole, base=replace(whole.base, facts=facts))
    groups = {name: layer.base.facts.get("groups", 1) for name, layer in layers.items()}
    largest = max((layer.spec.r * groups[name] for name, layer in layers.items()), default=1)
    step = math.lcm(*groups.values())
    r = math.ceil(largest / step) * step
    padded = {name: _padded(layer, r // groups[name], dtype) for name, layer in layers.items()}
    padded |= {name: adapter.layers[name] for name in row_layers(adapter)}
    return SavedAdapter(padded, adapter.trained, adapter.metadata)


def rank(adapter: SavedAdapter) -> int:
    """The one rank, as PEFT counts it, of a portable adapter."""
    layer = next((layer for layer in adapter.layers.values() if not is_rows(layer)), None)
    return 1 if layer is None else layer.spec.r * layer.base.facts.get("groups", 1)


def _padded(layer: SavedLayer, r: int, dtype: torch.dtype | None) -> SavedLayer:
    """The layer at rank r, with its tensors in one dtype."""
    more = r - layer.spec.r
    tensors = dict(layer.tensors)
    tensors["lora_A"] = F.pad(tensors["lora_A"], (0, 0, 0, more))  # (..., r, in)
    tensors["lora_B"] = F.pad(tensors["lora_B"], (0, more))  # (..., out, r)
    dtype = dtype or accumulation_dtype(*(tensor.dtype for tensor in tensors.values()))
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return SavedLayer(layer.base, replace(layer.spec, r=r, alpha=r), cast)

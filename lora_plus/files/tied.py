"""Adapters of tied weights in formats that have an adapter for each layer: one of ours as several, and back to one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_plus.layers.base_layer import BaseLayer
from lora_plus.layers.kinds import kinds_by_name
from lora_plus.model.tied import is_transposed

from .saved_adapter import SavedAdapter, SavedLayer
from .token_rows import is_rows


def spread(adapter: SavedAdapter) -> SavedAdapter:
    """The adapter with a layer for each of those that one A and B are for; their updates are the same."""
    layers: dict[str, SavedLayer] = {}
    for name, layer in adapter.layers.items():
        layers |= {name: layer} if "tied" not in layer.base.facts or is_rows(layer) else dict(_each(name, layer))
    return replace(adapter, layers=layers)


def _each(name: str, layer: SavedLayer) -> Iterator[tuple[str, SavedLayer]]:
    base = _alone(layer.base)
    yield name, replace(layer, base=base)
    for other, kind in layer.base.facts["tied"].items():
        layout = kinds_by_name()[kind].layout
        yield (
            other,
            SavedLayer(
                replace(base, kind=kind, layout=layout),
                layer.spec,
                _seen(layer.tensors, is_transposed(base.layout, layout)),
            ),
        )


def _alone(base: BaseLayer) -> BaseLayer:
    return replace(base, facts={fact: value for fact, value in base.facts.items() if fact != "tied"})


def _seen(tensors: Mapping[str, Tensor], transposed: bool) -> dict[str, Tensor]:
    """The tensors as a tied layer has them, whose matrix view may be the transpose."""
    if not transposed:
        return dict(tensors)
    return {"lora_A": tensors["lora_B"].mT.contiguous(), "lora_B": tensors["lora_A"].mT.contiguous()}


def joined(adapter: SavedAdapter, ties: Iterable[tuple[str, str]]) -> tuple[SavedAdapter, list[str]]:
    """The adapter with one layer for each pair of tied ones whose updates are the same; and the pairs that differ.

    Args:
        adapter: with a layer for each.
        ties: pairs of layers; the first of two keeps the adapter.
    """
    layers, differing = dict(adapter.layers), list[str]()
    for name, other in ties:
        one, two = layers[name], layers.get(other)
        if two is not None and _is_same(one, two):
            tied = {**one.base.facts.get("tied", {}), other: layers.pop(other).base.kind or _USUAL}
            layers[name] = replace(one, base=replace(one.base, facts={**one.base.facts, "tied": tied}))
        else:
            differing.append(f"{name!r} and {other!r}")
    return replace(adapter, layers=layers), differing


_USUAL = "Linear"
"""The kind of a layer of which nothing is known, as of a head whose weight a checkpoint has under another name."""


def _is_same(one: SavedLayer, other: SavedLayer) -> bool:
    """Whether another layer has just the adapter that following this one would give it."""
    base = other.base if other.base.kind else BaseLayer(_USUAL, kinds_by_name()[_USUAL].layout, one.base.shape)
    if one.spec != other.spec or one.base.shape != base.shape or "rows" in base.facts:
        return False
    seen = _seen(one.tensors, is_transposed(one.base.layout, base.layout))
    return seen.keys() == other.tensors.keys() and all(
        tensor.dtype == other.tensors[part].dtype and torch.equal(tensor, other.tensors[part])
        for part, tensor in seen.items()
    )

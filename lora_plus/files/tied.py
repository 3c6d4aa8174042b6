"""Tied weights in files: one adapter of ours as one for each layer, and back to one; what is trained in full twice.

Which of the layers has an adapter makes no difference to what they compute, so a model gets it on the one that has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_plus.layers.base_layer import BaseLayer
from lora_plus.layers.kinds import kinds_by_name
from lora_plus.model.tied import FollowingAdapter, is_transposed

from .checks import base_problem, shape_problems, without_values
from .fit import FITTERS
from .saved_adapter import SavedAdapter, SavedLayer
from .target import ModelTarget, Target
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


def at_leaders(data: SavedAdapter, target: Target, problems: list[str]) -> SavedAdapter:
    """The adapter with those of tied layers on the ones that have them in a model, where others of these follow."""
    if not isinstance(target, ModelTarget):
        return data
    leaders = {name: _leader(name, layer, target) for name, layer in data.layers.items() if "tied" in layer.base.facts}
    layers = dict[str, SavedLayer]()
    for name, layer in data.layers.items():
        leader = leaders.get(name)
        if leader is None or leader in data.layers:
            layers[name] = layer
            continue
        kinds = {name: layer.base.kind, **layer.base.facts["tied"]}
        kind = kinds.pop(leader)
        layout = kinds_by_name()[kind].layout
        base = BaseLayer(kind, layout, layer.base.shape, {**layer.base.facts, "tied": kinds})
        layers[leader] = SavedLayer(base, layer.spec, _seen(layer.tensors, is_transposed(layer.base.layout, layout)))
    return replace(data, layers=layers)


def _leader(name: str, layer: SavedLayer, target: ModelTarget) -> str | None:
    """The one of the tied layers that has the adapters that this one follows in a model; None if it follows none."""
    place = target.place(name)
    weight = None if place is None or is_rows(layer) else place.adapted()
    if weight is None or base_problem(layer.base) is not None or shape_problems(layer):
        return None
    held = [each for site in weight.adapter_sites() for each in site.lora_adapters.values()]
    followed = [id(each.source) for each in held if isinstance(each, FollowingAdapter)]
    return next((other for other in layer.base.facts["tied"] if id(target.modules.get(other)) in followed), None)


FITTERS.append(at_leaders)

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


def trained_once(adapter: SavedAdapter, target: Target, problems: list[str]) -> SavedAdapter:
    """The same adapter; a problem where two things in it would train one tensor of the model to two values."""
    units = target.units if isinstance(target, ModelTarget) and len(adapter.trained) > 1 else {}
    first: dict[int, tuple[str, Tensor]] = {}
    apart = dict[tuple[str, str], None]()
    for name in filter(units.__contains__, adapter.trained):
        for part, bound in units[name].tensors().items():
            value = adapter.trained[name].get(part)
            if value is None or without_values(value) is not None:
                continue
            other, given = first.setdefault(id(bound), (name, value))
            one = units[other].module is units[name].module and units[other].parameter == units[name].parameter
            if not one and not torch.equal(given, value):
                apart[other, name] = None
    problems += [f"{a!r} and {b!r} differ in a tensor that is one and the same in this model" for a, b in apart]
    return adapter


FITTERS.append(trained_once)

"""Putting the values of a file into an adapter that a sharded model has already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from lora_plus.layers.adapter import AdapterSite
from lora_plus.layers.freezing import set_requires_grad
from lora_plus.model.adapters import check_unmerged, set_adapter
from lora_plus.model.places import Place, adapted_places
from lora_plus.model.train_also import trained_modules
from lora_plus.model.tree import adapted_weights, named_modules
from lora_plus.tensors.distributed import fill
from lora_plus.tensors.variant import AdapterSpec
from lora_plus.text import join

from .saved_adapter import SavedAdapter

Chosen = Mapping[str, tuple[Place, AdapterSpec]]
"""By the name in the file of a layer, its place in the model and its settings."""


def check_refillable(model: nn.Module) -> None:
    """Raise in a state in which the values of adapters must not be changed."""
    for path, weight in adapted_weights(model):
        weight.check_enabled()
        check_unmerged(path, weight, "loading into it")


def _sites(model: nn.Module, adapter: str) -> dict[Any, tuple[Place, AdapterSite]]:
    return {place.key: (place, site) for place, site in adapted_places(model) if adapter in site.lora_specs}


def refill_problems(model: nn.Module, adapter: str, data: SavedAdapter, chosen: Chosen) -> list[str]:
    """How the adapter of this name in the model differs from the file's in anything but values."""
    sites = _sites(model, adapter)
    problems = []
    for name, (place, spec) in chosen.items():
        if place.key not in sites:
            problems.append(f"{name!r} has no adapter {adapter!r} in the model")
            continue
        _, site = sites.pop(place.key)
        ours, file = asdict(site.lora_specs[adapter]), asdict(spec)
        held, tensors = site.adapter_tensors(adapter), data.layers[name].tensors
        ours |= {join(part, "dtype"): tensor.dtype for part, tensor in held.items()}
        file |= {join(part, "dtype"): tensor.dtype for part, tensor in tensors.items()}
        problems += [
            f"{name!r}: {field} {file.get(field)!r} in the file, {ours.get(field)!r} in the model"
            for field in ours | file
            if file.get(field) != ours.get(field)
        ]
    problems += [f"{place.name!r} has no adapter in the file" for place, _ in sites.values()]
    trained = {path for path, _, _ in trained_modules(model, adapter)}
    problems += [f"{path!r} is not trained in full in the file" for path in sorted(trained - data.trained.keys())]
    problems += [f"{path!r} is not trained in full in the model" for path in sorted(data.trained.keys() - trained)]
    return problems


def refill(model: nn.Module, adapter: str, data: SavedAdapter, chosen: Chosen, *, trainable: bool) -> None:
    """Write the values of the file's layers into the model's adapter, and make it the active one.

    Every rank must call this.
    """
    sites = _sites(model, adapter)
    for name, (place, _) in chosen.items():
        held = sites[place.key][1].adapter_tensors(adapter)
        for part, tensor in data.layers[name].tensors.items():
            fill(held[part], tensor)
    set_requires_grad((module for _, module in named_modules(model)), False)
    set_adapter(model, adapter, trainable=trainable)

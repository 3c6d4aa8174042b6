"""Adapters of linear layers whose weight a module reads itself, where a file or a program has them as layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lora_plus.errors import warn_user
from lora_plus.layers.base_layer import PARAMETER, BaseLayer
from lora_plus.text import some

from .fit import FITTERS
from .saved_adapter import SavedAdapter, SavedLayer
from .target import ModelTarget, Target


def fit_read_layers(data: SavedAdapter, target: Target, problems: list[str]) -> SavedAdapter:
    """The adapter with parameters in the place of linear layers that the model reads; those have no dropout."""
    if not isinstance(target, ModelTarget):
        return data
    layers = dict(data.layers)
    for name, layer in data.layers.items():
        place = target.places.get(name) if layer.base.kind == "Linear" and not layer.base.facts else None
        if place is not None and not place.called and place.base().shape == layer.base.shape:
            layers[name] = SavedLayer(place.base(), layer.spec, layer.tensors)
    # PEFT's config has one dropout for all layers
    return replace(data, layers=without_dropout(layers, {} if data.format == "peft" else data.layers, problems))


FITTERS.append(fit_read_layers)


def without_dropout(
    layers: dict[str, SavedLayer], stated: Mapping[str, SavedLayer], problems: list[str]
) -> dict[str, SavedLayer]:
    """The layers without the dropout of those that have become parameters, which is said; not so where it is stated."""
    of_parameters = {name for name, layer in stated.items() if layer.base.kind == PARAMETER}
    found = {name: layer for name, layer in layers.items() if layer.spec.dropout and layer.base.kind == PARAMETER}
    dropped = [name for name in found if name not in of_parameters]
    if dropped and not problems:
        warn_user(f"where only a weight is read there is no dropout, so that of {some(dropped)} is left out")
    return layers | {name: replace(found[name], spec=replace(found[name].spec, dropout=0.0)) for name in dropped}


def as_layers(adapter: SavedAdapter, target: ModelTarget) -> SavedAdapter:
    """The adapter with linear layers in the place of parameters that are the weights of such."""
    layers = {}
    for name, layer in adapter.layers.items():
        path = layer.base.facts.get("parameter", "").removesuffix(".weight")
        if layer.base.kind == PARAMETER and "of" not in layer.base.facts and path in target.modules:
            linear = isinstance(target.modules[path], nn.Linear) and layer.base.layout == "o i -> o i"
            if linear and "rows" not in layer.base.facts:
                name, layer = path, replace(layer, base=BaseLayer("Linear", layer.base.layout, layer.base.shape))
        layers[name] = layer
    return replace(adapter, layers=layers)

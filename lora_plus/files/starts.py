"""Adapters that start from the weight (``"pissa"`` and its like) in files: of rank 2 r, and again of rank r in a model.

Such an adapter computes W + s (B A - B0 A0), with A0 and B0 fixed. Files have it as the plain adapter of rank 2 r that
it is, ``[A; A0]`` and ``[B, -B0]``, which any reader computes rightly, and say beside it which r and alpha it had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_plus.layers.adapter import Adapter
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.layers.kinds import DTYPES
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.model.places import Place
from lora_plus.tensors.distributed import is_dtensor
from lora_plus.tensors.variant import SUBTRACTED, AdapterSpec

from .checks import FACTS, base_problem, shape_problems
from .fit import FITTERS
from .saved_adapter import SavedAdapter, SavedLayer
from .target import ModelTarget, Target
from .token_rows import is_rows

START = "start"
"""What files call the r and the alpha of an adapter that started from the weight."""


def without_start(base: BaseLayer) -> BaseLayer:
    """The base of an adapter that has other factors now than those that it had with its start."""
    return replace(base, facts={fact: value for fact, value in base.facts.items() if fact != START})


def without_starts(adapter: SavedAdapter) -> SavedAdapter:
    """The adapter as the plain one of rank 2 r that it is."""
    started = {name: layer for name, layer in adapter.layers.items() if START in layer.base.facts}
    plain = {name: replace(layer, base=without_start(layer.base)) for name, layer in started.items()}
    return replace(adapter, layers=adapter.layers | plain) if plain else adapter


def with_starts(data: SavedAdapter, target: Target, problems: list[str]) -> SavedAdapter:
    """The adapter with its starts taken out, as a model holds it.

    That is so where the file says it, and where the model has an adapter with the same start. Where the model has
    adapters without any, it stays the plain one of rank 2 r, whose values such an adapter can take.
    """
    layers = dict(data.layers)
    adapted = isinstance(target, ModelTarget) and any(isinstance(module, AdaptedWeight) for _, module in target.named)
    for name, layer in data.layers.items():
        if START not in layer.base.facts and not adapted:
            continue
        place = _place(name, layer.base, target) if isinstance(target, ModelTarget) else None
        weight = None if place is None else place.adapted()
        if (START not in layer.base.facts and weight is None) or is_rows(layer):
            continue
        plain = layers[name] = replace(layer, base=without_start(layer.base))
        if place is None or base_problem(plain.base) is not None or shape_problems(plain):
            continue
        if not all(tensor.dtype in DTYPES for tensor in plain.tensors.values()):  # which the fit refuses
            continue
        held = _held(weight)
        told = layer.base.facts.get(START) if not held or any(map(_started, held)) else None
        specs = [_settings(told, layer.spec), *(each.spec for each in held if _has_start_of(each, plain))]
        spec = next(filter(None, specs), None)
        if spec is not None:
            layers[name] = _taken_out(plain, spec)
    return replace(data, layers=layers)


def _settings(told: Any, spec: AdapterSpec) -> AdapterSpec | None:
    """The settings of the adapter of rank r; None if these are not those of half of the one of rank 2 r."""
    r = told.get("r") if isinstance(told, Mapping) else None
    if type(r) is not int or 2 * r != spec.r:
        return None
    alpha: Any = told.get("alpha")
    usable = isinstance(alpha, (int, float)) and 0 < abs(alpha) <= 1e300
    own = replace(spec, r=r, alpha=alpha) if usable else spec.at_rank(r)
    return own if math.isclose(own.scale, spec.scale, rel_tol=1e-12) else spec.at_rank(r)


def _place(name: str, base: BaseLayer, target: ModelTarget) -> Place | None:
    """The place of an adapter in a model, or of the layer some of whose rows it is on."""
    return target.place(name) or target.place(base.weight_name(name).rpartition(".")[0])


def _held(weight: AdaptedWeight | None) -> list[Adapter]:
    """The adapters of a weight and of its rows."""
    return [] if weight is None else [each for site in weight.adapter_sites() for each in site.lora_adapters.values()]


def _started(adapter: Adapter) -> bool:
    return SUBTRACTED[0] in adapter.tensors()


def _has_start_of(adapter: Adapter, layer: SavedLayer) -> bool:
    """Whether the second half of a saved adapter is the start of one that a model has, bit for bit."""
    r = adapter.spec.r
    if not _started(adapter) or 2 * r != layer.spec.r or not math.isclose(adapter.spec.scale, layer.spec.scale):
        return False
    A0, B0 = (adapter.tensors()[name].detach() for name in SUBTRACTED)
    A, B = layer.factors()
    if is_dtensor(A0) or A.shape != (*A0.shape[:-2], 2 * r, A0.shape[-1]) or B.shape != (*B0.shape[:-1], 2 * r):
        return False
    return torch.equal(A[..., r:, :].to(A0), A0) and torch.equal(-B[..., r:].to(B0), B0)


def _taken_out(layer: SavedLayer, spec: AdapterSpec) -> SavedLayer:
    A, B, r = *layer.factors(), spec.r
    parts: dict[str, Tensor] = {"lora_A": A[..., :r, :], "lora_B": B[..., :r]}
    parts |= dict(zip(SUBTRACTED, (A[..., r:, :], -B[..., r:]), strict=True))
    own = {name: tensor.clone().contiguous() for name, tensor in parts.items()}
    return SavedLayer(layer.base, spec, {**layer.tensors, **own})


FITTERS.append(with_starts)
FACTS[START] = lambda base, told: isinstance(told, dict)

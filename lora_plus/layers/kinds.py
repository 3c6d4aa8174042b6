"""Which LoRA class adapts which layer: the table of kinds, and why some layers have none."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .class_swap import SwappedModule
from .layer import LoRALayer, argument_names

KINDS: dict[type[nn.Module], list[type[LoRALayer]]] = {}
"""Layer class -> the kinds for it and its subclasses. The first one that fits a layer adapts it."""

FORMS: list[Callable[[Tensor], str | None]] = []
"""Each says how a weight is stored, such as ``"quantized (torchao)"``, if an update cannot be added to it there."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Of the weights that can be adapted."""

Kind = TypeVar("Kind", bound=type[LoRALayer])


def adapts(base_class: type[nn.Module]) -> Callable[[Kind], Kind]:
    """Class decorator: register a LoRA class as the kind of layer for ``base_class`` and its subclasses.

    If several kinds are registered for one class, the last one is asked first whether it ``fits`` a layer.
    """

    def enter(kind: Kind) -> Kind:
        kind.base_class, kind.lora_arguments = base_class, argument_names(base_class)
        KINDS.setdefault(base_class, []).insert(0, kind)
        return kind

    return enter


def lora_class(module: nn.Module) -> type[LoRALayer] | None:
    """The kind that can adapt this layer, or None."""
    if isinstance(module, LoRALayer):
        return type(module)
    for parent in type(module).__mro__:
        for kind in KINDS.get(parent, ()):
            if kind.fits(module):
                return kind
    return None


def kinds_by_name() -> dict[str, type[LoRALayer]]:
    """Every kind by the name that it has in files."""
    return {kind.kind_name(): kind for kinds in KINDS.values() for kind in kinds}


def why_unsupported(module: nn.Module, kind: type[LoRALayer] | None) -> str | None:
    """Why a layer of this kind, or of none, cannot be adapted; None if it can."""
    name, weight = type(module).__name__, weight_of(module)
    if isinstance(module, SwappedModule) and module.adapted_names:
        return f"{name} whose parameters {sorted(module.adapted_names)} have adapters"
    if kind is None:
        return name
    stored = None if kind.stored_quantized else why_no_numbers(weight)
    if stored is not None:
        return f"{name} whose weight is {stored}"
    if isinstance(weight, nn.UninitializedParameter):
        return f"{name} whose weight is not initialised; run a forward pass first"
    if not isinstance(weight, Tensor):
        return f"{name} without a weight tensor"
    if not kind.stored_quantized and weight.dtype not in DTYPES:
        return f"{name} whose weight is {weight.dtype}, expected one of {DTYPES}"
    if not weight.numel():
        return f"{name} whose weight is empty"
    if isinstance(module, LoRALayer):
        return None
    if (unfit := kind.unfit(module)) is not None:
        return unfit
    if type(module) not in _TAKEN:
        _TAKEN[type(module)] = _OWN_NAMES.intersection(dir(type(module)))
    held = (_TAKEN[type(module)], module.__dict__, module._parameters, module._buffers, module._modules)
    if all(map(_OWN_NAMES.isdisjoint, held)):
        return None
    return f"{name} that has attributes of a LoRA layer already: {sorted(_OWN_NAMES.intersection(chain(*held)))}"


def weight_of(layer: nn.Module) -> Any:
    """The attribute ``weight`` of a layer, if it has one; torch takes several times as long to find a parameter."""
    held = layer._parameters.get("weight")
    return getattr(layer, "weight", None) if held is None else held


def why_no_numbers(weight: object) -> str | None:
    """How a weight is stored if an update cannot be added to it there; None for plain numbers, or without a weight."""
    if type(weight) is nn.Parameter or not isinstance(weight, Tensor):
        return None
    return next((stored for form in FORMS if (stored := form(weight)) is not None), None)


_STATED = {*dir(LoRALayer), *LoRALayer.__annotations__, *LoRALayer.lora_state} - {*dir(nn.Module), "weight"}
_OWN_NAMES = {name for name in _STATED if not name.startswith("__annot")}  # as any class has that states types

_TAKEN: WeakKeyDictionary[type[Any], set[str]] = WeakKeyDictionary()
"""Layer class -> attributes of it that a LoRA layer has, too; asking ``dir`` is slow."""


def numbers_like(weight: Tensor, *shape: int) -> Tensor:
    """Numbers between -1 and 1 without a pattern, like the weight in dtype and device, to try a forward with."""
    count = torch.arange(1, 1 + math.prod(shape), device=weight.device, dtype=torch.float32)
    return torch.sin(count * count).reshape(shape).to(weight.dtype)

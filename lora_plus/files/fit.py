"""Where in a model the layers of a saved adapter belong, and whether they fit there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from lora_plus.layers.base_layer import PARAMETER, BaseLayer
from lora_plus.layers.kinds import DTYPES
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.model.places import PLACE_FINDERS, Place, find_places, overlaps
from lora_plus.model.train_also import Unit
from lora_plus.text import join, near_misses

from .checks import base_problem, is_finite, shape_problems, unlike_base, unlike_dropout, value_problems, without_values
from .saved_adapter import SavedAdapter, SavedLayer
from .target import ModelTarget, Target

FITTERS: list[Callable[[SavedAdapter, Target, list[str]], SavedAdapter]] = []
"""What gives an adapter the form that its target has; each adds what is wrong to the list."""


def choose_places(data: SavedAdapter, target: ModelTarget, problems: list[str]) -> dict[str, Place]:
    """The place in the model of each layer of the file; what does not fit is added to the problems."""
    chosen: dict[str, Place] = {}
    seen: dict[Any, str] = {}
    rows: dict[int, tuple[str, float]] = {}
    lines: dict[str, list[str]] = {}
    fitting, missing, unlike = dict[str, SavedLayer](), list[str](), list[str]()
    for name, layer in data.layers.items():
        place = _place(name, layer.base, target, data.layers)
        if place is None:
            missing.append(name)
            continue
        chosen[name], own = place, lines.setdefault(name, [])
        if place.called and place.rows is not None:
            dropout = name, layer.spec.dropout
            unlike += unlike_dropout(rows.setdefault(id(place.owner), dropout), dropout)
        known = layer.base is target.bases.get(name)  # who read the file asked the model for it
        reason = None if known else place.refusal()
        if reason is not None:
            own.append(f"{name!r} cannot be adapted: it is {reason}")
            continue
        first = seen.setdefault(place.key, name)
        if first != name:
            own.append(f"{name!r} and {first!r} are one module in this model")
        wrong = _layer_problems(layer, layer.base if known else place.base())
        fitting |= {} if wrong else {name: layer}
        unfit = place.misfits(layer.spec)
        own += [f"{name!r}: {line}" for line in (*wrong, *([unfit] if unfit else []))]
    for name, wrong in value_problems(fitting).items():  # the values of what does not fit can be of any size
        lines[name] += wrong
    problems += itertools.chain(*lines.values())
    problems += _missing_modules(missing, target) if missing else ()
    problems += overlaps({place.key: place for place in chosen.values()}.values())
    problems += unlike
    return chosen


def _place(name: str, base: BaseLayer, target: ModelTarget, layers: Collection[str]) -> Place | None:
    """Where in the model a layer of the file belongs."""
    rows = base.facts.get("rows")
    owner_name = base.facts.get("parameter", "").rpartition(".")[0]
    inside = name.startswith(f"{owner_name}.") or not owner_name
    if base.kind != PARAMETER and rows is not None and inside and owner_name in target.modules:
        label = name.removeprefix(owner_name).removeprefix(".")
        entry = target.found[id(target.modules[owner_name])]
        return find_places({0: entry}, {0: {label: (rows[0], rows[1])}})[-1]
    return (place := target.place(name)) and PLACE_FINDERS[-1].told(place, base, target, layers)


def _missing_modules(names: list[str], target: ModelTarget) -> list[str]:
    # looking for near misses is slow, and a few of them show what is wrong
    hints = [near_misses(name, target.modules) for name in names[:3]] + [""] * len(names[3:])
    return [f"{name!r}: the model has no such module{hint}" for name, hint in zip(names, hints, strict=True)]


def _layer_problems(layer: SavedLayer, base: BaseLayer) -> list[str]:
    """How a layer's adapter differs from what this layer of the model needs."""
    if layer.base != base:
        pairs = [(key, getattr(layer.base, key), getattr(base, key)) for key in ("kind", "layout", "shape", "facts")]
        return [f"{key} {file!r} in the file, {ours!r} in the model" for key, file, ours in pairs if file != ours]
    # True and 1.0 equal 1, and are no extents
    told = layer.base.facts or {*map(type, layer.base.shape)} != {int}
    wrong = (base_problem(layer.base) if told else None) or unlike_base(layer)
    return shape_problems(layer) if wrong is None else [wrong]


def trained_units(
    data: SavedAdapter, target: ModelTarget, places: Mapping[str, Place], problems: list[str]
) -> dict[str, Unit]:
    """What is trained in full by its name in the file; how it differs from the model's own goes to the problems."""
    units, seen = dict[str, Unit](), dict[tuple[int, str], str]()
    adapted = {id(place.owner): name for name, place in places.items()}
    weights = {layer.base.weight_name(name): name for name, layer in data.layers.items() if data.trained}
    for name, tensors in data.trained.items():
        unit = target.units.get(name)
        if unit is None:
            problems += _missing_modules([name], target)
            continue
        first = seen.setdefault((id(unit.module), unit.parameter), name)
        if first != name:
            problems.append(f"{name!r} and {first!r} are one module in this model")
        inside = next((adapted[id(child)] for child in unit.modules() if id(child) in adapted), weights.get(name))
        others = [one for child in unit.modules() if isinstance(child, AdaptedWeight) for one in child.adapter_names()]
        if inside is not None or others:
            first = f"in the model it has the adapter {others[0]!r}; call delete_adapter first" if others else ""
            problems.append(f"{name!r} is trained in full, but {first or f'{inside!r} in it has an adapter'}")
            continue
        units[name], wanted = unit, unit.tensors()
        problems += [f"{join(name, part)!r} is missing" for part in wanted if part not in tensors]
        for part, tensor in tensors.items():
            reason = without_values(tensor) or (
                _tensor_problem(tensor, wanted[part]) if part in wanted else f"{name!r} has no such tensor"
            )
            if reason is not None:
                problems.append(f"{join(name, part)!r}: {reason}")
    return units


def _tensor_problem(tensor: Tensor, wanted: Tensor) -> str | None:
    """Why a tensor of a module trained in full cannot take the place of the model's own; None if it can."""
    if tensor.shape != wanted.shape:
        return f"shape {tuple(tensor.shape)} in the file, {tuple(wanted.shape)} in the model"
    if tensor.dtype != wanted.dtype and not (tensor.dtype in DTYPES and wanted.dtype in DTYPES):
        return f"{tensor.dtype} in the file, {wanted.dtype} in the model"
    if wanted.is_meta:
        return "the model has no values for it yet (it is on the meta device); load the base model first"
    if isinstance(wanted, nn.Parameter) and not is_finite(tensor.to(wanted.dtype)):
        return "values that are not finite"
    return None

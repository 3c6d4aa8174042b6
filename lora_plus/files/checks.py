"""Checks of a saved adapter that need no model: settings, shapes, values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_plus.layers.base_layer import PARAMETER, BaseLayer
from lora_plus.layers.kinds import DTYPES, kinds_by_name
from lora_plus.model.places import PLACE_FINDERS
from lora_plus.model.selection import LAYOUTS
from lora_plus.tensors import matrix as functional
from lora_plus.tensors.variant import SUBTRACTED, adapter_tensor_specs, needs_input, whole_only
from lora_plus.text import join, parents

from .saved_adapter import SavedAdapter, SavedLayer
from .tensor_file import read_all


def base_problem(base: BaseLayer) -> str | None:
    """What is wrong with what a file says of a layer; None if an adapter can belong to such a one."""
    known = kinds_by_name().get(base.kind)
    layouts = _OF_PARAMETERS if base.kind == PARAMETER else () if known is None else (known.layout,)
    if base.layout not in layouts:
        return f"unknown kind of layer {base.kind!r} with layout {base.layout!r}"
    stored = base.layout.split(" -> ")[0]
    if len(stored.split()) != len(base.shape) or not all(type(n) is int and n > 0 for n in base.shape):
        return f"its weight has shape {base.shape}, which is not {stored!r}"
    if math.prod(base.shape) >= 2**59:  # elements have at most 16 bytes
        return f"its weight has shape {base.shape}, which no tensor can have"
    for fact, value in base.facts.items():
        if not FACTS[fact](base, value):
            return f"{fact} is {value!r}, which {base.kind} of shape {base.shape} cannot have"
    *stack, out_features, _ = functional.matrix_shape(base.layout, base.shape)
    if "rows" in base.facts and stack:
        return "it has rows of a stack of matrices"
    if "rows" in base.facts and base.facts["rows"][1] > out_features:
        return f"rows {base.facts['rows']} of a weight that has {out_features}"
    if "parameter" not in base.facts and (base.kind == PARAMETER or "rows" in base.facts):
        return "it does not say of which parameter it is"
    return None


FACTS: dict[str, Callable[[BaseLayer, Any], bool]] = {
    "groups": lambda base, groups: (
        base.kind.startswith("Conv") and type(groups) is int and groups > 0 and base.shape[0] % groups == 0
    ),
    "max_norm": lambda base, norm: base.kind == "Embedding" and type(norm) in (int, float) and 0 <= norm <= 1e308,
    "parameter": lambda base, name: isinstance(name, str) and (base.kind == PARAMETER or "rows" in base.facts),
    "rows": lambda base, rows: (
        isinstance(rows, list) and [type(row) for row in rows] == [int, int] and 0 <= rows[0] < rows[1]
    ),
    "of": lambda base, reader: base.kind == PARAMETER and reader in PLACE_FINDERS[-1].readers(),
}
"""What a file says of a layer besides, and whether it can be so."""


_OF_PARAMETERS = (*LAYOUTS, "n d -> d n", "o i j -> o (i j)")
"""How a parameter can be stored; nn.EmbeddingBag and nn.Bilinear have the last two."""


def value_problems(layers: Mapping[str, SavedLayer]) -> dict[str, list[str]]:
    """By layer, what is wrong with the values of these layers' adapters, which are read in one go."""
    read_all(layer.tensors for layer in layers.values())
    tensors = {join(name, part): tensor for name, layer in layers.items() for part, tensor in layer.tensors.items()}
    told = {
        name: f"{name!r} is {tensor.dtype}, expected one of {DTYPES}"
        for name, tensor in tensors.items()
        if tensor.dtype not in DTYPES
    } | not_finite(tensors)
    lines = {name: [told.get(join(name, part)) for part in layer.tensors] for name, layer in layers.items() if told}
    return {name: wrong for name, own in lines.items() if (wrong := [line for line in own if line is not None])}


def shape_problems(layer: SavedLayer) -> list[str]:
    """What is wrong with the shapes of a layer's adapter, given its base."""
    base = layer.base
    *stack, out_features, in_features = functional.matrix_shape(base.layout, base.shape)
    if "rows" in base.facts:
        out_features = base.facts["rows"][1] - base.facts["rows"][0]
    stated, own, matrix = adapter_tensor_specs(layer.spec.variant), layer.tensors, (*stack, out_features, in_features)
    there = [each for name, each in stated.items() if name not in SUBTRACTED or SUBTRACTED[0] in own]
    expected = {each.name: each.shape(matrix, layer.spec.r) for each in there}
    shapes = {part: tuple(getattr(tensor, "shape", ())) for part, tensor in layer.tensors.items()}
    return [
        f"{part} has shape {shapes.get(part)}, expected {expected.get(part)}"
        for part in shapes | expected
        if shapes.get(part) != expected.get(part)
    ]


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a tensor are finite; other dtypes than those of weights are."""
    if tensor.dtype not in DTYPES or math.isfinite(tensor.detach().sum(dtype=torch.float32)):
        return True
    return bool(torch.isfinite(tensor).all())  # a sum of finite numbers can be too large


def not_finite(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A line for each of these tensors that has values that are not finite, or none; small ones are asked together."""
    told = {name: why for name, tensor in tensors.items() if (why := without_values(tensor))}
    alike: dict[Any, list[str]] = {}
    for name, tensor in [(name, tensor) for name, tensor in tensors.items() if name not in told]:
        alike.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(name)
    for (shape, *_), names in alike.items():
        step = 1 + _STACKED // max(1, shape.numel())
        for start in range(0, len(names), step):
            group = names[start : start + step]
            if len(group) == 1 or not is_finite(torch.stack([tensors[name] for name in group])):
                told |= {name: "has values that are not finite" for name in group if not is_finite(tensors[name])}
    return {name: f"{name!r} {told[name]}" for name in tensors if name in told}


def without_values(tensor: Any) -> str | None:
    """Why something is no tensor whose values are there and lie side by side; None if it is one."""
    if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
        return "has no values (it is on the meta device); load them first" if tensor.is_meta else None
    return f"must be a dense tensor, got {getattr(tensor, 'layout', type(tensor).__name__)}"


_STACKED = 2**16
"""Values of small tensors that are copied to be asked together."""


def settings_problem(layer: SavedLayer) -> str | None:
    """What such an adapter cannot do where it is; None if it can."""
    base, spec = layer.base, layer.spec
    why = needs_input(spec.dropout) if base.kind == PARAMETER else None
    return why or (None if base.rows is None else whole_only(spec.variant)) or unlike_base(layer)


def unlike_base(layer: SavedLayer) -> str | None:
    """Why its settings and what is said of its base do not go together; None if they do."""
    return next(filter(None, [check(layer) for check in SETTINGS_CHECKS]), None)


SETTINGS_CHECKS: list[Callable[[SavedLayer], str | None]] = []
"""What `unlike_base` asks; others enter theirs."""


def unlike_dropout(*rows: tuple[str, float]) -> Iterator[str]:
    """What is wrong with the dropout of two blocks of a weight's rows, by name; they have one input between them."""
    (name, one), (other, another) = rows
    if one != another:
        told = f"dropout {one} and {another}"
        yield f"{name!r} and {other!r} are rows of one weight with {told}; write the same for both"


def row_problems(adapter: SavedAdapter) -> Iterator[str]:
    """Layers that have the same rows of one weight, or one input and different dropout."""
    blocks: dict[str, list[tuple[tuple[int, float], str]]] = {}
    for name, layer in adapter.layers.items():
        blocks.setdefault(layer.base.weight_name(name), []).append((layer.base.rows or (0, math.inf), name))
    for several in map(sorted, blocks.values()):
        for ((_, stop), name), ((start, _), other) in itertools.pairwise(several):
            first, second = (adapter.layers[each] for each in (name, other))
            if start < stop:
                yield f"{name!r} and {other!r} overlap"
            elif first.base.kind != PARAMETER:
                yield from unlike_dropout((name, first.spec.dropout), (other, second.spec.dropout))


def adapter_problems(adapter: SavedAdapter) -> Iterator[str]:
    """What is wrong with an adapter, as far as that can be told without its model; the layers' values are read."""
    lines: dict[str, list[str]] = {}
    for name, layer in adapter.layers.items():
        if layer.base.kind:
            unfit = base_problem(layer.base) or settings_problem(layer)
        else:
            shapes = {part: tuple(tensor.shape) for part, tensor in layer.tensors.items()}
            unfit = f"what kind of layer it belongs to cannot be told from its tensors, {shapes}"
        wrong = shape_problems(layer) if unfit is None else [unfit]
        lines[name] = [f"{name!r}: {line}" for line in wrong]
    lines |= value_problems({name: layer for name, layer in adapter.layers.items() if not lines[name]})
    yield from itertools.chain(*lines.values())
    yield from row_problems(adapter)
    weights = {name: layer.base.weight_name(name) for name, layer in adapter.layers.items()}
    adapted = {outer: name for name, weight in weights.items() for outer in ("", weight, *parents(weight))}
    for path, tensors in adapter.trained.items():
        if path in adapted:
            yield f"{path!r} is trained in full, but {adapted[path]!r} in it has an adapter"
        yield from not_finite({join(path, name): tensor for name, tensor in tensors.items()}).values()

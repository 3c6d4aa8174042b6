"""Adapters of experts: from a layer for each matrix of each expert to stacks of them, and back.

transformers 4 and checkpoints have linear layers ``experts.3.w1``, ``experts.3.w3`` and ``experts.3.w2``. Version 5 of
transformers has two parameters ``experts.gate_up_proj`` and ``experts.down_proj``, each ``(experts, out, in)``. The
rows of ``gate_up_proj`` are those of w1 and below them those of w3.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_plus.layers.base_layer import PARAMETER, BaseLayer
from lora_plus.tensors.matrix import accumulation_dtype
from lora_plus.tensors.variant import VARIANTS
from lora_plus.text import parents

from .checks import base_problem, shape_problems, value_problems
from .fit import FITTERS
from .read_layers import without_dropout
from .rename import Renaming, renamed
from .saved_adapter import SavedAdapter, SavedLayer, most_common
from .target import Target

Family = Mapping[str, tuple[str, ...]]
"""Of an expert: the names of the stacked parameters, and of the layers whose rows each of them has, in their order."""

FAMILIES: tuple[Family, ...] = (
    {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    {"gate_up_proj": ("fc1", "fc3"), "down_proj": ("fc2",)},
    {"up_proj": ("up_proj",), "down_proj": ("down_proj",)},
)
"""Those of ``transformers/conversion_mapping.py`` of transformers 5.23, from Mixtral to Nemotron-H."""

STACKED = tuple(dict.fromkeys(name for family in FAMILIES for name in family))

BLOCKS = ("block_sparse_moe", "mlp")
"""What Mixtral and its like call the module around their experts in transformers 4, and in 5."""

STACK = "e o i -> e o i"
"""How the parameters of these families are stored. Others may have the rows of gate and up in turns."""

SINGLE = re.compile(r"(.*\bexperts)\.(0|[1-9]\d{0,5})\.(\w+)")
_STACKED = re.compile(r"(.*\bexperts)\.([a-z]\w*)")
_ROUTER = re.compile(r"(.*\bgate)(\.weight)?")


# ---- what a model has ------------------------------------------------------------------------------------------------


def fit_experts(data: SavedAdapter, target: Target, problems: list[str]) -> SavedAdapter:
    """The adapter with its experts, and their router, in the form that the target has them in; the rest as it is."""
    there = target.names()
    if there is None or re.search(r"\b(experts|gate)\b", "\n".join(data.layers)) is None:
        return data
    names = {path for name in there for path in (name, *parents(name))}
    here = functools.partial(in_its_block, names=names)
    if moved := {here(name) for name in (*data.layers, *data.trained) if here(name) != name}:
        data = renamed(data, Renaming(here), problems)
    layers = dict[str, SavedLayer]()
    stacks = dict[tuple[str, tuple[str, ...]], dict[tuple[int, str], SavedLayer]]()
    for name, layer in data.layers.items():
        single, stacked, router = (each.fullmatch(name) for each in (SINGLE, _STACKED, _ROUTER))
        if single is not None and name not in names and layer.base.kind in ("", "Linear"):
            found = _stack_of(single[1], single[3], target)
            if found is not None:
                stacks.setdefault(found, {})[int(single[2]), single[3]] = layer
                continue
        elif stacked is not None and layer.base.kind == PARAMETER:
            labels = labels_there(stacked[1], stacked[2], names)
            if labels is not None:
                layers |= _cut(name, layer, stacked[1], labels, target, problems)
                continue
        elif router is not None and router[1] in names:
            name, layer = _router(name, layer, router[1], target)
        if not layer.base.kind and name in moved and (base := target.base(name)) is not None and len(base.shape) == 2:
            layer = SavedLayer(base, layer.spec, layer.tensors)
        layers[name] = layer
    for (name, labels), group in stacks.items():
        base = target.base(name)
        assert base is not None
        whole = stack(base, labels, group, problems)
        layers |= {} if whole is None else {name: whole}
    return replace(data, layers=without_dropout(layers, data.layers, problems))


FITTERS.append(fit_experts)


def in_its_block(name: str, names: Collection[str]) -> str:
    """A name under the block as these modules have it: ``mlp.experts`` for ``block_sparse_moe.experts``, say."""
    for old, new in (BLOCKS, BLOCKS[::-1]):
        before, found, after = f".{name}.".partition(f".{old}.")
        if found and f"{before}.{old}"[1:] not in names and f"{before}.{new}"[1:] in names:
            return f"{before}.{new}.{after}"[1:-1]
    return name


def _stack_of(path: str, label: str, target: Target) -> tuple[str, tuple[str, ...]] | None:
    """The target's parameter that has the rows of this layer of each expert, and the labels of its rows."""
    for family in FAMILIES:
        for stacked, labels in family.items():
            base = target.base(f"{path}.{stacked}") if label in labels else None
            if base is not None and (base.kind, base.layout) == (PARAMETER, STACK):
                return f"{path}.{stacked}", labels
    return None


def labels_there(path: str, stacked: str, names: Collection[str]) -> tuple[str, ...] | None:
    """The labels of the layers that are there instead of a stacked parameter; None if there are none."""
    for family in FAMILIES:
        if stacked in family and all(f"{path}.0.{label}" in names for label in family[stacked]):
            return family[stacked]
    return None


def _router(name: str, layer: SavedLayer, path: str, target: Target) -> tuple[str, SavedLayer]:
    """The adapter of a router: a linear layer in version 4, a module with a weight in version 5."""
    linear = target.base(path)
    new = path if linear is not None and linear.kind == "Linear" else f"{path}.weight"
    base = target.base(new)
    same = base is not None and layer.base.shape in ((), base.shape)
    return (new, SavedLayer(base, layer.spec, layer.tensors)) if base is not None and same else (name, layer)


# ---- stacks ----------------------------------------------------------------------------------------------------------


def stack(
    base: BaseLayer, labels: Sequence[str], members: Mapping[tuple[int, str], SavedLayer], problems: list[str]
) -> SavedLayer | None:
    """Adapters of the layers of experts as one of their stacked parameter; None where that is a problem.

    Each label has a block of the rank, as wide as its highest rank, unless all labels have the same A. Lower ranks, and
    experts without an adapter, are filled up with zeros. Where scales differ, they are multiplied into B.

    Args:
        base: the parameter, ``(experts, out, in)``.
        labels: what the layers of an expert are called whose rows it has, in their order.
        members: the adapters, by expert and label.
        problems: gets what is wrong.
    """
    count, out, width = base.shape
    name, rows = base.facts["parameter"], out // len(labels)
    variant = next(iter(members.values())).spec.variant
    extra = VARIANTS[variant].tensors
    single = BaseLayer("Linear", "o i -> o i", (rows, width))
    named = {f"{name.rpartition('.')[0]}.{expert}.{label}": each for (expert, label), each in members.items()}
    lines = [f"{path!r}: {line}" for path, each in named.items() for line in shape_problems(replace(each, base=single))]
    lines += [f"{name!r} has {count} experts, and there is an adapter of {max(members)[0]}"] * (
        max(members)[0] >= count
    )
    ranks = [each.spec.r for each in members.values()]
    full = max(ranks) * count * len({label for _, label in members})
    if max(ranks) > min(rows, width) and sum(ranks) < full:
        # a small file would take the memory of all experts
        lines.append(f"{name!r}: rank {max(ranks)} of a few experts is above that of their matrices; resize it first")
    if any(each.spec.variant != variant for each in members.values()):
        lines.append(f"{name!r}: its experts have different variants, and one adapter of all has one")
    if extra and (any(each.axes != ("out",) for each in extra) or len(members) < count * len(labels)):
        lines.append(f"{name!r}: variant {variant!r} needs an adapter on each of {count} experts to be stacked")
    lines = lines or [line for wrong in value_problems(named).values() for line in wrong]
    if lines:
        problems += lines
        return None
    scale = most_common([each.spec.scale for each in members.values()])
    spec = next(each.spec for each in members.values() if each.spec.scale == scale)
    factors = []
    for at, label in enumerate(labels):
        own = {expert: each for (expert, other), each in members.items() if other == label}
        r = max((each.spec.r for each in own.values()), default=0)
        A = [F.pad(each.tensors["lora_A"], (0, 0, 0, r - each.spec.r)) for each in own.values()]
        B = [F.pad(_rescaled(each, scale), (0, r - each.spec.r)) for each in own.values()]
        if own:  # A (experts, r, in), B (experts, out, r)
            around = (0, 0, at * rows, (len(labels) - at - 1) * rows)
            factors.append((_at(own, A, count), F.pad(_at(own, B, count), around)))
    As, Bs = zip(*factors, strict=True)
    shared = all(A.dtype == As[0].dtype and torch.equal(A, As[0]) for A in As)
    tensors = {
        "lora_A": As[0] if shared else torch.cat(As, 1),
        "lora_B": torch.stack(Bs).sum(0) if shared else torch.cat(Bs, 2),
    }
    for each in extra:
        blocks = [torch.cat([members[expert, label].tensors[each.name] for label in labels]) for expert in range(count)]
        tensors[each.name] = torch.stack(blocks)
    return SavedLayer(base, spec.at_rank(tensors["lora_A"].shape[1]), tensors)


def _rescaled(layer: SavedLayer, scale: float) -> Tensor:
    """The B that gives the layer's update under another scale."""
    B, own = layer.tensors["lora_B"], layer.spec.scale
    return B if own == scale else B.to(accumulation_dtype(B.dtype)) * (own / scale)


def _at(experts: Collection[int], tensors: Sequence[Tensor], count: int) -> Tensor:
    """A stack of ``count`` that has these experts' tensors at their places, and zeros elsewhere."""
    dtype = functools.reduce(torch.promote_types, [each.dtype for each in tensors])
    found = tensors[0].new_zeros(count, *tensors[0].shape, dtype=dtype)
    found[list(experts)] = torch.stack([each.to(dtype) for each in tensors])
    return found


# ---- single experts --------------------------------------------------------------------------------------------------


def cut(layer: SavedLayer, labels: Sequence[str], base: Callable[[int, str], BaseLayer]) -> Iterator[SavedLayer]:
    """The adapter of a stacked parameter as one for each layer, by expert and then by label, with memory of its own.

    Of the columns of B those stay that have values in a label's rows of some expert.
    """
    A, B = layer.factors()
    rows = B.shape[1] // len(labels)
    blocks = [slice(at * rows, (at + 1) * rows) for at in range(len(labels))]
    used = [torch.count_nonzero(B[:, block], (0, 1)).nonzero().flatten() for block in blocks]
    for expert in range(len(A)):
        for label, block, columns in zip(labels, blocks, used, strict=True):
            kept = columns if len(columns) else torch.arange(B.shape[2], device=B.device)
            tensors = {"lora_A": A[expert, kept], "lora_B": B[expert, block][:, kept]}
            others = layer.tensors.keys() - tensors.keys()
            tensors |= {part: layer.tensors[part][expert, block].clone() for part in sorted(others)}
            yield SavedLayer(base(expert, label), layer.spec.at_rank(len(kept)), tensors)


def _cut(
    name: str, layer: SavedLayer, path: str, labels: Sequence[str], target: Target, problems: list[str]
) -> dict[str, SavedLayer]:
    """The adapter of a stacked parameter as those of the target's layers."""
    stated, extra = layer.base, VARIANTS[layer.spec.variant].tensors
    if stated.layout != STACK or any(each.axes != ("out",) for each in extra):
        return {name: layer}
    wrong = base_problem(stated)
    lines = [f"{name!r}: {line}" for line in (shape_problems(layer) if wrong is None else [wrong])]
    lines = lines or value_problems({name: layer}).get(name, [])
    if lines:
        problems += lines
        return {}
    count, out, width = stated.shape
    names = [f"{path}.{expert}.{label}" for expert in range(count) for label in labels]
    bases = {each: target.base(each) for each in names}
    fits = out % len(labels) == 0 and target.base(f"{path}.{count}.{labels[0]}") is None
    if not fits or any(each is None or each.shape != (out // len(labels), width) for each in bases.values()):
        problems.append(
            f"{name!r} has shape {stated.shape}, and the layers {names[0]!r} and so on do not have its rows"
        )
        return {}
    found: dict[str, Any] = bases
    return dict(zip(names, cut(layer, labels, lambda expert, label: found[f"{path}.{expert}.{label}"]), strict=True))

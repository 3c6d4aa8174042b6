"""The tensors of PEFT's adapters: from ours, one matrix each, to PEFT's shapes, and back.

What goes to PEFT is a `SavedLayer` whose tensors have the names that PEFT's keys end in. PEFT has one adapter for a
whole layer, and one for both weights of an attention module, so several of ours become one of higher rank there: their
A are stacked, and B has a block for each, with zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_plus.files.saved_adapter import SavedLayer, most_common
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.layers.kinds import DTYPES
from lora_plus.tensors.matrix import accumulation_dtype, joined_rows, matrix_shape
from lora_plus.tensors.variant import AdapterSpec

from .names import EMBEDDING_TENSORS, OUT_PROJECTION, TENSORS

ATTENTION = "MultiheadAttention"


# ---- to PEFT ---------------------------------------------------------------------------------------------------------


def layer_to_peft(layer: SavedLayer) -> SavedLayer:
    """An adapter of a linear layer, an embedding or a convolution."""
    shape, groups = layer.base.shape, layer.base.facts.get("groups", 1)
    names = EMBEDDING_TENSORS if layer.base.kind == "Embedding" else TENSORS
    tensors, spec = dict(layer.tensors), layer.spec
    if len(shape) > 2:
        A, B = tensors["lora_A"].reshape(-1, *shape[1:]), tensors["lora_B"]  # (r, in / groups, *kernel), (out, r)
        r, per_group = A.shape[:2]
        if groups > 1:
            # PEFT's A sees the channels of all groups: once per group, zero outside that group's channels
            blocks = A.new_zeros(groups, r, groups, per_group, *shape[2:])
            for group in range(groups):
                blocks[group, :, group] = A
            A = blocks.reshape(groups * r, groups * per_group, *shape[2:])
            spec = replace(spec, r=groups * r, alpha=spec.scale * groups * r, scaling="standard")
        pointwise = [1] * (len(shape) - 2)
        tensors |= {"lora_A": A, "lora_B": B.reshape(*B.shape, *pointwise)}
        if "lora_magnitude" in tensors:
            tensors["lora_magnitude"] = tensors["lora_magnitude"].reshape(1, -1, *pointwise)
    return SavedLayer(layer.base, spec, {names[name]: tensor for name, tensor in tensors.items()})


def join_rows(blocks: Sequence[SavedLayer]) -> SavedLayer:
    """Adapters of rows of one weight as one adapter of the whole; a single one that has no rows as it is."""
    if "rows" not in blocks[0].base.facts:
        return blocks[0]
    base, spec = blocks[0].base, _reference(blocks)
    A, B = _joined_factors(blocks, spec.scale)
    whole = BaseLayer(base.kind, base.layout, base.shape, {k: v for k, v in base.facts.items() if k != "rows"})
    return SavedLayer(whole, spec.at_rank(len(A)), {"lora_A": A, "lora_B": B})


def _joined_factors(blocks: Sequence[SavedLayer], scale: float) -> tuple[Tensor, Tensor]:
    """A and B of the whole weight under a scale; blocks that have the same A share it there."""
    groups = _of_one_A(blocks)
    out_features = matrix_shape(blocks[0].base.layout, blocks[0].base.shape)[0]
    joined = []
    for group in groups:
        parts = [(each.base.facts["rows"][0], each.tensors["lora_A"], rescaled(each, scale), 1.0) for each in group]
        _, B = joined_rows(sorted(parts, key=lambda part: part[0]), out_features)
        joined.append(B.unflatten(1, (len(group), -1)).sum(1))  # which have one A, so that theirs is one set of columns
    return torch.cat([group[0].tensors["lora_A"] for group in groups]), torch.cat(joined, dim=1)


def _of_one_A(blocks: Sequence[SavedLayer]) -> list[list[SavedLayer]]:
    """The blocks, those that have the same A together."""
    groups: list[list[SavedLayer]] = []
    for block in blocks:
        A = block.tensors["lora_A"]
        for group in groups:
            first = group[0].tensors["lora_A"]
            if first.dtype == A.dtype and torch.equal(first, A):
                group.append(block)
                break
        else:
            groups.append([block])
    return groups


def offsets(blocks: Sequence[SavedLayer]) -> list[int]:
    """The first row of A, and column of B, that each of these blocks has in what they are joined to."""
    first, found = 0, dict[int, int]()
    for group in _of_one_A(blocks):
        found |= dict.fromkeys(map(id, group), first)
        first += len(group[0].tensors["lora_A"])
    return [found[id(block)] for block in blocks]


def attention_to_peft(parts: Sequence[SavedLayer]) -> SavedLayer:
    """The adapters of an attention module as one, of one rank: the weight of lower rank is filled up with zeros."""
    spec = _reference(parts)
    blocks = [part for part in parts if "rows" in part.base.facts]
    last = next((part for part in parts if "rows" not in part.base.facts), None)
    width = parts[0].base.shape[1]
    like = parts[0].tensors["lora_A"]
    A = C = like.new_zeros(0, width)  # (r, d)
    B, D = like.new_zeros(3 * width, 0), like.new_zeros(width, 0)  # (3 d, r), (d, r)
    if blocks:
        A, B = _joined_factors(blocks, spec.scale)
    if last is not None:
        C, D = last.tensors["lora_A"], rescaled(last, spec.scale)
    r = max(len(A), len(C))
    tensors = {
        "lora_A.weight": F.pad(A, (0, 0, 0, r - len(A))),
        "lora_B.weight": F.pad(B, (0, r - B.shape[1])),
        f"{OUT_PROJECTION[1:]}.lora_A.weight": F.pad(C, (0, 0, 0, r - len(C))),
        f"{OUT_PROJECTION[1:]}.lora_B.weight": F.pad(D, (0, r - D.shape[1])),
    }
    base = BaseLayer(ATTENTION, parts[0].base.layout, (3 * width, width))
    return SavedLayer(base, spec.at_rank(r), tensors)


def parameter_to_peft(layer: SavedLayer, transposed: bool) -> SavedLayer:
    """An adapter of a parameter, or of a stack, whose members lie side by side; ``transposed``: of (stack, in, out)."""
    A, B = layer.tensors["lora_A"], layer.tensors["lora_B"]
    if A.ndim == 2:
        A, B = A[None], B[None]  # (stack, r, in), (stack, out, r)
    if is_read_transposed(layer.base, transposed):
        A, B = B.mT, A.mT
    A, B = A.flatten(0, 1).contiguous(), B.permute(1, 2, 0).flatten(1).contiguous()
    return SavedLayer(layer.base, layer.spec, {"lora_A.weight": A, "lora_B.weight": B})


def is_read_transposed(base: BaseLayer, transposed: bool) -> bool:
    """Whether PEFT takes a parameter's in for its out, so that A and B trade places."""
    stored, viewed = (axes.split() for axes in base.layout.split(" -> "))
    out_axis = len(stored) - (1 if transposed and len(stored) == 3 else 2)
    return stored.index(viewed[-2]) != out_axis


def _reference(layers: Sequence[SavedLayer]) -> AdapterSpec:
    """The settings of one of the layers that have the most common scale."""
    scale = most_common([layer.spec.scale for layer in layers])
    return next(layer.spec for layer in layers if layer.spec.scale == scale)


def rescaled(layer: SavedLayer, scale: float) -> Tensor:
    """The B that gives the layer's update under another scale."""
    B, own = layer.tensors["lora_B"], layer.spec.scale
    return B if own == scale else B.to(accumulation_dtype(B.dtype)) * (own / scale)


# ---- from PEFT -------------------------------------------------------------------------------------------------------


def convolution_from_peft(path: str, layer: SavedLayer, problems: list[str]) -> SavedLayer | None:
    """An adapter of a convolution with tensors in our shapes."""
    shape, groups = layer.base.shape, layer.base.facts.get("groups", 1)
    A, B, r = layer.tensors["lora_A"], layer.tensors["lora_B"], layer.spec.r
    pointwise = [1] * (len(shape) - 2)
    expected = {
        "lora_A": (r, shape[1] * groups, *shape[2:]),
        "lora_B": (shape[0], r // groups, *pointwise),
        "lora_magnitude": (1, shape[0], *pointwise),
    }
    wrong = _wrong_shapes(path, layer.tensors, expected)
    if wrong or r % groups:
        problems += wrong or [f"{path!r}: rank {r} is not a multiple of its {groups} groups"]
        return None
    spec = layer.spec
    rows, B = A.flatten(1), B.flatten(1)
    if groups > 1:
        blocks = A.reshape(groups, r // groups, groups, -1)  # (block of rows, row, group of channels, channel)
        own = torch.stack([blocks[group, :, group] for group in range(groups)])
        if torch.count_nonzero(blocks) != torch.count_nonzero(own):
            problems.append(f"{path!r}: the adapter mixes the channels of groups, which a grouped weight cannot hold")
            return None
        if all(torch.equal(block, own[0]) for block in own):
            rows = own[0]
        else:
            # our groups share one A: it holds the rows of all groups, and B picks each group's own
            rows, small = own.flatten(0, 1), B.reshape(groups, -1, r // groups)
            B = torch.block_diag(*small)
        spec = replace(spec, r=len(rows), alpha=spec.scale * len(rows), scaling="standard")
    tensors = {"lora_A": rows.contiguous(), "lora_B": B.contiguous()}
    if "lora_magnitude" in layer.tensors:
        tensors["lora_magnitude"] = layer.tensors["lora_magnitude"].flatten()
    return SavedLayer(layer.base, spec, tensors)


def attention_from_peft(
    path: str, parts: Mapping[str, BaseLayer], whole: SavedLayer, last: Mapping[str, Tensor], problems: list[str]
) -> dict[str, SavedLayer]:
    """An attention module's parts; ``whole`` has the tensors of q, k and v, ``last`` those of out_proj."""
    r, width = whole.spec.r, next(iter(parts.values())).shape[1]
    wrong = _wrong_shapes(path, whole.tensors, {"lora_A": (r, width), "lora_B": (3 * width, r)})
    wrong += _wrong_shapes(path, last, {"lora_A": (r, width), "lora_B": (width, r)}, f"{OUT_PROJECTION[1:]}.")
    if wrong:
        problems += wrong
        return {}
    # nothing starts with both at zero: PEFT has no other way to say that a weight has no adapter
    zero = [not any(map(torch.count_nonzero, tensors.values())) for tensors in (whole.tensors, last)]
    layers = {}
    for name, base in parts.items():
        is_last = "rows" not in base.facts
        if zero[is_last] and not all(zero):
            continue
        source = last if is_last else whole.tensors
        rows = slice(None) if is_last else slice(*base.facts["rows"])
        tensors = {"lora_A": source["lora_A"].clone(), "lora_B": source["lora_B"][rows].clone()}
        layers[name] = SavedLayer(base, whole.spec, tensors)
    return layers


def parameter_from_peft(path: str, layer: SavedLayer, transposed: bool, problems: list[str]) -> SavedLayer | None:
    """An adapter of a parameter with tensors in our shapes."""
    r, shape = layer.spec.r, layer.base.shape
    reason = stack_problem(layer.base, transposed)
    if reason is not None:
        problems.append(f"{path!r}: {reason}")
        return None
    stack = shape[0] if len(shape) == 3 else 1
    out_features, in_features = shape[-1:-3:-1] if transposed and len(shape) == 3 else shape[-2:]
    expected = {"lora_A": (r * stack, in_features), "lora_B": (out_features, r * stack)}
    wrong = _wrong_shapes(path, layer.tensors, expected)
    if wrong:
        problems += wrong
        return None
    A = layer.tensors["lora_A"].reshape(stack, r, in_features)
    B = layer.tensors["lora_B"].reshape(out_features, r, stack).permute(2, 0, 1)
    if is_read_transposed(layer.base, transposed):
        A, B = B.mT, A.mT
    if len(shape) == 2:
        A, B = A[0], B[0]
    tensors = {"lora_A": A.contiguous(), "lora_B": B.contiguous()}
    return SavedLayer(layer.base, layer.spec, tensors)


def stack_problem(base: BaseLayer, transposed: bool) -> str | None:
    """Why PEFT's update of a parameter is not one of ours; None if it is."""
    if "(" in base.layout:
        return f"PEFT takes the weight of shape {base.shape} for a stack of matrices, and it is one"
    if transposed and len(base.shape) == 3 and base.shape[0] == 1:
        return "PEFT adds the update of a single expert the wrong way round where is_transposed is set"
    return None


def _wrong_shapes(
    path: str, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], prefix: str = ""
) -> list[str]:
    return [
        f"{path!r}: {prefix}{TENSORS[name]} has shape {tuple(tensor.shape)}, expected {expected[name]}"
        for name, tensor in tensors.items()
        if tuple(tensor.shape) != expected[name]
    ] + [
        f"{path!r}: {prefix}{TENSORS[name]} is {tensor.dtype}, which nothing is computed with"
        for name, tensor in tensors.items()
        if tensor.dtype not in DTYPES
    ]

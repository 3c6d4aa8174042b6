"""The weight that contains adapters: computed in float32 or better, in blocks of rows, and rounded once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import matrix as functional
from .matrix import Index, accumulation_dtype, add_delta, delta_norm, from_matrix, to_matrix
from .variant import VARIANTS, only_adds


class Summand(NamedTuple):
    """One adapter of a weight, as its variant takes it."""

    variant: str
    """A name in `VARIANTS`."""
    A: Tensor
    B: Tensor
    scale: float
    tensors: Mapping[str, Tensor]
    """The adapter's tensors by their names, for those that the variant has besides A and B."""


class Merged(NamedTuple):
    """What `merged_weight` computes."""

    values: Tensor
    lost: float | None
    """How far the applied update is from the exact one, relative to its size; None where nothing was rounded."""


def joined(matrix: Tensor, summands: Sequence[Summand], rows: Index = (), *, in_place: bool = False) -> Tensor:
    """These rows of a weight's matrix view with the adapters in them: float32 or better, not yet rounded.

    Args:
        matrix: the rows.
        summands: the adapters of all rows, in the order in which they apply.
        rows: which rows of the matrix view these are, as `blocks` gives them; empty for all.
        in_place: the rows may be written into, and there are no gradients.
    """
    matrix = matrix.to(accumulation_dtype(matrix.dtype))
    for name, A, B, scale, tensors in summands:
        A, B, variant = A[rows[:-1]], B[rows], VARIANTS[name]
        if in_place and only_adds(name):
            matrix = add_delta(matrix, A, B, scale, in_place=True)
        else:
            own = {spec.name: tensors[spec.name][_rows_of(spec.axes, rows)] for spec in variant.tensors}
            matrix = variant.merge(matrix, A, B, scale, own)
    return matrix


def _rows_of(axes: Sequence[str], rows: Index) -> Index:
    """The index, in a tensor with these axes, of what belongs to these rows of the matrix view."""
    return (*rows[:-1], *(rows[-1] if axis == "out" else slice(None) for axis in axes)) if rows else ()


@torch.no_grad()
def merged_weight(base: Tensor, layout: str, summands: Sequence[Summand], dtype: torch.dtype) -> Merged:
    """The stored weight ``base`` with the adapters in it, rounded to ``dtype``; no second weight is held meanwhile.

    Raises:
        ValueError: if a value is not finite in this dtype and is so in the base.
    """
    values, wide = torch.empty_like(base, dtype=dtype), accumulation_dtype(base.dtype)
    rounds, adds = values.element_size() < 4, all(only_adds(each.variant) for each in summands)
    checks: list[Tensor] = []
    moved: list[Tensor] = []
    for index, rows in functional.blocks(layout, base.shape, functional.block_elements(base.device)):
        part, place = base[index], values[index]
        # a block in the middle of a weight need not be aligned, and some products then round otherwise
        own = place.copy_(part) if dtype == wide and not index else part.to(wide, copy=True)
        exact = from_matrix(joined(to_matrix(own, layout), summands, rows, in_place=True), layout, part.shape)
        if not exact.is_set_to(place):
            place.copy_(exact)
        if rounds and not adds:
            moved.append(torch.linalg.vector_norm(exact - part.to(exact.dtype)))
        # finite only if all values are, and cheaper than asking each
        checks.append(torch.linalg.vector_norm(exact.sub_(place.to(exact.dtype))) if rounds else place.sum())
    error = _norm(checks)
    if not math.isfinite(error) and not as_finite_as(values, base):
        raise ValueError(f"the merged weight is not finite in {dtype}")
    if not rounds:
        return Merged(values, None)
    return Merged(values, error / ((_update_norm(summands) if adds else _norm(moved)) or 1.0))


def _norm(parts: list[Tensor]) -> float:
    """The norm of a tensor from those of its parts."""
    return float(torch.linalg.vector_norm(torch.stack(parts)))


def _update_norm(summands: Sequence[Summand]) -> float:
    """The norm of a sum of updates."""
    return delta_norm(
        torch.cat([each.A for each in summands], dim=-2), torch.cat([each.scale * each.B for each in summands], dim=-1)
    )


def as_finite_as(new: Tensor, old: Tensor) -> bool:
    """Whether each value is finite that is so in the old tensor."""
    return bool((torch.isfinite(new) | ~torch.isfinite(old)).all())

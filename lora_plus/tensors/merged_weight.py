"""The weight that contains adapters: computed in float32 or better, in blocks of rows, and rounded once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import matrix as functional
from .matrix import Index, accumulation_dtype, from_matrix, to_matrix
from .variant import Variant


class Summand(NamedTuple):
    """One adapter of a weight, as its variant takes it."""

    variant: Variant
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


def joined(matrix: Tensor, summands: Sequence[Summand], rows: Index = ()) -> Tensor:
    """These rows of a weight's matrix view with the adapters in them: float32 or better, not yet rounded.

    Args:
        matrix: the rows.
        summands: the adapters of all rows, in the order in which they apply.
        rows: which rows of the matrix view these are, as `blocks` gives them; empty for all.
    """
    matrix = matrix.to(accumulation_dtype(matrix.dtype))
    for variant, A, B, scale, tensors in summands:
        own = {spec.name: tensors[spec.name][_rows_of(spec.axes, rows)] for spec in variant.tensors}
        matrix = variant.merge(matrix, A[rows[:-1]], B[rows], scale, own)
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
    values = torch.empty_like(base, dtype=dtype)
    total, lost, size = 0.0, [], []
    for index, rows in functional.blocks(layout, base.shape, functional.block_elements(base.device)):
        part = base[index]
        exact = from_matrix(joined(to_matrix(part, layout), summands, rows), layout, part.shape)
        values[index] = exact
        rounded = values[index].to(exact.dtype)
        total += float(rounded.sum())  # finite only if all values are, and cheaper than asking each
        if values.element_size() < 4:
            lost.append(torch.linalg.vector_norm(rounded - exact))
            size.append(torch.linalg.vector_norm(exact - part.to(exact.dtype)))
    if not math.isfinite(total) and not as_finite_as(values, base):
        raise ValueError(f"the merged weight is not finite in {dtype}")
    if not size:
        return Merged(values, None)
    error, moved = (float(torch.linalg.vector_norm(torch.stack(norms))) for norms in (lost, size))
    return Merged(values, error / (moved or 1.0))


def as_finite_as(new: Tensor, old: Tensor) -> bool:
    """Whether each value is finite that is so in the old tensor."""
    return bool((torch.isfinite(new) | ~torch.isfinite(old)).all())

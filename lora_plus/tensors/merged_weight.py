"""The weight that contains adapters: computed in float32 or better, in blocks of rows, and rounded once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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


class Memory:
    """Memory that blocks are computed in, one after the other: fresh memory costs as much as the arithmetic."""

    def __init__(self) -> None:
        self._held = self._last = torch.empty(0)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor in this memory, whose values are anything; the one that was given before is lost."""
        if self._last.shape != shape or self._last.dtype != dtype or self._last.device != device:
            count = math.prod(shape)
            if self._held.nbytes < count * dtype.itemsize or self._held.device != device:
                self._held = torch.empty(count, dtype=dtype, device=device)
            self._last = self._held.view(torch.uint8)[: count * dtype.itemsize].view(dtype).view(*shape)
        return self._last


@torch.no_grad()
def merged_weight(base: Tensor, layout: str, summands: Sequence[Summand], dtype: torch.dtype) -> Merged:
    """The stored weight ``base`` with the adapters in it, rounded to ``dtype``; no second weight is held meanwhile.

    Raises:
        ValueError: if a value is not finite in this dtype and is so in the base.
    """
    values, merge = torch.empty_like(base, dtype=dtype), BlockMerge(layout, base.shape, summands, Memory())
    for index, rows in merge.blocks(base.device):
        merge.write(values[index], base[index], rows)
    if not merge.is_finite(values, base):
        raise ValueError(f"the merged weight is not finite in {dtype}")
    return Merged(values, merge.lost())


class BlockMerge:
    """Merges adapters into one weight, block after block, and estimates how much of the update the rounding lost.

    The estimate takes the rounding errors of every eighth block. It takes the exact size of an update that is a plain
    sum, and that in the same blocks of any other.

    Args:
        layout: how the weight is stored, as in `to_matrix`.
        shape: its shape.
        summands: the adapters, in the order in which they apply. Without any, the weight is only converted.
        memory: what the blocks are computed in.
    """

    def __init__(self, layout: str, shape: Sequence[int], summands: Sequence[Summand], memory: Memory) -> None:
        self.layout, self.shape, self.summands, self._memory = layout, tuple(shape), summands, memory
        self._adds = all(only_adds(each.variant) for each in summands)
        self._checks: list[Tensor] = []
        self._blocks = self._sampled = 0
        self._errors: list[Tensor] = []
        self._moved: list[Tensor] = []

    def blocks(self, device: torch.device) -> Iterator[tuple[Index, Index]]:
        """The blocks to write, as `functional.blocks` gives them: their size decides about the last bit of a value."""
        return functional.blocks(self.layout, self.shape, functional.block_elements(device))

    def write(self, place: Tensor, part: Tensor, rows: Index) -> None:
        """Write these rows to their place in the merged weight, in its dtype, from that part of the stored one.

        Gradients must be off.
        """
        wide = accumulation_dtype(part.dtype)
        # a block in the middle of a weight need not be aligned, and some products then round otherwise
        own = place if place.dtype == wide and not rows else self._memory.tensor(part.shape, wide, part.device)
        matrix = joined(to_matrix(own.copy_(part), self.layout), self.summands, rows, in_place=True)
        exact = from_matrix(matrix, self.layout, part.shape)
        if not exact.is_set_to(place):
            place.copy_(exact)
        # what is appended is finite only if all values are, and cheaper than asking each
        if self._blocks % 8 or place.element_size() >= 4:
            self._checks.append(place.sum())
        else:
            if not self._adds:
                self._moved.append(torch.linalg.vector_norm(exact - part))
            self._errors.append(torch.linalg.vector_norm(exact.sub_(place)))
            self._checks.append(self._errors[-1])
            self._sampled += place.numel()
        self._blocks += 1

    def is_finite(self, values: Tensor, base: Tensor) -> bool:
        """Whether the values that were written since the last call are finite where the base's are."""
        total, self._checks = sum(map(float, self._checks)), []
        return math.isfinite(total) or bool((torch.isfinite(values) | ~torch.isfinite(base)).all())

    def lost(self) -> float | None:
        """How far the applied update is from the exact one, relative to its size; None where nothing was rounded."""
        if not self._errors:
            return None
        error = float(torch.linalg.vector_norm(torch.stack(self._errors)))
        if not self._adds:
            return error / (float(torch.linalg.vector_norm(torch.stack(self._moved))) or 1.0)
        A = torch.cat([each.A for each in self.summands], dim=-2)
        B = torch.cat([each.scale * each.B for each in self.summands], dim=-1)
        return error * math.sqrt(math.prod(self.shape) / self._sampled) / (delta_norm(A, B) or 1.0)

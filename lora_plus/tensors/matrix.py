"""Tensor arithmetic of LoRA: the matrix view of a weight, the update, and the update applied to activations.

``A`` is always ``(r, in)`` and ``B`` always ``(out, r)``, whatever the layout of the weight they belong to.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Index = tuple[slice, ...]


def to_matrix(weight: Tensor, layout: str) -> Tensor:
    """A stored weight as a matrix ``(out, in)``, or as a stack of them ``(stack, out, in)``.

    The layout is the einops pattern for that, such as ``"o i h w -> o (i h w)"`` for Conv2d.
    """
    stored, viewed = layout.split(" -> ")
    return weight if stored == viewed else rearrange(weight, layout)


def from_matrix(matrix: Tensor, layout: str, shape: Sequence[int]) -> Tensor:
    """The inverse of `to_matrix`: a matrix view as the stored weight of the given shape."""
    stored, viewed = layout.split(" -> ")
    if stored == viewed:
        return matrix
    sizes = dict(zip(stored.split(), shape, strict=True))
    return rearrange(matrix, f"{viewed} -> {stored}", **sizes)


@functools.cache
def matrix_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``(out, in)``, or ``(stack, out, in)``, of the matrix view of a weight with this layout and shape."""
    return tuple(to_matrix(torch.empty(shape, device="meta"), layout).shape)


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which weights are combined: the widest of the given ones, float32 at least."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast chooses the dtypes of operations on this device; torch has none to ask about on meta."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Inside, autocast is off: it would multiply in half precision."""
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else nullcontext()


def add_delta(weight: Tensor, A: Tensor, B: Tensor, scale: float, *, in_place: bool = False) -> Tensor:
    """The weight with its update, ``W + scale * B @ A``, computed in float32 or better.

    Eq. 3 of Hu et al. 2021 (arXiv:2106.09685). Batched over one leading dimension, if all have one. A transposed
    weight gives a transposed result, so that it lies in memory as the stored weight does. With ``in_place`` the result
    is written into the weight, if that has the result's dtype; there are no gradients then.
    """
    wide = accumulation_dtype(weight.dtype, A.dtype, B.dtype)
    if weight.stride(-1) != 1 and weight.stride(-2) == 1:
        return add_delta(weight.mT, B.mT, A.mT, scale, in_place=in_place).mT
    product = torch.addmm if weight.ndim == 2 else torch.baddbmm
    weight = weight.to(wide)
    with full_precision(A.device):
        return product(weight, B.to(wide), A.to(wide), alpha=scale, out=weight if in_place else None)


def delta_norm(A: Tensor, B: Tensor) -> float:
    """The Frobenius norm of ``B @ A``, over the whole stack where there is one, without the product.

    It is the root of ``trace(B^T B A A^T)``, of matrices ``(r, r)``. They are in float64, for a difference of products,
    written as one of twice the rank, can be small beside either.
    """
    A, B = (factor.detach().cpu().double() for factor in (A, B))
    return math.sqrt(max(0.0, float((B.mT @ B).mul_(A @ A.mT).sum())))


def rank_first_update(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``scale * B A x``, ``(..., in) -> (..., out)``, of plain operations for a compiler; all of one dtype.

    Each product with a factor, of the gradients too, is taken the way round in which the rank leads in the result, as
    `fused_linear` does. Autograd decides that for a gradient by how the operand lies in memory, so B is laid out anew.
    To be called after a product has read x: Inductor would store an x that does not lie in memory yet a second time,
    transposed.
    """
    hidden = torch.mm(A, x.reshape(-1, x.shape[-1]).t())  # (r, in), (in, rows) -> (r, rows)
    update = torch.mm(hidden.t(), (B * scale).t().contiguous())  # (rows, r), (r, out) -> (rows, out)
    return update.view(*x.shape[:-1], B.shape[0])


def row_norm(matrix: Tensor) -> Tensor:
    """The Euclidean norm of each row (output channel): ``(..., out, in) -> (..., out)``, float32 or better."""
    return torch.linalg.vector_norm(matrix, dim=-1, dtype=accumulation_dtype(matrix.dtype))


def sum_row_norm(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`row_norm` of ``W + scale * B @ A``: ``(..., out, in) -> (..., out)``, float32 or better.

    In blocks of rows, so that no matrix of the weight's size is made; of a large weight they stay in a CPU's cache
    (``benchmarks/results/2026-11-22.md``: up to three times as fast as making the sum, in float32).
    """
    # a compiler would unroll the blocks, and taking rows of a weight whose rows are on several ranks would gather it
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(weight) is not Tensor:
        return row_norm(add_delta(weight, A, B, scale))
    columns = math.prod(weight.shape) // weight.shape[-2]
    rows = max(_LEAST_ROWS, block_elements(weight.device) // columns)
    parts = zip(weight.split(rows, dim=-2), B.split(rows, dim=-2), strict=True)
    return torch.cat([row_norm(add_delta(part, A, part_B, scale)) for part, part_B in parts], dim=-1)


def block_elements(device: torch.device) -> int:
    """Elements to compute at a time: on a CPU they stay in its cache, elsewhere launches must be few."""
    return 2**19 if device.type == "cpu" else 2**24


def joined_rows(blocks: Sequence[tuple[int, Tensor, Tensor, float]], rows: int) -> tuple[Tensor, Tensor]:
    """A and B of the common update, at scale 1, of adapters that have some rows each: ``(R, in)`` and ``(rows, R)``.

    Of each, from the top: its first row, A ``(r_i, in)``, B ``(rows_i, r_i)`` and scale. The A's are stacked. The
    common B has block i in rows and columns of its own, and zeros elsewhere.
    """
    width = sum(B.shape[1] for _, _, B, _ in blocks)
    pieces, row, column = [], 0, 0
    for start, _, B, scale in blocks:
        pieces.append(B.new_zeros(start - row, width))
        pieces.append(F.pad(B * scale, (column, width - column - B.shape[1])))
        row, column = start + B.shape[0], column + B.shape[1]
    pieces.append(pieces[0].new_zeros(rows - row, width))
    return torch.cat([A for _, A, _, _ in blocks], dim=-2), torch.cat(pieces)


def blocks(layout: str, shape: Sequence[int], elements: int) -> Iterator[tuple[Index, Index]]:
    """Cut a stored weight into blocks of whole rows of its matrix view, of about so many elements, or leave it whole.

    Yields the block's index in the stored weight, and that of its rows in the matrix view (``(rows,)``, or
    ``(matrices, rows)`` of a stack); both are empty for the whole.
    """
    if math.prod(shape) <= elements:
        yield (), ()
        return
    stored, viewed = (side.split() for side in layout.split(" -> "))
    *leading, columns = matrix_shape(layout, tuple(shape))
    rows = min(leading[-1], max(_LEAST_ROWS, elements // columns))
    matrices = max(1, elements // (rows * columns))
    steps = [matrices, rows][-len(leading) :]
    ranges = [
        [slice(start, start + step) for start in range(0, extent, step)]
        for extent, step in zip(leading, steps, strict=True)
    ]
    for index in itertools.product(*ranges):
        by_axis = dict(zip(viewed, index, strict=False))
        yield tuple(by_axis.get(axis, slice(None)) for axis in stored), index


_LEAST_ROWS = 64
"""Rows of a block, at least: where a row lies across the memory, fewer would use a part of each cache line."""

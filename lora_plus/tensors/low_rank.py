"""Updates as low-rank factors: the nearest ones of a given rank, and the ways of combining several.

All of it is arithmetic on updates, the matrices ``s B A``. A and B on their own have no sum: ``(B1 + B2) (A1 + A2)`` is
not ``B1 A1 + B2 A2``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import matrix as functional
from .init import uniform


class Factors(NamedTuple):
    """An update ``B A`` in the place of a wanted one."""

    A: Tensor
    """``(..., r, in)``"""
    B: Tensor
    """``(..., out, r)``"""
    error: float
    """``||B A - wanted|| / ||wanted||`` in the Frobenius norm, over the whole stack where there is one."""


def truncated(matrix: Tensor, r: int) -> Factors:
    """The best approximation of ``(..., out, in)`` of rank r (Eckart and Young 1936), or less where it has less.

    By the exact decomposition up to 1024 rows or columns. Above, by a randomized one that always draws the same
    numbers: on 2048 x 2048 it takes 0.1 to 0.4 seconds in the place of 5 (ranks 16 and 64, one CPU thread), and where
    the singular values hardly fall, as in noise, its error was at most 0.2 % above the best one.

    The rows of A have norm 1, about as at the start of training, and B the singular values. Columns of zeros stay zero
    to the bit: an embedding's rows that nothing changes.
    """
    decompose = _exact_svd if min(matrix.shape[-2:]) <= _EXACT else _randomized_svd
    U, S, Vh = decompose(matrix, r)
    A = Vh[..., :r, :] * matrix.any(dim=-2, keepdim=True)
    B = U[..., :r] * S[..., None, :r]
    size = torch.linalg.vector_norm(matrix)
    error = torch.linalg.vector_norm(functional.add_delta(matrix, A, B, -1.0)) / torch.where(size > 0, size, 1.0)
    return Factors(A, B, float(error))


def truncated_product(A: Tensor, B: Tensor, r: int) -> Factors:
    """The best approximation of rank r of ``B A``, without the product: by the decomposition of a small matrix.

    With ``B = Q1 R1`` and ``A^T = Q2 R2``, the singular values of ``B A`` are those of ``R1 R2^T``.
    """
    left, upper = torch.linalg.qr(B)
    right, lower = torch.linalg.qr(A.mT)
    core = truncated(upper @ lower.mT, r)
    return Factors((core.A @ right.mT) * A.any(dim=-2, keepdim=True), left @ core.B, core.error)


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """The singular values of ``B A``, from the largest on: ``(..., r)``, or fewer where it has fewer rows or columns.

    Without the product, as in `truncated_product`.
    """
    upper, lower = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.mT, mode="r").R
    return torch.linalg.svdvals(upper @ lower.mT)  # type: ignore[no-any-return]


_EXACT = 1024
"""Rows or columns up to which the decomposition is exact: it takes 0.7 seconds there, and eight times that at 2048."""
_POWER_STEPS = 4


def _exact_svd(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)  # type: ignore[no-any-return]


def _randomized_svd(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples by subspace iteration (Halko et al. 2011, arXiv:0909.4061, alg. 4.4 and 5.1)."""
    width = min(2 * r, *matrix.shape[-2:])
    start = torch.randn(matrix.shape[-1], width, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    U, S, Vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ U, S, Vh


# ---- the methods -----------------------------------------------------------------------------------------------------


class Update(NamedTuple):
    """One adapter's update of one place, ``factor * B A``; the factor is its scale and its weight."""

    A: Tensor
    B: Tensor
    factor: float

    def dense(self) -> Tensor:
        """``(..., out, in)``."""
        return (self.factor * self.B) @ self.A


class Options(NamedTuple):
    """What a method can be told."""

    r: int = 0
    density: float = 1.0
    generator: torch.Generator | None = None


def _sum(updates: Sequence[Update], options: Options) -> Factors:
    A = torch.cat([update.A for update in updates], dim=-2)
    return Factors(A, torch.cat([update.factor * update.B for update in updates], dim=-1), 0.0)


def _svd(updates: Sequence[Update], options: Options) -> Factors:
    A, B, _ = _sum(updates, options)
    return truncated_product(A, B, options.r)


def _trimmed(update: Tensor, options: Options) -> Tensor:
    """The given part of the entries, those of the largest size, in this layer; the rest is zero."""
    kept = max(1, round(options.density * update.numel()))
    # not kthvalue, which raises on a GPU when torch is told to use deterministic algorithms only
    least = update.abs().flatten().topk(kept, sorted=False).values.min()
    return update.where(update.abs() >= least, 0)


def _dropped(update: Tensor, options: Options) -> Tensor:
    """Each entry with the given probability, divided by it; zero otherwise."""
    keep = uniform(tuple(update.shape), 0.5, update, options.generator) < options.density - 0.5
    return update.where(keep, 0) / options.density


def _added(updates: Sequence[Tensor]) -> Tensor:
    return sum(updates[1:], updates[0])


def _elected(updates: Sequence[Tensor]) -> Tensor:
    """By entry, the mean of those that have the sign of the sum; entries of zero have none."""
    sign = _added(updates).sign()
    agreeing = [update.sign() == sign for update in updates]
    total = _added([update.where(agrees, 0) for update, agrees in zip(updates, agreeing, strict=True)])
    return total / _added([agrees.to(total.dtype) for agrees in agreeing]).clamp(min=1)


def _dense(
    thin: Callable[[Tensor, Options], Tensor], join_up: Callable[[Sequence[Tensor]], Tensor]
) -> Callable[[Sequence[Update], Options], Factors]:
    """A method on the matrices themselves: each made sparse, joined, and cut to rank r."""

    def combine(updates: Sequence[Update], options: Options) -> Factors:
        return truncated(join_up([thin(update.dense(), options) for update in updates]), options.r)

    return combine


@dataclass(frozen=True)
class Method:
    """A way of combining."""

    combine: Callable[[Sequence[Update], Options], Factors]
    """From the updates of one place, of those adapters that have one, to the combined one."""
    options: tuple[str, ...] = ()
    """What it can be told; all but the generator must be."""


METHODS: dict[str, Method] = {
    # sum_i w_i s_i B_i A_i, the task arithmetic of Ilharco et al. 2022 (arXiv:2212.04089), as it is
    "sum": Method(_sum),
    # the same, cut to rank r
    "svd": Method(_svd, ("r",)),
    # Yadav et al. 2023 (arXiv:2306.01708), layer by layer
    "ties": Method(_dense(_trimmed, _elected), ("r", "density")),
    # Yu et al. 2023 (arXiv:2311.03099), layer by layer
    "dare": Method(_dense(_dropped, _added), ("r", "density", "generator")),
    # the dropping of DARE in the place of TIES's trimming
    "dare_ties": Method(_dense(_dropped, _elected), ("r", "density", "generator")),
}

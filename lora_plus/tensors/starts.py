"""The starts other than the default, which enter themselves in the tables: drawn, or a part of the weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .init import INITS, PRINCIPAL, normal, uniform


def gaussian(weight: Tensor, r: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A normal with variance ``1/in``, B zero: Init[1] of Hayou et al. 2024 (arXiv:2402.12354, sec. 3)."""
    out_features, in_features = weight.shape
    A = normal((r, in_features), weight, generator) / math.sqrt(in_features)
    return A, A.new_zeros(out_features, r)


def orthogonal(weight: Tensor, r: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A with orthogonal rows of norm ``1/sqrt(3)``, about that of kaiming's rows; B zero.

    With r above the number of columns it is the columns that are orthogonal, of that norm times ``sqrt(r/in)``.
    """
    out_features, in_features = weight.shape
    drawn = normal((r, in_features), weight, generator)
    tall = drawn.T if r <= in_features else drawn
    Q, R = torch.linalg.qr(tall)
    Q = Q * R.diagonal().sign()  # uniform over orthogonal matrices (Mezzadri 2007, arXiv:math-ph/0609050)
    A = Q.T / math.sqrt(3) if r <= in_features else Q * math.sqrt(r / in_features / 3)
    return A.contiguous(), A.new_zeros(out_features, r)


def kaiming_B(weight: Tensor, r: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A zero, B uniform in ``+-1/sqrt(r)``: Init[B] of Hayou et al. 2024 (arXiv:2406.08447), the worse one there."""
    out_features, in_features = weight.shape
    B = uniform((out_features, r), 1 / math.sqrt(r), weight, generator)
    return B.new_zeros(r, in_features), B


def pissa(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """The part ``scale * B0 A0`` has the r largest singular values (Meng et al. 2024, arXiv:2404.02948)."""
    return _singular(weight, slice(r), scale)


def milora(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """The part ``scale * B0 A0`` has the r smallest singular values (Wang et al. 2024, arXiv:2406.09044)."""
    return _singular(weight, slice(min(weight.shape) - r, None), scale)


def olora(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """B0 is the first r columns of Q and A0 the first r rows of R, ``W = Q R`` (Büyükakyüz 2024, arXiv:2406.01775)."""
    Q, R = torch.linalg.qr(weight)
    return R[:r], Q[:, :r]


def _singular(weight: Tensor, chosen: slice, scale: float) -> tuple[Tensor, Tensor]:
    """Both factors with the square roots of the chosen singular values, divided by the scale."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[chosen] / abs(scale)).sqrt()
    return root[:, None] * Vh[chosen], U[:, chosen] * root * math.copysign(1.0, scale)


INITS |= {"gaussian": gaussian, "orthogonal": orthogonal, "kaiming_B": kaiming_B}
PRINCIPAL |= {"pissa": pissa, "milora": milora, "olora": olora}

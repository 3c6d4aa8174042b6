"""How A and B start: a table of names, each a function of the frozen weight; any such function can be passed instead.

An init is ``(weight, r, generator)`` with the frozen weight in its matrix view ``(out, in)`` and returns
``A (r, in)`` and ``B (out, r)``, in float32 or better and on the weight's device (on the CPU for a weight on the meta
device, which has no values). Its random numbers come from ``generator`` if there is one.

Those of `PRINCIPAL` start from a part of the weight itself and are ``(weight, r, scale)``, float32 or better. What they
return is also kept, as A0 and B0, and taken out again: the layer computes ``W + scale * (B A - B0 A0)``. The papers
change the base weight instead; here it is left alone. The model starts from the same outputs up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .matrix import accumulation_dtype

Init = Callable[[Tensor, int, "torch.Generator | None"], tuple[Tensor, Tensor]]


def uniform(shape: tuple[int, ...], bound: float, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform numbers in ``[-bound, bound)``, float32 or better, on the device of ``like``.

    They are drawn on the generator's own device, so one seed gives the same numbers on every device.
    """
    home = _home(like)
    device = home if generator is None else generator.device
    drawn = torch.empty(shape, dtype=accumulation_dtype(like.dtype), device=device)
    return drawn.uniform_(-bound, bound, generator=generator).to(home)


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers, as `uniform` draws them."""
    home, dtype = _home(like), accumulation_dtype(like.dtype)
    device = home if generator is None else generator.device
    return torch.randn(shape, dtype=dtype, device=device, generator=generator).to(home)


def _home(like: Tensor) -> torch.device:
    return torch.device("cpu") if like.is_meta else like.device


def kaiming(weight: Tensor, r: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A uniform in ``+-1/sqrt(in)`` (Kaiming with a = sqrt 5), B zero: the update starts at zero.

    The init of Hu et al. 2021 (arXiv:2106.09685) as its code has it; Init[A] of Hayou et al. 2024
    (arXiv:2402.12354). The bound is stated here because ``kaiming_uniform_`` takes the fan-in from the shape it is
    given, which is the wrong one for a transposed or stacked factor.
    """
    out_features, in_features = weight.shape
    A = uniform((r, in_features), 1 / math.sqrt(in_features), weight, generator)
    return A, A.new_zeros(out_features, r)


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


INITS: dict[str, Init] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "kaiming_B": kaiming_B,
}


def pissa(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """The part ``scale * B0 A0`` has the r largest singular values (Meng et al. 2024, arXiv:2404.02948)."""
    return _singular(weight, slice(0, r), scale)


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


Principal = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]

PRINCIPAL: dict[str, Principal] = {"pissa": pissa, "milora": milora, "olora": olora}


def check_init(init: str | Init) -> None:
    """Raise unless it is the name of an init, or a function."""
    if callable(init) or (isinstance(init, str) and (init in INITS or init in PRINCIPAL)):
        return
    raise ValueError(f"unknown init {init!r}; choose one of {sorted({*INITS, *PRINCIPAL})} or pass a function")

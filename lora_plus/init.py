"""How A and B start: a table of names, or any function of the same form.

An init is called as ``init(weight, r, generator)`` with the frozen weight in its matrix view ``(out, in)`` and returns
``A (r, in)`` and ``B (out, r)``, in float32 or better and on the weight's device (on the CPU for a weight on the meta
device, which has no values). Its random numbers come from ``generator`` if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .functional import accumulation_dtype

Init = Callable[[Tensor, int, "torch.Generator | None"], tuple[Tensor, Tensor]]


def uniform(shape: tuple[int, ...], bound: float, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform numbers in ``[-bound, bound)``, float32 or better, on the device of ``like``.

    They are drawn on the generator's own device, so one seed gives the same numbers on every device.
    """
    home = torch.device("cpu") if like.is_meta else like.device
    device = home if generator is None else generator.device
    drawn = torch.empty(shape, dtype=accumulation_dtype(like.dtype), device=device)
    return drawn.uniform_(-bound, bound, generator=generator).to(home)


def kaiming(weight: Tensor, r: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A uniform in ``+-1/sqrt(in)`` (Kaiming with a = sqrt 5), B zero: the update starts at zero.

    The init of Hu et al. 2021 (arXiv:2106.09685) as its code has it; Init[A] of Hayou et al. 2024
    (arXiv:2402.12354). The bound is stated here because ``kaiming_uniform_`` takes the fan-in from the shape it is
    given, which is the wrong one for a transposed or stacked factor.
    """
    out_features, in_features = weight.shape
    A = uniform((r, in_features), 1 / math.sqrt(in_features), weight, generator)
    return A, A.new_zeros(out_features, r)


INITS: dict[str, Init] = {"kaiming": kaiming}


def resolve(init: str | Init) -> Init:
    """The init of that name, or the function itself."""
    if callable(init):
        return init
    try:
        return INITS[init]
    except (KeyError, TypeError):
        raise ValueError(f"unknown init {init!r}; choose one of {sorted(INITS)} or pass a function") from None

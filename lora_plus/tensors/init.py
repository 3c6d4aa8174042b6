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
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .matrix import accumulation_dtype, full_precision
from .variant import SUBTRACTED, VARIANTS, AdapterSpec

Init = Callable[[Tensor, int, "torch.Generator | None"], tuple[Tensor, Tensor]]
"""``(weight, r, generator) -> (A, B)``: the start of an adapter on a weight of shape (out, in)."""

InitName = Literal["kaiming", "gaussian", "orthogonal", "kaiming_B", "pissa", "milora", "olora"]
"""Name of an init: the names in `INITS` and `PRINCIPAL`."""


def uniform(shape: tuple[int, ...], bound: float, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform numbers in ``[-bound, bound)``, float32 or better, on the device of ``like``.

    They are drawn on the generator's own device, so one seed gives the same numbers on every device.
    """
    home, dtype = "cpu" if like.is_meta else like.device, accumulation_dtype(like.dtype)
    drawn = torch.empty(shape, dtype=dtype, device=home if generator is None else generator.device)
    drawn.uniform_(-bound, bound, generator=generator)
    return drawn if generator is None else drawn.to(home)


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers, as `uniform` draws them."""
    home, dtype = "cpu" if like.is_meta else like.device, accumulation_dtype(like.dtype)
    drawn = torch.empty(shape, dtype=dtype, device=home if generator is None else generator.device)
    return drawn.normal_(generator=generator).to(home)


def kaiming(weight: Tensor, r: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A uniform in ``+-1/sqrt(in)`` (Kaiming with a = sqrt 5), B zero: the update starts at zero.

    The init of Hu et al. 2021 (arXiv:2106.09685) as its code has it; Init[A] of Hayou et al. 2024
    (arXiv:2402.12354). The bound is stated here because ``kaiming_uniform_`` takes the fan-in from the shape it is
    given, which is the wrong one for a transposed or stacked factor.
    """
    out_features, in_features = weight.shape
    A = uniform((r, in_features), 1 / math.sqrt(in_features), weight, generator)
    return A, A.new_zeros(out_features, r)


def embedding(weight: Tensor, r: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A zero, B standard normal: what ``"kaiming"`` is for an embedding, as in loralib and PEFT.

    A lookup takes one column of A, so its fan-in is 1, not the vocabulary. A row that is never looked up never moves.
    """
    out_features, in_features = weight.shape
    B = normal((out_features, r), weight, generator)
    return B.new_zeros(r, in_features), B


INITS: dict[str, Init] = {"kaiming": kaiming}
"""By name; `starts` enters more."""


class Lookup(NamedTuple):
    """That a weight is read by index, one column of its matrix view at a time."""

    padding: int | None
    """The column that gets no update, if there is one."""


PRINCIPAL: dict[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = {}
"""Those that start from a part of the weight, by name; `starts` enters them."""


@dataclass(frozen=True)
class Start:
    """How the tensors of a new adapter begin.

    Raises:
        TypeError, ValueError: naming the setting, its value and what was expected.
    """

    init: str | Init = "kaiming"
    """A name in `INITS` or `PRINCIPAL`, or a function of the form of those in `INITS`."""
    dtype: torch.dtype | None = None
    """Of the tensors; None for float32, or the weight's own where that is wider."""
    generator: torch.Generator | None = None
    """The source of all random numbers; None for torch's global generator."""

    def __post_init__(self) -> None:
        known = (*INITS, *PRINCIPAL)
        if not callable(self.init) and not (isinstance(self.init, str) and self.init in known):
            raise ValueError(f"unknown init {self.init!r}; choose one of {sorted(known)} or pass a function")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {self.dtype!r}")

    def needs_values(self, spec: AdapterSpec) -> bool:
        """Whether a new adapter depends on the numbers in the weight, and not only on its shape."""
        return callable(self.init) or self.init in PRINCIPAL or VARIANTS[spec.variant].rescales

    def tensors(self, matrix: Tensor, spec: AdapterSpec, lookup: Lookup | None = None) -> dict[str, Tensor]:
        """The tensors by the name of their container: lora_A, lora_B, the variant's, and what is taken out again.

        Args:
            matrix: the frozen weight in its matrix view ``(out, in)``, or a ``(stack, out, in)`` with one for each.
            spec: the adapter's settings.
            lookup: how the weight is read by index; None if it is multiplied with.
        """
        variant = VARIANTS[spec.variant]
        A, B = self.factors(matrix, spec, lookup)
        if "lora_A" in variant.frozen and not bool(A.any()):
            raise ValueError(
                f"variant {spec.variant!r} freezes A, and init {self.init!r} makes it zero: nothing would be learnt"
            )
        if lookup is not None and lookup.padding is not None:
            A[..., lookup.padding] = 0
        from_weight = isinstance(self.init, str) and self.init in PRINCIPAL
        start = torch.zeros_like(B) if from_weight else B  # with what is taken out again, the update starts at zero
        extra = variant.extra(matrix, A, start, spec.scale)
        if extra or variant.tensors:
            made = {name: tuple(tensor.shape) for name, tensor in extra.items()}
            stated = {tensor.name: tensor.shape(matrix.shape, spec.r) for tensor in variant.tensors}
            if made != stated:
                raise ValueError(
                    f"variant {spec.variant!r} made the tensors {made} besides A and B, and states {stated}"
                )
        tensors = {"lora_A": A, "lora_B": B, **extra}
        if from_weight:  # which can be a window on all of it
            tensors |= dict(zip(SUBTRACTED, (A, B), strict=True))
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        wanted = accumulation_dtype(matrix.dtype) if self.dtype is None else self.dtype
        for name, tensor in tensors.items():
            if tensor.dtype != wanted or not tensor.is_contiguous():
                tensors[name] = tensor.to(wanted).contiguous()
        return tensors

    def factors(self, matrix: Tensor, spec: AdapterSpec, lookup: Lookup | None = None) -> tuple[Tensor, Tensor]:
        """A ``(r, in)`` and B ``(out, r)`` for one matrix, or stacks of them."""
        if matrix.ndim == 3:
            A, B = map(torch.stack, zip(*(self.factors(each, spec, lookup) for each in matrix), strict=True))
            return A, B
        init, r = self.init, spec.r
        if init == "kaiming" and lookup is not None and "lora_A" not in VARIANTS[spec.variant].frozen:
            return embedding(matrix, r, self.generator)
        if not isinstance(init, str):
            return _checked(init, matrix, r, self.generator)
        if init in INITS:
            return INITS[init](matrix, r, self.generator)
        if matrix.is_meta:
            raise ValueError(
                f"init {init!r} starts from the weight, which has no values on the meta device; load it first"
            )
        if r > min(matrix.shape):
            raise ValueError(f"init {init!r} takes r={r} directions of a weight that has {min(matrix.shape)}")
        with full_precision(matrix.device):
            return PRINCIPAL[init](matrix.to(accumulation_dtype(matrix.dtype)), r, spec.scale)


def _checked(init: Init, matrix: Tensor, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """What a function that is not ours returns: neither the base nor its own tensors are shared with it."""
    A, B = (factor.clone() for factor in init(matrix.clone(), r, generator))
    out_features, in_features = matrix.shape
    if A.shape != (r, in_features) or B.shape != (out_features, r):
        raise ValueError(
            f"init {init!r} returned A {tuple(A.shape)} and B {tuple(B.shape)}; "
            f"expected {(r, in_features)} and {(out_features, r)}"
        )
    if not all(t.is_floating_point() and bool(t.isfinite().all()) for t in (A, B)):
        raise ValueError(f"init {init!r} returned values that are not finite floating-point numbers")
    if not A.any() and not B.any():
        raise ValueError(
            f"init {init!r} returned A = 0 and B = 0, which no gradient moves; return one that is not zero"
        )
    return A, B

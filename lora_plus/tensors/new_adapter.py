"""The tensors that a new adapter of one matrix starts with."""

from __future__ import annotations

import torch
from torch import Tensor

from .init import INITS, PRINCIPAL, Init, check_init
from .matrix import accumulation_dtype, full_precision
from .variant import STARTS, VARIANTS, AdapterSpec


def new_tensors(
    matrix: Tensor,
    spec: AdapterSpec,
    *,
    init: str | Init = "kaiming",
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    no_update: int | None = None,
) -> dict[str, Tensor]:
    """The tensors by the name of their container: lora_A, lora_B, those of the variant, and what is taken out again.

    Args:
        matrix: the frozen weight in its matrix view ``(out, in)``, or ``(stack, out, in)`` with an adapter for each.
        spec, init, dtype, generator: as in `inject_lora`.
        no_update: the column of A that starts at zero, as that of an embedding's padding does.
    """
    check_init(init)
    if matrix.ndim == 2:
        A, B = _factors(matrix, spec, init, generator)
    else:
        A, B = map(torch.stack, zip(*(_factors(each, spec, init, generator) for each in matrix), strict=True))
    if "lora_A" in VARIANTS[spec.variant].frozen and not bool(A.any()):
        raise ValueError(
            f"variant {spec.variant!r} freezes A, and init {init!r} makes it zero: nothing would be learnt"
        )
    if no_update is not None:
        A[..., no_update] = 0
    from_weight = isinstance(init, str) and init in PRINCIPAL
    start = torch.zeros_like(B) if from_weight else B  # with what is taken out again, the update starts at zero
    tensors = {"lora_A": A, "lora_B": B, **_extra(matrix, A, start, spec)}
    tensors |= dict(zip(STARTS, (A, B), strict=True)) if from_weight else {}
    wanted = accumulation_dtype(matrix.dtype) if dtype is None else dtype
    copy = callable(init) or from_weight
    return {name: tensor.to(wanted, copy=copy).contiguous() for name, tensor in tensors.items()}


def _extra(matrix: Tensor, A: Tensor, B: Tensor, spec: AdapterSpec) -> dict[str, Tensor]:
    """The tensors of the variant, which must be those that it states."""
    variant = VARIANTS[spec.variant]
    made = variant.extra(matrix, A, B, spec.scale)
    shapes = {name: tuple(tensor.shape) for name, tensor in made.items()}
    stated = {tensor.name: tensor.shape(matrix.shape, spec.r) for tensor in variant.tensors}
    if shapes != stated:
        raise ValueError(f"variant {spec.variant!r} made the tensors {shapes} besides A and B, and states {stated}")
    return made


def _factors(
    matrix: Tensor, spec: AdapterSpec, init: str | Init, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    (out_features, in_features), r = matrix.shape, spec.r
    if isinstance(init, str):
        return INITS[init](matrix, r, generator) if init in INITS else _of_weight(matrix, spec, init)
    # a function that is not ours gets a copy: what it does to the weight must not reach the base
    A, B = init(matrix.clone(), r, generator)
    if A.shape != (r, in_features) or B.shape != (out_features, r):
        raise ValueError(
            f"init {init!r} returned A {tuple(A.shape)} and B {tuple(B.shape)}; "
            f"expected {(r, in_features)} and {(out_features, r)}"
        )
    if not all(t.is_floating_point() and bool(t.isfinite().all()) for t in (A, B)):
        raise ValueError(f"init {init!r} returned values that are not finite floating-point numbers")
    return A, B


def _of_weight(matrix: Tensor, spec: AdapterSpec, init: str) -> tuple[Tensor, Tensor]:
    if matrix.is_meta:
        raise ValueError(f"init {init!r} starts from the weight, which has no values on the meta device; load it first")
    if spec.r > min(matrix.shape):
        raise ValueError(f"init {init!r} takes r={spec.r} directions of a weight that has {min(matrix.shape)}")
    with full_precision(matrix.device):
        return PRINCIPAL[init](matrix.to(accumulation_dtype(matrix.dtype)), spec.r, spec.scale)

"""The tensors that a new adapter of one matrix starts with."""

from __future__ import annotations

import torch
from torch import Tensor

from .functional import accumulation_dtype
from .init import Init, resolve
from .variants import VARIANTS, AdapterSpec


def new_tensors(
    matrix: Tensor,
    spec: AdapterSpec,
    *,
    init: str | Init = "kaiming",
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    no_update: int | None = None,
) -> dict[str, Tensor]:
    """The tensors by the name of their container: lora_A, lora_B and those of the variant.

    Args:
        matrix: the frozen weight in its matrix view ``(out, in)``, or ``(stack, out, in)`` with an adapter for each.
        spec, init, dtype, generator: as in `inject_lora`.
        no_update: the column of A that starts at zero, as that of an embedding's padding does.
    """
    if matrix.ndim == 2:
        A, B = _factors(matrix, spec.r, init, generator)
    else:
        A, B = map(torch.stack, zip(*(_factors(each, spec.r, init, generator) for each in matrix), strict=True))
    if no_update is not None:
        A[..., no_update] = 0
    tensors = {"lora_A": A, "lora_B": B, **VARIANTS[spec.variant].extra(matrix, A, B, spec.scale)}
    wanted = accumulation_dtype(matrix.dtype) if dtype is None else dtype
    return {name: tensor.to(wanted, copy=callable(init)).contiguous() for name, tensor in tensors.items()}


def _factors(matrix: Tensor, r: int, init: str | Init, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    out_features, in_features = matrix.shape
    # a function that is not ours gets a copy: what it does to the weight must not reach the base
    A, B = resolve(init)(matrix.clone() if callable(init) else matrix, r, generator)
    if A.shape != (r, in_features) or B.shape != (out_features, r):
        raise ValueError(
            f"init {init!r} returned A {tuple(A.shape)} and B {tuple(B.shape)}; "
            f"expected {(r, in_features)} and {(out_features, r)}"
        )
    if callable(init) and not all(t.is_floating_point() and bool(t.isfinite().all()) for t in (A, B)):
        raise ValueError(f"init {init!r} returned values that are not finite floating-point numbers")
    return A, B

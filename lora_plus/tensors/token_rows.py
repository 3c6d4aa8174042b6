"""The variants whose adapter is some rows of a stored weight, by their ids: the rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .matrix import accumulation_dtype
from .variant import VARIANTS, HasWeight, LoRA, TensorSpec

ROWS = "lora_rows"
"""The container of the rows ``(k, dim)``."""


class Rows(LoRA):
    """``W`` with other rows at k ids, of a weight ``(n, dim)`` that is multiplied with: a head's.

    The adapter has the rows themselves, and not how far they moved: those of new tokens are random in each process
    that resizes an embedding, and what is added to them is the difference.
    """

    factors: tuple[TensorSpec, ...] = ()
    # a decay would pull the rows to zero, also those that no batch has, and not to the base as that of A and B does
    tensors: tuple[TensorSpec, ...] = (TensorSpec(ROWS, ("r", "in"), "rows", "rows", decays=False),)

    def extra(self, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> dict[str, Tensor]:
        raise ValueError("'rows' cannot be chosen as a variant; pass train_rows={name: ids} to inject_lora")


class LookupRows(Rows):
    """The same of a weight that is looked up: an embedding's. Its rows are the columns of the matrix view."""

    tensors: tuple[TensorSpec, ...] = (TensorSpec(ROWS, ("r", "out"), "rows", "rows", decays=False),)

    def join(self, layer: HasWeight, adapter: Any, x: Tensor, y: Tensor, update: Tensor) -> Tensor:
        return y + (update if adapter.gain == 1 else adapter.gain * update).to(y.dtype)


VARIANTS |= {"rows": Rows(), "lookup_rows": LookupRows()}

VARIANT_OF = {"o i -> o i": "rows", "n d -> d n": "lookup_rows"}
"""By the layout of a weight whose first dimension the ids count, the variant of the adapter."""


def row_factors(variant: str, moved: Tensor, ids: Sequence[int], n: int) -> tuple[Tensor, Tensor]:
    """A ``(k, in)`` and B ``(out, k)`` of the update that adds ``moved (k, dim)`` to these rows of n."""
    chosen = moved.new_zeros(len(ids), n)
    chosen.scatter_(1, torch.tensor([[each] for each in ids], device=moved.device), 1.0)
    return (moved, chosen.mT) if variant == "rows" else (chosen, moved.mT)


def moved_rows(rows: Tensor, own: Tensor) -> Tensor:
    """How far rows are from the weight's own, in float32 or better."""
    wide = accumulation_dtype(rows.dtype, own.dtype)
    return rows.to(wide) - own.detach().to(rows.device, wide)

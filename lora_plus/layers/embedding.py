"""Embeddings with adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_plus.tensors.init import Lookup

from .adapter import ActiveAdapter
from .calls import Calls
from .kinds import adapts
from .layer import LoRALayer

_UNBOUNDED = Calls()
"""The embeddings that compute their base in this thread, where the norm is that of the adapted row."""


@adapts(nn.Embedding)
class LoRAEmbedding(LoRALayer, nn.Embedding):
    """``y = (W + s B A) onehot(index)``; integers ``(...)`` to ``(..., embedding_dim)``.

    The row at ``padding_idx`` gets no update: A's column there starts at zero and gets no gradient. ``max_norm`` limits
    the norm of the adapted row; unlike in ``nn.Embedding``, the stored weight does not change.
    """

    layout = "n d -> d n"
    roles = {"lora_A": "embedding_A", "lora_B": "embedding_B"}

    lora_state = LoRALayer.lora_state | {"lora_max_norm": None}

    padding_idx: int | None
    lora_max_norm: float | None
    """The norm that no row exceeds; apart, since torch 2.8 compiles no property that has an attribute of its name."""

    @property
    def max_norm(self) -> float | None:  # type: ignore[override]
        """The norm that no row exceeds; None while the base computes, for torch rescales stored rows in place."""
        return self.lora_max_norm if _UNBOUNDED.noted(self) is None else None

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        self.__dict__["max_norm"] = self.__dict__["lora_max_norm"] = value

    def begin(self) -> None:
        super().begin()
        self.max_norm = self.__dict__["max_norm"]

    @classmethod
    def unfit(cls, layer: nn.Module) -> str | None:
        if layer.max_norm is None or type(layer).forward is nn.Embedding.forward:
            return None
        return f"{type(layer).__name__} with max_norm and a forward of its own, which would see rows of any norm"

    @classmethod
    def lookup(cls, layer: nn.Module) -> Lookup:
        return Lookup(layer.padding_idx if isinstance(layer.padding_idx, int) else None)

    @classmethod
    def base_facts(cls, module: nn.Module) -> dict[str, Any]:
        return {} if module.max_norm is None else {"max_norm": module.max_norm}

    def trial_input(self) -> Tensor:
        return torch.arange(min(4, len(self.weight)), device=self.weight.device)

    def adapted(self, x: Tensor, y: Tensor, adapters: Sequence[ActiveAdapter]) -> Tensor:
        y = super().adapted(x, y, adapters)
        return y if self.max_norm is None else _clip_norm(y, self.max_norm, self.norm_type)

    def base_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.max_norm is None:
            return super().base_forward(*args, **kwargs)
        outer = _UNBOUNDED.begin(self)
        try:
            y = super().base_forward(*args, **kwargs)
        finally:
            _UNBOUNDED.end(outer)
        merged = self.lora_merge is not None and not self.lora_disabled  # then nothing is added any more
        return _clip_norm(y, self.max_norm, self.norm_type) if merged else y

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float, y: Tensor) -> Tensor:
        rows = F.embedding(x, A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq) * scale  # (..., r)
        if dropout:  # of the input, which here is the one-hot vector: a dropped token gets no update
            rows = rows * F.dropout(rows.new_ones(x.shape), dropout).unsqueeze(-1)
        return F.linear(rows, B)


def _clip_norm(rows: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Rows ``(..., dim)`` longer than ``max_norm`` scaled down to it, by the formula of ``nn.Embedding``."""
    norm = torch.linalg.vector_norm(rows, norm_type, dim=-1, keepdim=True)
    factor = max_norm / (norm.double() + 1e-7)
    return rows * torch.where(norm > max_norm, factor, 1.0).to(rows.dtype)

"""An adapter that is some rows of a weight, such as those of new tokens: at their ids the weight has the adapter's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_plus.tensors.token_rows import ROWS, moved_rows, row_factors

from .adapter import Adapter


@dataclass(eq=False)
class TokenRows(Adapter):
    """The rows ``lora_rows (k, dim)`` in the place of the weight's at k ids.

    The update is the difference to the rows that the weight has now: at the start it is zero, bit for bit, and the sum
    is the adapter's rows, whatever the weight has there by then.
    """

    ids: Sequence[int] = ()
    layer: Any = field(default=None, repr=False)
    """The layer whose weight it is."""
    gain: float = 1.0
    """The factor by which the layer's own forward multiplies the rows that it looks up."""
    followers: list[Any] = field(default_factory=list, repr=False)
    """The other layers that have the same weight, and the rows with it."""

    def factors(self) -> tuple[Tensor, Tensor]:
        weight, rows = self.layer.own_weight(), self.modules[ROWS]._parameters[self.name]
        own = weight.index_select(0, torch.tensor(self.ids, device=weight.device))
        return row_factors(self.spec.variant, moved_rows(rows, own), self.ids, len(weight))


@dataclass(eq=False)
class MirroredRows(TokenRows):
    """The rows of another layer that has the same weight, for this layer."""

    held = False
    source: Any = field(default=None, repr=False)
    """The layer that has the rows."""

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.name not in getattr(self.source, "lora_adapters", {}):
            how = "a layer tied to this one has lost it, as a part of the model was changed alone"
            raise ValueError(f"adapter {self.name!r}: {how}; call remove_lora on the whole model")
        return super().factors()

    modules = property(lambda self: self.source._modules, lambda self, value: None)  # type: ignore[assignment]

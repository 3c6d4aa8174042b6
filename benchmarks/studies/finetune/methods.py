"""The ways of fine-tuning that are compared: a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_plus import loraplus_param_groups
from lora_plus.tensors.variant import VariantName


def adamw(model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW without decay over all groups."""
    return torch.optim.AdamW(groups, weight_decay=0.0)


@dataclass(frozen=True)
class Method:
    """What differs from plain LoRA."""

    lr_ratio: float = 1.0
    """Rate of B over rate of A; their geometric mean is the rate of the sweep."""
    variant: VariantName = "lora"
    from_gradients: bool = False
    """Whether A starts from the gradient of a few batches."""
    head_rate: float | None = None
    """Rate of what is trained beside the adapters, such as the head; None for the rate of the sweep."""
    optimizer: Callable[[nn.Module, list[dict[str, Any]]], torch.optim.Optimizer] = adamw
    """From the adapted model and its LoRA+ groups, each with its rate, to the optimizer; a schedule moves its rates."""

    def optimizer_of(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """The optimizer; ``rate`` is the geometric mean of A's and B's rate, and that of what has none of its own."""
        groups = loraplus_param_groups(model, lr=rate, lr_ratio=self.lr_ratio, lr_mode="geometric")
        for group in groups:
            if group["name"].startswith("other") and self.head_rate is not None:
                group["lr"] = self.head_rate
        return self.optimizer(model, groups)


PLAIN = "LoRA"
PROBE = "linear probe"
"""What all methods start from; it is scored, not trained."""
METHODS: dict[str, Method] = {
    PLAIN: Method(),
    "LoRA+ x2": Method(lr_ratio=2),
    "LoRA+ x4": Method(lr_ratio=4),
    "LoRA+ x8": Method(lr_ratio=8),
    "LoRA+ x16": Method(lr_ratio=16),
    "DoRA": Method(variant="dora"),
    "gradient init": Method(from_gradients=True),
    "gradient init x4": Method(from_gradients=True, lr_ratio=4),
}

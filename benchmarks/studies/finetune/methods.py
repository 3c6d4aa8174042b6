"""The ways of fine-tuning that are compared: a table."""

from __future__ import annotations

from dataclasses import dataclass

from lora_plus.tensors.variant import VariantName


@dataclass(frozen=True)
class Method:
    """What differs from plain LoRA."""

    lr_ratio: float = 1.0
    """Rate of B over rate of A; their geometric mean is the rate of the sweep."""
    variant: VariantName = "lora"
    from_gradients: bool = False
    """Whether A starts from the gradient of a few batches."""


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

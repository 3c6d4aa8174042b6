"""The learning rate of LoRA+ that goes with a tuned one of LoRA."""

from __future__ import annotations

import math

from lora_plus.errors import check_number

from .groups import LrMode, rates


def convert_lr(lr: float, *, lr_ratio: float = 4.0, lr_mode: LrMode = "A") -> float:
    """The ``lr`` of LoRA+ that goes with a tuned rate of plain LoRA.

    It keeps the geometric mean of the rates of A and B at the tuned rate, which is what transfers between ratios:
    ``lr / sqrt(lr_ratio)`` in mode "A", ``lr`` in mode "geometric", ``lr * sqrt(lr_ratio)`` in mode "B".

    Examples:
        >>> convert_lr(2e-4, lr_ratio=4), convert_lr(2e-4, lr_ratio=4, lr_mode="B")
        (0.0001, 0.0004)

    Args:
        lr: the rate at which plain LoRA does best, with the same optimizer, rank and alpha.
        lr_ratio, lr_mode: as they will be passed to `loraplus_param_groups`.

    Raises:
        ValueError: if a number is out of range, or the mode unknown.
    """
    check_number("lr", lr, tensor=True)
    return lr / math.sqrt(math.prod(rates(1.0, lr_ratio, lr_mode)))

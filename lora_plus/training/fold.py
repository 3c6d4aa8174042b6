"""LoRA+ for optimizers that take one learning rate: the ratio of the rates moves into alpha."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from lora_plus.errors import check_number, entry_of
from lora_plus.model.state import Need, require
from lora_plus.tensors.variant import SUBTRACTED

FOLDS: dict[str, Callable[[float], float]] = {
    "adam": lambda ratio: ratio,  # a step does not depend on the gradient's size
    "sgd": math.sqrt,  # a step is proportional to the gradient
}
"""How an optimizer's steps answer to the gradient's size: ``lr_ratio -> c``, what alpha is multiplied by."""


@torch.no_grad()
def fold_lr_ratio(model: nn.Module, lr_ratio: float, *, rule: str = "adam", adapter: str = "default") -> None:
    """Give an optimizer with one learning rate the effect of LoRA+: multiply alpha by a factor c, and divide B by c.

    For optimizers with one rate (Prodigy, D-Adaptation) or that an engine builds. The output stays the same: bit for
    bit if c is a power of 2, otherwise up to rounding. Training at one rate then equals LoRA+ with this ratio and
    ``lr_mode="A"``. The rule ``"adam"`` (c is the ratio) is for steps that do not depend on the gradient's size (Adam,
    RMSprop, Lion, Prodigy), ``"sgd"`` (c is its square root) for steps proportional to the gradient. Neither fits
    LBFGS. Three things differ: clipping by the norm of all gradients (B's is c times as large), weight decay (B decays
    at A's rate) and Adam's epsilon (on B as if c times smaller).

    Call it once, before the optimizer is built, and use ``lr_ratio=1`` in `loraplus_param_groups`. ``1 / lr_ratio``
    with the same rule undoes it. Embedding adapters are not changed, because LoRA+ trains them at one rate.

    Examples:
        >>> model = inject_lora(nn.Sequential(nn.Linear(8, 8)), ["0"], r=2, alpha=4)
        >>> fold_lr_ratio(model, 4)
        >>> model[0].lora_adapters["default"].spec.alpha
        16.0

    Args:
        model: a model with the adapter; it is changed.
        lr_ratio: rate of B over rate of A, as in `loraplus_param_groups`.
        rule: ``"adam"`` or ``"sgd"``.
        adapter: the adapter's name.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: if the ratio or the rule is unknown or out of range, the model is merged or disabled, or the adapter
            is on embeddings only. The model is then as it was.
    """
    check_number("lr_ratio", lr_ratio, tensor=True)
    state = require(model, "folding a ratio", Need.UNCOPIED | Need.CHANGEABLE, adapters=[adapter])
    factor = entry_of("rule", rule, FOLDS)(float(lr_ratio))
    folded = []
    for _, each, _ in state.adapters(adapter):
        if any(role == "B" for role, _ in each.parameters()):
            folded.append((each, replace(each.spec, alpha=each.spec.alpha * factor)))
    if not folded:
        raise ValueError(f"adapter {adapter!r} is on embeddings only, whose factors learn at one rate; nothing to fold")
    for each, spec in folded:
        tensors = each.tensors()
        divided = [tensors[name] for name in ("lora_B", SUBTRACTED[1]) if name in tensors]
        with state.storage.gathered(divided, write=True):
            for tensor in divided:
                tensor.div_(factor)
        each.spec = spec

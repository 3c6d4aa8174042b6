"""The ways of fine-tuning that are compared: tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_plus import loraplus_param_groups
from lora_plus.tensors.init import InitName
from lora_plus.tensors.variant import VariantName

Groups = list[dict[str, Any]]
RANK, SCALE = 8, 2.0
"""Of plain LoRA: r, and alpha / r."""


def adamw(model: nn.Module, groups: Groups) -> torch.optim.Optimizer:
    """AdamW without decay over all groups."""
    return torch.optim.AdamW(groups, weight_decay=0.0)


class Sizes(NamedTuple):
    """Numbers that a rule for the rank can ask for."""

    weights: int
    """Entries of all weights of the task that can be adapted."""
    all: int
    """Entries of A and B at rank 1, on all of them."""
    own: int
    """Entries of A and B at rank 1, on those that the method adapts."""


def as_large_as(rank: int) -> Callable[[Sizes], int]:
    """The rank with as many parameters as adapters of ``rank`` on all weights have."""
    return lambda sizes: max(1, round(rank * sizes.all / sizes.own))


def share(part: float) -> Callable[[Sizes], int]:
    """The rank whose A and B hold this part of the weights that can be adapted."""
    return lambda sizes: max(1, round(part * sizes.weights / sizes.own))


@dataclass(frozen=True)
class Method:
    """What differs from plain LoRA."""

    lr_ratio: float = 1.0
    """Rate of B over rate of A; their geometric mean is the rate of the sweep."""
    variant: VariantName = "lora"
    init: InitName = "kaiming"
    from_gradients: bool = False
    """Whether A starts from the gradient of a few batches."""
    head_rate: float | None = None
    """Rate of what is trained beside the adapters, such as the head; None for the rate of the sweep."""
    optimizer: Callable[[nn.Module, Groups], torch.optim.Optimizer] = adamw
    """From the adapted model and its LoRA+ groups, each with its rate, to the optimizer; a schedule moves its rates."""
    rank: int | Callable[[Sizes], int] = RANK
    """The rank, or a rule for it."""
    scale: float = SCALE
    """alpha / r."""
    targets: Any = None
    """What gets an adapter; None for all that the task names."""
    in_full: bool = False
    """Whether all weights of the adapted part are trained, without adapters."""
    octaves: int = 0
    """How far its grid of rates lies above the task's."""

    def optimizer_of(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """The optimizer; ``rate`` is the geometric mean of A's and B's rate, and that of what has none of its own."""
        return self.optimizer(model, self.groups(model, rate))

    def groups(self, model: nn.Module, rate: float) -> Groups:
        """All that is trained, with its rates."""
        if self.in_full:
            return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}]
        groups = loraplus_param_groups(model, lr=rate, lr_ratio=self.lr_ratio, lr_mode="geometric")
        for group in groups:
            if group["name"].startswith("other") and self.head_rate is not None:
                group["lr"] = self.head_rate
        return groups


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
FULL = "full fine-tuning"
SIZES: dict[str, Method] = {
    FULL: Method(in_full=True, octaves=-4),
    "alpha = r": Method(scale=1),
    "5 % of the weights": Method(rank=share(0.05)),
    "rank 64": Method(rank=64, octaves=-2),
    "rank 64 x4": Method(rank=64, lr_ratio=4, octaves=-2),
}
"""How much is trained, and at which scale."""
FAR: dict[str, Method] = {
    "LoRA+ x64": Method(lr_ratio=64),
    "ratio 1/4": Method(lr_ratio=1 / 4),
}
"""Ratios outside of the usual ones: further, and below 1, where A learns faster than B."""
PLACES: dict[str, Method] = {
    "q and v": Method(targets=("q", "v")),
    "q, rank 16": Method(targets=("q",), rank=16),
    "q and v, as many": Method(targets=("q", "v"), rank=as_large_as(RANK)),
}
"""Which weights are adapted; for models with attention. "As many" parameters as LoRA on all has."""


def only(*names: str) -> dict[str, Method]:
    """Some of all methods, by name."""
    known = METHODS | FAR | SIZES | PLACES
    return {name: known[name] for name in names}


class Rule(NamedTuple):
    """A rule of thumb, and the two methods that tell what following it gains."""

    words: str
    followed: str
    otherwise: str


RATIO = "raise B's rate"
"""How rules about LoRA+ begin."""
RULES = (
    Rule(f"{RATIO}: ratio 4", "LoRA+ x4", PLAIN),
    Rule(f"{RATIO}: ratio 16 for every task", "LoRA+ x16", PLAIN),
    Rule(f"{RATIO}: ratio 64", "LoRA+ x64", PLAIN),
    Rule(f"{RATIO}: ratio 4, at rank 64", "rank 64 x4", "rank 64"),
    Rule("raise A's rate instead: ratio 1/4", "ratio 1/4", PLAIN),
    Rule("alpha = 2 r rather than alpha = r", PLAIN, "alpha = r"),
    Rule("rank 64 rather than 8", "rank 64", PLAIN),
    Rule("as many parameters as 5 % of the weights rather than rank 8", "5 % of the weights", PLAIN),
    Rule("q and v rather than q alone at twice the rank", "q and v", "q, rank 16"),
    Rule("all linear layers rather than q and v with as many parameters", PLAIN, "q and v, as many"),
    Rule("train all weights rather than adapters", FULL, PLAIN),
)

"""LoRA+ for optimizers that take one learning rate: the ratio of the rates moves into the adapter's scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from lora_plus.layers.adapter import AdapterSite
from lora_plus.model.adapters import check_adapter, check_unmerged
from lora_plus.model.inject import check_uncopied
from lora_plus.model.storage import shards_of
from lora_plus.model.tree import adapter_sites
from lora_plus.tensors.variant import HELD_DIVIDED

from .groups import check_number

FOLDS: dict[str, Callable[[float], float]] = {
    "adam": lambda ratio: ratio,  # a step does not depend on the gradient's size
    "sgd": math.sqrt,  # a step is proportional to the gradient
}
"""How an optimizer's steps answer to the gradient's size: ``lr_ratio -> the factor that B gives to the scale``."""


def fold_lr_ratio(model: nn.Module, lr_ratio: float, *, rule: str = "adam", adapter: str = "default") -> None:
    """Let training at one learning rate act as LoRA+ in mode "A" with this ratio: B gives a factor to the scale.

    For optimizers that have one rate (Prodigy, D-Adaptation), or that an engine builds. With the factor ``c`` of the
    rule, B is divided by c in place and the scale multiplied by c, so the model computes what it did: bit for bit where
    c is a power of 2, up to rounding otherwise. One rate ``lr`` for A and B then moves the weight as ``lr`` for A and
    ``lr * lr_ratio`` for B do without it:

    ======  ===============  ==========================================================================================
    rule    c                holds for
    ======  ===============  ==========================================================================================
    adam    lr_ratio         steps that do not depend on the gradient's size: Adam, AdamW, RMSprop, Lion, Prodigy
    sgd     sqrt(lr_ratio)   steps that are proportional to the gradient: SGD, with momentum or without
    ======  ===============  ==========================================================================================

    This is exact up to rounding. It ceases to be with

    - clipping by the norm of all gradients, because B's gradient is c times as large;
    - weight decay, because B decays at the rate of A, ``lr_ratio`` times slower (AdamW, SGD) than in its own group;
    - Adam's epsilon, which acts on B as if it were c times smaller.

    Optimizers that estimate the rate (Prodigy) do so from the gradients of the folded adapter. A quasi-Newton method
    (LBFGS) estimates the scales too, and neither rule describes it.

    Build the optimizer afterwards, with one rate. Embedding adapters, for which LoRA+ has one rate, are passed over.
    Saving undoes the fold: files and `adapter_state_dict` hold alpha and B as they are without it, and what is loaded
    is not folded, so fold it again to train it further. The model's own ``state_dict`` holds B as it is trained, for a
    model that is folded alike.

    Example:
        >>> model = inject_lora(nn.Sequential(nn.Linear(8, 8)), ["0"], r=2, alpha=4)
        >>> fold_lr_ratio(model, 4)
        >>> model[0].lora_specs["default"].scale
        8.0

    Args:
        model: a model with the adapter; it is changed.
        lr_ratio: rate of B over rate of A, as in `loraplus_param_groups`.
        rule: one of the above.
        adapter: the adapter's name.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: if the ratio or the rule is unknown or out of range, the model is merged or disabled, or the adapter
            is folded already, or has embedding adapters only. The model is then as it was.
    """
    check_number("lr_ratio", lr_ratio)
    if rule not in FOLDS:
        raise ValueError(f"unknown rule {rule!r}; choose one of {sorted(FOLDS)}")
    sites = _sites(model, adapter)
    folds = {site.lora_specs[adapter].fold for site in sites} - {1.0}
    if folds:
        raise ValueError(f"a ratio is folded into adapter {adapter!r} already; call unfold_lr_ratio(model) first")
    if not sites:
        raise ValueError(f"adapter {adapter!r} is on embeddings only, whose factors learn at one rate; nothing to fold")
    _refold(model, sites, adapter, FOLDS[rule](float(lr_ratio)))


def unfold_lr_ratio(model: nn.Module, *, adapter: str = "default") -> None:
    """Undo `fold_lr_ratio`: B and the scale get back what they would be without it.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: if no ratio is folded into it, or the model is merged or disabled.
    """
    sites = [site for site in _sites(model, adapter) if site.lora_specs[adapter].fold != 1]
    if not sites:
        raise ValueError(f"no ratio is folded into adapter {adapter!r}")
    _refold(model, sites, adapter, 1.0)


def _sites(model: nn.Module, adapter: str) -> list[AdapterSite]:
    """Where the adapter has a B that LoRA+ gives a rate of its own."""
    check_adapter(model, adapter)
    check_uncopied(model, "folding a ratio")
    sites = []
    for path, site, weight in adapter_sites(model):
        weight.check_enabled()
        check_unmerged(path, weight, "folding a ratio")
        if any((name, role) == (adapter, "B") for name, role, _ in site.lora_parameters()):
            sites.append(site)
    return sites


@torch.no_grad()
def _refold(model: nn.Module, sites: list[AdapterSite], adapter: str, fold: float) -> None:
    shards = shards_of(model)
    for site in sites:
        spec = site.lora_specs[adapter]
        tensors = site.adapter_tensors(adapter)
        divided = [tensors[name] for name in HELD_DIVIDED if name in tensors]
        with shards.gathered(divided, write=True):
            for tensor in divided:
                tensor.mul_(spec.fold / fold)
        site.lora_specs[adapter] = replace(spec, fold=fold)

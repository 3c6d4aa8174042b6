"""Modules trained in full together with an adapter (``train_also``): which they are, and what they were before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Trained:
    """Kept on the module object itself, so that it goes where the module goes."""

    adapter: str
    """The adapter that the module is trained and saved with."""
    original: dict[str, Tensor]
    """The module's own state before: what removing the adapter brings back."""


_MARK = "_lora_trained"


def trained_modules(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, nn.Module, Trained]]:
    """``(name, module, record)`` for the modules trained in full, with one adapter or with any."""
    for name, module in model.named_modules():
        record = module.__dict__.get(_MARK)
        if record is not None and adapter in (None, record.adapter):
            yield name, module, record


def is_trained(module: nn.Module) -> bool:
    """Whether this very module is marked as trained in full."""
    return _MARK in module.__dict__


def mark_trained(module: nn.Module, adapter: str) -> None:
    """Note that a module is trained in full with this adapter, and keep a copy of its state."""
    original = {name: tensor.detach().clone() for name, tensor in module.state_dict(keep_vars=True).items()}
    module.__dict__[_MARK] = Trained(adapter, original)


def unmark_trained(module: nn.Module, *, restore: bool) -> None:
    """Forget that a module was trained in full, and on demand bring back its original state, bit for bit."""
    record: Trained = module.__dict__.pop(_MARK)
    if restore:
        with torch.no_grad():
            for name, tensor in module.state_dict(keep_vars=True).items():
                tensor.copy_(record.original[name])


def swap_original(module: nn.Module) -> None:
    """Exchange a module's trained state and its original one, without copying; a second call exchanges them back."""
    record: Trained = module.__dict__[_MARK]
    for name, tensor in module.state_dict(keep_vars=True).items():
        original = record.original[name].to(tensor.device, tensor.dtype)
        record.original[name], tensor.data = tensor.data, original

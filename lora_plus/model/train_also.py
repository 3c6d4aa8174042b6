"""Modules trained in full together with an adapter (``train_also``): which they are, and what they were before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_plus.tensors.distributed import fill, is_dtensor

from .storage import Storage


@dataclass
class Trained:
    """Kept on the module object itself, so that it goes where the module goes."""

    adapter: str
    """The adapter that the module is trained and saved with."""
    original: dict[str, Tensor]
    """The module's own state before: what removing the adapter brings back."""
    aside: list[tuple[Tensor, Tensor]] | None = None
    """While the module shows its original state: its tensors, and the trained values that they get back."""
    spares: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the original state that were shown before and not changed: copying a large head takes as long as it."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "spares": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for tensor, held in self.aside or ():  # the block that shows the original state is not a copy's
            show_again(tensor, held)
        self.aside = None


_MARK = "_lora_trained"


def record_of(module: nn.Module) -> Trained | None:
    """What is noted of a module that is trained in full; None for any other module."""
    return module.__dict__.get(_MARK)


def mark_trained(module: nn.Module, adapter: str, storage: Storage) -> None:
    """Note that a module is trained in full with this adapter, and keep a copy of its state."""
    tensors = module.state_dict(keep_vars=True)
    with storage.gathered(tensors.values()):
        original = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    module.__dict__[_MARK] = Trained(adapter, original)


def unmark_trained(module: nn.Module) -> Trained:
    """Forget that a module was trained in full; returns what was noted of it."""
    record: Trained = module.__dict__.pop(_MARK)
    return record


def restore_trained(module: nn.Module, storage: Storage) -> None:
    """Bring back the original state of a module that was trained in full, bit for bit, and forget that it was."""
    original = unmark_trained(module).original
    storage.write((tensor, original[name]) for name, tensor in module.state_dict(keep_vars=True).items())


@contextmanager
def originals(trained: Iterable[tuple[nn.Module, Trained]]) -> Iterator[None]:
    """The original state of these modules trained in full for the length of a ``with`` block."""
    records = [(module, record) for module, record in trained if record.aside is None]
    # by tensor: one that has several names, or several owners, is exchanged once
    held: dict[int, tuple[Tensor, Tensor]] = {}
    shown: list[tuple[Trained, str, Tensor, Tensor, int]] = []
    try:
        for module, record in records:
            tensors = module.state_dict(keep_vars=True)
            for name, tensor in tensors.items():
                if id(tensor) not in held:
                    held[id(tensor)] = tensor, show_copy(tensor, record.original[name], record.spares.pop(name, None))
                    if not (is_dtensor(tensor) or tensor.is_inference()):
                        shown.append((record, name, tensor, tensor.data, tensor._version))
            record.aside = [held[id(tensor)] for tensor in tensors.values()]
        yield
    finally:
        for record, name, tensor, copy, version in shown:
            if (tensor._version, tensor.data_ptr()) == (version, copy.data_ptr()):
                record.spares[name] = copy
        for tensor, values in held.values():
            show_again(tensor, values)
        for _, record in records:
            record.aside = None


def show_copy(tensor: Tensor, values: Tensor, spare: Tensor | None = None) -> Tensor:
    """Let a tensor, which may be a DTensor, show a copy of whole values; returns those that `show_again` needs.

    ``spare`` is such a copy from before, which is taken where it has the tensor's dtype and device.
    """
    if not is_dtensor(tensor):
        held = tensor.data
        if spare is None or (spare.device, spare.dtype) != (tensor.device, tensor.dtype):
            spare = values.to(tensor.device, tensor.dtype, copy=True)  # statistics or an optimizer may change it
        tensor.data = spare
        return held
    held = tensor.detach().clone()  # engines read the memory that a shard had at first
    fill(tensor, values)
    return held


@torch.no_grad()
def show_again(tensor: Tensor, held: Tensor) -> None:
    """Undo `show_copy`."""
    if is_dtensor(tensor):
        tensor.copy_(held)
    else:
        tensor.data = held

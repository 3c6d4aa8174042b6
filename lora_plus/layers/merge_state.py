"""What each weight of a merged model keeps, so that it can show its own values again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lora_plus.tensors.distributed import local

Key = tuple[str, str, str]
"""One tensor of one adapter of a weight: the label of its rows, its container, the adapter's name."""

Tensors = Mapping[Key, Tensor]

Value = TypeVar("Value")


class Slot(NamedTuple):
    """Where a module holds its weight: the table of its parameters or buffers, and the name there."""

    table: dict[str, Any]
    name: str

    @property
    def tensor(self) -> Any:
        """What is bound there now."""
        return self.table[self.name]

    def bind(self, tensor: Tensor) -> None:
        """Make this the weight; the one that was bound is left as it is, for whoever shares it."""
        self.table[self.name] = tensor


@dataclass(kw_only=True)
class Merge:
    """The state of a weight of a merged model: another tensor is bound in the place of the base's.

    Where no adapter of the weight was merged, no other tensor is bound. The slots that the methods take are None where
    the weight is computed, by a parametrization or a hook.
    """

    adapters: tuple[str, ...] = ()
    """The adapters that the merged weight contains; the others have no effect while the model is merged."""
    copies: dict[Key, Tensor] = field(default_factory=dict)
    """Their tensors as they were merged."""
    versions: dict[Key, int] | None = None
    """The tensors' version counters when they were known to be unchanged; None where values are to be compared."""
    lost: float | None = None
    """Relative error of the applied update after rounding to the weight's dtype; None at float32 and above."""
    own: Tensor | None = None
    """The base's own parameter, or buffer, bound back by unmerging."""
    bound: Tensor | None = None
    """What is bound in its place and contains the adapters."""

    def show(self, slot: Slot | None) -> None:
        """Bind the merged weight."""
        if self.bound is not None:
            assert slot is not None
            slot.bind(self.bound)

    def hide(self, slot: Slot | None) -> None:
        """Bind the base's own weight."""
        if self.own is not None:
            assert slot is not None
            slot.bind(self.own)

    def is_shown(self, slot: Slot | None) -> bool:
        """Whether the merged weight is still the one that is bound."""
        return self.bound is None or (slot is not None and slot.tensor is self.bound)

    def watched(self, tensors: Tensors) -> Tensors:
        """The tensors of the merged adapters as they are now; ``tensors`` are those that their containers hold."""
        return tensors

    def is_stale(self, tensors: Tensors, *, by_value: bool = False) -> bool:
        """Whether a merged adapter has been changed since.

        Version counters are quick to compare. They begin anew in a copy, and do not see what is written through
        ``.data``; then values tell, and where these are as they were, the counters hold again.
        """
        tensors = self.watched(tensors)
        now = versions(tensors)
        if self.versions is not None and (now != self.versions or not by_value):
            return now != self.versions
        if any(not _same(tensors[key], copy) for key, copy in self.copies.items()):
            return True
        self.versions = now
        return False

    def rename(self, old: str, new: str) -> None:
        """Follow an adapter that has been given another name; what was noted stays noted: a change must still show."""
        self.adapters = tuple(new if name == old else name for name in self.adapters)
        self.copies = _renamed(self.copies, old, new)
        self.versions = None if self.versions is None else _renamed(self.versions, old, new)

    def follow(self, fn: Callable[[Tensor], Tensor], weight: Tensor, tensors: Tensors, shown: bool) -> None:
        """Do to what is kept here what was done to the module's tensors, as in ``model.to(...)``.

        ``weight`` is the one that is bound by now, the merged one if it is ``shown``.
        """
        self.copies = {key: fn(copy) for key, copy in self.copies.items()}
        self.versions = None
        hidden = self.own if shown else self.bound
        if hidden is not None:
            hidden.data = fn(hidden.data)  # the same object: it may be tied
            self.bound = weight if shown else self.bound


def _renamed(noted: dict[Key, Value], old: str, new: str) -> dict[Key, Value]:
    return {(label, container, new if name == old else name): each for (label, container, name), each in noted.items()}


def versions(tensors: Tensors) -> dict[Key, int]:
    """The version counters of named tensors: they differ after any change in place."""
    return {name: 0 if tensor.is_inference() else tensor._version for name, tensor in tensors.items()}


@torch.no_grad()
def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values here; of DTensors, the same parts."""
    if one.is_meta or other.is_meta or one.shape != other.shape or one.dtype != other.dtype:
        return one.is_meta and other.is_meta
    return torch.equal(local(one), local(other))

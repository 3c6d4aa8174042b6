"""What each weight of a merged model keeps, so that it can show its own values again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_plus.tensors.distributed import is_dtensor

if TYPE_CHECKING:
    from .weight import AdaptedWeight


@dataclass(kw_only=True)
class Merge:
    """The state of a weight of a merged model, none of whose adapters was merged: it is what the base's is."""

    adapters: tuple[str, ...] = ()
    """The adapters that the shown weight contains; the others have no effect while the model is merged."""
    copies: dict[str, Tensor] = field(default_factory=dict)
    """Their tensors as they were merged."""
    versions: dict[str, int] | None = None
    """The tensors' version counters when they were known to be unchanged; None where values are to be compared."""
    lost: float | None = None
    """Relative error of the applied update after rounding to the weight's dtype; None at float32 and above."""

    def show(self, owner: AdaptedWeight) -> None:
        """Let the owner's weight be the merged one."""

    def hide(self, owner: AdaptedWeight) -> None:
        """Let the owner's weight be its own."""

    def can_be_hidden(self, owner: AdaptedWeight) -> bool:
        """Whether the owner's weight can be its own again."""
        return True

    def is_shown(self, owner: AdaptedWeight) -> bool:
        """Whether the owner's weight is still the merged one."""
        return True

    def own_weight(self, owner: AdaptedWeight) -> Tensor:
        """The base's own parameter, or buffer."""
        return owner.weight

    def tensors(self, owner: AdaptedWeight) -> Mapping[str, Tensor]:
        """The tensors of the merged adapters as they are now."""
        return owner.noted_tensors(self.adapters)

    def is_stale(self, owner: AdaptedWeight, *, by_value: bool = False) -> bool:
        """Whether a merged adapter has been changed since.

        Version counters are quick to compare. They begin anew in a copy, and do not see what is written through
        ``.data``; then values tell, and where these are as they were, the counters hold again.
        """
        tensors = self.tensors(owner)
        now = versions(tensors)
        if self.versions is not None and (now != self.versions or not by_value):
            return now != self.versions
        if any(not _same(tensors[name], copy) for name, copy in self.copies.items()):
            return True
        self.versions = now
        return False

    def rename(self, owner: AdaptedWeight, old: str, new: str) -> None:
        """Follow an adapter of the owner that has been given another name."""
        self.adapters = tuple(new if name == old else name for name in self.adapters)
        names = list(owner.noted_tensors(self.adapters))  # what was noted stays noted: a change must still be found
        self.copies = dict(zip(names, self.copies.values(), strict=True))
        if self.versions is not None:
            self.versions = dict(zip(names, self.versions.values(), strict=True))

    def follow(self, owner: AdaptedWeight, fn: Callable[[Tensor], Tensor]) -> None:
        """Do to what the owner does not show what was done to its tensors, as in ``model.to(...)``."""
        self.copies = {name: fn(copy) for name, copy in self.copies.items()}
        self.versions = None


@dataclass(kw_only=True)
class BoundMerge(Merge):
    """The state of a weight that is merged: another tensor is bound in its place."""

    weight: Tensor
    """The base's own parameter, or buffer, bound back by unmerging."""
    bound: Tensor
    """What is bound in its place and contains the adapters."""

    def show(self, owner: AdaptedWeight) -> None:
        owner.bind_weight(self.bound)

    def hide(self, owner: AdaptedWeight) -> None:
        owner.bind_weight(self.weight)

    def can_be_hidden(self, owner: AdaptedWeight) -> bool:
        return owner.weight_place() is not None

    def is_shown(self, owner: AdaptedWeight) -> bool:
        return owner.weight is self.bound

    def own_weight(self, owner: AdaptedWeight) -> Tensor:
        return self.weight

    def follow(self, owner: AdaptedWeight, fn: Callable[[Tensor], Tensor]) -> None:
        super().follow(owner, fn)
        hidden = self.bound if owner.lora_disabled else self.weight
        hidden.data = fn(hidden.data)  # the same object: it may be tied
        if not owner.lora_disabled:
            self.bound = owner.weight


@dataclass(kw_only=True)
class MergeInShards(BoundMerge):
    """The same of a weight that is a DTensor: the merged values are written into the parameter that it has.

    An engine that shards parameters puts its own in the place of any other at the next forward.
    """

    parameters: dict[str, Tensor]
    """The adapters' parameters: in a forward others are in their place, with counters of their own."""

    @torch.no_grad()
    def show(self, owner: AdaptedWeight) -> None:
        """Exchange the values of the weight and those kept in ``bound``."""
        shown = self.weight.detach().clone()
        self.weight.copy_(self.bound)
        self.bound = shown

    hide = show

    def is_shown(self, owner: AdaptedWeight) -> bool:
        return True

    def tensors(self, owner: AdaptedWeight) -> Mapping[str, Tensor]:
        return self.parameters

    def follow(self, owner: AdaptedWeight, fn: Callable[[Tensor], Tensor]) -> None:
        Merge.follow(self, owner, fn)
        self.weight, self.bound = owner.weight, fn(self.bound)
        self.parameters = owner.noted_tensors(self.adapters)


def versions(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The version counters of named tensors: they differ after any change in place."""
    return {name: 0 if tensor.is_inference() else tensor._version for name, tensor in tensors.items()}


@torch.no_grad()
def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values here; of DTensors, the same parts."""
    if one.is_meta or other.is_meta or one.shape != other.shape or one.dtype != other.dtype:
        return one.is_meta and other.is_meta
    local = [tensor.to_local() if is_dtensor(tensor) else tensor for tensor in (one, other)]  # type: ignore[attr-defined]
    return torch.equal(*local)

"""What engines add to the check of an optimizer. Nothing of ours is imported here, so that they can do so early."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from lora_plus.layers.adapter import Adapter
    from lora_plus.layers.weight import AdaptedWeight
    from lora_plus.model.unsaved import Unsaved


class Member(NamedTuple):
    """A tensor of an adapter."""

    adapter: str
    role: str
    key: int
    """The id of the parameter."""


@dataclass(frozen=True)
class Training:
    """What is to be trained, and in which groups it is. Parameters go by their ids."""

    model: nn.Module
    groups: list[Mapping[str, Any]]
    lr_ratio: float | None
    labels: list[str]
    """What messages call the groups."""
    position: dict[int, int]
    """The position of its group for each parameter that is in one, the last of them."""
    names: dict[int, str]
    """The name of each of the model's parameters."""
    trainable: set[int]
    """The parameters that are to be trained."""
    adapters: list[tuple[str, Adapter, AdaptedWeight]]
    """With the name and the weight that each is on."""
    tensors: list[Member]
    """The adapters' tensors; those of a place from A to B."""
    beside: Unsaved
    """What is trainable beside them."""


CHECKS: list[Callable[[Training], Iterable[str]]] = []
"""Checks of engines: each says what is wrong on this rank, and for each what to do."""

COLLECTIVE: list[Callable[[nn.Module, list[str]], list[str]]] = []
"""Checks over ranks: from what this rank has found to what all have found, with what differs between them."""

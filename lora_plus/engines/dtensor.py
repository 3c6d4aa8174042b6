"""``fully_shard`` (FSDP2) and tensor parallelism: parameters are DTensors, and each knows its mesh and whole shape."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_plus.layers.merge_state import Key, Merge, Slot, Tensors
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.model.tree import Tree
from lora_plus.tensors.distributed import distributed_like, is_dtensor, whole

from .sharded import ShardedStorage


class DTensorStorage(ShardedStorage):
    """Parameters that are DTensors."""

    engine = "fully_shard or tensor parallelism"
    fixed = True

    def groups(self) -> list[Any]:
        meshes: list[Any] = [p.device_mesh for p in self.parameters if is_dtensor(p)]  # type: ignore[attr-defined]
        mesh = max(meshes, key=lambda mesh: mesh.size())  # that of a part of the model can be a part of it
        return [mesh.get_group(dimension) for dimension in range(mesh.ndim)]

    def settle(self) -> None:
        _reshard(self.tree)

    @contextmanager
    def exposed(self, weight: AdaptedWeight) -> Iterator[None]:
        sharded = [
            (part._parameters, name, parameter)
            for part in weight.holders()
            for name, parameter in part._parameters.items()
            if parameter is not None and is_dtensor(parameter)
        ]
        for held, name, parameter in sharded:
            held[name] = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
        try:
            yield
        finally:
            for held, name, parameter in sharded:
                held[name] = parameter

    def bound(self, merge: Merge, adapters: Tensors) -> Merge:
        if merge.own is None or merge.bound is None or not is_dtensor(merge.own):
            return merge
        bound = distributed_like(merge.bound, merge.own)
        return MergeInShards(**vars(merge) | {"bound": bound}, parameters=dict(adapters))


def _reshard(tree: Tree) -> None:
    """Shard again what ``fully_shard`` left whole after a forward, as it does with the root's parameters."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    resharding: Any = getattr(fsdp, "FSDPModule", ())
    for module in tree.everything() if resharding else ():
        if isinstance(module, resharding):
            module.reshard()


def find(tree: Tree) -> DTensorStorage | None:
    """The storage of a model with DTensors; what a forward left whole is sharded again."""
    _reshard(tree)
    one_of_each = {type(parameter): parameter for parameter in tree.parameters()}
    return DTensorStorage(tree) if any(map(is_dtensor, one_of_each.values())) else None


@dataclass(kw_only=True)
class MergeInShards(Merge):
    """The state of a merged weight that is a DTensor: the merged values are written into the parameter that it has.

    An engine that shards parameters puts its own in the place of any other at the next forward.
    """

    own: Tensor
    bound: Tensor
    """The values that the parameter does not show: the base's, as long as the merged ones are shown."""
    parameters: dict[Key, Tensor]
    """The adapters' parameters: in a forward others are in their place, with counters of their own."""

    @torch.no_grad()
    def show(self, slot: Slot | None) -> None:
        """Exchange the values of the weight and those kept in ``bound``."""
        shown = self.own.detach().clone()
        self.own.copy_(self.bound)
        self.bound = shown

    hide = show

    def is_shown(self, slot: Slot | None) -> bool:
        return True

    def watched(self, tensors: Tensors) -> Tensors:
        return self.parameters

    def follow(self, fn: Callable[[Tensor], Tensor], weight: Tensor, tensors: Tensors, shown: bool) -> None:
        self.copies = {key: fn(copy) for key, copy in self.copies.items()}
        self.versions = None
        self.own, self.bound, self.parameters = weight, fn(self.bound), dict(tensors)

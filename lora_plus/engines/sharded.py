"""What the storages of all engines that shard a model have in common: ranks that act, or fail, together."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch

from lora_plus.model.storage import Result, Storage
from lora_plus.model.tree import Tree


class ShardedStorage(Storage):
    """Parameters of a model that several ranks hold together. Abstract."""

    sharded = True

    def __init__(self, tree: Tree) -> None:
        self.tree, self.parameters = tree, tree.parameters()

    def groups(self) -> list[Any]:
        """Process groups whose product is the ranks that hold the model together."""
        raise NotImplementedError

    def on_one_rank(self, action: Callable[[], None]) -> None:
        first = all(torch.distributed.get_rank(group) == 0 for group in self.groups())
        self.on_every_rank(action if first else lambda: None)

    def on_every_rank(self, action: Callable[[], Result]) -> Result:
        own = None
        try:
            result = action()
        except BaseException as error:
            own = error
        told = None if own is None else _transportable(own)
        for group in self.groups():
            heard: list[BaseException | None] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(heard, told, group=group)
            told = next((error for error in heard if error is not None), None)
        if own is not None:
            raise own
        if told is not None:
            raise told
        return result


def _transportable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error

"""``FullyShardedDataParallel``: parameters are flat slices of the one parameter of their unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_plus.model.tree import WRAPPERS, Tree, Wrapper

from .sharded import ShardedStorage

WRAPPERS.append(Wrapper("torch.distributed.fsdp", "FullyShardedDataParallel", "_fsdp_wrapped_module"))


class FSDP1Storage(ShardedStorage):
    """Parameters that are slices of flat ones."""

    engine = "FullyShardedDataParallel"
    flat = fixed = True

    def __init__(self, tree: Tree) -> None:
        super().__init__(tree)
        from torch.distributed.fsdp import FullyShardedDataParallel

        self._fsdp = FullyShardedDataParallel
        self._units: dict[int, FullyShardedDataParallel] = {}
        self._shapes: dict[int, torch.Size] = {}
        for unit in self._fsdp.fsdp_modules(tree.model):
            flat = unit._handle.flat_param if unit._handle is not None else None
            if flat is not None and flat._params is not None:
                self._units |= {id(parameter): unit for parameter in flat._params}
                self._shapes |= {id(p): shape for p, shape in zip(flat._params, flat._shapes, strict=True)}

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(self._shapes.get(id(tensor), tensor.shape))

    @contextmanager
    def gathered(self, tensors: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
        self._fsdp.fsdp_modules(
            self.tree.model, root_only=True
        )  # or a unit gathered before a forward takes itself for one
        units = {id(unit): unit for tensor in tensors if (unit := self._units.get(id(tensor))) is not None}
        with ExitStack() as stack:
            for unit in units.values():
                stack.enter_context(self._fsdp.summon_full_params(unit, recurse=False, writeback=write))
            yield

    def groups(self) -> list[Any]:
        return [self._fsdp.fsdp_modules(self.tree.model)[0].process_group]


def find(tree: Tree) -> FSDP1Storage | None:
    """The storage of a model with units of it."""
    return FSDP1Storage(tree) if any(hasattr(p, "_fsdp_flattened") for p in tree.parameters()) else None

"""DeepSpeed's ZeRO: parameters that are partitioned over the ranks (ZeRO-3), or trained as copies (ZeRO-1 and 2)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lora_plus.model.storage import Storage
from lora_plus.model.tree import NOT_REDUCED, WRAPPERS, Tree, Wrapper

from .sharded import ShardedStorage


def _replicas(engine: Any) -> Any:
    return None if engine.zero_optimization_partition_weights() else engine.data_parallel_group


WRAPPERS.append(Wrapper("deepspeed", "DeepSpeedEngine", "module", _replicas, NOT_REDUCED))


class ZeROStorage(Storage):
    """ZeRO-1 and 2: parameters are whole; their copies in full precision, which are trained, are not."""

    engine = "DeepSpeed"
    copied = True


class ZeRO3Storage(ShardedStorage):
    """ZeRO-3: parameters are empty, but for the length of their module's forward and backward.

    A model is so before an engine takes it over, if it was built under ``zero.Init``.
    """

    engine = "DeepSpeed ZeRO-3"
    flat = True

    def __init__(self, tree: Tree) -> None:
        super().__init__(tree)
        # an engine numbers modules, and trains copies in full precision
        self.fixed = self.copied = any("ds_id" in module.__dict__ for module in tree.everything())

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(getattr(tensor, "ds_shape", tensor.shape))

    @contextmanager
    def outlined(self) -> Iterator[None]:
        init = sys.modules["deepspeed"].zero.partition_parameters
        init.shutdown_init_context()  # inside of zero.Init every new tensor would be of its dtype
        try:
            with _empty_ones_kept(self.parameters) as empty:
                for parameter in empty:
                    parameter.data = parameter.data.new_empty(1).expand(self.shape(parameter))  # takes no memory
                yield
        finally:
            init.restore_init_context()

    @contextmanager
    def gathered(self, tensors: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
        # what a caller has gathered already must not be gathered again
        partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id") and (write or _is_empty(tensor))]
        gather = sys.modules["deepspeed"].zero.GatheredParameters(partitioned, modifier_rank=0 if write else None)
        with _empty_ones_kept(partitioned), gather:
            yield

    def groups(self) -> list[Any]:
        partitioned: Any = next(p for p in self.parameters if hasattr(p, "ds_id"))
        return [partitioned.ds_process_group]


@contextmanager
def _empty_ones_kept(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Those of the tensors that have no values on this rank; what they show is the same after the block."""
    empty = [(tensor, tensor.data) for tensor in tensors if _is_empty(tensor)]
    try:
        yield [tensor for tensor, _ in empty]
    finally:
        for tensor, shown in empty:
            tensor.data = shown


def _is_empty(tensor: Any) -> bool:
    return hasattr(tensor, "ds_status") and tensor.ds_status.name == "NOT_AVAILABLE"


def find(tree: Tree) -> Storage | None:
    """The storage of a model that an engine of DeepSpeed, or ``zero.Init``, has taken over."""
    parameters = tree.parameters()
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return ZeRO3Storage(tree)
    return ZeROStorage() if any(hasattr(parameter, "_hp_mapping") for parameter in parameters) else None

"""Tensors inside nested containers, such as the batches and arguments that a model is given."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, MutableMapping
from typing import Any

from torch import Tensor


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same, changed in every tensor: inside mappings, lists, tuples and dataclasses, which are made anew."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):
        twin = copy.copy(value)
        for name, item in value.items():
            twin[name] = map_tensors(item, change)
        return twin
    if isinstance(value, (list, tuple)):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        same = copy.copy(value)
        for own in dataclasses.fields(value):
            object.__setattr__(same, own.name, map_tensors(getattr(value, own.name), change))
        return same
    return value


def repeat_samples(batch: Any, copies: int) -> tuple[int, Any]:
    """The number of samples of a batch, and the batch with all of them repeated one after the other."""
    sizes = set()

    def repeat(tensor: Tensor) -> Tensor:
        if not tensor.ndim:
            return tensor
        sizes.add(len(tensor))
        return tensor.repeat(copies, *[1] * (tensor.ndim - 1))

    repeated = map_tensors(batch, repeat)
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(
            "expected a batch of tensors whose first dimension is the samples, got first dimensions of "
            f"{sorted(sizes) or 'no tensor'}; leave to the loss function what is common to all samples"
        )
    return sizes.pop(), repeated

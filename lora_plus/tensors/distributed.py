"""Tensors of which each rank holds a part (torch's DTensor): gathering them, and writing whole values into them."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is this rank's part of one that is distributed over a mesh."""
    return hasattr(tensor, "device_mesh")  # importing the class takes longer than importing this library


def whole(tensor: Tensor) -> Tensor:
    """The tensor, detached; a DTensor is gathered from its shards, for which every rank must call this."""
    return (tensor.full_tensor() if is_dtensor(tensor) else tensor).detach()  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def without_values(tensor: Tensor) -> Tensor:
    """A plain tensor with the shape, dtype and device of a DTensor, whose numbers do not count; others as they are."""
    if not is_dtensor(tensor):
        return tensor
    return torch.empty(1, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def distributed_like(values: Tensor, tensor: Tensor) -> Tensor:
    """Whole values on the device and in the dtype of a tensor; where that is a DTensor, distributed as it is.

    Every rank must call it, and gets its part of the first one's values.
    """
    values = values.detach().to(tensor.device, tensor.dtype)
    if not is_dtensor(tensor):
        return values
    from torch.distributed.tensor import distribute_tensor  # which takes long to import where nothing is sharded

    return distribute_tensor(values, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Write whole values into a tensor, which may be a DTensor."""
    tensor.copy_(distributed_like(values, tensor))

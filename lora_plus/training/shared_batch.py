"""A batch that several candidates of a sweep share: its samples once for each of them, and what they must not share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lora_plus.model.dry_run import map_tensors
from lora_plus.model.tree import Tree


def check_losses(losses: Any, samples: int) -> None:
    """Raise unless there is a loss for each sample."""
    if not isinstance(losses, Tensor) or losses.shape != (samples,):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"the loss function must return a loss for each of the {samples} samples, got {got}; "
            "use reduction='none' and a mean over all dimensions but the first"
        )


def check_statistics(model: nn.Module) -> None:
    """Raise if a sample's output depends on the other samples of its batch."""
    for name, module in Tree(model).modules:
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name!r} ({type(module).__name__}) takes the statistics of the whole batch, which several candidates "
                "share; call .eval() on it"
            )


def repeated_samples(batch: Any, copies: int) -> tuple[int, Any]:
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
            f"{sorted(sizes) or 'no tensor'}; move what all samples share into the loss function"
        )
    return sizes.pop(), repeated

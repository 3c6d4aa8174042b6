"""Adapters in half precision, in which the steps of an optimizer are rounded away."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_plus.errors import warn_user
from lora_plus.tensors.distributed import local
from lora_plus.text import some


def warn_of_half_precision(
    groups: Sequence[Mapping[str, Any]], names: Mapping[int, str], adapters: Iterable[int]
) -> None:
    """Warn of trainable adapters in float16 or bfloat16, and of how many of their entries a step cannot change.

    A step of Adam changes an entry by about the rate. Where that is less than half the distance to the next number of
    the dtype, the entry stays what it is. Other optimizers' steps are not estimated.

    Args:
        groups: the optimizer's.
        names: names of the model's parameters, by id.
        adapters: ids of the tensors that adapters have.
    """
    own = set(adapters)
    held = [
        (parameter, group)
        for group in groups
        for parameter in group["params"]
        if id(parameter) in own and parameter.requires_grad and parameter.dtype.itemsize == 2
    ]
    if not held:
        return
    moved = [(parameter, float(group["lr"])) for parameter, group in held if "betas" in group and not parameter.is_meta]
    entries = sum(local(parameter).numel() for parameter, _ in moved)
    lost = sum(int(lost_entries(local(parameter.detach()), lr)) for parameter, lr in moved)
    share = f" (a step of Adam changes {1 - lost / entries:.0%} of the entries)" if entries else ""
    dtypes = " and ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter, _ in held}))
    warn_user(
        f"{some([names.get(id(parameter), '?') for parameter, _ in held])} in {dtypes}: small steps round away{share}; "
        "cast the model before you inject: new adapters are float32"
    )


def lost_entries(tensor: Tensor, step: float) -> Tensor:
    """How many entries of a tensor a change of this size leaves as they are, rounded to nearest in its dtype."""
    exponent = torch.frexp(tensor.float()).exponent  # entries are in [2^(exponent - 1), 2^exponent)
    half_distance = torch.exp2((exponent - 2).float()) * torch.finfo(tensor.dtype).eps
    return ((tensor != 0) & (half_distance > step)).sum()

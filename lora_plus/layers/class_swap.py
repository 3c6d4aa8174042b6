"""Exchanging the class of a module object, beneath the classes that torch puts on top of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def swap_class(module: nn.Module, change: Callable[[Any], type[nn.Module]]) -> None:
    """Give the module the class that ``change`` makes of its own.

    A module under ``torch.nn.utils.parametrizations`` or ``fully_shard`` has a class of its own that derives from the
    module's. It stays on top, so that parametrizations can be added and removed before and after.
    """
    top = type(module)
    if not _is_on_top(module):
        _set_class(module, change(top))
        return
    *others, old = top.__bases__
    below = change(old)
    body = {name: value for name, value in top.__dict__.items() if name not in ("__dict__", "__weakref__")}
    name = top.__name__.removesuffix(old.__name__) + below.__name__
    _set_class(module, type(name, (*others, below), body))


def _is_on_top(module: nn.Module) -> bool:
    """Whether the module's class was put by torch on top of the module's own, its last base."""
    # importing it takes longer than importing this library
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    # asking for a submodule that is not there is slow
    parametrized = "parametrizations" in module._modules and parametrize.is_parametrized(module)
    return parametrized or sharded in type(module).__bases__


def _set_class(module: nn.Module, new: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", new)  # a module's own __setattr__ may know only its own attributes


def check_top_class(module: nn.Module) -> None:
    """Raise if the module's class is not one that this library gave it.

    Raises:
        ValueError: naming the class that another tool has put on top.
    """
    top: type[Any] = type(module)
    if _is_on_top(module):
        top = top.__bases__[-1]
    if "base_class" not in top.__dict__:
        raise ValueError(f"its class {top.__name__} was put on top of ours by another tool; undo that first")

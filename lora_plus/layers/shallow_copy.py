"""A shallow copy of a module, with structure of its own and the same parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from .merged import Merge

Module = TypeVar("Module", bound=nn.Module)


def shallow_copy(module: Module, own: Iterable[str]) -> Module:
    """What ``copy.copy`` gives, but that its tables, and those of these submodules and all in them, are its own.

    Torch's shares them, so that an adapter that is renamed or taken out of one would be half gone from the other.
    """
    copied = module.__class__.__new__(module.__class__)
    tables = {name: copy.copy(value) for name, value in module.__dict__.items() if isinstance(value, (dict, Merge))}
    copied.__dict__.update(module.__dict__ | tables)
    for name in own:
        child = module._modules[name]
        assert child is not None
        copied._modules[name] = shallow_copy(child, child._modules)
    return copied

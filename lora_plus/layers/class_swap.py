"""The class swap: a module object gets another class, which adds adapters, and later its own class back.

The object stays what it is, so that references, hooks, tied weights, base parameter names and ``isinstance`` stay as
they were. A class for a user's own class is made on the fly and let go with the last module of it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NoReturn, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.nn.utils import parametrize

from .fused_kernels import check_not_fused, warn_of_quantization
from .merge_state import Merge

Module = TypeVar("Module", bound=nn.Module)


class SwappedModule(nn.Module):
    """A module whose class was exchanged for one with adapters. Abstract; comes before the module's own class."""

    base_class: ClassVar[type[nn.Module]]
    """The class that the module has without adapters."""
    adapted_names: ClassVar[tuple[str, ...]] = ()
    """The parameters that have adapters on their own."""
    made_from: ClassVar[tuple[Any, ...] | None] = None
    """What `derived_class` made the class from; None for one that is written in a file."""

    @classmethod
    def class_body(cls, base_class: type[Any], names: tuple[str, ...]) -> dict[str, Any]:
        """The attributes of the class that is derived from this one and a user's, for these adapted parameters."""
        raise NotImplementedError

    def why_unrestorable(self) -> str | None:
        """Why the module cannot become what it was; None if it can."""
        top: type[Any] = type(self).__bases__[-1] if _is_on_top(self) else type(self)
        if "base_class" in top.__dict__:
            return None
        return f"another tool has changed its class to {top.__name__}; undo that first"

    def restore(self) -> nn.Module:
        """Become the plain module that it was, in place; the adapters are dropped."""
        self.take_out()
        swap_class(self, lambda swapped: swapped.base_class)
        return self

    def take_out(self) -> None:
        """Drop all that the plain module does not have."""
        raise NotImplementedError

    def drop_everywhere(self, adapter: str) -> None:
        """Drop one adapter, if it is here; become plain again with the last one."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":
            warn_of_quantization(self.base_class)
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks each module for; it reads no forward that takes any arguments."""
        raise ValueError(f"torch.jit.script cannot read a {type(self).__name__}; call merge_and_unload(model) first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        check_not_fused(self.base_class)
        with torch.no_grad():  # recurrent layers keep the weights that they compute with
            reduced: Any = super().__reduce_ex__(protocol)
        made_from = type(self).__dict__.get("made_from")
        # a class made on the fly has no name to be found by: pickle what it was made from
        return reduced if made_from is None else (_new, made_from, *reduced[2:])


_DERIVED: WeakValueDictionary[tuple[Any, ...], type[Any]] = WeakValueDictionary()
"""By what they were made from, the classes that were made on the fly, while something is of them."""


def derived_class(kind: type[SwappedModule], base_class: type[Any], names: tuple[str, ...] = ()) -> type[Any]:
    """The class of modules of a user's class that have become one of this kind; the same for the same arguments.

    ``names`` are the adapted parameters, where these have adapters on their own.
    """
    made_from = (kind, base_class, names)
    if (made := _DERIVED.get(made_from)) is not None:
        return made
    body = {"base_class": base_class, "made_from": made_from, "__module__": base_class.__module__}
    body |= kind.class_body(base_class, names)
    return _DERIVED.setdefault(made_from, type(f"LoRA{base_class.__name__}", (kind, base_class), body))


def _new(kind: type[SwappedModule], base_class: type[Any], names: tuple[str, ...]) -> Any:
    made: Any = derived_class(kind, base_class, names)
    return made.__new__(made)


def swap_class(module: nn.Module, change: Callable[[Any], type[nn.Module]]) -> None:
    """Give the module the class that ``change`` makes of its own.

    A module under ``torch.nn.utils.parametrizations`` or ``fully_shard`` has a class of its own that derives from the
    module's. It stays on top, so that parametrizations can be added and removed before and after.
    """
    top, new = type(module), None
    if _is_on_top(module):
        *others, old = top.__bases__
        below = change(old)
        body = {name: value for name, value in top.__dict__.items() if name not in ("__dict__", "__weakref__")}
        new = type(top.__name__.removesuffix(old.__name__) + below.__name__, (*others, below), body)
    # a module's own __setattr__ may know only its own attributes
    object.__setattr__(module, "__class__", new or change(top))


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


def _is_on_top(module: nn.Module) -> bool:
    """Whether the module's class was put by torch on top of the module's own, its last base."""
    # importing it takes longer than importing this library
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    # asking for a submodule that is not there is slow
    parametrized = "parametrizations" in module._modules and parametrize.is_parametrized(module)
    return parametrized or sharded in type(module).__bases__

"""A ``forward`` that another tool assigns to a LoRA layer object, or takes back, must not pass the adapters by."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor

from .class_swap import SwappedModule


class AssignedForward(SwappedModule):
    """A layer whose class computes the adapters in ``forward``, which an assigned one would replace.

    One that says by ``__wrapped__`` that it calls the layer's own forward comes before that, as on any module. Any
    other one is the base computation, to which the adapters are joined.
    """

    lora_base_forward: Callable[..., Tensor] | None
    """The assigned forward that is the base computation, such as that of a hook from before the injection."""

    def run_assigned_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the base by the assigned forward."""
        assert self.lora_base_forward is not None
        try:
            return self.lora_base_forward(*args, **kwargs)
        except RecursionError:
            raise ValueError(
                f"the forward assigned to this {self.base_class.__name__} calls the one that it replaced, in a "
                "loop; decorate it with functools.wraps(layer.forward), or assign it before injecting"
            ) from None

    def why_unrestorable(self) -> str | None:
        if self.lora_base_forward is not None and "forward" in self.__dict__:
            return (
                "a forward that was assigned to it after the injection calls one that was assigned before; remove the "
                "later one first"
            )
        return super().why_unrestorable()

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "forward":
            super().__setattr__(name, value)
            return
        own, base = (MethodType(function, self) for function in (type(self).forward, self.base_class.forward))
        self.__dict__.pop("forward", None)
        if value == base:  # as a tool does that takes back what it had put before the adapters came
            self.__dict__["lora_base_forward"] = None
        elif inspect.unwrap(value) not in (own, own.__func__):
            self.__dict__["lora_base_forward"] = value
        elif value != own:
            self.__dict__["forward"] = value

    def __delattr__(self, name: str) -> None:
        if name == "forward" and "forward" not in self.__dict__ and self.lora_base_forward is not None:
            self.__dict__["lora_base_forward"] = None
        else:
            super().__delattr__(name)

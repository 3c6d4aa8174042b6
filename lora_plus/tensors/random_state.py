"""Torch's random states: keeping them, and giving them back where a call fails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

Params = ParamSpec("Params")
Result = TypeVar("Result")


def random_state() -> Callable[[], None]:
    """A function that brings back torch's random states as they are now: the CPU's, and all of the accelerator's."""
    on_cpu, accelerator = torch.get_rng_state(), _accelerator()
    suffix = "_all" if hasattr(accelerator, "get_rng_state_all") else ""
    on_devices = None if accelerator is None else getattr(accelerator, "get_rng_state" + suffix)()

    def bring_back() -> None:
        torch.set_rng_state(on_cpu)
        if accelerator is not None:
            getattr(accelerator, "set_rng_state" + suffix)(on_devices)

    return bring_back


def _accelerator() -> Any:
    """Torch's module for the accelerator of this machine; None without one, or while it is not used."""
    kind = torch._C._get_accelerator().type
    module = None if kind == "cpu" else getattr(torch, kind)
    used = getattr(module, "is_initialized", lambda: module is not None)
    return module if used() else None


def draws(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorator of a function that may have a ``generator``: where it fails, nothing was drawn."""

    @functools.wraps(function)
    def drawing(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        generator: Any = kwargs.get("generator")
        own = generator.get_state() if isinstance(generator, torch.Generator) else None
        bring_back = random_state()
        try:
            return function(*args, **kwargs)
        except BaseException:
            bring_back()
            if own is not None:
                generator.set_state(own)
            raise

    return drawing

"""Taking parameters out of training, and giving them back the ``requires_grad`` that they had."""

from __future__ import annotations

from collections.abc import Container, Iterable

from torch import nn

_FLAGS = "_lora_requires_grad"
"""On a module: the ``requires_grad`` that its own parameters had before the first change."""


def set_requires_grad(modules: Iterable[nn.Module], wanted: bool, only: Container[int] | None = None) -> None:
    """Set ``requires_grad`` of the modules' own floating-point parameters, and note what it was.

    With ``only``, of those whose ids are in it.
    """
    others = []  # none is changed before all are noted: a shared parameter has several owners
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is None or not (only is None or id(parameter) in only):
                continue
            if parameter.requires_grad != wanted and parameter.is_floating_point():
                module.__dict__.setdefault(_FLAGS, {}).setdefault(name, not wanted)
                others.append(parameter)
    for parameter in others:
        parameter.requires_grad_(wanted)


def restore_requires_grad(modules: Iterable[nn.Module]) -> None:
    """Give the modules' own parameters the ``requires_grad`` that was noted for them."""
    for module in modules:
        for name, flag in module.__dict__.pop(_FLAGS, {}).items():
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(flag)

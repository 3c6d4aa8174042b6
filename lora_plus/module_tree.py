"""Walking over a model, past what holds the tensors of its adapters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .adapter_tensors import AdapterTensors, BaseParameters
from .arguments import check_model
from .names import join
from .wrappers import wrapped


def named_modules(model: nn.Module, *, every_name: bool = False) -> list[tuple[str, nn.Module]]:
    """``(name, module)`` for all modules but containers of ours, as ``model.named_modules()`` orders them.

    Wrappers that engines put around modules are passed by, and names are those of the model without them. Torch's chain
    of generators takes three times as long, which shows where there are thousands of layers.

    Args:
        model: the module to start from.
        every_name: whether a module that has several names is given under each of them.
    """
    check_model(model)
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if not every_name and id(module) in seen:
            return
        seen.add(id(module))
        inner = wrapped(module)
        if inner is not None:
            visit(name, inner)
            return
        found.append((name, module))
        for key, child in module._modules.items():
            if child is not None and not isinstance(child, (AdapterTensors, BaseParameters)):
                visit(f"{name}.{key}" if name else key, child)

    visit("", model)
    return found


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """``(name, parameter)`` for all parameters but those of adapters, each under all of its names."""
    return [
        (join(name, key), parameter)
        for name, module in named_modules(model, every_name=True)
        for key, parameter in own_parameters(module)
    ]


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """``(name, parameter)`` for a module's own parameters, with those of them that have adapters."""
    for holder in (module, *module._modules.values()):
        if holder is module or isinstance(holder, BaseParameters):
            for key, parameter in holder._parameters.items():
                if parameter is not None:
                    yield key, parameter


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module of this name."""
    return next(module for name, module in named_modules(model, every_name=True) if name == path)

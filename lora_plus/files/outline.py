"""How a model is built, as far as formats of other programs go by that."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lora_plus.model.tree import own_parameters
from lora_plus.text import join, parents

from .saved_adapter import SavedAdapter
from .target import ModelTarget, Target


@dataclass(frozen=True)
class Outline:
    """The parts of a model."""

    modules: Mapping[str, Sequence[str]]
    """Every module under its first name, in the order of the model, with its own parameters in their order."""
    names: Mapping[str, None]
    """All names of all modules, in the same order."""
    containers: Collection[str] = ()
    """Those of ``nn.ModuleList`` and the like."""
    uncalled: Collection[str] = ()
    """Those of modules that have no forward of their own."""
    transposed: Collection[str] = ()
    """Those of modules that say of themselves that they store experts as (stack, in, out)."""
    whole: bool = True
    """Whether these are all parts of the model; if not, they are those that an adapter names."""

    @functools.cached_property
    def parameters(self) -> dict[str, None]:
        """The full names of all parameters."""
        return {join(module, name): None for module, own in self.modules.items() for name in own}


def outline_of(target: Target, child: str = "") -> Outline | None:
    """How a model, or the module of this name in it, is built; None for what is no model."""
    if not isinstance(target, ModelTarget):
        return None
    start = f"{child}." if child else ""
    inside = [(name[len(start) :], module) for name, module in target.named if f"{name}.".startswith(start)]
    known = ModelTarget(inside) if child else target
    modules = {}
    for entry in known.found.values():
        own = dict(own_parameters(entry.module))
        modules[entry.name] = [name for name in entry.module._parameters if name in own]  # in the module's order
    named = known.modules.items()
    return Outline(
        modules,
        dict.fromkeys(known.modules),
        {name for name, module in named if isinstance(module, _CONTAINERS)},
        {name for name, module in named if type(module).forward is _NONE and "forward" not in vars(module)},
        {name for name, module in named if getattr(module, "is_transposed", False)},
    )


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_NONE = nn.Module.forward


def outline_named_by(adapter: SavedAdapter) -> Outline:
    """The parts of a model that an adapter names."""
    modules: dict[str, list[str]] = {}
    for name, layer in sorted(adapter.layers.items()):
        owner, _, parameter = layer.base.weight_name(name).rpartition(".")
        held = modules.setdefault(owner, [])
        held += [] if parameter in held else [parameter]
    trained = [name.rpartition(".")[0] if "" in tensors else name for name, tensors in adapter.trained.items()]
    for name in [*modules, *trained]:
        for outer in (name, *parents(name), ""):
            modules.setdefault(outer, [])
    inside = {name: modules[name] for name in sorted(modules)}
    return Outline(inside, dict.fromkeys(inside), whole=False)


def readers_in(target: Target) -> dict[str, list[str]]:
    """The modules that read their weights themselves, with the names of the places for adapters in each."""
    found: dict[str, list[str]] = {}
    for name, place in target.places.items() if isinstance(target, ModelTarget) else ():
        if place.of is not None:
            found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def ties_in(target: Target) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for path, module in target.named if isinstance(target, ModelTarget) else ():
        for name, parameter in own_parameters(module):
            names.setdefault(id(parameter), []).append(join(path, name))
    return [each for each in names.values() if len(each) > 1]

"""What files leave to what their adapter belongs to: a model, a checkpoint, or nothing but the file."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lora_plus.layers.base import BaseLayer
from lora_plus.layers.kinds import DTYPES
from lora_plus.model.places import NamedModule, Place, find_modules, find_parameters, find_places
from lora_plus.model.tree import named_modules, named_parameters, own_parameters, submodule
from lora_plus.text import join, parents

from .rename import Renaming
from .saved_adapter import SavedAdapter
from .tensor_file import equal_in_dtype


@dataclass(frozen=True)
class Outline:
    """How a model is built, as far as formats go by that."""

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


class Target:
    """What an adapter is read for, or written from; of this one nothing is known.

    Names are those of the model or checkpoint, unless something else is said.

    Args:
        rename: the user's map from the names in the file to those here.
    """

    rename = Renaming()

    def __init__(self, rename: Renaming | None = None) -> None:
        if rename is not None:
            self.rename = rename

    def names(self) -> Collection[str] | None:
        """The names of all modules; None if they are not known."""
        return None

    def outline(self, child: str = "") -> Outline | None:
        """How the model, or the module of this name in it, is built; None if that is not known."""
        return None

    def readers(self) -> Mapping[str, Sequence[str]]:
        """The modules that read their weights themselves, with the names of the places for adapters in each."""
        return {}

    def base(self, name: str) -> BaseLayer | None:
        """The base layer of this name; None if it cannot be adapted, or is not known."""
        return None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of the tensor that has this full name in the file; None if there is none."""
        return None

    def repeats(self, name: str, tensor: Tensor) -> bool | None:
        """Whether a tensor equals the one of this name in the file, in the dtype that it has here.

        None if that cannot be told.
        """
        return None

    def ties(self) -> list[list[str]]:
        """The names of each parameter that has several."""
        return []


class ModelTarget(Target):
    """A model.

    Args:
        model: the model, unwrapped.
        rename: as above.
    """

    def __init__(self, model: nn.Module, rename: Renaming | None = None) -> None:
        super().__init__(rename)
        self.model = model

    @functools.cached_property
    def found(self) -> dict[int, NamedModule]:
        """The modules."""
        return find_modules(named_modules(self.model, every_name=True))

    @functools.cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules by all their names."""
        return {name: entry.module for entry in self.found.values() for name in entry.names}

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        """The layers, and the parts of modules that read their weights themselves, by all their names."""
        return _by_name(find_places(self.found, {}))

    @functools.cached_property
    def parameters(self) -> dict[str, Place]:
        """Every parameter as a place of its own, by all its names."""
        return _by_name(find_parameters(self.found))

    def place(self, name: str) -> Place | None:
        """Where an adapter of this name can be."""
        return self.places.get(name) or (None if name in self.modules else self.parameters.get(name))

    def names(self) -> Collection[str]:
        return self.modules

    def readers(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, place in self.places.items():
            if place.of is not None:
                found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    def base(self, name: str) -> BaseLayer | None:
        place = self.place(name)
        return None if place is None or place.refusal() else place.base()

    def repeats(self, name: str, tensor: Tensor) -> bool | None:
        module, _, parameter = name.rpartition(".")
        new = self.rename(module)
        place = None if new is None else self.parameters.get(join(new, parameter))
        if place is None:
            return False
        own = place.stored()
        if type(own) not in (Tensor, nn.Parameter) or own.is_meta or own.dtype not in DTYPES:
            return None
        return equal_in_dtype(tensor, own.detach())

    def ties(self) -> list[list[str]]:
        names: dict[int, list[str]] = {}
        for name, parameter in named_parameters(self.model):
            names.setdefault(id(parameter), []).append(name)
        return [each for each in names.values() if len(each) > 1]

    def outline(self, child: str = "") -> Outline:
        return ModelTarget(submodule(self.model, child))._outline if child else self._outline

    @functools.cached_property
    def _outline(self) -> Outline:
        modules = {}
        for entry in self.found.values():
            own = dict(own_parameters(entry.module))
            modules[entry.name] = [name for name in entry.module._parameters if name in own]  # in the module's order
        named = self.modules.items()
        return Outline(
            modules,
            dict.fromkeys(self.modules),
            {name for name, module in named if isinstance(module, _CONTAINERS)},
            {name for name, module in named if type(module).forward is _NONE and "forward" not in vars(module)},
            {name for name, module in named if getattr(module, "is_transposed", False)},
        )


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_NONE = nn.Module.forward


def _by_name(places: Iterable[Place]) -> dict[str, Place]:
    return {name: place for place in places for name, _ in place.names}


class SavedTarget(Target):
    """The parts of a model that an adapter names.

    Args:
        adapter: the adapter, as plain data.
    """

    def __init__(self, adapter: SavedAdapter) -> None:
        self.adapter = adapter

    def names(self) -> Collection[str]:
        return self.outline().names

    def outline(self, child: str = "") -> Outline:
        modules: dict[str, list[str]] = {}
        for name, layer in sorted(self.adapter.layers.items()):
            owner, _, parameter = layer.base.weight_name(name).rpartition(".")
            held = modules.setdefault(owner, [])
            held += [] if parameter in held else [parameter]
        for name in [*modules, *self.adapter.trained]:
            for outer in (name, *parents(name), ""):
                modules.setdefault(outer, [])
        start = f"{child}." if child else ""
        inside = {name.removeprefix(start): modules[name] for name in sorted(modules) if name.startswith(start)}
        return Outline(inside, dict.fromkeys(inside), whole=False)

"""What files leave to what their adapter belongs to: a model, a checkpoint, or nothing but the file."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable

from torch import Tensor, nn

from lora_plus.layers.base_layer import BaseLayer
from lora_plus.layers.kinds import DTYPES
from lora_plus.model.places import PLACE_FINDERS, NamedModule, Place, find_modules, find_places
from lora_plus.model.train_also import Unit, find_units
from lora_plus.model.tree import Named
from lora_plus.text import join

from .rename import Renaming
from .tensor_file import equal_in_dtype


class Target:
    """The model or checkpoint that an adapter is read for, or written from. This base class knows nothing of it.

    Names are those of the model or checkpoint, unless a method says otherwise.
    """

    rename = Renaming()
    """The user's map from the names in the file to those here."""

    def names(self) -> Collection[str] | None:
        """The names of all modules; None if they are not known."""
        return None

    def base(self, name: str) -> BaseLayer | None:
        """The base layer of this name; None if it cannot be adapted, or is not known."""
        return None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of the tensor that has this full name in the file; None if there is none."""
        return None

    def tensor(self, name: str) -> Tensor | None:
        """The tensor that has this full name in the file, in memory of its own; None if there is none."""
        return None

    def repeats(self, name: str, tensor: Tensor) -> bool | None:
        """Whether a tensor equals the one of this name in the file, in the dtype that it has here.

        None if that cannot be told.
        """
        return None


class ModelTarget(Target):
    """A model, by its modules under each of their names, as a walk met them."""

    def __init__(self, named: Named, rename: Renaming = Target.rename) -> None:
        self.named, self.rename = named, rename
        self.bases: dict[str, BaseLayer | None] = {}
        """What was asked for, by name."""
        self._parameters: dict[str, dict[str, Place]] = {}

    @functools.cached_property
    def found(self) -> dict[int, NamedModule]:
        """The modules, without those that hold adapters."""
        return find_modules(self.named)

    @functools.cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules by all their names."""
        return {name: entry.module for entry in self.found.values() for name in entry.names}

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        """The layers, and the parts of modules that read their weights themselves, by all their names."""
        return _by_name(find_places(self.found, {}))

    def parameter(self, name: str) -> Place | None:
        """A parameter as a place of its own, by its full name."""
        owner = name.rpartition(".")[0]
        if owner not in self._parameters:
            entries = {0: self.found[id(self.modules[owner])]} if owner in self.modules else {}
            self._parameters[owner] = _by_name(PLACE_FINDERS[-1].parameters(entries))
        return self._parameters[owner].get(name)

    def place(self, name: str) -> Place | None:
        """Where an adapter of this name can be."""
        return self.places.get(name) or (None if name in self.modules else self.parameter(name))

    def names(self) -> Collection[str]:
        return self.modules

    @functools.cached_property
    def units(self) -> dict[str, Unit]:
        """What can be trained in full, modules and parameters, by all their names."""
        return {name: unit for unit in reversed(find_units(self.found)) for name in unit.names}

    def base(self, name: str) -> BaseLayer | None:
        if name not in self.bases:
            place = self.place(name)
            self.bases[name] = None if place is None or place.refusal() else place.base()
        return self.bases[name]

    def repeats(self, name: str, tensor: Tensor) -> bool | None:
        module, _, parameter = name.rpartition(".")
        new = self.rename(module)
        place = None if new is None else self.parameter(join(new, parameter))
        if place is None:
            return False
        own = place.stored()
        if type(own) not in (Tensor, nn.Parameter) or own.is_meta or own.dtype not in DTYPES:
            return None
        return equal_in_dtype(tensor, own.detach())


def _by_name(places: Iterable[Place]) -> dict[str, Place]:
    return {name: place for place in places for name in place.names}

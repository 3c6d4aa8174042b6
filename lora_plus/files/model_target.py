"""What a model answers to the readers and writers of file formats."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lora_plus.layers.base import BaseLayer
from lora_plus.layers.kinds import DTYPES
from lora_plus.layers.parameter import raw_parameters
from lora_plus.layers.quantized import store_of_weight
from lora_plus.model.places import Found, Place, find_modules, find_parameters, find_places
from lora_plus.surgery.bare_tree import BareModel
from lora_plus.text import join

from .peft.names import Outline
from .peft.renaming import Bases, in_file_names
from .rename import Renaming
from .unread_tensors import equal_in_dtype


class ModelTarget:
    """A model that an adapter is loaded into, as `formats.target.Target` has it.

    Args:
        model: the model, unwrapped.
        rename: the user's map from the names in the file to the model's.
    """

    def __init__(self, model: nn.Module, rename: Renaming) -> None:
        self.rename = rename
        self.found = find_modules(model)
        self.by_name: dict[str, Found] = {name: entry for entry in self.found.values() for name in entry.names}
        self.places = _by_name(find_places(self.found, {}))

    @functools.cached_property
    def parameters(self) -> dict[str, Place]:
        """Every parameter as a place of its own, by its names."""
        return _by_name(find_parameters(self.found))

    def names(self) -> Collection[str]:
        """The names of all modules."""
        return self.by_name

    def base(self, name: str) -> BaseLayer | None:
        """The base layer of this name; None if it cannot be adapted."""
        place = self.places.get(name)
        return None if place is None or place.refusal() else place.base()

    def repeats(self, name: str, tensor: Tensor) -> bool | None:
        """Whether a tensor equals the model's own parameter of this name in the file, in the parameter's dtype.

        None if the parameter's values are not at hand, because it is on the meta device, sharded or quantized.
        """
        module, _, parameter = name.rpartition(".")
        new = self.rename(module)
        place = None if new is None else self.parameters.get(join(new, parameter))
        if place is None:
            return False
        own = place.stored()
        if type(own) not in (Tensor, nn.Parameter) or own.is_meta or store_of_weight(own) or own.dtype not in DTYPES:
            return None
        return equal_in_dtype(tensor, own.detach())

    def peft(self, tensors: Mapping[str, Tensor], config: Any, problems: list[str]) -> tuple[Bases, Outline]:
        """Every module and place by name with its base layer, and the model's outline, in the names of the file."""
        bases: dict[str, BaseLayer | None] = dict.fromkeys(self.by_name)
        places = self.parameters | self.places
        bases |= {name: None if place.refusal() else place.base() for name, place in places.items()}
        own = outline(self.found)
        return in_file_names(tensors, bases, own, self.rename) if self.rename.given else (bases, own)


def _by_name(places: Iterable[Place]) -> dict[str, Place]:
    return {name: place for place in places for name, _ in place.names}


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def outline(found: Mapping[int, Found]) -> Outline:
    """What PEFT goes by when it names the parts of a model."""
    modules = {}
    for entry in found.values():
        raw = raw_parameters(entry.module)
        modules[entry.name] = [name for name in entry.module._parameters if name in raw]  # in the module's order
    named = [(name, entry.module) for entry in found.values() for name in entry.names]
    return Outline(
        modules,
        names=dict.fromkeys(name for name, _ in named),
        containers={name for name, module in named if isinstance(module, _CONTAINERS)},
        uncalled={name for name, module in named if _has_no_forward(module)},
        transposed={name for name, module in named if getattr(module, "is_transposed", False)},
        whole=not any(isinstance(module, BareModel) for _, module in named),
    )


def _has_no_forward(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward and "forward" not in vars(module)

"""Where adapters can be put in a model: on its layers, and where `PLACE_FINDERS` find another place."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_plus.layers.adapter import Adapter
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.layers.class_swap import SwappedModule
from lora_plus.layers.kinds import lora_class, why_unsupported
from lora_plus.layers.layer import LoRALayer
from lora_plus.layers.site import AdapterSite, Holders, RowBlock
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.tensors.distributed import whole, without_values
from lora_plus.tensors.init import Lookup, Start
from lora_plus.tensors.variant import VARIANTS, AdapterSpec

from .storage import Storage
from .tree import Named, sites_in

Rows = tuple[int, int]
"""The first row of a block, and the row after its last one, in the matrix view of a weight."""


class NamedModule(NamedTuple):
    """One module object of a model, or a parameter of its own, under all the names it has there."""

    module: nn.Module
    names: list[str]
    parameter: str = ""

    @property
    def name(self) -> str:
        """The first name, the one that ``named_modules`` gives."""
        return self.names[0]

    def named(self) -> list[tuple[str, nn.Module]]:
        """All its names, with the module that a type or a function is asked about."""
        return [(name, self.module) for name in self.names]


class Place(ABC):
    """A weight of a model, or some rows of one, that an adapter can be put on."""

    owner: nn.Module
    """The layer, or the module that has the parameter."""
    owner_name: str
    names: Sequence[str]
    """Its own name, once for each name of the owner."""
    aliases: Sequence[str] = ()
    """Further names for targets, which can be those of several places."""
    around: nn.Module
    """The module that patterns see under the aliases."""
    key: Any
    """The same for the same place, under whatever name it was found."""
    weight_key: Any
    """The same for all places on the same weight."""
    called: bool
    """Whether the owner is a layer that is called, and the weight its own."""
    rows: Rows | None = None
    """The rows of the weight's matrix view that it is; None for all."""
    of: str | None = None
    """The class of the module that it is a part of, where that module reads its weights itself."""
    linear: bool
    """Whether ``"all-linear"`` includes it."""
    ids: Sequence[int] = ()
    """The rows of the stored weight that it is, where it is such rows."""

    @property
    def name(self) -> str:
        """Its own name: what files and summaries call it."""
        return self.names[0]

    def named(self) -> list[tuple[str, nn.Module]]:
        """All names that patterns can match, with the modules that a type or a function is asked about."""
        return [(name, self.owner) for name in self.names] + [(name, self.around) for name in self.aliases]

    @abstractmethod
    def refusal(self) -> str | None:
        """Why no adapter can be put here, as a noun phrase; None if one can."""

    @abstractmethod
    def misfits(self, spec: AdapterSpec) -> str | None:
        """What such an adapter cannot do here; None if it can."""

    def overlapped(self) -> str | None:
        """What adapters are there already on other rows that overlap these; None if there are none."""
        weight = self.adapted()
        return next(map(described, [] if weight is None else weight.row_blocks()), None)

    @abstractmethod
    def adapted(self) -> AdaptedWeight | None:
        """What holds the adapters of its weight; None if there are none yet."""

    @abstractmethod
    def stored(self) -> Tensor:
        """The stored weight that the adapter is added to, without adapters."""

    @abstractmethod
    def matrix(self, *, values: bool = True) -> Tensor:
        """The matrix view of the weight, or of its rows; without values only shape, dtype and device count.

        With values it is whole: a weight that is sharded as a DTensor is gathered.
        """

    def part_of(self, matrix: Tensor) -> Tensor:
        """Its rows of a matrix that has the rows of its whole weight."""
        return matrix

    def lookup(self) -> Lookup | None:
        """How the weight is read by index; None if it is multiplied with."""
        return None

    def new_tensors(self, storage: Storage, spec: AdapterSpec, start: Start) -> dict[str, Tensor]:
        """The tensors of a new adapter, by the name of their container; nothing is changed."""
        if not start.needs_values(spec):
            return start.tensors(self.matrix(values=False), spec, self.lookup())
        with storage.gathered([self.stored()]):
            return start.tensors(self.matrix(), spec, self.lookup())

    @abstractmethod
    def check_adoptable(self) -> None:
        """Raise where `adopt` would fail, before anything is changed."""

    @abstractmethod
    def adopt(self) -> Any:
        """What holds adapters here: the layer, parameter or block, which becomes one if it is not."""

    @abstractmethod
    def base(self) -> BaseLayer:
        """What a file says of the weight."""


class LayerPlace(Place):
    """A layer that is called, which no kind need adapt."""

    called = True

    def __init__(self, layer: nn.Module, names: Sequence[str]) -> None:
        self.owner, self.names, self.owner_name = layer, names, names[0]
        self.key = self.weight_key = id(layer)

    @functools.cached_property
    def kind(self) -> Any:
        """The kind of the layer; None if there is none."""
        return lora_class(self.owner)

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.kind is not None and self.kind.linear_low_rank

    def refusal(self) -> str | None:
        return why_unsupported(self.owner, self.kind)

    def misfits(self, spec: AdapterSpec) -> str | None:
        if self.kind.stored_quantized and VARIANTS[spec.variant].rescales:
            return (
                f"variant {spec.variant!r} needs the weight's numbers in each step, and they are quantized; exclude it"
            )
        return None

    def adapted(self) -> AdaptedWeight | None:
        return self.owner if isinstance(self.owner, AdaptedWeight) else None

    def stored(self) -> Tensor:
        weight = self.owner.weight
        assert isinstance(weight, Tensor)
        return weight

    def matrix(self, *, values: bool = True) -> Tensor:
        matrix = self.kind.matrix_of(self.owner, values=values)
        return whole(matrix) if values else without_values(matrix)

    def lookup(self) -> Lookup | None:
        lookup: Lookup | None = self.kind.lookup(self.owner)
        return lookup

    def check_adoptable(self) -> None:
        if not isinstance(self.owner, LoRALayer):
            self.kind.class_for(type(self.owner))

    def adopt(self) -> LoRALayer:
        return self.owner if isinstance(self.owner, LoRALayer) else self.kind.adopt(self.owner)

    def base(self) -> BaseLayer:
        kind = self.kind
        # a user's own subclass is written as the torch layer that it is
        return BaseLayer(kind.kind_name(), kind.layout, kind.stored_shape(self.owner), kind.base_facts(self.owner))


# ---- finding places --------------------------------------------------------------------------------------------------

Layouts = Callable[[str, nn.Module], str | None]
"""The layout that a user states for a parameter of this name in this module, if any."""


Fused = Mapping[int, Mapping[str, Rows]]
"""By the identity of a linear layer, its blocks of rows by their names."""


Owners = Mapping[str, nn.Module]


class Finder:
    """Finds the places of a model that are no layers. This one knows of none."""

    def readers(self) -> list[str]:
        """The classes of modules that read their weights themselves, in which it finds places."""
        return []

    def instead(self, found: Mapping[int, NamedModule], fused: Fused) -> dict[int, list[Place]]:
        """By the identity of a module that is no place itself, its places."""
        return {}

    def parameters(self, found: Mapping[int, NamedModule], layouts: Layouts = lambda name, owner: None) -> list[Place]:
        """The parameters of these modules, each as a place of its own, whoever reads it."""
        return []

    def rows(self, named: Named, wanted: Any, *selected: Any) -> list[tuple[Any, AdapterSpec]]:
        """The places of ``train_rows``, which is ``wanted``, with their settings, beside what is ``selected``."""
        return []

    def adapted(self, site: AdapterSite, weight: AdaptedWeight, adapter: Adapter, owners: Owners, name: str) -> Place:
        """The place of an adapter on a site of a weight; the module of this name among ``owners`` has the weight."""
        return LayerPlace(weight, [name])

    def told(self, place: Place, base: BaseLayer, target: Any, layers: Collection[str]) -> Place:
        """The same place as a file tells of it, which has adapters on these layers of what it is loaded into."""
        return place


PLACE_FINDERS = [Finder()]
"""The last one is asked."""

TIES: dict[str, Callable[[Any, Named], list[tuple[Place, AdapterSpec]]]] = {"named": lambda found, named: found.places}
"""What ``tied`` of `inject_lora` says -> from what targets select in these modules, the places to adapt."""


def find_modules(named: Named) -> dict[int, NamedModule]:
    """The modules that a walk met, each once, by identity, with all names; what holds adapters is left out."""
    hidden = {id(child) for _, module in named if isinstance(module, Holders) for child in module.modules()}
    found: dict[int, NamedModule] = {}
    for name, module in named:
        if (known := found.get(id(module))) is not None:
            known.names.append(name)
        elif id(module) not in hidden:
            found[id(module)] = NamedModule(module, [name])
    return found


def find_places(found: Mapping[int, NamedModule], fused: Fused) -> list[Place]:
    """The places of these modules, in their order: layers, and what there is instead."""
    others = PLACE_FINDERS[-1].instead(found, fused)
    inside = {id(place.owner) for places in others.values() for place in places}
    places: list[Place] = []
    for key, each in found.items():
        if key in others:
            places += others[key]
        elif key not in inside:
            places.append(LayerPlace(each.module, each.names))
    return places


def adapted_places(named: Named, name: str | None = None) -> Iterator[tuple[Place, Adapter]]:
    """The adapters in modules that a walk met, all or those of a name, with their places."""
    modules = dict(named)
    for owner_name, weight, site in sites_in(named):
        for adapter in site.lora_adapters.values():
            if adapter.held and name in (None, adapter.name):
                yield PLACE_FINDERS[-1].adapted(site, weight, adapter, modules, owner_name), adapter


def overlaps(places: Iterable[Place]) -> list[str]:
    """What is wrong with adapting all of these: a layer and its own parameter, or rows that overlap or are adapted."""
    lines: list[str] = []
    weights: dict[Any, list[Place]] = {}
    places = list(places)
    layers = {id(place.owner): place for place in reversed(places) if place.called}
    for place in places:
        layer = layers.get(id(place.owner))
        if layer is not None and not place.called:
            lines.append(f"{place.name!r} and its layer {layer.name!r} are both to be adapted; choose one")
        if isinstance(place.owner, SwappedModule) and (reason := place.overlapped()) is not None:
            lines.append(f"{place.name!r} cannot be adapted: {reason}")
        others = weights.setdefault(place.weight_key, [])
        lines += [f"{place.name!r} and {it.name!r} overlap" for it in others if rows_overlap(place.rows, it.rows)]
        others.append(place)
    return lines


def described(block: RowBlock) -> str:
    """A block of rows that has adapters, for messages."""
    return f"rows {block.rows[0]} to {block.rows[1]} of its weight have adapters as {block.lora_label!r}"


def rows_overlap(one: Rows | None, other: Rows | None) -> bool:
    """Whether two blocks of rows of one weight, or all of its rows, have some in common."""
    return one is None or other is None or (one[0] < other[1] and other[0] < one[1])

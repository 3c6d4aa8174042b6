"""Where adapters can be put in a model: on its layers, on blocks of their rows, and on parameters that others read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_plus.layers.adapter import AdapterSite, RowBlock
from lora_plus.layers.base import PARAMETER, BaseLayer
from lora_plus.layers.kinds import DTYPES, lora_class, why_no_numbers, why_unsupported
from lora_plus.layers.layer import LoRALayer, needs_values
from lora_plus.layers.parameter import (
    HOLDERS,
    OWN_NAMES,
    LoRAOwner,
    LoRAParameter,
    adopt_parameter,
    owner_class,
    parameter_holders,
    raw_parameters,
)
from lora_plus.layers.weight import BLOCKS, AdaptedWeight
from lora_plus.tensors import matrix as functional
from lora_plus.tensors.distributed import whole, without_values
from lora_plus.tensors.init import Init
from lora_plus.tensors.new_adapter import new_tensors
from lora_plus.tensors.variant import VARIANTS, AdapterSpec, only_adds
from lora_plus.text import join

from .parts import PARTS, Part, parts_of
from .storage import shards_of
from .tree import named_modules, owner_path


@dataclass
class Found:
    """One module object of a model, under all the names it has there."""

    module: nn.Module
    names: list[str]

    @property
    def name(self) -> str:
        """The first name, the one that ``named_modules`` gives."""
        return self.names[0]


@dataclass
class Place:
    """A weight of a model, or some rows of one, that an adapter can be put on."""

    owner: nn.Module
    """The layer, or the module that has the parameter."""
    owner_name: str
    names: list[tuple[str, nn.Module]]
    """Its own name, once for each name of the owner, with the module that a type or a function is asked about."""
    aliases: list[tuple[str, nn.Module]] = field(default_factory=list)
    """Further names for targets, which can be those of several places."""
    parameter: str | None = None
    """The parameter that is adapted on its own, because no layer that computes with it is called."""
    label: str = ""
    """The name inside the owner; empty where the adapter is the owner's one."""
    rows: tuple[int, int] | None = None
    """The block of rows of the matrix view; None for all."""
    layout: str = "o i -> o i"
    """Of a parameter; a layer states its own."""
    of: str | None = None
    """The class of the module that it is a part of, where that module reads its weights itself."""
    linear_part: bool = False
    """Whether it is a linear map, where that does not follow from the kind of a layer."""
    refused: str | None = None
    """Why no adapter can be put here, if that was clear when it was found."""

    @property
    def name(self) -> str:
        """Its own name: what files and summaries call it."""
        return self.names[0][0]

    @property
    def key(self) -> tuple[int, str | None, tuple[int, int] | None]:
        """The same for the same place, under whatever name it was found."""
        return id(self.owner), self.parameter, self.rows

    @functools.cached_property
    def _kind(self) -> type[LoRALayer] | None:
        return lora_class(self.owner)

    @property
    def kind(self) -> type[LoRALayer]:
        """The kind of the layer."""
        assert self._kind is not None
        return self._kind

    @property
    def linear(self) -> bool:
        """Whether ``"all-linear"`` includes it."""
        if self.parameter is not None or self._kind is None:
            return self.linear_part
        return self._kind.linear_low_rank

    def refusal(self) -> str | None:
        """Why no adapter can be put here, as a noun phrase; None if one can."""
        if self.refused is not None:
            return self.refused
        if self.parameter is not None:
            return self._parameter_refusal(self.parameter, raw_parameters(self.owner).get(self.parameter))
        if parameter_holders(self.owner):
            return f"{type(self.owner).__name__} whose parameters {sorted(parameter_holders(self.owner))} have adapters"
        return why_unsupported(self.owner, self._kind)

    def _parameter_refusal(self, name: str, parameter: nn.Parameter | None) -> str | None:
        what = f"parameter {name!r}"
        if parameter is None:
            return f"{what} that is not held but computed; remove the parametrization first"
        if isinstance(self.owner, LoRALayer):
            return f"{what} of a layer that has adapters itself"
        if isinstance(self.owner, (nn.Sequential, nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule)):
            return f"{what} of a {type(self.owner).__name__}, which can take in no module that holds adapters"
        if not isinstance(self.owner, LoRAOwner) and (clash := OWN_NAMES & set(dir(self.owner))):
            return f"{what} of a {type(self.owner).__name__} that has attributes of ours already: {sorted(clash)}"
        there = parameter_holders(self.owner).get(name)
        if there is not None and there.layout != self.layout:
            return f"{what} that has adapters with the layout {there.layout!r}, not {self.layout!r}"
        if (stored := why_no_numbers(parameter)) is not None:
            return f"{what} that is {stored}"
        if isinstance(parameter, nn.UninitializedParameter):
            return f"{what} that is not initialised; run a forward pass first"
        if parameter.dtype not in DTYPES:
            return f"{what} of {parameter.dtype}, expected one of {DTYPES}"
        if parameter.ndim not in (2, 3) or not parameter.numel():
            return f"{what} of shape {tuple(parameter.shape)}, expected two or three dimensions, none of them 0"
        if parameter.ndim != len(self.layout.split(" -> ")[0].split()):
            return f"{what} of shape {tuple(parameter.shape)}, which is not {self.layout.split(' -> ')[0]!r}"
        if "parametrizations" in self.owner._modules and name.startswith("original"):
            return f"{what} of a parametrization"
        return None

    def misfits(self, spec: AdapterSpec) -> str | None:
        """What such an adapter cannot do here; None if it can."""
        if self.parameter is not None and spec.dropout:
            return f"dropout {spec.dropout} has no input to act on where only a weight is read; use 0, or exclude it"
        if self.parameter is None and self.kind.stored_quantized and VARIANTS[spec.variant].rescales:
            return (
                f"variant {spec.variant!r} needs the weight's numbers in each step, and they are quantized; exclude it"
            )
        if self.rows is not None and VARIANTS[spec.variant].rescales:
            return f"variant {spec.variant!r} rescales whole weights and cannot act on some rows of one; exclude it"
        if self.rows is not None and not only_adds(spec.variant):
            return f"variant {spec.variant!r} is no plain sum and cannot act on some rows of a weight; exclude it"
        return None

    def overlapped(self) -> str | None:
        """What adapters are there already on other rows that overlap these; None if there are none."""
        there = parameter_holders(self.owner).get(self.parameter) if self.parameter else self.owner
        if not isinstance(there, AdaptedWeight):
            return None
        for block in there.row_blocks():
            rows = (block.start, block.stop)
            same = self.rows == rows and self.label == block.lora_label
            if not same and (_overlap(self.rows, rows) or self.label == block.lora_label):
                return f"rows {block.start} to {block.stop} of its weight have adapters as {block.lora_label!r}"
        if self.rows is not None and there.lora_specs:
            return "its whole weight has adapters"
        return None

    def stored(self) -> Tensor:
        """The stored weight that the adapter is added to, without adapters."""
        weight = self.owner.weight if self.parameter is None else raw_parameters(self.owner)[self.parameter]
        assert isinstance(weight, Tensor)
        return weight

    def matrix(self, *, values: bool = True) -> Tensor:
        """The matrix view of the weight, or of its rows; without values only shape, dtype and device count.

        With values it is whole: a weight that is sharded as a DTensor is gathered.
        """
        if self.parameter is None:
            matrix = self.kind.matrix_of(self.owner, values=values)
        else:
            matrix = functional.to_matrix(self.stored().detach(), self.layout)
        matrix = whole(matrix) if values else without_values(matrix)
        return matrix if self.rows is None else matrix[self.rows[0] : self.rows[1]]

    def new_tensors(
        self, spec: AdapterSpec, *, init: str | Init, dtype: torch.dtype | None, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """The tensors of a new adapter, by the name of their container; nothing is changed."""
        values = needs_values(spec, init)
        hole = self.kind.no_update(self.owner) if self.parameter is None else None
        with shards_of(self.owner).gathered([self.stored()] if values else []):
            matrix = self.matrix(values=values)
            return new_tensors(matrix, spec, init=init, dtype=dtype, generator=generator, no_update=hole)

    def check_adoptable(self) -> None:
        """Raise where `adopt` would fail, before anything is changed."""
        if self.parameter is not None:
            owner_class(type(self.owner), tuple(dict.fromkeys((*parameter_holders(self.owner), self.parameter))))
        elif not isinstance(self.owner, LoRALayer):
            self.kind.class_for(type(self.owner))

    def adopt(self) -> AdapterSite:
        """What holds adapters here: the layer, parameter or block, which becomes one if it is not."""
        weight: AdaptedWeight
        if self.parameter is not None:
            whole = self.parameter if self.rows is not None else self.label
            weight = adopt_parameter(self.owner, self.parameter, self.layout, whole, self.of)
        else:
            weight = self.owner if isinstance(self.owner, LoRALayer) else self.kind.adopt(self.owner)
        if self.rows is None:
            return weight
        base = self.base()
        return weight.row_block(self.label, *self.rows, functional.matrix_shape(base.layout, base.shape)[0])

    def base(self) -> BaseLayer:
        """What a file says of the weight."""
        facts: dict[str, Any] = {}
        if self.parameter is not None or self.rows is not None:
            facts["parameter"] = join(self.owner_name, self.parameter or "weight")
        if self.rows is not None:
            facts["rows"] = list(self.rows)
        if self.of is not None:
            facts["of"] = self.of
        if self.parameter is not None:
            return BaseLayer(PARAMETER, self.layout, tuple(self.stored().shape), facts)
        kind = self.kind
        # a user's own subclass is written as the torch layer that it is
        return BaseLayer(
            kind.kind_name(), kind.layout, kind.stored_shape(self.owner), kind.base_facts(self.owner) | facts
        )


def overlaps(places: Iterable[Place]) -> list[str]:
    """What is wrong with adapting all of these: a layer and its own parameter, or rows that overlap."""
    lines: list[str] = []
    layers: dict[int, Place] = {}
    blocks: dict[tuple[int, str | None], list[Place]] = {}
    places = list(places)
    for place in places:
        if place.parameter is None:
            layers.setdefault(id(place.owner), place)
    for place in places:
        layer = layers.get(id(place.owner))
        if place.parameter is not None and layer is not None:
            lines.append(f"{place.name!r} and its layer {layer.name!r} are both to be adapted; choose one")
        before = blocks.setdefault((id(place.owner), place.parameter), [])
        lines += [f"{place.name!r} and {other.name!r} overlap" for other in before if _overlap(place.rows, other.rows)]
        before.append(place)
    return lines


def _overlap(one: tuple[int, int] | None, other: tuple[int, int] | None) -> bool:
    return one is None or other is None or (one[0] < other[1] and other[0] < one[1])


def find_modules(model: nn.Module) -> dict[int, Found]:
    """Every module of the model once, by identity, with all its names; what holds adapters is left out."""
    found: dict[int, Found] = {}
    hidden: set[int] = set()
    for name, module in named_modules(model, every_name=True):  # a module comes before what it holds
        if id(module) in hidden:
            continue
        found.setdefault(id(module), Found(module, [])).names.append(name)
        held = BLOCKS if isinstance(module, AdaptedWeight) else HOLDERS if isinstance(module, LoRAOwner) else None
        container = None if held is None else module._modules.get(held)
        if container is not None:
            hidden |= {id(child) for child in container.modules()}
    return found


def find_places(found: Mapping[int, Found], fused: Mapping[int, Mapping[str, tuple[int, int]]]) -> list[Place]:
    """The places of a model, in the order of its modules: parts, fused blocks, and whatever else is a module.

    Args:
        found: the modules, from `find_modules`.
        fused: by the identity of a linear layer, its blocks of rows by their names.
    """
    places = []
    inside: set[int] = set()
    for key, entry in found.items():
        parts = parts_of(entry.module)
        for part in parts:
            owner = entry.module._modules.get(part.child) if part.child else entry.module
            if owner is not None:
                inside.add(id(owner))
                places.append(_part_place(entry, part, owner))
        for label, rows in fused.get(key, {}).items():
            names = [(join(name, label), entry.module) for name in entry.names]
            whole = [(name, entry.module) for name in entry.names]
            places.append(Place(entry.module, entry.name, names, whole, label=label, rows=rows))
        if not parts and key not in fused and key not in inside:
            names = [(name, entry.module) for name in entry.names]
            places.append(Place(entry.module, entry.name, names))
    return places


def _part_place(entry: Found, part: Part, owner: nn.Module) -> Place:
    own = join(part.child, part.label)
    return Place(
        owner,
        join(entry.name, part.child),
        [(join(name, own), owner) for name in entry.names],
        [
            (join(name, inner), entry.module)
            for name in entry.names
            for inner in (*part.aliases, join(part.child, part.parameter), "")
        ],
        part.parameter,
        part.label,
        part.rows,
        part.layout,
        of=next(parent.__name__ for parent in type(entry.module).__mro__ if parent in PARTS),
        linear_part=part.linear,
        refused=part.refusal,
    )


def find_parameters(
    found: Mapping[int, Found], layouts: Callable[[str, nn.Module], str | None] = lambda name, owner: None
) -> list[Place]:
    """Every parameter of the model as a place of its own, whoever reads it.

    Args:
        found: the modules, from `find_modules`.
        layouts: the layout that a user states for a parameter of this name in this module, if any.
    """
    places = []
    for entry in found.values():
        there = parameter_holders(entry.module)
        for parameter, value in raw_parameters(entry.module).items():
            names = [(join(name, parameter), entry.module) for name in entry.names]
            layout = next((layout for each in names if (layout := layouts(*each)) is not None), None)
            if layout is None:
                layout = there[parameter].layout if parameter in there else _usual_layout(entry.module, value)
            places.append(Place(entry.module, entry.name, names, [], parameter, parameter, None, layout))
    return places


def adapted_places(model: nn.Module) -> Iterator[tuple[Place, AdapterSite]]:
    """The places of a model that have adapters, with what holds these."""
    seen: dict[str, nn.Module] = {}
    for path, module in named_modules(model):
        seen[path] = module
        if not isinstance(module, AdaptedWeight):
            continue
        owner_name, parameter, of = path, None, None
        if isinstance(module, LoRAParameter):
            owner_name, parameter, of = owner_path(path, module), path.rpartition(".")[2], module.of
        owner: nn.Module = module if parameter is None else seen[owner_name]
        for site in module.adapter_sites():
            if site.lora_specs:
                rows = (site.start, site.stop) if isinstance(site, RowBlock) else None
                names = [(join(owner_name, site.lora_label), owner)]
                yield Place(owner, owner_name, names, [], parameter, site.lora_label, rows, module.layout, of), site


def _usual_layout(owner: nn.Module, parameter: Tensor) -> str:
    # transformers marks experts that are stored as (stack, in, out)
    stack = "e i o -> e o i" if getattr(owner, "is_transposed", False) else "e o i -> e o i"
    return stack if parameter.ndim == 3 else "o i -> o i"

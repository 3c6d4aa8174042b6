"""Places that are no layers: parameters that somebody else reads, and blocks of rows of a weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lora_plus.layers.adapter import Adapter
from lora_plus.layers.base_layer import PARAMETER, BaseLayer
from lora_plus.layers.kinds import DTYPES, lora_class, why_no_numbers
from lora_plus.layers.layer import LoRALayer
from lora_plus.layers.parameter import LoRAParameter
from lora_plus.layers.parameter_owner import (
    OWN_NAMES,
    LoRAOwner,
    adopt_parameter,
    owner_class,
    parameter_holders,
    raw_parameters,
)
from lora_plus.layers.site import AdapterSite, RowBlock
from lora_plus.layers.token_rows import TokenRows
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.tensors.distributed import whole, without_values
from lora_plus.tensors.init import Lookup
from lora_plus.tensors.matrix import matrix_shape, to_matrix
from lora_plus.tensors.variant import AdapterSpec, needs_input, whole_only
from lora_plus.text import join

from .parts import PARTS, Part, reader_of
from .places import (
    PLACE_FINDERS,
    Finder,
    Fused,
    LayerPlace,
    Layouts,
    NamedModule,
    Owners,
    Place,
    Rows,
    described,
    rows_overlap,
)
from .selection import LAYOUTS
from .started import with_start
from .tied import told_to_follow, with_followers
from .token_rows import TokenRowsPlace, selected_rows, told_rows
from .tree import Named

# ---- places ----------------------------------------------------------------------------------------------------------


class ParameterPlace(Place):
    """A parameter that is adapted on its own, because no layer that computes with it is called."""

    called = False

    def __init__(
        self,
        owner: nn.Module,
        owner_name: str,
        names: Sequence[str],
        part: Part,
        aliases: Sequence[str] = (),
        around: nn.Module | None = None,
        of: str | None = None,
    ) -> None:
        self.owner, self.owner_name, self.names = owner, owner_name, names
        self.aliases, self.around = aliases, around or owner
        self.part, self.of, self.linear = part, of, part.linear
        self.key = self.weight_key = (id(owner), part.parameter)

    def refusal(self) -> str | None:
        if self.part.refusal is not None:
            return self.part.refusal
        owner, name, layout = self.owner, self.part.parameter, self.part.layout
        what, kind = f"parameter {name!r}", type(owner).__name__
        parameter = raw_parameters(owner).get(name)
        if parameter is None:
            return f"{what} that is not held but computed; remove the parametrization first"
        if isinstance(owner, LoRALayer):
            return f"{what} of a layer that has adapters itself"
        if isinstance(owner, (nn.Sequential, nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule)):
            return f"{what} of a {kind}, which can take in no module that holds adapters"
        if not isinstance(owner, LoRAOwner) and (taken := OWN_NAMES.intersection(dir(owner))):
            return f"{what} of a {kind} that has attributes of ours already: {sorted(taken)}"
        there = parameter_holders(owner).get(name)
        if there is not None and there.layout != layout:
            return f"{what} that has adapters with the layout {there.layout!r}, not {layout!r}"
        if (stored := why_no_numbers(parameter)) is not None:
            return f"{what} that is {stored}"
        if isinstance(parameter, nn.UninitializedParameter):
            return f"{what} that is not initialised; run a forward pass first"
        if parameter.dtype not in DTYPES:
            return f"{what} of {parameter.dtype}, expected one of {DTYPES}"
        if parameter.ndim not in (2, 3) or not parameter.numel():
            return f"{what} of shape {tuple(parameter.shape)}, expected two or three dimensions, none of them 0"
        if parameter.ndim != len(layout.split(" -> ")[0].split()):
            return f"{what} of shape {tuple(parameter.shape)}, which is not {layout.split(' -> ')[0]!r}"
        if "parametrizations" in owner._modules and name.startswith("original"):
            return f"{what} of a parametrization"
        return None

    def misfits(self, spec: AdapterSpec) -> str | None:
        why = needs_input(spec.dropout)
        return why and f"{why}; use 0, or exclude it"

    def adapted(self) -> AdaptedWeight | None:
        return parameter_holders(self.owner).get(self.part.parameter)

    def stored(self) -> Tensor:
        return raw_parameters(self.owner)[self.part.parameter]

    def matrix(self, *, values: bool = True) -> Tensor:
        matrix = to_matrix(self.stored().detach(), self.part.layout)
        return whole(matrix) if values else without_values(matrix)

    def check_adoptable(self) -> None:
        owner_class(type(self.owner), tuple(dict.fromkeys((*parameter_holders(self.owner), self.part.parameter))))

    def adopt(self) -> AdaptedWeight:
        return adopt_parameter(self.owner, self.part.parameter, self.part.layout, self.part.label, self.of)

    def base(self) -> BaseLayer:
        facts = {"parameter": join(self.owner_name, self.part.parameter)} | ({} if self.of is None else {"of": self.of})
        return BaseLayer(PARAMETER, self.part.layout, tuple(self.stored().shape), facts)

    def stored_as(self, layout: str) -> ParameterPlace:
        """The same place with the layout that a file states, which a user may have stated for a parameter."""
        part = replace(self.part, layout=layout)
        return ParameterPlace(self.owner, self.owner_name, self.names, part, self.aliases, self.around, self.of)


class RowsPlace(Place):
    """A block of rows of a weight: one of several projections that are computed together; named in its owner."""

    def __init__(
        self,
        whole: Place,
        rows: Rows,
        label: str,
        names: Sequence[str],
        aliases: Sequence[str] = (),
        around: nn.Module | None = None,
    ) -> None:
        self.whole, self.rows, self.label, self.names = whole, rows, label, names
        self.aliases, self.around = aliases, around or whole.owner
        self.owner, self.owner_name = whole.owner, whole.owner_name
        self.key, self.weight_key = (whole.key, rows), whole.key
        self.of, self.called, self.linear = whole.of, whole.called, whole.linear

    def refusal(self) -> str | None:
        return self.whole.refusal()

    def misfits(self, spec: AdapterSpec) -> str | None:
        why = whole_only(spec.variant)
        return self.whole.misfits(spec) or (f"{why}; exclude it" if why else None)

    def overlapped(self) -> str | None:
        weight = self.adapted()
        if weight is None:
            return None
        for block in weight.row_blocks():
            rows, same_label = block.rows, self.label == block.lora_label
            if not (same_label and self.rows == rows) and (same_label or rows_overlap(self.rows, rows)):
                return described(block)
        return "its whole weight has adapters" if weight.lora_adapters else None

    def adapted(self) -> AdaptedWeight | None:
        return self.whole.adapted()

    def stored(self) -> Tensor:
        return self.whole.stored()

    def matrix(self, *, values: bool = True) -> Tensor:
        return self.part_of(self.whole.matrix(values=values))

    def part_of(self, matrix: Tensor) -> Tensor:
        assert self.rows is not None
        return matrix[self.rows[0] : self.rows[1]]

    def lookup(self) -> Lookup | None:
        return self.whole.lookup()

    def check_adoptable(self) -> None:
        self.whole.check_adoptable()

    def adopt(self) -> RowBlock:
        assert self.rows is not None
        base = self.whole.base()
        total = matrix_shape(base.layout, base.shape)[0]
        weight: AdaptedWeight = self.whole.adopt()
        return weight.row_block(self.label, self.rows, total)

    def base(self) -> BaseLayer:
        base = self.whole.base()
        weight = base.weight_name(self.owner_name)
        return replace(base, facts=base.facts | {"parameter": weight, "rows": list(self.rows or ())})


class _Finder(Finder):
    """Finds the parts of modules that read their weights themselves, and blocks of rows of fused layers."""

    def readers(self) -> list[str]:
        return [module.__name__ for module in PARTS if isinstance(module, type)]

    def instead(self, found: Mapping[int, NamedModule], fused: Fused) -> dict[int, list[Place]]:
        kinds = {type(each.module) for each in found.values()}
        readers = {kind: reader_of(kind) for kind in kinds}
        places = {key: _blocks(found[key], rows) for key, rows in fused.items()}
        for key, each in found.items():
            if (reader := readers[type(each.module)]) is not None and (parts := _parts(each, *reader)):
                places.setdefault(key, []).extend(parts)
            elif isinstance(each.module, ParametrizationList):
                places[key] = [ParameterPlace(each.module, each.name, each.names, _COMPUTED)]
                places |= {id(child): [] for child in each.module if lora_class(child) is None}
        return places

    def parameters(self, found: Mapping[int, NamedModule], layouts: Layouts = lambda name, owner: None) -> list[Place]:
        places: list[Place] = []
        for each in found.values():
            there = parameter_holders(each.module)
            for parameter, value in raw_parameters(each.module).items():
                names = [join(name, parameter) for name in each.names]
                layout = next((layout for name in names if (layout := layouts(name, each.module)) is not None), None)
                if layout is None and parameter in there:
                    layout = there[parameter].layout
                elif (
                    layout is None and value.ndim == 3
                ):  # transformers marks experts that are stored as (stack, in, out)
                    layout = "e i o -> e o i" if getattr(each.module, "is_transposed", False) else "e o i -> e o i"
                part = Part(parameter, parameter, layout=layout or "o i -> o i")
                places.append(ParameterPlace(each.module, each.name, names, part))
        return places

    def rows(self, named: Named, wanted: Any, *selected: Any) -> list[tuple[Any, AdapterSpec]]:
        return selected_rows(named, wanted, *selected)

    def told(self, place: Place, base: BaseLayer, target: Any, layers: Collection[str]) -> Place:
        if base.kind == PARAMETER and isinstance(place, ParameterPlace) and base.layout in LAYOUTS:
            return place.stored_as(base.layout)
        if "ids" in base.facts:
            return told_rows(place, base, target, layers)
        return told_to_follow(place, base.facts.get("tied"), target, layers)

    def adapted(self, site: AdapterSite, weight: AdaptedWeight, adapter: Adapter, owners: Owners, name: str) -> Place:
        if isinstance(adapter, TokenRows):
            return TokenRowsPlace(owners[name], [name], adapter.ids, list(owners.items()), adapter=adapter.name)
        place: Place = with_followers(LayerPlace(owners[name], [name]), adapter, owners)
        if isinstance(weight, LoRAParameter):
            part = Part(weight.weight_name, weight.lora_label, layout=weight.layout)
            place = ParameterPlace(owners[name], name, [join(name, part.label)], part, of=weight.of)
        if isinstance(site, RowBlock):
            place = RowsPlace(place, site.rows, site.lora_label, [join(name, site.lora_label)])
        return with_start(place, adapter)


def _blocks(each: NamedModule, rows: Mapping[str, Rows]) -> list[Place]:
    """The places of a fused layer."""
    layer = LayerPlace(each.module, each.names)
    return [
        RowsPlace(layer, own, label, [join(name, label) for name in each.names], each.names)
        for label, own in rows.items()
    ]


_COMPUTED = Part(
    "",
    "",
    refusal="a parameter that a parametrization computes; call torch.nn.utils.parametrize.remove_parametrizations",
)
"""What stands for a parametrized parameter under the name of its parametrizations."""


def _parts(each: NamedModule, reader: str | None, parts: Callable[[nn.Module], list[Part]]) -> list[Place]:
    """The places of a module that reads its weights itself."""
    places: list[Place] = []
    for part in parts(each.module):
        owner = each.module._modules.get(part.child) if part.child else each.module
        if owner is None:
            continue
        names = [join(name, join(part.child, part.label)) for name in each.names]
        inner = (*part.aliases, join(part.child, part.parameter), "")
        aliases = [join(name, alias) for name in each.names for alias in inner]
        own = part if part.rows is None else replace(part, label=part.parameter)
        owner_name = join(each.name, part.child)
        place = ParameterPlace(owner, owner_name, names, own, aliases, each.module, reader)
        places.append(
            place if part.rows is None else RowsPlace(place, part.rows, part.label, names, aliases, each.module)
        )
    return places


PLACE_FINDERS.append(_Finder())

"""Rows of embeddings and heads that are trained (``train_rows``): which they are, and which layers share them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_plus.errors import shortened
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.layers.kinds import lora_class
from lora_plus.layers.layer import LoRALayer
from lora_plus.layers.token_rows import MirroredRows, TokenRows
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.tensors.init import Start
from lora_plus.tensors.matrix import accumulation_dtype
from lora_plus.tensors.token_rows import ROWS, VARIANT_OF
from lora_plus.tensors.variant import AdapterSpec

from .dry_run import left_as_it_was
from .patterns import shown
from .places import LayerPlace, NamedModule, Place
from .storage import Storage
from .tree import Named, own_parameters


class TokenRowsPlace(LayerPlace):
    """Rows of a layer's weight ``(n, dim)``, by their ids, also for the other layers that have this weight."""

    def __init__(
        self,
        layer: nn.Module,
        names: Sequence[str],
        ids: Sequence[int],
        named: Named,
        taken: Collection[str] = (),
        any_tie: bool = False,
        adapter: str | None = None,
    ) -> None:
        super().__init__(layer, names)
        self.ids, self.named_modules = tuple(ids), named
        self.adapter = adapter  # whose rows they are, where they are there already
        # the names of what else has adapters in a file; whether it leaves to the model which layers share the rows
        self.taken, self.any_tie = taken, any_tie

    @property
    def spec(self) -> AdapterSpec:
        """The settings of an adapter here, whose scale is 1."""
        k = len(self.ids)
        return AdapterSpec(r=k, alpha=k, variant=VARIANT_OF[self.kind.layout])

    @property
    def readers(self) -> list[tuple[str, nn.Module]]:
        """The layer and the other modules that have its weight, or its rows already, each once, by name."""
        weight = self.owner.own_weight() if isinstance(self.owner, AdaptedWeight) else self.stored()
        found = {id(self.owner): (self.name, self.owner)}
        for name, module in self.named_modules:
            if id(module) not in found and (self._mirrors(module) if self.adapter else _has(module, weight)):
                found[id(module)] = name, module
        return list(found.values())

    def _mirrors(self, module: nn.Module) -> bool:
        """Whether a module has the rows that are there; it can have been tied or untied since."""
        own = module.lora_adapters.get(str(self.adapter)) if isinstance(module, LoRALayer) else None
        return isinstance(own, MirroredRows) and own.source is self.owner

    def refusal(self) -> str | None:
        if (reason := _unfit(self.owner) or super().refusal()) is not None:
            return reason
        for name, module in self.readers[1:]:
            if (reason := _unfit(module)) is not None:
                return f"tied to {name!r}, {reason}"
            if name in self.taken:
                return f"tied to {name!r}, which has an adapter of its own in the file"
        return None

    def misfits(self, spec: AdapterSpec) -> str | None:
        n = len(self.stored())
        if not self.ids or not all(type(each) is int and 0 <= each < n for each in self.ids):
            return f"expected one id or more from 0 to {n - 1}, got {_few(self.ids)}"
        if len(set(self.ids)) < len(self.ids):
            return f"expected each id once, got {_few([each for each in self.ids if self.ids.count(each) > 1])}"
        for name, layer in self.readers:
            if (padding := getattr(layer, "padding_idx", None)) in self.ids:
                return f"id {padding} is the padding_idx of {name!r}, whose row is not trained; leave it out"
        return None if spec == self.spec else f"its {len(self.ids)} rows have the settings {self.spec}, got {spec}"

    def new_tensors(self, storage: Storage, spec: AdapterSpec, start: Start) -> dict[str, Tensor]:
        weight = self.stored().detach()
        if weight.is_meta:
            raise ValueError(
                f"the rows of {self.name!r} start from those of its weight, which has no values on the meta device; "
                "load it first"
            )
        return {ROWS: weight[list(self.ids)].to(start.dtype or accumulation_dtype(weight.dtype))}

    def check_adoptable(self) -> None:
        for name, module in self.readers:
            LayerPlace(module, [name]).check_adoptable()

    def adopt(self) -> Any:
        return _Readers([LayerPlace(module, [name]).adopt() for name, module in self.readers], self.ids)

    def base(self) -> BaseLayer:
        base, tied = super().base(), {name: _kind(module).kind_name() for name, module in self.readers[1:]}
        facts: dict[str, Any] = {"ids": list(self.ids)}
        facts |= {"tied": {}} if self.any_tie else {"tied": tied} if tied else {}
        return BaseLayer(base.kind, base.layout, base.shape, base.facts | facts)


class _Readers:
    """What takes in rows for a layer and the others that have its weight."""

    def __init__(self, layers: Sequence[LoRALayer], ids: Sequence[int]) -> None:
        self.layers, self.ids = layers, ids

    def add_adapter(self, name: str, spec: AdapterSpec, tensors: dict[str, Tensor], *, trainable: bool = True) -> None:
        first, *others = self.layers
        first.add_adapter(name, spec, tensors, trainable=trainable)
        gain = gain_of(first) or 1.0
        rows = TokenRows(name, spec, first._modules, first.roles, 1.0, self.ids, first, gain)
        first.lora_adapters[name] = rows
        for each in others:
            own = AdapterSpec(r=spec.r, alpha=spec.alpha, variant=VARIANT_OF[each.layout])
            gain = gain_of(each) or 1.0
            each.lora_adapters[name] = MirroredRows(name, own, {}, each.roles, 1.0, self.ids, each, gain, source=first)
            each.activate((name,))
            rows.followers.append(each)


def told_rows(place: Place, base: BaseLayer, target: Any, layers: Collection[str]) -> TokenRowsPlace:
    """The place of rows as a file tells of it, which has adapters on these layers of the target, a model."""
    ids = base.facts["ids"]
    stated = ids if isinstance(ids, list) and {*map(type, ids)} == {int} else ()  # a file can say anything
    any_tie = base.facts.get("tied") == {}
    return TokenRowsPlace(place.owner, place.names, stated, target.named, layers, any_tie)


def _has(module: nn.Module, weight: Tensor) -> bool:
    return any(own is weight for own in _weights(module))


def _weights(module: nn.Module) -> list[Tensor]:
    """The weight of a layer without its adapters; of any other module all its parameters."""
    if isinstance(module, AdaptedWeight):
        return [module.own_weight()]
    return [own for _, own in own_parameters(module)]


def _kind(module: nn.Module) -> Any:
    kind: Any = lora_class(module)
    return kind


def _unfit(module: nn.Module) -> str | None:
    """Why a module cannot have other rows in its weight, as a noun phrase; None if it can."""
    kind, what = _kind(module), type(module).__name__
    if kind is None or kind.layout not in VARIANT_OF or kind.stored_quantized:
        return f"{what}, where an nn.Embedding or nn.Linear that is not quantized was expected"
    return (
        None if gain_of(module) is not None else f"{what} with a forward of its own that does not just scale its rows"
    )


def gain_of(layer: nn.Module) -> float | None:
    """The factor by which a layer's forward multiplies what its class of torch computes; None if it does otherwise.

    That is 1 but for embeddings with a forward of their own, such as Gemma's, of which some rows are looked up.
    """
    kind = _kind(layer)
    adapted = layer if isinstance(layer, LoRALayer) else None
    if not (kind.class_for(type(layer)) if adapted is None else adapted).overrides():
        return 1.0
    (weight,) = _weights(layer)[:1]
    if kind.lookup(layer) is None or weight.is_meta:
        return None
    ids = torch.arange(min(64, len(weight)), device=weight.device)
    with torch.no_grad(), left_as_it_was(layer):
        layer.eval()
        try:
            found = type(layer).forward(layer, ids) if adapted is None else adapted.base_forward(ids)
        except Exception:
            return None
        rows = weight[ids]
        ratio = ((found.double() * rows.double()).sum() / rows.double().square().sum()).to(rows.dtype)
        step = torch.finfo(rows.dtype).eps * ratio
        return next((float(f) for f in (ratio, ratio + step, ratio - step) if torch.equal(rows * f, found)), None)


# ---- what a user selects ---------------------------------------------------------------------------------------------


def selected_rows(
    named: Named,
    wanted: Mapping[Any, Iterable[int]] | None,
    modules_of: Callable[[str, Any], list[NamedModule]],
    trained: Collection[int],
    problems: list[str],
) -> list[tuple[TokenRowsPlace, AdapterSpec]]:
    """The places of ``train_rows`` with their settings; what is wrong is added to the problems.

    ``modules_of`` gives the modules that a pattern of this setting matches; ``trained`` are those trained in full.
    """
    if not isinstance(wanted, Mapping | None):
        raise TypeError(f"train_rows must be a mapping from pattern to ids, got {_few(wanted)}")
    places: dict[int, TokenRowsPlace] = {}
    for pattern, ids in (wanted or {}).items():
        ids = ids.tolist() if hasattr(ids, "tolist") else ids  # of a tensor or of numpy's
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise TypeError(f"train_rows[{shown(pattern)}] must be a list of ids, got {_few(ids)}")
        given = [*ids]
        for each in modules_of("train_rows", pattern):
            place = TokenRowsPlace(each.module, each.names, given, named)
            problems += [f"train_rows: {place.name!r} {why}" for why in _entered(place, trained, places)]
    return [(place, place.spec) for place in {id(place): place for place in places.values()}.values()]


def _entered(place: TokenRowsPlace, trained: Collection[int], places: dict[int, TokenRowsPlace]) -> Iterator[str]:
    """Enter a place for each layer that has its weight, or yield why that cannot be."""
    if (reason := place.refusal()) is not None:
        yield f"is {reason}"
        return
    if (reason := place.misfits(place.spec if place.ids else AdapterSpec(r=1, alpha=1))) is not None:
        yield f"- {reason}"
        return
    # an embedding comes before a head that is tied to it, as in files of other programs
    first = next(((n, each) for n, each in place.readers if _kind(each).lookup(each) is not None), None)
    if first is not None and first[1] is not place.owner:
        place = TokenRowsPlace(first[1], [first[0]], place.ids, place.named_modules)
    for name, module in place.readers:
        other = places.get(id(module))
        if id(module) in trained:
            yield f"and train_also both train {name!r}; choose one"
        elif other is not None and other.ids != place.ids:
            yield f"and {other.name!r} share a weight, but not the ids; give both the same ids, or name one of them"
        else:
            places.setdefault(id(module), place)


def _few(ids: Any) -> str:
    return shortened(repr([*ids] if isinstance(ids, (tuple, range)) else ids), 60)

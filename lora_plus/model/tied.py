"""Tied weights: one A and B for all layers that read a weight, such as an embedding and the head that is tied to it.

One layer has the adapter; the others follow it. A layer that stores the weight's matrix the other way round computes
with the transposed factors: W of a head is ``(vocabulary, dim)``, an embedding's matrix view is ``(dim, vocabulary)``,
so the update ``B A`` of one is ``A.T B.T`` of the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor, nn

from lora_plus.errors import Problems
from lora_plus.layers.adapter import Adapter
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.layers.layer import LoRALayer
from lora_plus.layers.parameter_owner import parameter_holders
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.tensors.variant import AdapterSpec, only_adds
from lora_plus.text import join, some

from .places import TIES, LayerPlace, Place
from .selection import Selection
from .state import NEEDS, Need, State
from .token_rows import TokenRowsPlace
from .tree import Named, Tree, own_parameters

# ---- adapters --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class SharedAdapter(Adapter):
    """An adapter that other layers follow, which read the same weight."""

    followers: list[LoRALayer] = field(default_factory=list, repr=False)


def _of_the_other(name: str) -> Any:
    """An attribute that is the followed adapter's; what is set is left alone, for it is set there too."""
    return property(lambda self: getattr(self.other, name), lambda self, value: None)


@dataclass(eq=False)
class FollowingAdapter(Adapter):
    """What a layer computes with that follows another one's adapter: its tensors, its settings, its strength."""

    held = False
    source: LoRALayer = field(kw_only=True, repr=False)
    transposed: bool = field(kw_only=True)
    """Whether the layer's matrix view is the transpose of that of the source."""
    fixed: Adapter | None = field(default=None, repr=False)
    """The followed adapter with the strength 1; None for the one that the source has."""
    spec, modules, roles, strength = map(_of_the_other, ("spec", "modules", "roles", "strength"))

    @property
    def other(self) -> Adapter:
        """The adapter that it follows."""
        held = self.fixed or getattr(self.source, "lora_adapters", {}).get(self.name)
        if held is None:
            how = "a layer tied to this one has lost it, as a part of the model was changed alone"
            raise ValueError(f"adapter {self.name!r}: {how}; call remove_lora on the whole model")
        return held

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.other.factors()
        return (B.mT, A.mT) if self.transposed else (A, B)

    def unweighted(self) -> Adapter:
        return replace(self, fixed=self.other.unweighted())


def _left_behind(state: State) -> Iterator[str]:
    """The adapters of a part of a model that layers outside of it follow, which would be left without."""
    inside = {id(module) for module in state.everything()}
    for path, adapter, _ in state.adapters():
        for layer in getattr(adapter, "followers", ()):
            if id(layer) not in inside and has_adapter(layer, adapter.name):
                what = f"{repr(path) if path else 'it'} shares the adapter {adapter.name!r} with a {layer.kind_name()}"
                yield f"{what} layer outside of this part of the model; call it on the whole model"


NEEDS[Need.UNFOLLOWED] = "all layers that share an adapter", _left_behind


# ---- places ----------------------------------------------------------------------------------------------------------


class TiedPlace(LayerPlace):
    """A layer together with those that follow its adapters."""

    def __init__(
        self, place: Place, followers: Sequence[LayerPlace], fault: str | None = None, told: Sequence[str] = ()
    ) -> None:
        super().__init__(place.owner, place.names)
        self.followers, self.fault = followers, fault
        self.told = told or [follower.name for follower in followers]  # what a file calls them
        self.key = (id(self.owner), *sorted(id(follower.owner) for follower in self.followers))

    def refusal(self) -> str | None:
        return super().refusal() or self.fault or next(filter(None, map(self._unlike, self.followers)), None)

    def misfits(self, spec: AdapterSpec) -> str | None:
        if not only_adds(spec.variant) and any(map(self._transposed, self.followers)):
            return f"variant {spec.variant!r} acts on rows, which are columns for {self.followers[0].name!r}"
        return super().misfits(spec)

    def check_adoptable(self) -> None:
        super().check_adoptable()
        for follower in self.followers:
            follower.check_adoptable()

    def adopt(self) -> Any:
        return _Shared(super().adopt(), [(each, self._transposed(each)) for each in self.followers])

    def base(self) -> BaseLayer:
        base = super().base()
        told = {name: each.kind.kind_name() for name, each in zip(self.told, self.followers, strict=True)}
        return replace(base, facts=base.facts | {"tied": told}) if told else base

    def _transposed(self, follower: LayerPlace) -> bool:
        return is_transposed(self.kind.layout, follower.kind.layout)

    def _unlike(self, follower: LayerPlace) -> str | None:
        """Why another layer cannot follow, as a noun phrase; None if it can."""
        weight, reason = self.owner._parameters.get("weight"), follower.refusal()
        if weight is None or follower.owner._parameters.get("weight") is not weight:
            kind = type(self.owner).__name__
            return f"{kind} whose weight is not tied to that of {follower.name!r} in this model; tie them first"
        own, other = LayerPlace.base(self), follower.base() if reason is None else None
        if other is not None and own != other and (own.facts or other.facts or len(own.shape) != 2):
            reason = f"{other.kind}, which reads it in another way"
        return None if reason is None else f"tied to {follower.name!r}: {reason}"


def is_transposed(one: str, other: str) -> bool:
    """Whether the matrix views of a weight by these two layouts are the transposes of each other."""
    first, second = ([side.split() for side in layout.split(" -> ")] for layout in (one, other))
    return len(first[0]) == 2 and first[0].index(first[1][0]) != second[0].index(second[1][0])


class _Shared:
    """What takes in an adapter for a layer and those that follow it."""

    def __init__(self, layer: LoRALayer, followers: Sequence[tuple[LayerPlace, bool]]) -> None:
        self.layer, self.followers = layer, followers

    def add_adapter(self, name: str, spec: AdapterSpec, tensors: dict[str, Tensor], *, trainable: bool = True) -> None:
        self.layer.add_adapter(name, spec, tensors, trainable=trainable)
        own = self.layer.lora_adapters[name]
        shared = SharedAdapter(**{each.name: getattr(own, each.name) for each in fields(own)})
        self.layer.lora_adapters[name] = shared
        for place, transposed in self.followers:
            follower = place.adopt()
            follower.lora_adapters[name] = FollowingAdapter(
                name, spec, own.modules, own.roles, source=self.layer, transposed=transposed
            )
            follower.activate((name,))
            shared.followers.append(follower)


# ---- finding them ----------------------------------------------------------------------------------------------------


def has_adapter(module: nn.Module, name: str) -> bool:
    """Whether a module has an adapter of this name."""
    return isinstance(module, AdaptedWeight) and name in module.adapter_names()


def with_followers(place: Place, adapter: Adapter, modules: Mapping[str, nn.Module]) -> Place:
    """The place of an adapter that a model has, with those that follow it."""
    if not isinstance(adapter, SharedAdapter):
        return place
    names = {id(module): name for name, module in reversed([*modules.items()])}
    there = [layer for layer in adapter.followers if id(layer) in names and has_adapter(layer, adapter.name)]
    return TiedPlace(place, [LayerPlace(layer, [names[id(layer)]]) for layer in there])


def told_to_follow(place: Place, tied: Any, target: Any, layers: Collection[str]) -> Place:
    """A place with those that follow it, by the names that a file has for them.

    The ``target`` has the model's ``places`` by their names; ``layers`` are those of all that the file has adapters on.
    """
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied):
        return place
    places: Mapping[str, Place] = target.places
    found = [places.get(name) for name in tied]
    followers = [other for other in found if isinstance(other, LayerPlace)]
    own, kind, names = {id(places[name].owner) for name in layers if name in places}, place.owner, ", ".join(tied)
    fault = None
    if len(followers) < len(tied):
        fault = f"{type(kind).__name__} tied to {names} in the file, which the model does not have"
    elif any(id(follower.owner) in own for follower in followers):
        fault = f"{type(kind).__name__} tied to {names} in the file, and one of these has an adapter of its own there"
    return TiedPlace(place, followers, fault, list(tied))


def readers_of_weights(named: Named) -> dict[int, dict[str, nn.Module]]:
    """By the identity of a parameter, the modules that have it, by the first name that it has in each."""
    found: dict[int, dict[str, nn.Module]] = {}
    seen = set[int]()
    for path, module in named:
        for name, parameter in own_parameters(module) if id(module) not in seen else ():
            found.setdefault(id(parameter), {})[join(path, name)] = module
        seen.add(id(module))
    return found


class Ties:
    """Which weights of a model are tied, for what says so of its adapters."""

    def __init__(self, tree: Tree) -> None:
        self.readers = readers_of_weights(tree.names)
        self.names = {id(module): name for name, module in tree.modules}

    def notes(self, adapter: Adapter, weight: AdaptedWeight) -> Iterator[str]:
        """Which other layers have the adapter, or have the same weight without it or with one of their own."""
        if not adapter.held:
            return
        if isinstance(adapter, SharedAdapter):
            with_it = [name for layer in adapter.followers if (name := self.names.get(id(layer))) is not None]
            yield f"one A and B with {some(with_it)}, tied"
            return
        others: dict[bool, list[str]] = {False: [], True: []}
        for name, module in self.readers.get(id(weight.own_weight()), {}).items():
            own = weight in parameter_holders(module).values() or module in getattr(adapter, "followers", ())
            if module is not weight and not own:
                others[has_adapter(module, adapter.name)].append(name)
        if others[False]:
            yield f"not on {some(others[False])}, tied to it"
        if others[True]:
            yield f"merging unties it from {some(others[True])}; tied='both' would not"


def _both(selection: Selection, named: Named) -> list[tuple[Place, AdapterSpec]]:
    """The selected places with all that read the same weights; of those that are selected too the first one leads."""
    problems: list[str] = []
    readers = readers_of_weights(named)
    made: dict[int, tuple[Place, AdapterSpec]] = {}
    for place, spec in selection.places:
        weight = place.stored()
        if isinstance(place, TokenRowsPlace) or len(readers.get(id(weight), ())) < 2:
            made[id(place)] = place, spec
            continue
        if id(weight) in made:
            leader, other = made[id(weight)]
            if spec != other:
                problems.append(f"{place.name!r} and {leader.name!r} are tied and get one adapter, of one r and alpha")
            continue
        names = [name for name, module in readers[id(weight)].items() if module is not place.owner]
        layers = [name for name in names if name.rpartition(".")[2] == "weight"]
        followers = [LayerPlace(readers[id(weight)][name], [name.rpartition(".")[0]]) for name in layers]
        tied = TiedPlace(place, followers)
        problems += _unfit(selection, place, tied, spec, names)
        made[id(weight)] = tied, spec
    if not problems and not any(isinstance(place, TiedPlace) for place, _ in made.values()):
        problems.append("no selected weight is tied to another one, so tied='both' has no effect; leave it out")
    if problems:
        raise Problems("nothing was changed, because of", problems)
    return list(made.values())


def _unfit(
    selection: Selection, place: Place, tied: TiedPlace, spec: AdapterSpec, names: Sequence[str]
) -> Iterator[str]:
    """Why a place and the layers tied to it, whose weights have these names, cannot have one adapter."""
    if not isinstance(place, LayerPlace) or len(tied.followers) < len(names):
        yield f"{place.name!r} is tied to {', '.join(map(repr, names))}, and not all are layers; use tied='named'"
        return
    for why in filter(None, (tied.refusal() or tied.misfits(spec),)):
        yield f"{place.name!r}: {why}; use tied='named'"
    for follower in tied.followers:
        if selection.is_excluded(follower):
            yield f"{place.name!r} is tied to {follower.name!r}, which exclude takes out; use tied='named'"
        if selection.is_trained(follower):
            yield f"{place.name!r} is tied to {follower.name!r}, which train_also trains; use tied='named'"


TIES["both"] = _both

"""Which places of a model a user's targets select, and what is wrong with those that select nothing."""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lora_plus.errors import Problems, entry_of
from lora_plus.layers.adapter import check_adapter_name
from lora_plus.layers.kinds import KINDS, lora_class, weight_of
from lora_plus.tensors.matrix import matrix_shape
from lora_plus.tensors.variant import AdapterSpec
from lora_plus.text import join, near_misses, some

from .patterns import NameIndex, Pattern, as_patterns, matcher, shown
from .places import PLACE_FINDERS, NamedModule, Place, Rows, find_modules, find_places, overlaps
from .train_also import Unit, find_units
from .tree import Named

ALL_LINEAR = "all-linear"
_EXPRESSION = re.compile(r"[\\^$()|+]")

LAYOUTS = ("o i -> o i", "i o -> o i", "e o i -> e o i", "e i o -> e o i")
"""How a bare parameter can be stored: (out, in) or (in, out), alone or as a stack of experts."""


class Selection:
    """What targets select in a model; the arguments are those of `inject_lora`.

    Raises:
        TypeError, ValueError: for a setting out of range; one error for all patterns that select nothing, or nothing
            that can be adapted, or that disagree.
    """

    places: list[tuple[Place, AdapterSpec]]
    """The places to adapt, with their settings."""
    train_also: list[Unit]
    """What is to be trained in full."""

    def __init__(
        self,
        named: Named,
        spec: AdapterSpec,
        targets: Pattern | Sequence[Pattern],
        *,
        exclude: Pattern | Sequence[Pattern] = (),
        train_also: Pattern | Sequence[Pattern] = (),
        rank_pattern: Mapping[Any, int] | None = None,
        alpha_pattern: Mapping[Any, float] | None = None,
        fused: Mapping[Any, Sequence[str] | Mapping[str, int]] | None = None,
        layouts: Mapping[Any, str] | None = None,
        train_rows: Mapping[Any, Sequence[int]] | None = None,
    ) -> None:
        wanted = as_patterns(targets)
        if not wanted and not train_rows:
            raise ValueError('no target given; name layers, or pass "all-linear"')
        ranks = _by_pattern("rank_pattern", rank_pattern, lambda r: replace(spec, r=r))
        alphas = _by_pattern("alpha_pattern", alpha_pattern, lambda alpha: replace(spec, alpha=alpha))
        blocks = _by_pattern("fused", fused, _check_blocks)
        self._layouts = _by_pattern("layouts", layouts, lambda it: entry_of("layout", it, dict.fromkeys(LAYOUTS)))
        self._problems: list[str] = []
        self._found = find_modules(named)
        self._modules = NameIndex([*self._found.values()])
        self._places = NameIndex(find_places(self._found, self._fused(blocks) if blocks else {}))
        self.train_also = self._units(as_patterns(train_also))
        self.inside_trained = {id(it) for unit in self.train_also for it in unit.modules() or unit.tensors().values()}
        rows = PLACE_FINDERS[-1].rows(named, train_rows, self._modules_of, self.inside_trained, self._problems)
        self.inside_trained |= {id(layer) for place, _ in rows for _, layer in place.readers}
        self._excluded = {place.key for pattern in as_patterns(exclude) for place in self._matching("exclude", pattern)}
        chosen: set[Any] = set()
        for pattern in wanted:
            hits = self._all_linear() if pattern == ALL_LINEAR else self._target(pattern)
            chosen.update(place.key for place in hits)
        loose = self._parameters.things if "_parameters" in self.__dict__ else ()
        loose = [place for place in loose if place.key in chosen]
        places = [*(place for place in self._places.things if place.key in chosen), *loose]
        self._problems += overlaps(places)
        for place in places:
            if self.inside_trained and self.is_trained(place):
                what = "is both a target and trained by train_also or train_rows; add it to exclude"
                self._problems.append(f"{place.name!r} {what}")
            if (reason := place.misfits(spec)) is not None:
                self._problems.append(f"{place.name!r}: {reason}")
        complete = not self._problems  # where places are missing, more patterns match none
        index = NameIndex(places)
        r_of = self._by_place("rank_pattern", ranks, index, complete)
        alpha_of = self._by_place("alpha_pattern", alphas, index, complete)
        self._by_place("layouts", self._layouts, NameIndex(loose), complete)
        if self._problems:
            raise Problems("nothing was changed, because of", self._problems)
        spec_of = functools.cache(lambda r, alpha: replace(spec, r=r, alpha=alpha))  # one for all that have the same
        self.places = [
            (place, spec_of(r_of.get(place.key, spec.r), alpha_of.get(place.key, spec.alpha))) for place in places
        ] + rows

    @functools.cached_property
    def _parameters(self) -> NameIndex[Place]:
        """The parameters that are no places yet, found when a pattern first asks for them."""
        known = {place.weight_key for place in self._places.things}
        stated = [(matcher(pattern), layout) for pattern, layout in self._layouts.items()]

        def layout_of(name: str, owner: nn.Module) -> str | None:
            return next((layout for matches, layout in stated if matches(name, owner)), None)

        return NameIndex([p for p in PLACE_FINDERS[-1].parameters(self._found, layout_of) if p.weight_key not in known])

    # ---- what patterns match -----------------------------------------------------------------------------------

    def _matching(self, setting: str, pattern: Pattern) -> list[Place]:
        """Layers, parts and blocks; parameters where a name or an expression matches none of these."""
        hits = self._places.matching(pattern)
        if not hits and isinstance(pattern, (str, re.Pattern)) and pattern:
            hits = self._parameters.matching(pattern)
        if not hits and setting == "target":
            usable = [place for place in self._parameters.things if place.refusal() is None]
            self._nothing(setting, pattern, "module or parameter", NameIndex([*self._places.things, *usable]))
        elif not hits:
            self._nothing(setting, pattern, "module", self._places)
        return hits

    def _modules_of(self, setting: str, pattern: Pattern) -> list[NamedModule]:
        return self._modules.matching(pattern) or self._nothing(setting, pattern, "module", self._modules)

    def _target(self, pattern: Pattern) -> list[Place]:
        """The places for one target; a module's parts that cannot be adapted are a problem."""
        hits = self._matching("target", pattern)
        reasons = [(place, place.refusal()) for place in hits]
        supported = [place for place, reason in reasons if reason is None]
        kept = [place for place in supported if not self.is_excluded(place)] if self._excluded else supported
        if hits and not supported:
            named = [f"{place.name or 'the model itself'} ({reason})" for place, reason in reasons[:4]]
            more = f" and {len(hits) - 4} more" if len(hits) > 4 else ""
            inside = tuple(f"{place.name}." for place in hits if place.name)
            within = isinstance(pattern, str) and any(place.name.startswith(inside) for place in self._places.things)
            hint = f"name what is in it: {f'{pattern}.*'!r}" if within else _supported()
            self._problems.append(
                f"target {shown(pattern)} matches nothing that can be adapted: {', '.join(named)}{more}; {hint}"
            )
        elif hits and not kept:
            self._problems.append(f"target {shown(pattern)} matches only layers that exclude takes out")
        if len(hits) > len(supported) > 0:
            self._problems += [
                f"target {shown(pattern)} matches {place.name!r}, which cannot be adapted: {reason}; exclude it"
                for place, reason in reasons
                if reason is not None and place.of and not self.is_excluded(place)
            ]
        return kept

    def _all_linear(self) -> list[Place]:
        found = [module for module, *_ in self._found.values() if isinstance(module, nn.Embedding)]
        embeddings = {id(module.weight) for module in found}
        kept = []
        for place in self._places.things:
            if not place.linear or self.is_excluded(place) or (self.inside_trained and self.is_trained(place)):
                continue
            if embeddings and place.called and id(place.stored()) in embeddings:
                continue
            reason = place.refusal()
            if reason is None:
                kept.append(place)
            else:
                self._problems.append(f"{ALL_LINEAR!r}: {place.name!r} cannot be adapted: {reason}; exclude it")
        if not kept and not self._problems:
            self._problems.append(f"target {ALL_LINEAR!r} finds no linear layer to adapt in this model{self._hidden()}")
        return kept

    def is_excluded(self, place: Place) -> bool:
        # a layer goes with its own parameters and blocks
        return place.key in self._excluded or id(place.owner) in self._excluded

    def is_trained(self, place: Place) -> bool:
        """Whether its weight is trained in full."""
        return not self.inside_trained.isdisjoint((id(place.owner), id(place.stored())))

    def _units(self, patterns: Sequence[Pattern]) -> list[Unit]:
        """The modules that patterns match, or else the parameters; nothing that is inside of another one of these."""
        units, index = dict[tuple[int, str], Unit](), functools.cache(lambda: NameIndex(find_units(self._found)))
        for pattern in patterns:
            hits: list[Any] = self._modules.matching(pattern) or index().matching(pattern)
            hits = hits or self._nothing("train_also", pattern, "module or parameter", index())
            units |= {(id(hit.module), hit.parameter): Unit(*hit) for hit in hits}
        inside = Counter(id(child) for unit in units.values() for child in unit.modules())
        return [unit for unit in units.values() if inside[id(unit.module)] == (not unit.parameter)]

    # ---- settings by pattern -----------------------------------------------------------------------------------

    def _fused(self, patterns: Mapping[Any, Any]) -> dict[int, dict[str, Rows]]:
        """The blocks of rows of each layer that the user says is fused."""
        blocks: dict[int, dict[str, Rows]] = {}
        for pattern, sizes in patterns.items():
            for each in self._modules_of("fused", pattern):
                rows = _rows(each.module, sizes)
                if isinstance(rows, str):
                    self._problems.append(f"fused {shown(pattern)}: {each.name!r} {rows}")
                elif id(each.module) in blocks:
                    self._problems.append(f"fused: {shown(pattern)} and another key both match {each.name!r}")
                else:
                    blocks[id(each.module)] = rows
        return blocks

    def _by_place(
        self, setting: str, values: Mapping[Any, Any], places: NameIndex[Place], complete: bool
    ) -> dict[Any, Any]:
        """By the key of a place its value. A place that two patterns match is a problem, and a pattern without any."""
        pattern_of: dict[Any, Any] = {}
        for pattern in values:
            hits = places.matching(pattern)
            if not hits and complete:
                self._nothing(setting, pattern, "adapted layer", places)
            for place in hits:
                other = pattern_of.setdefault(place.key, pattern)
                if other is not pattern:
                    self._problems.append(f"{setting}: {shown(other)} and {shown(pattern)} both match {place.name!r}")
        return {key: values[pattern] for key, pattern in pattern_of.items()}

    # ---- problems ----------------------------------------------------------------------------------------------

    def _nothing(self, setting: str, pattern: Pattern, what: str, named: NameIndex[Any]) -> list[Any]:
        """No hits, which is a problem."""
        names = named.names()
        words = [ALL_LINEAR] if setting == "target" and "." not in shown(pattern) else []
        hint = near_misses(pattern, names + words)
        if isinstance(pattern, str) and _EXPRESSION.search(pattern):
            hint = "; for a regular expression pass re.compile(...)"
        elif not hint:
            last = sorted({tail for name in names if (tail := name.rpartition(".")[2]) and not tail.isdigit()})
            hint = f"; there is {some(last, 5)}" if last else ""
        self._problems.append(f"{setting} {shown(pattern)} matches no {what}{hint}{self._hidden()}")
        return []

    def _hidden(self) -> str:
        """A hint where modules are kept in plain lists, which hide them from the model."""
        for it in self._found.values():
            for name, value in it.module.__dict__.items():
                items = value.values() if isinstance(value, dict) else value
                plain = isinstance(value, (list, tuple, dict)) and not name.startswith("_")
                if plain and any(isinstance(item, nn.Module) and id(item) not in self._found for item in items):
                    held, kind = join(it.name, name), type(value).__name__
                    return f"; {held!r} holds modules in a plain {kind}, make it an nn.ModuleList or nn.ModuleDict"
        return ""


def _by_pattern(setting: str, values: Any, check: Callable[[Any], object]) -> dict[Any, Any]:
    """A setting by pattern; each value is checked."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f"{setting} must be a mapping from pattern to value, got {values!r}")
    for pattern, value in values.items():
        try:
            check(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{setting}[{pattern!r}]: {error}") from None
    return dict(values)


def _check_blocks(blocks: Any) -> None:
    if isinstance(blocks, str) or not isinstance(blocks, (Sequence, Mapping)):
        raise TypeError(f"expected a list of names, or a mapping from names to numbers of rows, got {blocks!r}")
    names = list(blocks)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected one name or more, each once, got {names}")
    for name in names:
        check_adapter_name(name, "a block")
    if isinstance(blocks, Mapping) and not all(
        isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in blocks.values()
    ):
        raise ValueError(f"numbers of rows must be positive integers, got {blocks!r}")


def _rows(module: nn.Module, sizes: Sequence[str] | Mapping[str, int]) -> dict[str, Rows] | str:
    """The rows of each block by its name, or what is wrong."""
    kind = lora_class(module)
    if kind is None or not isinstance(weight_of(module), Tensor):
        return f"is a {type(module).__name__}, expected a layer that can be adapted"
    total = matrix_shape(kind.layout, kind.stored_shape(module))[0]
    if not isinstance(sizes, Mapping):
        if total % len(sizes):
            return f"has {total} rows, which are not {len(sizes)} equal blocks; state the rows of each"
        sizes = dict.fromkeys(sizes, total // len(sizes))
    if sum(sizes.values()) != total:
        return f"has {total} rows, but the blocks {dict(sizes)} have {sum(sizes.values())}"
    ends = list(itertools.accumulate(sizes.values()))
    return {label: (end - size, end) for (label, size), end in zip(sizes.items(), ends, strict=True)}


def _supported() -> str:
    layers = sorted(base.__name__ for base in KINDS if base is not nn.Module)
    readers = ", ".join(PLACE_FINDERS[-1].readers())
    return (
        f"supported are {', '.join(layers)}, GPT-2's Conv1D, the weights of {readers}, and parameters of two or three "
        "dimensions"
    )

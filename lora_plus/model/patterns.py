"""Which places of a model a list of patterns selects, and what is wrong with the patterns that select nothing."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_plus.layers.kinds import KINDS, lora_class
from lora_plus.tensors import matrix as functional
from lora_plus.text import join, near_misses

from .parts import PARTS
from .places import Found, Place, find_modules, find_parameters, find_places, overlaps
from .settings import LoRAConfig, Pattern, as_patterns

ALL_LINEAR = "all-linear"


@dataclass
class Selection:
    """What `select` found: the places to adapt with their rank and alpha, and the modules to train in full."""

    places: list[tuple[Place, int, float]]
    train_also: list[Found]


def matcher(pattern: Pattern) -> Callable[[str, nn.Module], bool]:
    """The pattern as a function of a full name and the module that it belongs to."""
    if isinstance(pattern, str):
        tail = f".{pattern}"
        if not _is_glob(pattern):
            return lambda name, module: name == pattern or name.endswith(tail)
        # a glob may start at any dot, as a plain name may
        glob = re.compile(rf"(?:.*\.)?(?:{fnmatch.translate(pattern)})", re.DOTALL)
        return lambda name, module: name == pattern or name.endswith(tail) or glob.match(name) is not None
    if isinstance(pattern, re.Pattern):
        return lambda name, module: pattern.fullmatch(name) is not None
    if isinstance(pattern, type):
        return lambda name, module: isinstance(module, pattern)
    if callable(pattern) and not isinstance(pattern, nn.Module):
        return pattern
    got = f"a {type(pattern).__name__}; give its name" if isinstance(pattern, nn.Module) else repr(pattern)
    raise TypeError(
        f"a pattern must be a name, a glob, a compiled regular expression, a module type or a function, got {got}"
    )


def select(model: nn.Module, config: LoRAConfig) -> Selection:
    """The places that the config's patterns select in this model.

    Raises:
        ValueError: one error for all patterns that select nothing, or nothing that can be adapted, or that disagree.
    """
    return _Selector(model, config).select()


class _Selector:
    def __init__(self, model: nn.Module, config: LoRAConfig) -> None:
        self.config = config
        self.problems: list[str] = []
        self.found = find_modules(model)
        self.places = find_places(self.found, self._fused())
        self._parameters: list[Place] | None = None

    def select(self) -> Selection:
        config = self.config
        trained = self._trained()
        inside_trained = {id(module) for entry in trained for module in entry.module.modules()}
        excluded = self._excluded()
        chosen: dict[Any, Place] = {}
        for pattern in as_patterns(config.targets):
            if pattern == ALL_LINEAR:
                chosen |= self._all_linear(excluded, inside_trained)
            else:
                chosen |= self._target(pattern, excluded)
        for place in chosen.values():
            if id(place.owner) in inside_trained:
                self.problems.append(
                    f"{place.name!r} is both a target and trained in full by train_also; add it to exclude"
                )
        self.problems += overlaps(chosen.values())
        self.problems += [
            f"{place.name!r} cannot be adapted: {reason}"
            for place in chosen.values()
            if (reason := place.overlapped()) is not None
        ]
        order = [place for place in (*self.places, *(self._parameters or [])) if chosen.get(place.key) is place]
        ranks = self._per_place("rank_pattern", config.rank_pattern or {}, config.r, order)
        alphas = self._per_place("alpha_pattern", config.alpha_pattern or {}, config.alpha, order)
        self._check_used(
            "layouts", config.layouts or {}, [place for place in order if place.parameter and not place.of]
        )
        spec = config.spec()
        self.problems += [f"{place.name!r}: {line}" for place in order if (line := place.misfits(spec)) is not None]
        if self.problems:
            raise ValueError("nothing was changed, because of\n" + "\n".join(f"  {line}" for line in self.problems))
        return Selection(list(zip(order, ranks, alphas, strict=True)), trained)

    @property
    def parameters(self) -> list[Place]:
        """All parameters as places, found when a pattern first asks for them."""
        if self._parameters is None:
            known = {(place.owner, place.parameter) for place in self.places}
            stated = [(matcher(pattern), layout) for pattern, layout in (self.config.layouts or {}).items()]

            def layout_of(name: str, owner: nn.Module) -> str | None:
                return next((layout for matches, layout in stated if matches(name, owner)), None)

            places = find_parameters(self.found, layout_of)
            self._parameters = [place for place in places if (place.owner, place.parameter) not in known]
        return self._parameters

    def _trained(self) -> list[Found]:
        trained: dict[int, Found] = {}
        for pattern in as_patterns(self.config.train_also):
            trained |= {id(entry.module): entry for entry in self._modules("train_also", pattern)}
        return list(trained.values())

    def _modules(self, setting: str, pattern: Pattern) -> list[Found]:
        """The modules that a pattern matches; none is a problem."""
        matches = matcher(pattern)
        hits = [e for e in self.found.values() if any(matches(name, e.module) for name in e.names)]
        if not hits:
            self._nothing(setting, pattern, "module", [name for e in self.found.values() for name in e.names])
        return hits

    def _excluded(self) -> set[Any]:
        excluded: set[Any] = set()
        for pattern in as_patterns(self.config.exclude):
            hits = self._matching(pattern)
            if not hits:
                self._nothing("exclude", pattern, "module", _all_names(self.places))
            excluded |= {place.key for place in hits}
        return excluded

    def _matching(self, pattern: Pattern) -> list[Place]:
        """Layers, parts and blocks; parameters where a name or an expression matches none of these."""
        hits = _hits(pattern, self.places)
        if hits or not isinstance(pattern, (str, re.Pattern)) or not pattern:
            return hits
        return _hits(pattern, self.parameters)

    def _target(self, pattern: Pattern, excluded: set[Any]) -> dict[Any, Place]:
        hits = self._matching(pattern)
        reasons = {place.key: place.refusal() for place in hits}
        supported = [place for place in hits if reasons[place.key] is None]
        kept = {place.key: place for place in supported if not self._is_excluded(place, excluded)}
        self.problems += [
            f"target {_show(pattern)} matches {place.name!r}, which cannot be adapted: {reasons[place.key]}; exclude it"
            for place in hits
            if supported and place.of and reasons[place.key] is not None and not self._is_excluded(place, excluded)
        ]
        if not hits:
            usable = [*self.places, *(place for place in self.parameters if place.refusal() is None)]
            self._nothing("target", pattern, "module or parameter", _all_names(usable))
        elif not supported:
            shown = [f"{place.name or 'the model itself'} ({reasons[place.key]})" for place in hits[:4]]
            more = f" and {len(hits) - 4} more" if len(hits) > 4 else ""
            self.problems.append(
                f"target {_show(pattern)} matches nothing that can be adapted: {', '.join(shown)}{more}; {_supported()}"
            )
        elif not kept:
            self.problems.append(f"target {_show(pattern)} matches only layers that exclude takes out")
        return kept

    @staticmethod
    def _is_excluded(place: Place, excluded: set[Any]) -> bool:
        return place.key in excluded or (id(place.owner), None, None) in excluded

    def _all_linear(self, excluded: set[Any], inside_trained: set[int]) -> dict[Any, Place]:
        embeddings = {id(e.module.weight) for e in self.found.values() if isinstance(e.module, nn.Embedding)}
        kept: dict[Any, Place] = {}
        for place in self.places:
            if not place.linear or self._is_excluded(place, excluded) or id(place.owner) in inside_trained:
                continue
            if place.parameter is None and id(place.owner.weight) in embeddings:
                continue
            reason = place.refusal()
            if reason is None:
                kept[place.key] = place
            else:
                self.problems.append(f"{ALL_LINEAR!r}: {place.name!r} cannot be adapted: {reason}; exclude it")
        if not kept and not self.problems:
            self.problems.append(f"target {ALL_LINEAR!r} finds no linear layer to adapt in this model{self._listed()}")
        return kept

    def _fused(self) -> dict[int, dict[str, tuple[int, int]]]:
        """The blocks of rows of each layer that the user says is fused."""
        blocks: dict[int, dict[str, tuple[int, int]]] = {}
        for pattern, sizes in (self.config.fused or {}).items():
            for entry in self._modules("fused", pattern):
                rows = _rows(entry.module, sizes)
                if isinstance(rows, str):
                    self.problems.append(f"fused {_show(pattern)}: {entry.name!r} {rows}")
                elif id(entry.module) in blocks:
                    self.problems.append(f"fused: {_show(pattern)} and another key both match {entry.name!r}")
                else:
                    blocks[id(entry.module)] = rows
        return blocks

    def _per_place(self, setting: str, patterns: Mapping[Any, Any], default: Any, places: list[Place]) -> list[Any]:
        """The value for each place; a place that two keys match, or a key that matches no place, is a problem."""
        self._check_used(setting, patterns, places)
        values: dict[Any, tuple[Any, Any]] = {}
        for pattern, value in patterns.items():
            for place in _hits(pattern, places):
                other, _ = values.setdefault(place.key, (pattern, value))
                if other is not pattern:
                    self.problems.append(f"{setting}: {_show(other)} and {_show(pattern)} both match {place.name!r}")
        return [values.get(place.key, (None, default))[1] for place in places]

    def _check_used(self, setting: str, patterns: Iterable[Any], places: list[Place]) -> None:
        for pattern in patterns:
            if not self.problems and not _hits(pattern, places):
                self._nothing(setting, pattern, "adapted layer", _all_names(places))

    def _nothing(self, setting: str, pattern: Pattern, what: str, names: Iterable[str]) -> None:
        self.problems.append(
            f"{setting} {_show(pattern)} matches no {what}{near_misses(pattern, names)}{self._listed()}"
        )

    def _listed(self) -> str:
        """A hint where modules are kept in plain lists, which hide them from the model."""
        for entry in self.found.values():
            for name, value in entry.module.__dict__.items():
                items = value.values() if isinstance(value, dict) else value
                plain = isinstance(value, (list, tuple, dict)) and not name.startswith("_")
                if plain and any(isinstance(item, nn.Module) and id(item) not in self.found for item in items):
                    held, kind = join(entry.name, name), type(value).__name__
                    return f"; {held!r} holds modules in a plain {kind}, make it an nn.ModuleList or nn.ModuleDict"
        return ""


def _hits(pattern: Pattern, places: Iterable[Place]) -> list[Place]:
    matches = matcher(pattern)
    return [place for place in places if any(matches(*each) for each in place.names + place.aliases)]


def _all_names(places: Iterable[Place]) -> list[str]:
    return [name for place in places for name, _ in place.names + place.aliases]


def _is_glob(pattern: str) -> bool:
    return bool(set(pattern) & set("*?["))


def _rows(module: nn.Module, sizes: Sequence[str] | Mapping[str, int]) -> dict[str, tuple[int, int]] | str:
    """The rows of each block by its name, or what is wrong."""
    kind = lora_class(module)
    if kind is None or not isinstance(getattr(module, "weight", None), Tensor):
        return f"is a {type(module).__name__}, expected a layer that can be adapted"
    total = functional.matrix_shape(kind.layout, kind.stored_shape(module))[0]
    if not isinstance(sizes, Mapping):
        if total % len(sizes):
            return f"has {total} rows, which are not {len(sizes)} equal blocks; state the rows of each"
        sizes = dict.fromkeys(sizes, total // len(sizes))
    if sum(sizes.values()) != total:
        return f"has {total} rows, but the blocks {dict(sizes)} have {sum(sizes.values())}"
    ends = list(itertools.accumulate(sizes.values()))
    return {label: (end - size, end) for (label, size), end in zip(sizes.items(), ends, strict=True)}


def _show(pattern: Pattern) -> str:
    if isinstance(pattern, type):
        return pattern.__name__
    return f"re.compile({pattern.pattern!r})" if isinstance(pattern, re.Pattern) else repr(pattern)


def _supported() -> str:
    layers = ", ".join(sorted(base.__name__ for base in KINDS if base is not nn.Module))
    parts = ", ".join(module.__name__ for module in PARTS)
    return f"supported are {layers}, GPT-2's Conv1D, the weights of {parts}, and parameters of two or three dimensions"

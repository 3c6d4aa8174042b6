"""Which modules of a model a list of patterns selects, and what is wrong with the patterns that select nothing."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .config import LoRAConfig, Pattern, as_patterns
from .layers import KINDS, LoRALinear, LoRATransposedLinear, lora_class, why_unsupported
from .lora_layer import LoRALayer

ALL_LINEAR = "all-linear"


@dataclass
class Found:
    """One module object of a model, under all the names it has there."""

    module: nn.Module
    names: list[str]
    parents: list[nn.Module] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The first name, the one that ``named_modules`` gives."""
        return self.names[0]


@dataclass
class Selection:
    """What `select` found: the layers to adapt with their rank and alpha, and the modules to train in full."""

    layers: list[tuple[Found, int, float]]
    train_also: list[Found]


def find_modules(model: nn.Module) -> dict[int, Found]:
    """Every module of the model once, by identity, with all its names and parents; adapters' containers left out."""
    found: dict[int, Found] = {}
    hidden = {id(child) for layer in model.modules() if isinstance(layer, LoRALayer) for child in layer.children()}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) not in hidden:
            found.setdefault(id(module), Found(module, [])).names.append(name)
    for entry in list(found.values()):
        if isinstance(entry.module, tuple(_READS_WEIGHTS)):
            for child in entry.module.children():
                found[id(child)].parents.append(entry.module)
    return found


_READS_WEIGHTS: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "inside an nn.MultiheadAttention, which reads its weight and never calls it",
}
"""Modules that use a child's weight without calling the child, so that an adapter on the child would be inert."""


def refusal(entry: Found) -> str | None:
    """What keeps the module from being adapted, as a noun phrase; None if it can be."""
    for parent in entry.parents:
        return next(reason for owner, reason in _READS_WEIGHTS.items() if isinstance(parent, owner))
    return why_unsupported(entry.module)


def matcher(pattern: Pattern) -> Callable[[str, nn.Module], bool]:
    """The pattern as a function of a module's full name and the module."""
    if isinstance(pattern, str):
        tail = f".{pattern}"
        if not set(pattern) & set("*?["):
            return lambda name, module: name == pattern or name.endswith(tail)
        # a glob may start at any dot, as a plain name may
        glob = re.compile(rf"(?:.*\.)?(?:{fnmatch.translate(pattern)})", re.DOTALL)
        return lambda name, module: name == pattern or name.endswith(tail) or glob.match(name) is not None
    if isinstance(pattern, re.Pattern):
        return lambda name, module: pattern.fullmatch(name) is not None
    if isinstance(pattern, type):
        return lambda name, module: isinstance(module, pattern)
    if callable(pattern):
        return pattern
    raise TypeError(
        f"a pattern must be a name, a glob, a compiled regular expression, a module type or a function, got {pattern!r}"
    )


def select(model: nn.Module, config: LoRAConfig) -> Selection:
    """The layers that the config's patterns select in this model.

    Raises:
        ValueError: one error for all patterns that select nothing, or nothing that can be adapted, or that disagree.
    """
    return _Selector(model, config).select()


class _Selector:
    def __init__(self, model: nn.Module, config: LoRAConfig) -> None:
        self.config = config
        self.found = find_modules(model)
        self.problems: list[str] = []

    def select(self) -> Selection:
        config = self.config
        excluded = self._union("exclude", config.exclude)
        trained = self._union("train_also", config.train_also)
        inside_trained = {id(module) for key in trained for module in self.found[key].module.modules()}
        chosen: dict[int, Found] = {}
        for pattern in as_patterns(config.targets):
            if pattern == ALL_LINEAR:
                chosen |= self._all_linear(excluded, inside_trained)
            else:
                chosen |= self._target(pattern, excluded)
        for key in inside_trained & chosen.keys():
            name = self.found[key].name
            self.problems.append(f"{name!r} is both a target and trained in full by train_also; add it to exclude")
        order = [entry for key, entry in self.found.items() if key in chosen]
        ranks = self._per_layer("rank_pattern", config.rank_pattern or {}, config.r, order)
        alphas = self._per_layer("alpha_pattern", config.alpha_pattern or {}, config.alpha, order)
        if self.problems:
            raise ValueError("nothing was changed, because of\n" + "\n".join(f"  {line}" for line in self.problems))
        return Selection(list(zip(order, ranks, alphas, strict=True)), [self.found[key] for key in trained])

    def _matching(self, pattern: Pattern, among: Iterable[Found]) -> Iterator[Found]:
        matches = matcher(pattern)
        return (entry for entry in among if any(matches(name, entry.module) for name in entry.names))

    def _union(self, setting: str, patterns: Any) -> dict[int, Found]:
        union: dict[int, Found] = {}
        for pattern in patterns:
            hits = {id(entry.module): entry for entry in self._matching(pattern, self.found.values())}
            if not hits:
                self._nothing(setting, pattern)
            union |= hits
        return union

    def _target(self, pattern: Pattern, excluded: dict[int, Found]) -> dict[int, Found]:
        hits = list(self._matching(pattern, self.found.values()))
        reasons = {id(entry.module): refusal(entry) for entry in hits}
        supported = [entry for entry in hits if reasons[id(entry.module)] is None]
        kept = {id(entry.module): entry for entry in supported if id(entry.module) not in excluded}
        if not hits:
            self._nothing("target", pattern)
        elif not supported:
            shown = [f"{entry.name or 'the model itself'} ({reasons[id(entry.module)]})" for entry in hits[:4]]
            more = f" and {len(hits) - 4} more" if len(hits) > 4 else ""
            self.problems.append(
                f"target {_show(pattern)} matches nothing that can be adapted: {', '.join(shown)}{more}; {_supported()}"
            )
        elif not kept:
            self.problems.append(f"target {_show(pattern)} matches only layers that exclude takes out")
        return kept

    def _all_linear(self, excluded: dict[int, Found], inside_trained: set[int]) -> dict[int, Found]:
        embeddings = {id(e.module.weight) for e in self.found.values() if isinstance(e.module, nn.Embedding)}
        linear = (LoRALinear, LoRATransposedLinear)
        kept: dict[int, Found] = {}
        for key, entry in self.found.items():
            kind = lora_class(entry.module)
            if kind is None or not issubclass(kind, linear) or entry.parents:
                continue
            if key in excluded or key in inside_trained or id(entry.module.weight) in embeddings:
                continue
            reason = refusal(entry)
            if reason is None:
                kept[key] = entry
            else:
                self.problems.append(f"{ALL_LINEAR!r}: {entry.name!r} cannot be adapted: {reason}; exclude it")
        if not kept and not self.problems:
            self.problems.append(f"target {ALL_LINEAR!r} finds no linear layer to adapt in this model")
        return kept

    def _per_layer(self, setting: str, patterns: Any, default: Any, layers: list[Found]) -> list[Any]:
        """The value for each layer; a layer that two keys match, or a key that matches no layer, is a problem."""
        values: dict[int, tuple[Any, Any]] = {}
        for pattern, value in patterns.items():
            hits = list(self._matching(pattern, layers))
            if not hits and not self.problems:
                self._nothing(setting, pattern, layers)
            for entry in hits:
                other, _ = values.setdefault(id(entry.module), (pattern, value))
                if other is not pattern:
                    self.problems.append(f"{setting}: {_show(other)} and {_show(pattern)} both match {entry.name!r}")
        return [values.get(id(entry.module), (None, default))[1] for entry in layers]

    def _nothing(self, setting: str, pattern: Pattern, among: Iterable[Found] | None = None) -> None:
        what = "module" if among is None else "adapted layer"
        names = [name for entry in (among or self.found.values()) for name in entry.names]
        self.problems.append(f"{setting} {_show(pattern)} matches no {what}{near_misses(pattern, names)}")


def near_misses(wanted: Any, names: Iterable[str]) -> str:
    """`` (did you mean 'a' or 'b'?)`` with the names closest to a mistyped one, or nothing."""
    if not isinstance(wanted, str):
        return ""
    tails = {name if "." in wanted else name.rpartition(".")[2] for name in names} - {""}
    close = difflib.get_close_matches(wanted, sorted(tails), n=3)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _show(pattern: Pattern) -> str:
    if isinstance(pattern, type):
        return pattern.__name__
    return f"re.compile({pattern.pattern!r})" if isinstance(pattern, re.Pattern) else repr(pattern)


def _supported() -> str:
    return f"supported are {', '.join(base.__name__ for base in KINDS)} and GPT-2's Conv1D"

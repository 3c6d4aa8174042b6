"""Patterns: what a user writes to say which modules are meant, and which names match."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

from lora_plus.text import endings

Pattern = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]
"""Selects modules: a name, a glob, a compiled regular expression, a type, or a function of name and module."""

_GLOB = re.compile(r"[*?\[]")


def as_patterns(patterns: Any) -> tuple[Any, ...]:
    """One pattern or several, as a tuple."""
    several = isinstance(patterns, Iterable) and not isinstance(patterns, (str, type, Mapping, nn.Module))
    return tuple(patterns) if several else (patterns,)


def matcher(pattern: Pattern) -> Callable[[str, nn.Module], bool]:
    """The pattern as a function of a full name and the module that it belongs to."""
    if isinstance(pattern, str):
        tail = f".{pattern}"
        if not _GLOB.search(pattern):
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


def shown(pattern: Pattern) -> str:
    """A pattern in a message."""
    if isinstance(pattern, type):
        return pattern.__name__
    return f"re.compile({pattern.pattern!r})" if isinstance(pattern, re.Pattern) else repr(pattern)


class Nameable(Protocol):
    """What patterns can match."""

    def named(self) -> Sequence[tuple[str, nn.Module]]: ...  # its names, each with the module that belongs to it


Thing = TypeVar("Thing", bound=Nameable)


class NameIndex(Generic[Thing]):
    """Things of a model, by what patterns match."""

    def __init__(self, things: Sequence[Thing]) -> None:
        self.things = things

    def matching(self, pattern: Pattern) -> list[Thing]:
        """What a pattern matches."""
        if isinstance(pattern, str) and not _GLOB.search(pattern):
            return self._by_ending.get(pattern, [])
        matches = matcher(pattern)
        return [thing for thing in self.things if any(matches(*named) for named in thing.named())]

    def names(self) -> list[str]:
        """All names."""
        return [name for thing in self.things for name, _ in thing.named()]

    @functools.cached_property
    def _by_ending(self) -> dict[str, list[Thing]]:
        """Full names, and what follows a dot in them: a plain name is looked up here, and not compared with each."""
        found: dict[str, list[Thing]] = {}
        for thing in self.things:
            for name, _ in thing.named():
                for ending in (name, *endings(name)):
                    known = found.setdefault(ending, [])
                    if not known or known[-1] is not thing:  # two of its names can end alike
                        known.append(thing)
        return found

"""A user's map from the names in an adapter's file to those in what the adapter is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from lora_plus.layers.base_layer import BaseLayer
from lora_plus.text import join

from .saved_adapter import SavedAdapter

Names = Mapping[str, str | None] | Callable[[str], str | None]
"""Maps names in a file to names in a model or checkpoint, by prefixes or by a function. None leaves a name out."""


class Renaming:
    """The function from names to names; of prefixes, which end at a dot, the longest counts.

    Args:
        names: what the user gave; None, as an empty mapping, changes no name.

    Raises:
        TypeError: if a name is neither a text nor None; for a function, when it is called.
    """

    def __init__(self, names: Names | None = None) -> None:
        self.given = bool(names)
        self._function = names if callable(names) else None
        self._prefixes = {} if names is None or callable(names) else dict(names)
        self._used: set[str] = set()
        for old, new in self._prefixes.items():
            _check(old, new)

    def __call__(self, name: str, separator: str = ".") -> str | None:
        """The name of something in its new place; None if it is left out.

        Args:
            name: its name in the file.
            separator: what stands between the parts of a name there.
        """
        if self._function is not None:
            return _check(name, self._function(name))
        for given in sorted(self._prefixes, key=len, reverse=True):
            old, new = given.rstrip(separator), self._prefixes[given]
            if not old or name == old or name.startswith(f"{old}{separator}"):
                self._used.add(given)
                rest = name[len(old) :].lstrip(separator)
                return None if new is None else separator.join(filter(None, [new.rstrip(separator), rest]))
        return name

    def unused(self) -> list[str]:
        """A line for each prefix that no name had."""
        left = [old for old in self._prefixes if old and old not in self._used]
        return [f"names: no name in the file is or starts with {old!r}" for old in left]


def _check(old: str, new: str | None) -> str | None:
    if not isinstance(new, (str, type(None))):
        raise TypeError(f"names gives {new!r} for {old!r}, expected a name, or None to leave it out")
    return new


def renamed(adapter: SavedAdapter, rename: Renaming, problems: list[str]) -> SavedAdapter:
    """The adapter under the names of its new place; what is left out is not in it.

    Two that get the same name are added to the problems.
    """
    origins: dict[str, str] = {}
    for old in [*adapter.layers, *adapter.trained]:
        new = rename(old)
        if new is not None and (first := origins.setdefault(new, old)) != old:
            problems.append(f"{first!r} and {old!r} of the file are both called {new!r} by names")
    return SavedAdapter(
        {new: replace(adapter.layers[old], base=_moved(adapter.layers[old].base, rename))
         for new, old in origins.items() if old in adapter.layers},
        {new: adapter.trained[old] for new, old in origins.items() if old in adapter.trained},
        adapter.metadata,
    )  # fmt: skip


def _moved(base: BaseLayer, rename: Renaming) -> BaseLayer:
    """The base under its new name, where it says the name of a parameter, or of tied layers."""
    facts = {**base.facts}
    if "parameter" in facts:
        owner, _, parameter = facts["parameter"].rpartition(".")
        facts["parameter"] = join(rename(owner) or "", parameter)
    if isinstance(facts.get("tied"), dict):
        facts["tied"] = {rename(name): kind for name, kind in facts["tied"].items()}
    return replace(base, facts=facts)

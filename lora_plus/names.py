"""Dotted names inside a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def join(path: str, name: str) -> str:
    """The dotted name of something inside the module at ``path``; either is empty for the module itself."""
    return f"{path}.{name}" if path and name else path or name


def near_misses(wanted: Any, names: Iterable[str]) -> str:
    """`` (did you mean 'a' or 'b'?)`` with the names closest to a mistyped one, or nothing."""
    if not isinstance(wanted, str):
        return ""
    tails = {name if "." in wanted else name.rpartition(".")[2] for name in names} - {""}
    close = difflib.get_close_matches(wanted, sorted(tails), n=3)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


_SHOWN = 3


def some(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more

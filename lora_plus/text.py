"""Dotted names and near misses; text for a terminal, without what acts on one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any


def printable(text: object) -> str:
    """The text in one line, with an escape such as ``\\x1b`` for each character that does not show as itself.

    Those are control characters, line separators, marks that turn the direction of text, and lone surrogates: what
    ``repr`` escapes, too.
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


def counted(number: int, what: str) -> str:
    """A number of things: ``1 layer``, ``2 layers``."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """One line a row, each column as wide as its longest cell; those that are numbered in ``right`` end alike."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    pads = [str.rjust if column in right else str.ljust for column in range(len(widths))]
    padded = [[pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)] for row in cells]
    return ["  ".join(row).rstrip() for row in padded]


def join(path: str, name: str) -> str:
    """The dotted name of something inside the module at ``path``; either is empty for the module itself."""
    return f"{path}.{name}" if path and name else path or name


def near_misses(wanted: Any, names: Iterable[str]) -> str:
    """`` (did you mean 'a' or 'b'?)`` with the names closest to a mistyped one, whatever their case, or nothing."""
    if not isinstance(wanted, str):
        return ""
    tails = {tail.casefold(): tail for name in names if (tail := name if "." in wanted else name.rpartition(".")[2])}
    close = [repr(tails[each]) for each in difflib.get_close_matches(wanted.casefold(), sorted(tails), n=3)]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more


def median_and_worst(values: Mapping[str, float], form: str, what: str = "") -> str:
    """``0.1 in the median layer, 0.3 in 'a'``, with numbers in this format and, after the first one, what they are."""
    worst = max(values, key=values.__getitem__)
    median = sorted(values.values())[len(values) // 2]
    return f"{median:{form}}{what} in the median layer, {values[worst]:{form}} in {worst!r}"


def parents(name: str) -> Iterator[str]:
    """The dotted names of what is around something, from the next one outwards: ``a.b`` and ``a`` around ``a.b.c``."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def endings(name: str) -> Iterator[str]:
    """What a dotted name ends in, the name itself left out: ``a.b.c`` in ``b.c`` and ``c``."""
    while "." in name:
        name = name.partition(".")[2]
        yield name

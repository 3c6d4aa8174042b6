"""Text for a terminal: rows in aligned columns, and texts of other people without what acts on a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: object) -> str:
    """The text in one line, with an escape such as ``\\x1b`` for each character that does not show as itself.

    Those are control characters, line separators, marks that turn the direction of text, and lone surrogates: what
    ``repr`` escapes, too.
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


def counted(number: int, what: str) -> str:
    """A number of things: ``1 layer``, ``2 layers``."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line a row, each column as wide as its longest cell."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]

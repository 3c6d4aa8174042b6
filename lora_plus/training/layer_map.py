"""Figures of layers, drawn as a map of projections by depth where their names have both, and else as bars."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, takewhile
from typing import Any

from .drawing import COLOURS, centred, plain, rounded, title


def parted(name: str) -> tuple[str, tuple[str, ...]]:
    """The name of a layer with ``*`` for each number in it, and the numbers."""
    return _NUMBER.sub("*", name), tuple(_NUMBER.findall(name))


_EMPTIEST = 8
"""Cells of a map for each layer, at most."""
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Layout:
    """Where the figures of layers are drawn: in a map of projections by depth, or as a bar each."""

    rows: list[str]
    """Labels of the map's rows, or of the bars."""
    columns: list[str]
    """Labels of the map's columns; none for bars."""
    places: list[tuple[int, int]]
    """Row and column of each layer."""

    @classmethod
    def of(cls, names: Sequence[str]) -> Layout:
        """A map if the names have several forms that differ in numbers only, and together fill a good part of it."""
        found, numbers = zip(*map(parted, names), strict=True)
        forms = list(zip(found, map(len, numbers), strict=True))  # a name may have a * of its own
        rows = list(dict.fromkeys(forms))
        depths = _depths(forms, numbers)
        columns = sorted(set(depths), key=lambda each: (not each, [(len(one), one) for one in each]))
        places = list(zip(map(_order(rows), forms), map(_order(columns), depths), strict=True))
        filled = len(rows) * len(columns) <= _EMPTIEST * len(names) and len(set(places)) == len(places)
        if filled and 1 < len(rows) < len(names):
            return cls(_short([form for form, _ in rows]), [plain(".".join(each)) or "-" for each in columns], places)
        return cls(_short(names), [], [(row, 0) for row in range(len(names))])

    @property
    def height(self) -> float:
        """The inches that one panel takes."""
        return 0.85 + min(6.0, 0.2 * len(self.rows))

    @property
    def margin(self) -> float:
        """The inches that the labels of the rows take."""
        return 0.2 + 0.07 * max(map(len, self.rows))

    def draw(
        self, panel: Any, values: Sequence[float], name: str, room: float, *, zero: bool = False, labelled: bool = True
    ) -> None:
        """Draw a figure of each layer: NaN leaves its place empty, and infinity is at the end of the scale.

        Args:
            room: the inches that the panel has beside its labels.
            zero: whether the figures have two signs that mean different things, and the colours two hues for them.
            labelled: whether the rows have labels; a panel at its left may have the same.
        """
        title(panel, name, room)
        _thin(panel.set_yticks, self.rows, 40)
        panel.tick_params(axis="y", labelleft=labelled)
        finite = [abs(value) if zero else value for value in values if math.isfinite(value)]
        high = max(finite, default=1.0) or 1.0
        low = -high if zero else min([0.0, *finite])
        shown = [min(max(value, low), high) for value in values]
        if not self.columns:
            self._bars(panel, values, shown)
            panel.locator_params(axis="x", nbins=max(2, round(1.8 * room)))
            return
        grid = [[math.nan] * len(self.columns) for _ in self.rows]
        for (row, column), value in zip(self.places, shown, strict=True):
            grid[row][column] = value
        mesh = panel.pcolormesh(
            grid, vmin=low, vmax=high, cmap="PuOr" if zero else "viridis", edgecolor="face", linewidth=0.4,
            rasterized=len(values) > 10_000,
        )  # fmt: skip
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_tick_params(length=0)
        panel.invert_yaxis()
        panel.spines[:].set_visible(False)
        panel.set_xlabel("depth")
        aspect, part = max(12, len(self.rows)), 0.05 if room > 4 else 0.1
        room -= 0.6  # for the colour bar
        _thin(panel.set_xticks, self.columns, max(1, int(10 * room / (1 + max(map(len, self.columns))))))
        panel.figure.colorbar(mesh, ax=panel, pad=0.01, fraction=part, aspect=aspect).outline.set_visible(False)
        if len(self.columns) <= 2 * room:
            for (row, column), value, colour in zip(self.places, values, mesh.to_rgba(shown), strict=True):
                if not math.isnan(value):
                    panel.text(column + 0.5, row + 0.5, rounded(value, 2), **centred(colour), fontsize=7)

    def _bars(self, panel: Any, values: Sequence[float], shown: Sequence[float]) -> None:
        """A horizontal bar each, as one artist, however many there are."""
        lengths = [length for value in shown for length in (0.0 if math.isnan(value) else value, 0.0)][:-1]
        edges = [edge for row in range(len(values)) for edge in (row + 0.1, row + 0.9)]
        panel.stairs(lengths, edges, orientation="horizontal", fill=True, color=COLOURS[0])
        panel.axvline(0, color=panel.spines["left"].get_edgecolor(), linewidth=0.8)
        panel.set_ylim(len(values), 0)
        panel.spines[["top", "right"]].set_visible(False)
        for row, (value, length) in enumerate(zip(values, shown, strict=True)):
            if not math.isfinite(value) and len(values) <= 40:
                panel.text(0 if math.isnan(value) else length, row + 0.5, f" {value:g}", va="center", fontsize=7)


def _order(items: Sequence[Any]) -> Any:
    return {item: n for n, item in enumerate(items)}.__getitem__


def _thin(set_ticks: Any, labels: Sequence[str], most: int) -> None:
    """Ticks in the middles of places, so few of them that their labels have room."""
    least = math.ceil(len(labels) / most)
    step = next((step for step in (1, 2, 5, 10, 20, 50) if step >= least), least)
    set_ticks([place + 0.5 for place in range(0, len(labels), step)], labels[::step])


def _depths(forms: Sequence[Any], numbers: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Of the numbers in names, those that tell layers of one form apart; all of them where it has one layer."""
    of_form: dict[Any, list[tuple[str, ...]]] = {}
    for form, each in zip(forms, numbers, strict=True):
        of_form.setdefault(form, []).append(each)
    vary = {
        form: [len(group) == 1 or len(set(column)) > 1 for column in zip(*group, strict=True)]
        for form, group in of_form.items()
    }
    return [tuple(compress(each, vary[form])) for form, each in zip(forms, numbers, strict=True)]


def _short(names: Sequence[str]) -> list[str]:
    """Each name by the last parts that no other one ends in, or in full without what all begin with."""
    without = [".".join(part for part in name.split(".") if part != "*") for name in names]
    names = without if len(set(without)) == len(names) else names
    tails = [[".".join(name.split(".")[-parts:]) for parts in range(1, 4)] for name in names]
    seen = Counter(tail for each in tails for tail in set(each))
    all_parts = zip(*[name.split(".")[:-1] for name in names], strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, all_parts))
    found = [
        next((tail for tail in each if seen[tail] == 1), ".".join(name.split(".")[common:]))
        for each, name in zip(tails, names, strict=True)
    ]
    return [plain(each) or "(model)" for each in found]

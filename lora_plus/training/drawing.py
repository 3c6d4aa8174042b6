"""What all pictures share: the file that they go to, and figures of layers, as a map or as bars."""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress, takewhile
from os import PathLike
from pathlib import Path
from typing import Any

from lora_plus.text import printable

ENDINGS: dict[str, dict[str, None]] = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
"""What the name of a picture ends in, and what is left out of such a file, so that equal pictures are equal files."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#7B3294")
"""Told apart by all kinds of colour vision (most are of Okabe & Ito), on white and on black."""

_LOOKS = {"svg.hashsalt": "lora_plus", "font.size": 9, "axes.titlesize": "medium", "axes.titlelocation": "left"}


def check_picture(path: str | PathLike[str]) -> None:
    """Raise where no picture can be drawn into this path.

    Raises:
        ValueError: if the path has another ending than those of `ENDINGS`.
        ImportError: if matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in ENDINGS:
        *others, last = ENDINGS
        raise ValueError(f"{printable(path)!r} is no name for a picture: it must end in {', '.join(others)} or {last}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError("drawing needs matplotlib; run: pip install 'lora-plus[plot]'") from None


@contextmanager
def picture(path: str | PathLike[str], width: float, height: float) -> Iterator[Any]:
    """A figure of so many inches, which is written into the file at the end of the block, and after an error is not.

    Raises:
        ValueError, ImportError: as `check_picture` does.
    """
    check_picture(path)
    import matplotlib
    from matplotlib.figure import Figure

    ending, made = Path(path).suffix.lower(), io.BytesIO()
    with matplotlib.rc_context(_LOOKS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the picture has a box there
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(made, format=ending[1:], metadata=ENDINGS[ending], dpi=150)
    Path(path).write_bytes(made.getvalue())


def plain(text: str) -> str:
    """The text as a picture shows it in one line: no formula, no control character, at most 32 characters."""
    text = printable(text)
    if len(text) > 32:
        text = f"{text[:11]}…{text[-20:]}"
    return text.replace("$", r"\$")  # which would begin a formula


def headline(figure: Any, *lines: str) -> None:
    """Write lines over a figure, broken to its width."""
    figure.suptitle("\n".join(_broken(line, figure.get_figwidth()) for line in lines), fontsize="medium")


def title(panel: Any, text: str, inches: float) -> None:
    """Write the title of a panel, broken to so many inches."""
    panel.set_title(_broken(text, inches))


def _broken(text: str, inches: float) -> str:
    return textwrap.fill(text, max(16, round(15 * inches)))


def rounded(value: float, digits: int) -> str:
    """The number with so many digits that count, zeros at the end among them: ``0.80``, ``12``, ``1.5e+03``."""
    return f"{value:#.{digits}g}".rstrip(".")


def log_axis(panel: Any, low: float, high: float) -> None:
    """Make the y axis logarithmic between two positive numbers, with plain numbers at the ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_yscale("log")
    panel.set_ylim(low, high)
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def parted(name: str) -> tuple[str, tuple[str, ...]]:
    """The name of a layer with ``*`` for each number in it, and the numbers."""
    return _NUMBER.sub("*", name), tuple(_NUMBER.findall(name))


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
        """A map if the names have several forms that differ in numbers only, and some of them several layers."""
        forms, numbers = zip(*map(parted, names), strict=True)
        rows = list(dict.fromkeys(forms))
        depths = _depths(forms, numbers)
        columns = sorted(set(depths), key=lambda each: (not each, [(len(one), one) for one in each]))
        places = list(zip(map(_order(rows), forms), map(_order(columns), depths), strict=True))
        if 1 < len(rows) < len(names) and len(set(places)) == len(places):
            return cls(_short(rows), [plain(".".join(each)) or "-" for each in columns], places)
        return cls(_short(names), [], [(row, 0) for row in range(len(names))])

    @property
    def height(self) -> float:
        """The inches that one panel takes."""
        return 0.85 + min(6.0, 0.2 * len(self.rows))

    def draw(self, panel: Any, values: Sequence[float], name: str, *, zero: bool = False, wide: bool = False) -> None:
        """Draw a figure of each layer: NaN leaves its place empty, and infinity is at the end of the scale.

        Args:
            zero: whether the figures have two signs that mean different things, and the colours two hues for them.
            wide: whether the panel is as wide as the page, so that more labels have room.
        """
        room = panel.figure.get_figwidth() * (1 if wide else 0.5) - 0.2 - 0.07 * max(map(len, self.rows))
        title(panel, name, room)
        _thin(panel.set_yticks, self.rows, 40)
        finite = [abs(value) if zero else value for value in values if math.isfinite(value)]
        high = max(finite, default=1.0) or 1.0
        low = -high if zero else min(0.0, *finite, 0.0)
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
        room -= 0.6  # for the colour bar
        _thin(panel.set_xticks, self.columns, max(1, int(10 * room / (1 + max(map(len, self.columns))))))
        aspect = max(12, len(self.rows))
        part = 0.05 if wide else 0.1
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


def centred(colour: Sequence[float]) -> dict[str, Any]:
    """How a text is written in the middle of a cell of this colour: in black or white, by what is easier to read."""
    red, green, blue = colour[:3]
    light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
    return {"ha": "center", "va": "center", "color": "black" if light else "white"}


def _order(items: Sequence[Any]) -> Any:
    return {item: n for n, item in enumerate(items)}.__getitem__


def _thin(set_ticks: Any, labels: Sequence[str], most: int) -> None:
    """Ticks in the middles of places, so few of them that their labels have room."""
    least = math.ceil(len(labels) / most)
    step = next((step for step in (1, 2, 5, 10, 20, 50) if step >= least), least)
    set_ticks([place + 0.5 for place in range(0, len(labels), step)], labels[::step])


def _depths(forms: Sequence[str], numbers: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Of the numbers in names, those that tell layers of one form apart; all of them where it has one layer."""
    of_form: dict[str, list[tuple[str, ...]]] = {}
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

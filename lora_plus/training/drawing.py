"""What all pictures share: the file that they go to, texts, and colours."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from lora_plus.packages import needed
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
        ImportError: if matplotlib is not installed, or too old.
    """
    if Path(path).suffix.lower() not in ENDINGS:
        *others, last = ENDINGS
        raise ValueError(f"{printable(path)!r} is no name for a picture: it must end in {', '.join(others)} or {last}")
    with needed("drawing", "matplotlib"):
        import matplotlib.figure  # noqa: F401


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


def centred(colour: Sequence[float]) -> dict[str, Any]:
    """How a text is written in the middle of a cell of this colour: in black or white, by what is easier to read."""
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour[:3])
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # of 0 to 1, by WCAG 2; both contrasts are 4.58 at 0.179
    return {"ha": "center", "va": "center", "color": "black" if light > 0.179 else "white"}

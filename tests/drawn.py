"""What a plot function draws: its figure's artists, and the numbers in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

REFUSED = r"'{}' is no name for a picture: it must end in \.svg, \.png or \.pdf"


def drawn(plot: Callable[..., None], *given: Any, into: Path) -> Any:
    """The figure that ``plot(*given, path)`` would have written; nothing is rendered, which takes a second."""
    figure = pytest.importorskip("matplotlib.figure")
    found: list[Any] = []
    with mock.patch.object(
        figure.Figure, "savefig", autospec=True, side_effect=lambda self, *_, **__: found.append(self)
    ):
        plot(*given, into / "unrendered.png")
    (made,) = found
    return made


def panels(figure: Any) -> dict[str, Any]:
    """The panels by their titles; colour bars have none."""
    return {title.replace("\n", " "): panel for panel in figure.axes if (title := panel.get_title(loc="left"))}


def map_of(panel: Any) -> dict[tuple[str, str], float]:
    """The number in each cell of a map that is not empty, by the labels of its row and column."""
    (mesh,) = (each for each in panel.collections if hasattr(each, "get_coordinates"))
    row_label, column_label = (axis.get_major_formatter() for axis in (panel.yaxis, panel.xaxis))
    return {
        (row_label(row + 0.5), column_label(column + 0.5)): float(value)
        for row, values in enumerate(mesh.get_array().filled(math.nan))
        for column, value in enumerate(values)
        if not math.isnan(value)
    }


def bars_of(panel: Any) -> dict[str, float]:
    """The length of each bar, by its label."""
    (patch,) = (each for each in panel.patches if hasattr(each, "get_data"))
    label = panel.yaxis.get_major_formatter()
    return {label(place + 0.5): float(length) for place, length in enumerate(patch.get_data().values[::2])}


def texts(panel: Any) -> list[str]:
    """What is written in a panel."""
    return [each.get_text() for each in panel.texts]

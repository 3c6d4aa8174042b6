"""A picture of an adapter: size and spectrum of its updates, layer by layer; it needs matplotlib."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import accumulate
from os import PathLike
from typing import Any

from lora_plus.text import counted
from lora_plus.training.drawing import COLOURS, headline, log_axis, picture, plain, rounded, title
from lora_plus.training.layer_map import Layout

from .measures import LayerMeasures


def plot_measures(measures: Sequence[LayerMeasures], path: str | PathLike[str], *, width: float = 7.5) -> None:
    """Draw the updates of an adapter into a file: norms, effective ranks, and singular values.

    If the layers' names have a projection and a depth, norms and effective ranks are maps of projection by depth;
    otherwise they are bars. The singular values have a line for each row of the map: the median over its layers, in a
    band from the least to the largest. Without a map they have a line for each layer. If that were more than eight
    lines, one line stands for all layers.

    Examples:
        >>> adapter = lora_plus.files.read_adapter("adapter.safetensors")
        >>> plot_measures([measure(name, layer) for name, layer in adapter.layers.items()], "adapter.svg")

    Args:
        measures: the results of `measure` for each layer.
        path: ends in ``.svg``, ``.png`` or ``.pdf``.
        width: of the picture, in inches; the text has 9 points at any width.

    Raises:
        ValueError: if it has another ending, or there is no layer.
        ImportError: if matplotlib is not installed.
    """
    if not measures:
        raise ValueError("there is no layer to draw; an adapter that only trains modules in full has no update s B A")
    layout = Layout.of([each.name for each in measures])
    trained = any(map(_has_spectrum, measures))
    maps = {"norm": ("Norm of the update s·B·A (Frobenius)", [each.norm for each in measures])}
    if trained:
        ranks = [math.nan if each.effective_rank is None else each.effective_rank for each in measures]
        maps["rank"] = ("Effective rank of the update", ranks)
    rows = [[name, name] for name in maps] if layout.columns or not trained else [[*maps]]
    heights = [layout.height] * len(rows)
    if trained:
        rows, heights = [*rows, ["values", "energy"]], [*heights, 2.6]
    with picture(path, width, 0.5 + sum(heights)) as figure:
        panels = figure.subplot_mosaic(rows, height_ratios=heights)
        room = (width - layout.margin) / len({*rows[0]})
        for name, (heading, figures) in maps.items():
            layout.draw(panels[name], figures, heading, room, labelled=any(row[0] == name for row in rows))
        if trained:
            _spectra(panels["values"], panels["energy"], layout, measures)
        headline(figure, *_facts(measures))


def _facts(measures: Sequence[LayerMeasures]) -> list[str]:
    live = [each for each in measures if _has_spectrum(each)]
    r = sorted({each.r for each in measures})
    of = f"r = {r[0]}" if len(r) == 1 else f"r = {r[0]} to {r[-1]}"
    lines = [f"{counted(len(measures), 'layer')}, {of}"]
    if live:
        norm, rank = (statistics.median(getattr(each, key) for each in live) for key in ("norm", "effective_rank"))
        lines[0] += f"; the median layer: norm {rounded(norm, 2)}, effective rank {rank:.1f}"
    still = [plain(each.name) or "(model)" for each in measures if each.effective_rank is None]
    large = [plain(each.name) or "(model)" for each in measures if not math.isfinite(each.norm)]
    if len(still) == len(measures):
        lines.append("No layer has an update: s·B·A is zero, as before training")
    elif still:
        lines.append(f"{_named(still)} without an update: s·B·A is zero, as before training")
    if large:
        lines.append(f"{_named(large)} with numbers so large that their squares overflow float64")
    return lines


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" * (len(names) > 3)
    return f"{counted(len(names), 'layer')} ({', '.join(names[:3])}{more})"


def _has_spectrum(each: LayerMeasures) -> bool:
    return each.effective_rank is not None and math.isfinite(each.norm)


def _spectra(values: Any, energy: Any, layout: Layout, measures: Sequence[LayerMeasures]) -> None:
    """The singular values, and the part of their energy, the sum of their squares, that the first k of them have."""
    of_row: list[list[tuple[float, ...]]] = [[] for _ in layout.rows]
    for each, (row, _) in zip(measures, layout.places, strict=True):
        if _has_spectrum(each):
            of_row[row].append(each.singular_values)
    series = [(label, group) for label, group in zip(layout.rows, of_row, strict=True) if group]
    if len(series) > len(COLOURS):
        series = [("all layers", [spectrum for _, group in series for spectrum in group])]
    spectra = [spectrum for _, group in series for spectrum in group]
    longest, high = max(map(len, spectra)), max(spectrum[0] for spectrum in spectra)
    for colour, (label, group) in zip(COLOURS, series, strict=False):
        _band(values, group, colour, label)
        _band(energy, [_energy(spectrum, longest) for spectrum in group], colour, label)
    room = values.figure.get_figwidth() / 2 - 0.5
    title(values, "Singular values of s·B·A", room)
    title(energy, "Energy share of the first k", room)
    values.set(xlabel="k-th largest")
    energy.set(xlabel="k", ylim=(0, 1.03))
    least = min(value for spectrum in spectra for value in spectrum if value > 0)
    log_axis(values, max(0.8 * least, 1e-5 * high), 1.25 * high)  # below are rounding errors
    for panel in (values, energy):
        panel.set_xlim(0.5, longest + 0.5)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        energy.legend(frameon=False, fontsize=7, loc="lower right", ncols=2)


def _energy(spectrum: Sequence[float], length: int) -> list[float]:
    squares = [value**2 for value in spectrum] + [0.0] * (length - len(spectrum))
    return [part / sum(squares) for part in accumulate(squares)]


def _band(panel: Any, group: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """The median at each place over those that reach it, and a band from the least to the largest."""
    columns = [[each[n] for each in group if n < len(each)] for n in range(max(map(len, group)))]
    places = range(1, len(columns) + 1)
    marker = "o" if len(columns) <= 16 else ""
    panel.plot(places, list(map(statistics.median, columns)), marker=marker, ms=3, lw=1.3, color=colour, label=label)
    panel.fill_between(places, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.12, linewidth=0)

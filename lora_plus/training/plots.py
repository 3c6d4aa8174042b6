"""Pictures of what a sweep or a gauge has found; they need matplotlib."""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

from .candidates import SweepResult
from .gauge import COLUMNS, GaugeReport


def plot_sweep(result: SweepResult, path: str | PathLike[str]) -> None:
    """Draw the loss over lr and lr_ratio into a file: a panel for each r and alpha, the mean over seeds.

    A cell is empty where there is no candidate, or one diverged. Stopped candidates have the loss they stopped at.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    chosen = [row.candidate for row in result.rows]
    panels = sorted({(each.r, each.alpha) for each in chosen})
    rates, ratios = sorted({each.lr for each in chosen}), sorted({each.lr_ratio for each in chosen})
    cells: dict[tuple[float, ...], list[float]] = {}
    for row in result.rows:
        own = row.candidate
        loss = math.nan if row.stopped == "diverged" else row.loss
        cells.setdefault((own.r, own.alpha, own.lr, own.lr_ratio), []).append(loss)
    means = {cell: sum(losses) / len(losses) for cell, losses in cells.items()}
    finite = [mean for mean in means.values() if math.isfinite(mean)] or [0.0]
    figure = _figure(1.5 + 3.5 * len(panels), 3.5)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (r, alpha) in zip(axes, panels, strict=True):
        shown = [[means.get((r, alpha, lr, ratio), math.nan) for ratio in ratios] for lr in rates]
        image = panel.imshow(shown, vmin=min(finite), vmax=max(finite), origin="lower", aspect="auto")
        panel.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
        panel.set_yticks(range(len(rates)), [f"{lr:g}" for lr in rates])
        panel.set(title=f"r = {r}, alpha = {alpha:g}", xlabel="lr_ratio", ylabel="lr")
    figure.colorbar(image, ax=list(axes), label="loss")
    figure.savefig(path)


def plot_gauge(report: GaugeReport, path: str | PathLike[str]) -> None:
    """Draw a gauge's table into a file, a bar for each layer and figure.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = _figure(2.2 * len(COLUMNS) + 2, 0.2 * len(report.rows) + 1.5)
    places = range(len(report.rows))
    panels = figure.subplots(1, len(COLUMNS), sharey=True)
    for panel, (title, (_, get)) in zip(panels, COLUMNS.items(), strict=True):
        values = [get(row) for row in report.rows]
        panel.barh(places, [value if math.isfinite(value) else 0.0 for value in values])
        panel.set_title(title, fontsize=9)
        panel.set_yticks(places, [f"{row.name or '(model)'} {row.adapter}" for row in report.rows], fontsize=7)
    panels[0].invert_yaxis()  # once for all: they share the axis
    figure.suptitle(f"w = {report.work_share:+.2f} over all layers, {report.steps} steps", fontsize=9)
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib; run: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")

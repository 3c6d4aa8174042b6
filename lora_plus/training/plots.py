"""Pictures of what a sweep or a gauge has found; they need matplotlib."""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

from .candidates import SweepResult, SweepRow
from .gauge import COLUMNS, GaugeReport


def plot_sweep(result: SweepResult, path: str | PathLike[str]) -> None:
    """Draw the loss over lr and lr_ratio into a file: a panel for each r and alpha, the mean over seeds in each cell.

    The colour goes by the rank of the cell among all that did not diverge, for one bad loss would make all others look
    alike. A frame marks the best cell. Cells with candidates that were halved are hatched: their loss is that of fewer
    steps. A cell is empty where there is no candidate, or one diverged.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    cells: dict[tuple[float, ...], list[SweepRow]] = {}
    for row in result.rows:
        own = row.candidate
        cells.setdefault((own.r, own.alpha, own.lr, own.lr_ratio), []).append(row)
    means = {
        cell: sum(row.loss for row in rows) / len(rows)
        for cell, rows in cells.items()
        if all(row.stopped != "diverged" and math.isfinite(row.loss) for row in rows)
    }
    halved = {cell for cell in means if any(row.stopped for row in cells[cell])}
    ranked = sorted(means, key=lambda cell: (cell in halved, means[cell]))
    rank = {cell: float(n) for n, cell in enumerate(ranked)}
    panels = sorted({cell[:2] for cell in cells})
    rates, ratios = sorted({cell[2] for cell in cells}), sorted({cell[3] for cell in cells})
    figure = _figure(1.5 + (1 + len(ratios)) * len(panels), 1.5 + 0.6 * len(rates))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (r, alpha) in zip(axes, panels, strict=True):
        shown = [[rank.get((r, alpha, lr, ratio), math.nan) for ratio in ratios] for lr in rates]
        image = panel.imshow(shown, vmin=0, vmax=max(1, len(rank) - 1), origin="lower", aspect="auto", cmap="viridis_r")
        for y, lr in enumerate(rates):
            for x, ratio in enumerate(ratios):
                cell = (r, alpha, lr, ratio)
                if cell in means:
                    light = rank[cell] < len(rank) / 2
                    panel.text(x, y, f"{means[cell]:.3g}", ha="center", va="center", color="k" if light else "w")
                    _frame(panel, x, y, hatch="///" if cell in halved else "", best=cell == ranked[0])
        panel.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
        panel.set_yticks(range(len(rates)), [f"{lr:g}" for lr in rates])
        panel.set(title=f"r = {r:g}, alpha = {alpha:g}", xlabel="lr_ratio", ylabel="lr")
    figure.colorbar(image, ax=list(axes), label="rank (0 is the best)")
    figure.suptitle("\n".join([result.loss_words, *result.edges()]), fontsize=9)
    figure.savefig(path)


def plot_sweep_curves(result: SweepResult, path: str | PathLike[str]) -> None:
    """Draw the training losses of all candidates over the steps into a file; the best one is drawn thick.

    The axis is as high as candidates need that were trained to the end.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = _figure(8, 4.5)
    panel = figure.subplots()
    for n, row in enumerate(result.rows):
        note = f" ({row.stopped})" if row.stopped else ""
        label = f"{row.candidate.name}{note}".replace("$", r"\$")  # which would begin a formula
        panel.plot(
            range(1, len(row.losses) + 1), row.losses, label=label, zorder=-n,
            linewidth=0.8 if n else 2.5, linestyle="--" if row.stopped else "-",
        )  # fmt: skip
    whole = [loss for row in result.rows if not row.stopped for loss in row.losses]
    if whole and min(whole) > 0:
        panel.set_yscale("log")
        panel.set_ylim(min(whole) * 0.9, max(whole) * 2)  # others may leave it
    panel.set(xlabel="step", ylabel="training loss")
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def plot_gauge(report: GaugeReport, path: str | PathLike[str]) -> None:
    """Draw a gauge's table into a file, a bar for each layer and figure, over the verdict.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = _figure(2.2 * len(COLUMNS) + 2, 0.2 * len(report.rows) + 1.5)
    places = range(len(report.rows))
    panels = figure.subplots(1, len(COLUMNS), sharey=True)
    for panel, (title, (_, get)) in zip(panels, COLUMNS.items(), strict=True):
        values = [get(row) for row in report.rows]
        panel.barh(places, [value if math.isfinite(value) else 0.0 for value in values])
        panel.axvline(0, color="k", linewidth=0.8)
        panel.set_title(title, fontsize=9)
        panel.set_yticks(places, [f"{row.name or '(model)'} {row.adapter}" for row in report.rows], fontsize=7)
    panels[0].invert_yaxis()  # once for all: they share the axis
    figure.suptitle(f"w = {report.work_share:+.2f} over all layers, {report.steps} steps: {report.verdict}", fontsize=9)
    figure.savefig(path, dpi=120)


def _frame(panel: Any, x: int, y: int, *, hatch: str, best: bool) -> None:
    """Hatch a cell, and frame it if it is the best."""
    from matplotlib.patches import Rectangle

    if hatch or best:
        edge, width = ("r", 2.5) if best else ("0.4", 0.0)
        panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch=hatch, edgecolor=edge, linewidth=width))


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib; run: pip install 'lora-plus[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")

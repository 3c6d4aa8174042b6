"""Pictures of what a sweep or a gauge has found; they need matplotlib."""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

from lora_plus.text import join

from .candidates import SweepResult, SweepRow
from .drawing import COLOURS, centred, headline, log_axis, picture, plain, rounded
from .gauge import COLUMNS, GaugeReport
from .layer_map import Layout


def plot_sweep(result: SweepResult, path: str | PathLike[str]) -> None:
    """Draw the loss over lr and lr_ratio into a file: a panel for each r and alpha, the mean over seeds in each cell.

    The colour shows the rank of the cell among all that did not diverge; a scale of losses would let one bad loss make
    all others look alike. A frame marks the best cell. Cells with candidates that were halved are hatched: they were
    trained for fewer steps. A cell without a candidate, or with one that diverged, is empty.

    Args:
        path: ends in ``.svg``, ``.png`` or ``.pdf``.

    Raises:
        ValueError: if it has another ending.
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
    rank = {cell: float(n) for n, cell in enumerate(ranked, 1)}
    panels = sorted({cell[:2] for cell in cells})
    rates, ratios = sorted({cell[2] for cell in cells}), sorted({cell[3] for cell in cells})
    width = max(1.7, 0.3 + 0.62 * len(ratios))
    abreast = min(len(panels), max(1, int(9 / width)))
    lines = math.ceil(len(panels) / abreast)
    with picture(path, max(4.6, 1.6 + width * abreast), 0.9 + (0.5 + 0.4 * len(rates)) * lines) as figure:
        axes = figure.subplots(lines, abreast, squeeze=False, sharex=True, sharey=True)
        for panel, (r, alpha) in zip(axes.flat, panels, strict=False):
            shown = [[rank.get((r, alpha, lr, ratio), math.nan) for ratio in ratios] for lr in rates]
            mesh = panel.pcolormesh(shown, vmin=1, vmax=max(2, len(rank)), cmap="viridis_r", ec="face", lw=0.4)
            for y, lr in enumerate(rates):
                for x, ratio in enumerate(ratios):
                    cell = (r, alpha, lr, ratio)
                    if cell in means:
                        _cell(panel, x, y, means[cell], mesh.to_rgba(rank[cell]))
                        _frame(panel, x, y, hatch="////" if cell in halved else "", best=cell == ranked[0])
            panel.set_xticks([x + 0.5 for x in range(len(ratios))], [f"{ratio:g}" for ratio in ratios])
            panel.set_yticks([y + 0.5 for y in range(len(rates))], [f"{lr:.3g}" for lr in rates])
            panel.set(title=f"r = {r:g}, alpha = {alpha:g}", xlabel="lr_ratio", ylabel="lr")
            panel.tick_params(length=0)
            panel.spines[:].set_visible(False)
            panel.label_outer()
        for panel in axes.flat[len(panels) - abreast : len(panels)]:  # the lowest that are drawn
            panel.set_xlabel("lr_ratio")
            panel.tick_params(labelbottom=True)
        for panel in axes.flat[len(panels) :]:
            panel.set_axis_off()
        bar = figure.colorbar(mesh, ax=list(axes.flat), label="rank (1 is the best)", pad=0.01, fraction=0.06)
        bar.ax.invert_yaxis()
        bar.ax.yaxis.get_major_locator().set_params(integer=True)
        bar.outline.set_visible(False)
        lines_above = ["All candidates diverged"]
        if ranked:
            settings = zip(("lr", "lr_ratio", "r", "alpha"), (*ranked[0][2:], *ranked[0][:2]), strict=True)
            lines_above = ["Best: " + ", ".join(f"{name} = {value:.3g}" for name, value in settings)]
        empty = len(means) < len(panels) * len(rates) * len(ratios)
        marks = ["hatched: stopped early"] * bool(halved) + ["empty: diverged, or not tried"] * empty
        headline(figure, *lines_above, *result.edges(), "; ".join([f"in the cells: {result.loss_words}", *marks]))


def plot_sweep_curves(result: SweepResult, path: str | PathLike[str]) -> None:
    """Draw the training losses of all candidates over the steps into a file; the best one is drawn thick.

    The best ones have a colour and a name. The vertical axis fits the candidates that were trained to the end.

    Args:
        path: ends in ``.svg``, ``.png`` or ``.pdf``.

    Raises:
        ValueError: if it has another ending.
        ImportError: if matplotlib is not installed.
    """
    with picture(path, 7.5, 3.8) as figure:
        panel = figure.subplots()
        for n, row in enumerate(result.rows):
            note = f" ({row.stopped})" if row.stopped else ""
            named = n < len(COLOURS)
            panel.plot(
                range(1, len(row.losses) + 1), row.losses, label=plain(row.candidate.name) + note if named else None,
                color=COLOURS[n] if named else "#999999", alpha=1.0 if named else 0.4, zorder=2 - n / len(result.rows),
                linewidth=0.9 if n else 2.5, linestyle="--" if row.stopped else "-",
            )  # fmt: skip
        whole = [loss for row in result.rows if not row.stopped for loss in row.losses]
        if whole and min(whole) > 0:
            log_axis(panel, min(whole) * 0.9, max(whole) * 2)  # others may leave it
        panel.set(xlabel="step", ylabel="training loss")
        panel.spines[["top", "right"]].set_visible(False)
        more = len(result.rows) - len(COLOURS)
        title = f"best first; {more} more in grey" if more > 0 else "best first"
        panel.legend(title=title, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, alignment="left")


_TITLES = {
    "w": "w = log2(work of A / work of B)",
    "growth of A": "Norm of A over that at the start",
    "|sBA|": "Norm of the update s·B·A",
    "eff. rank": "Effective rank of the update",
    "|grad A|": "Norm of A's gradient, mean",
    "|grad B|": "Norm of B's gradient, mean",
    "saturation of B": "Saturation of B: 0 straight, 1 to and fro",
}


def plot_gauge(report: GaugeReport, path: str | PathLike[str], *, width: float = 7.5) -> None:
    """Draw a gauge's table into a file, under the verdict: a panel for each figure.

    If the layers' names have a projection and a depth, a panel is a map of projection by depth. Otherwise it has a bar
    for each layer. An infinite w means that one of the factors did no work.

    Args:
        path: ends in ``.svg``, ``.png`` or ``.pdf``.
        width: of the picture, in inches; the text has 9 points at any width.

    Raises:
        ValueError: if it has another ending.
        ImportError: if matplotlib is not installed.
    """
    several = len({row.adapter for row in report.rows}) > 1
    layout = Layout.of([join(row.adapter, row.name) if several else row.name for row in report.rows])
    first, *others = COLUMNS
    rows = [[first, first], *(others[n : n + 2] for n in range(0, len(others), 2))]
    room = width - layout.margin
    with picture(path, width, 0.4 + layout.height * len(rows)) as figure:
        panels = figure.subplot_mosaic(rows)
        for n, (name, (_, get)) in enumerate(COLUMNS.items()):
            figures, wide = [get(row) for row in report.rows], name == first
            own = room if wide else room / 2
            layout.draw(panels[name], figures, _TITLES[name], own, zero=name == "w", labelled=wide or n % 2 == 1)
        headline(figure, f"w = {report.work_share:+.2f} over all layers, {report.steps} steps: {report.verdict}")


def _cell(panel: Any, x: int, y: int, loss: float, colour: Any) -> None:
    """Write a loss into its cell, on a box of the cell's colour, as a hatch would cross the number."""
    box = {"facecolor": colour, "edgecolor": "none", "pad": 0.5}
    panel.text(x + 0.5, y + 0.5, rounded(loss, 3), **centred(colour), bbox=box, zorder=4)


def _frame(panel: Any, x: int, y: int, *, hatch: str, best: bool) -> None:
    """Hatch a cell, and frame it if it is the best."""
    from matplotlib.patches import Rectangle

    if hatch or best:
        how: dict[str, Any] = {"edgecolor": "r", "linewidth": 2.5} if best else {"edgecolor": "0.4", "linewidth": 0.0}
        panel.add_patch(Rectangle((x, y), 1, 1, fill=False, hatch=hatch, clip_on=not best, zorder=3, **how))

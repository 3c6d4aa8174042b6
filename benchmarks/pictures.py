"""The pictures of the README and the documentation.

``python benchmarks/pictures.py`` draws them into ``docs/pictures``: the idea of LoRA+; what a step costs, from the
tables of the results; a sweep, a gauge and an adapter, of the runs of ``studies/finetune/pictured_runs.py``. Colours
are told apart by all kinds of colour vision (Okabe & Ito), and the ink is readable on white and on black.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from lora_plus.surgery import LayerMeasures, plot_measures
from lora_plus.training import Candidate, GaugeReport, GaugeRow, SweepResult, SweepRow, plot_gauge, plot_sweep

ROOT = Path(__file__).parents[1]
INK, FROZEN, A_COLOUR, B_COLOUR = "#808080", "#8A8A8A", "#0072B2", "#D55E00"
A_TEXT = "#2B86C0"
"""Light enough for thin letters on black."""
LOOKS = {
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "svg.hashsalt": "lora_plus", "svg.fonttype": "none", "font.size": 11, "font.family": "sans-serif",
    "axes.facecolor": "none", "savefig.transparent": True,
}  # fmt: skip

STEPS = {
    "SmolLM2-135M, real weights": "SmolLM2-135M, 1024 tokens,\nall 210 linear layers",
    "BERT of 22M, 4 x 128 tokens": "BERT of 22M, 512 tokens,\nall linear layers",
    "BERT of 22M compiled": "the same, compiled",
    "ViT-B/16": "ViT-B/16, 2 images,\nall linear layers",
    "the same, DoRA": "DoRA on one layer of\n1024 x 1024, 256 tokens",
}
"""How the row of a measurement begins, in the results, and what the picture calls it."""
BARS = {"lora_plus": B_COLOUR, "PEFT": A_COLOUR, "wrapper": FROZEN}
"""The columns of the results, with a colour for each."""


def tables(page: Path) -> Iterator[list[list[str]]]:
    """The tables of a page in Markdown, as cells."""
    for block in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        yield [row for row in rows if not set("".join(row)) <= set("-: ")]


def figure_of(cell: str) -> float | None:
    """The figure in front of a cell such as "**1.054** (1.043 - 1.146)"."""
    found = re.match(r"\**([\d.]+)", cell)
    return float(found[1]) if found else None


def step_costs() -> dict[str, dict[str, float | None]]:
    """For each of `STEPS`, the time of a step over the frozen model's, as last measured."""
    found: dict[str, dict[str, float | None]] = {}
    for page in sorted((ROOT / "benchmarks" / "results").glob("20*-*-*.md")):
        for header, *rows in tables(page):
            for row in rows:
                name = next((shown for start, shown in STEPS.items() if row[0].startswith(start)), None)
                if name and "frozen" in header and {"lora_plus", "PEFT"} <= set(header):
                    cells = dict(zip(header, row, strict=True))
                    found[name] = {bar: figure_of(cells.get(bar, "")) for bar in BARS}
            if header[0].endswith("compiled, float32, r = 8"):
                name = STEPS["BERT of 22M compiled"]
                found[name] = {row[0]: figure_of(row[-1]) for row in rows if row[0] in BARS}
    return {name: found[name] for name in STEPS.values()}


def draw_costs(axes: Axes) -> None:
    """Bars from 1, the frozen model, to the time of a step over it."""
    costs = step_costs()
    height = 0.8 / len(BARS)
    for n, (bar, colour) in enumerate(BARS.items()):
        for place, row in enumerate(costs.values()):
            if (value := row.get(bar)) is not None:
                y = place + (n - 1) * height
                axes.barh(y, value - 1, height * 0.9, left=1, color=colour, label=bar if place == 0 else None)
                axes.text(value + 0.01, y, f"{value:.2f}", va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(costs)), list(costs))
    axes.invert_yaxis()
    axes.set_xlim(1, 2.4)
    axes.set_xlabel("step time; the frozen model's is 1")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")


def box(axes: Axes, corner: tuple[float, float], size: tuple[float, float], colour: str, name: str) -> None:
    """A matrix: a rectangle with its name in it."""
    axes.add_patch(Rectangle(corner, *size, facecolor=colour, edgecolor="none", alpha=0.9))
    middle = (corner[0] + size[0] / 2, corner[1] + size[1] / 2)
    axes.text(*middle, name, ha="center", va="center", color="white", fontsize=15, weight="bold")


def draw_idea(axes: Axes) -> None:
    """x goes through W, which is frozen, and beside it through the thin A and B; the outputs are added."""
    box(axes, (2.0, 1.9), (2.4, 2.4), FROZEN, "W")
    axes.text(3.2, 4.45, "frozen, (out, in)", ha="center", color=INK)
    box(axes, (2.0, 0.55), (2.4, 0.42), A_COLOUR, "A")
    axes.text(3.2, 0.1, "(r, in), learns at lr", ha="center", color=A_TEXT)
    box(axes, (5.3, -0.15), (0.42, 1.9), B_COLOUR, "B")
    axes.text(5.9, 0.1, "(out, r), starts at 0,\nlearns at lr · lr_ratio", ha="left", va="center", color=B_COLOUR)
    axes.text(0.5, 1.95, "x", ha="center", va="center", fontsize=17)
    axes.text(7.6, 3.1, "W x + s · B A x", ha="left", va="center", fontsize=15)
    axes.text(7.6, 2.5, "s = alpha / r", ha="left", va="center")
    for start, end in (
        ((0.75, 2.1), (1.9, 3.1)), ((0.75, 1.8), (1.9, 0.8)), ((4.5, 3.1), (7.4, 3.1)), ((4.5, 0.8), (5.2, 0.8)),
        ((5.85, 0.9), (7.4, 2.9)),
    ):  # fmt: skip
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=INK, linewidth=1.4))
    axes.set_xlim(0.2, 11)
    axes.set_ylim(-0.4, 4.9)
    axes.set_aspect("equal")
    axes.set_axis_off()


PHONE = 4.8
"""Inches of a picture whose text can be read on a phone, which shows it on a third of that."""


def draw_sweep(rows: list[dict[str, Any]], path: Path) -> None:
    """The heat map of a sweep."""
    plot_sweep(SweepResult([SweepRow(Candidate(**row.pop("candidate")), **row) for row in rows]), path)


def draw_gauge(report: dict[str, Any], path: Path) -> None:
    """The maps of a gauge."""
    plot_gauge(GaugeReport([GaugeRow(**row) for row in report["rows"]], report["steps"]), path, width=PHONE)


def draw_adapter(layers: list[dict[str, Any]], path: Path) -> None:
    """Norms and spectra of an adapter."""
    plot_measures([LayerMeasures(**layer) for layer in layers], path, width=PHONE)


PICTURES = {"idea": (draw_idea, (5.8, 3.0)), "costs": (draw_costs, (5.6, 4.4))}
RUNS: dict[str, Callable[[Any, Path], None]] = {"sweep": draw_sweep, "gauge": draw_gauge, "adapter": draw_adapter}
"""What is drawn of the saved runs, by its name there, which is the picture's too."""


def main() -> None:
    """Draw all of `PICTURES` and `RUNS`."""
    folder = ROOT / "docs" / "pictures"
    folder.mkdir(exist_ok=True)
    runs = json.loads((ROOT / "benchmarks" / "results" / "pictures.json").read_text())
    with matplotlib.rc_context(LOOKS):
        for name, (draw, size) in PICTURES.items():
            figure = Figure(figsize=size, layout="constrained")
            draw(figure.subplots())
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        for name, draw_run in RUNS.items():
            draw_run(runs[name], folder / f"{name}.svg")


if __name__ == "__main__":
    main()

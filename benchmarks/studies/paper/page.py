"""The results page: what each experiment hands over, and how it becomes Markdown and pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Told apart by all kinds of colour vision (Okabe & Ito)."""
MARKERS = "osD^vP"


@dataclass(frozen=True)
class Finding:
    """A statement beside what was measured."""

    claim: str
    """What the paper says, and where."""
    measured: str
    agrees: bool
    why: str = ""
    """Why not, if it does not agree and the reason is known."""


@dataclass(frozen=True)
class Table:
    """Figures under a title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure that is drawn when it is asked for, as printing needs no matplotlib."""

    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Section:
    """What one experiment has to say."""

    title: str
    setup: str
    """What was run."""
    findings: Sequence[Finding]
    tables: Sequence[Table]
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    """By the name of the file, without its ending."""


def lines_of_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, with an empty line after it."""
    ruler = "|".join("---" for _ in columns)
    return [f"| {' | '.join(columns)} |", f"|{ruler}|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def verdict(finding: Finding) -> str:
    """Whether it agrees, and if not, why."""
    if finding.agrees:
        return "**agrees**"
    return f"**does not agree**: {finding.why}" if finding.why else "**does not agree**"


def markdown(section: Section, folder: str) -> str:
    """The section as Markdown; its pictures lie in the folder."""
    lines = [f"## {section.title}", "", section.setup, ""]
    judged = [(finding.claim, finding.measured, verdict(finding)) for finding in section.findings]
    lines += lines_of_table(("the paper", "measured", ""), judged)
    for table in section.tables:
        lines += [f"{table.title}:", "", *lines_of_table(table.columns, table.rows)]
    for name, picture in section.pictures.items():
        lines += [f"![{picture.caption}]({folder}/{name}.svg)", "", f"*{picture.caption}*", ""]
    return "\n".join(lines)


def style() -> AbstractContextManager[None]:
    """Small files with text as text, and the same bytes at each run."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.hashsalt": "lora_plus",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.titlesize": 9,
    }
    return matplotlib.rc_context(settings)


def save_pictures(section: Section, folder: Path) -> None:
    """Draw the section's pictures into ``folder`` as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in section.pictures.items():
        with style():
            picture.draw().savefig(folder / f"{name}.svg", metadata={"Date": None})


def main(question: str | None, run: Callable[[], Section]) -> None:
    """The command line of an experiment: run it, print its section."""
    parser = argparse.ArgumentParser(description=question, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, help="draw the pictures into this folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    section = run()
    print(markdown(section, str(options.figures or ".")))
    if options.figures:
        save_pictures(section, options.figures)


def signed(value: float, digits: int = 2) -> str:
    """With its sign, as slopes and differences are written."""
    return f"{value:+.{digits}f}"


def power(rate: float) -> str:
    """A rate or ratio as a power of two, such as 2^-6."""
    exponent = torch.tensor(rate, dtype=torch.float64).log2().item()
    return f"2^{round(exponent, 2):g}"

"""What a benchmark shows: where it ran, its tables, and the same as JSON and as a picture."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Spread, interleaved
from options import DTYPES
from rich.console import Console
from rich.table import Table

import lora_plus

PACKAGES = ("torch", "peft", "loralib", "transformers", "safetensors")
Cell = str | int | Spread


def processor(device: str) -> str:
    """The name of the processor that computes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in facts.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of everything that the figures depend on."""
    installed = {found.name: found.version for found in importlib.metadata.distributions() if found.name in PACKAGES}
    of_packages = {name: installed[name] for name in PACKAGES if name in installed}
    return {"lora_plus": lora_plus.__version__, **of_packages, "Python": platform.python_version()}


@dataclass(frozen=True)
class Shown:
    """A table as it was printed."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    drawn: Sequence[str]
    """The columns that are drawn."""

    def as_plain(self) -> dict[str, Any]:
        rows = [dict(zip(self.columns, map(_plain, row), strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows}


def _plain(cell: Cell) -> Any:
    if not isinstance(cell, Spread):
        return cell
    return {"unit": cell.unit, "median": cell.median, "quartiles": cell.quartiles, "rounds": cell.values}


def _from_plain(cell: Any) -> Cell:
    return Spread(tuple(cell["rounds"]), cell["unit"]) if isinstance(cell, dict) else cell


def as_markdown(table: dict[str, Any]) -> str:
    """A table of a benchmark's JSON, with its title."""
    rows = [list(table["rows"][0])] + [[str(_from_plain(cell)) for cell in row.values()] for row in table["rows"]]
    rows.insert(1, ["---"] * len(rows[0]))
    cells = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join([f"**{table['title']}**", "", *(f"| {row} |" for row in cells)])


class Report:
    """Prints the circumstances at once and each table as it comes, which the JSON then has too; `close` draws."""

    def __init__(self, question: str | None, options: argparse.Namespace, *, ceilings: bool = False) -> None:
        self.options, self.tables = options, list[Shown]()
        self.console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        self.facts = {
            "question": (question or "").partition("\n")[0],
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "processor": processor(options.device),
            "threads": torch.get_num_threads(),
            "clock": options.clock,
            "float32 matmul": torch.get_float32_matmul_precision(),
            "versions": versions(),
        }
        self.console.print(f"\n[bold]{self.facts['question']}[/]")
        self.console.print(", ".join(f"{name} {version}" for name, version in versions().items()))
        self.console.print(f"{self.facts['processor']}, {self.facts['threads']} threads, {options.clock} clock")
        self.console.print(f"{self.facts['date']}  {self.facts['command']}", soft_wrap=True)
        if ceilings:
            self.table("ceilings", ("what", "measured"), _ceilings(options))

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, drawn: Sequence[str] = ()
    ) -> None:
        """Print a table, and keep it for the files. ``drawn`` are the columns that the picture shows."""
        table = Table()
        for n, column in enumerate(columns):
            figures = any(not isinstance(row[n], str) for row in rows)
            table.add_column(column, justify="right" if figures else "left")
        for row in rows:
            table.add_row(*map(str, row))
        self.console.print(f"\n[bold]{title}[/]")
        self.console.print(table)
        self.tables.append(Shown(title, columns, rows, drawn))
        if self.options.json:
            content = {**self.facts, "tables": [table.as_plain() for table in self.tables]}
            self.options.json.write_text(json.dumps(content, indent=1) + "\n")

    def close(self) -> None:
        """Write the picture."""
        if self.options.plot:
            _draw([table for table in self.tables if table.drawn], self.options.plot, self.facts)


def _ceilings(options: argparse.Namespace) -> list[tuple[str, Spread]]:
    """What the machine can do at best: the bandwidth of a copy, and the speed of a square product in each dtype.

    The numbers are random: a GPU, whose power is limited, multiplies equal ones faster.
    """
    on_gpu = torch.device(options.device).type == "cuda"
    source = torch.ones(2**28 if on_gpu else 2**24, device=options.device)
    target, n = torch.empty_like(source), 8192 if on_gpu else 1024
    squares = {name: torch.randn(n, n, device=options.device, dtype=DTYPES[name]) for name in options.dtype}
    products = {name: partial(torch.matmul, square, square) for name, square in squares.items()}
    seconds = interleaved({"": lambda: target.copy_(source), **products}, options)
    copied = seconds.pop("").rate(2 * source.nbytes, "B/s")
    rates = [(f"{n} x {n} product, {name}", s.rate(2 * n**3, "FLOP/s")) for name, s in seconds.items()]
    return [("copy, bytes read and written", copied), *rates]


def _draw(tables: Sequence[Shown], path: Path, facts: dict[str, Any]) -> None:
    """One panel a table: a bar for each median, with a line from the first to the third quartile."""
    from matplotlib.figure import Figure

    bars = [_bars(table) for table in tables]
    figure = Figure(figsize=(9, 1 + sum(0.25 * len(of_table) + 0.8 for of_table in bars)), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=[len(of_table) + 1 for of_table in bars])
    for table, of_table, panel in zip(tables, bars, panels[:, 0], strict=True):
        spreads = [spread for _, spread, _ in of_table]
        reach = [[abs(spread.quartiles[side] - spread.median) for spread in spreads] for side in (0, 1)]
        colours = [f"C{n}" for _, _, n in of_table]
        panel.barh(range(len(of_table)), [s.median for s in spreads], xerr=reach, color=colours, ecolor="#333333")
        panel.set_yticks(range(len(of_table)), [label for label, _, _ in of_table], fontsize=8)
        panel.invert_yaxis()
        what = f": {table.drawn[0]}" if len(table.drawn) == 1 else ""
        unit = spreads[0].unit
        panel.set_title(table.title + what + ("" if unit == "x" else f" [{unit}]"), loc="left", fontsize=9)
    figure.suptitle(f"{facts['question']}\n{facts['processor']}, {facts['date']}", fontsize=9)
    figure.savefig(path, dpi=120)


def _bars(table: Shown) -> list[tuple[str, Spread, int]]:
    """Label, value and the number of the column, for each row and each drawn column that has a value there."""
    found = []
    for row in table.rows:
        by_name = dict(zip(table.columns, row, strict=True))
        label = " ".join(cell for cell in row if isinstance(cell, str) and cell)
        for n, column in enumerate(table.drawn):
            if isinstance(cell := by_name[column], Spread):
                found.append((f"{label} {column}" if len(table.drawn) > 1 else label, cell, n))
    return found

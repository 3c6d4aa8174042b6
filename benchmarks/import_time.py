"""What does ``import lora_plus`` cost over the packages it needs? Wall and CPU time in fresh interpreters, in turns."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from measuring import Spread
from options import common_parser, parse
from report import Cell, Report

NEEDED = "import torch, safetensors, einops"
MEASURE = f"""
import time
{NEEDED}
wall, cpu = time.perf_counter(), time.process_time()
import lora_plus
print(time.perf_counter() - wall, time.process_time() - cpu)
lora_plus.inject_lora
print(time.perf_counter() - wall, time.process_time() - cpu)
"""

STEPS = ("import lora_plus", "and the first of its names")


def measure(byte_code: str) -> list[tuple[float, ...]]:
    """Wall and CPU seconds after each step in one fresh interpreter, with byte code kept in a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = byte_code
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [tuple(map(float, line.split())) for line in done.stdout.splitlines()]


def main() -> None:
    parser = common_parser(__doc__)
    parser.set_defaults(rounds=9)
    options = parse(parser)
    report = Report(__doc__, options)
    with tempfile.TemporaryDirectory() as byte_code:
        measure(byte_code)  # compiles it
        measured = zip(*[measure(byte_code) for _ in range(options.rounds)], strict=True)
    rows: list[list[Cell]] = []
    for step, runs in zip(STEPS, measured, strict=True):
        for clock, values in zip(("wall", "CPU"), zip(*runs, strict=True), strict=True):
            spread = (min(values), Spread(values).median, max(values))
            rows.append([step, clock, *(Spread((value,)) for value in spread)])
    report.table(f"after {NEEDED}", ("step", "clock", "least", "median", "most"), rows, drawn=("median",))
    report.close()


if __name__ == "__main__":
    main()

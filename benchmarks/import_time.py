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
"""


def measure(byte_code: str) -> tuple[float, float]:
    """Wall and CPU seconds of the import in one fresh interpreter, with byte code kept in a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = byte_code
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def main() -> None:
    parser = common_parser(__doc__)
    parser.set_defaults(rounds=9)
    options = parse(parser)
    report = Report(__doc__, options)
    with tempfile.TemporaryDirectory() as byte_code:
        measure(byte_code)  # compiles it
        measured = zip(*[measure(byte_code) for _ in range(options.rounds)], strict=True)
    rows: list[list[Cell]] = []
    for clock, values in zip(("wall", "CPU"), measured, strict=True):
        rows.append([clock, *(Spread((value,)) for value in (min(values), Spread(values).median, max(values)))])
    report.table(f"import lora_plus after {NEEDED[7:]}", ("clock", "least", "median", "most"), rows, drawn=("median",))
    report.close()


if __name__ == "__main__":
    main()

"""What does ``import lora_plus`` cost over the packages it needs? Wall and CPU time in fresh interpreters, in turns."""

from __future__ import annotations

import statistics
import subprocess
import sys

NEEDED = "import torch, safetensors, einops"
MEASURE = f"""
import time
{NEEDED}
wall, cpu = time.perf_counter(), time.process_time()
import lora_plus
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def measure() -> tuple[float, float]:
    """Wall and CPU seconds of the import in one fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def main(runs: int = 9) -> None:
    measure()  # compiles the byte code
    walls, cpus = zip(*(measure() for _ in range(runs)), strict=True)
    for name, values in (("wall", walls), ("CPU", cpus)):
        spread = f"{min(values) * 1e3:.0f} to {max(values) * 1e3:.0f}"
        print(f"import lora_plus after {NEEDED[7:]}: {statistics.median(values) * 1e3:.0f} ms {name} ({spread})")


if __name__ == "__main__":
    main()

"""What does LoRA cost on one GPU? Tests of correctness, then the rows of `gpu_rows.py`, in at most 7.5 minutes.

Each part is a process of its own with a time limit, so that one which hangs or crashes costs its own figures only. The
page and the JSON in ``benchmarks/results`` are written again after every part. The exit code is 0 if the tests passed,
1 if not, and 2 if nothing could be run.

    benchmarks/gpu.sh
    benchmarks/gpu.sh --device cpu --tiny --out /tmp    # shows that it runs, in about a minute
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_rows import ROWS, add_options
from report import as_markdown

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/test_devices.py"
TESTS_SECONDS = 90.0
FACTS = ("processor", "versions", "clock", "float32 matmul")
"""What the rows report of the machine."""
LEAST_SECONDS = 10.0
"""With less time left nothing is begun."""

INTRODUCTION = """# What LoRA costs on a GPU

`benchmarks/gpu.sh` writes this page, and `gpu.json` with the figures of every round. It takes at most 7.5 minutes on
one H200 and needs no network: all weights are random. It first runs the tests of `tests/test_devices.py`, then each row
below. Rows whose packages are missing are left out; the head of the script says how to bring packages there.

In each table all implementations take turns, with the same base, the same input and equal A and B. Times are medians
over the rounds, and ratios have quartiles. The weights of a row are larger than the GPU's cache.

- **frozen**: the same model without adapters, forward and backward to the input.
- **peft in the base's dtype**: PEFT with `autocast_adapter_dtype=False`.
- **step**: timed with CUDA events, including the time of Python.
- **replayed**: timed as one CUDA graph, without the time of Python.
- **peak**: the bytes of all tensors in a step, with the model, the adapters and, for a whole model, AdamW's state.
- **grad A**, **grad B**: the norms of the gradients of all A and of all B. They show that all implementations train,
  and train the same. (PEFT orders the factors of experts differently, so there the norms differ.)
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int | None
    """None if it was stopped for its time."""
    seconds: float
    output: str
    """The last lines that were not shown."""

    @property
    def note(self) -> str:
        """What to say of it; empty if all went well."""
        if self.code == 0:
            return ""
        if self.code is None:
            return f"Stopped after {self.seconds:.0f} s, its limit."
        last = self.output.strip().splitlines()[-1:] or ["nothing was printed"]
        return f"Ended with exit code {self.code}: `{last[0][:200]}`"


def run(command: Sequence[str], seconds: float, *, shown: bool = True) -> Ended:
    """Run a command for so many seconds at most, and end all that it started. Only errors are kept if ``shown``."""
    begun = time.monotonic()
    with tempfile.TemporaryFile() as kept:
        stdout = None if shown else kept
        with subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=kept, start_new_session=True) as process:
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        kept.seek(0)
        output = kept.read().decode(errors="replace")[-4000:]
    return Ended(code, time.monotonic() - begun, output)


def tests_command(options: argparse.Namespace) -> list[str]:
    chosen = f"{options.device} and linear" if options.tiny else options.device
    # another version of torch may warn of what this one does not
    settings = ["-q", "-W", "default", "-p", "no:cacheprovider", "-k", chosen]
    return [sys.executable, "-m", "pytest", *settings, str(ROOT / TESTS)]


def rows_command(names: Sequence[str], folder: str, options: argparse.Namespace) -> list[str]:
    own = ["--device", options.device, "--into", folder, *(["--tiny"] if options.tiny else [])]
    return [sys.executable, str(Path(__file__).with_name("gpu_rows.py")), *names, *own]


def page(record: dict[str, Any]) -> str:
    """The page of what is known so far, which may be nothing."""
    parts = [INTRODUCTION]
    if not record:
        parts.append("**This has not been run yet, because no GPU was available.** What it will measure:\n")
    else:
        versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
        parts.append(", ".join(filter(None, [record["date"], record.get("processor", ""), versions])) + ".\n")
        parts.append(f"Tests: {record['tests']['summary']}.\n")
    for name, row in ROWS.items():
        parts.append(f"## {row.title}\n\n{row.about}\n")
        known = record.get("rows", {}).get(name)
        if record and known is None:
            parts.append("Not run: no time was left.\n")
        elif known is not None:
            parts += [as_markdown(table) + "\n" for table in known["tables"]]
            parts += [f"{known['note']}\n"] if known["note"] else []
    return "\n".join(parts)


def publish(record: dict[str, Any], folder: Path) -> None:
    (folder / "gpu.md").write_text(page(record))
    (folder / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")


def measure(options: argparse.Namespace) -> int:
    """Run everything, and publish as it comes. Returns the exit code."""
    deadline = time.monotonic() + options.seconds

    def left() -> float:
        return deadline - time.monotonic() - 1  # for ending

    print(f"tests on {options.device} ...", flush=True)
    tests = run(tests_command(options), min(TESTS_SECONDS, left()), shown=False)
    lines = tests.output.strip().splitlines() or ["no output"]
    summary = lines[-1].strip("= ") if tests.code is not None else tests.note.rstrip(".")
    print(summary if tests.code == 0 else tests.output, flush=True)
    record: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "tests": {"code": tests.code, "seconds": tests.seconds, "summary": summary},
        "rows": {},
    }
    publish(record, options.out)
    with tempfile.TemporaryDirectory() as folder:
        # the imports of a process take longer than tiny rows
        for names in [list(ROWS)] if options.tiny else [[name] for name in ROWS]:
            if left() < LEAST_SECONDS:
                print(f"{', '.join(names)}: no time was left", flush=True)
                continue
            ended = run(rows_command(names, folder, options), min(sum(ROWS[name].seconds for name in names), left()))
            for name in names:
                path = Path(folder, f"{name}.json")
                found = json.loads(path.read_text()) if path.exists() else {"tables": []}
                record |= {fact: found[fact] for fact in FACTS if fact in found}
                record["rows"][name] = {"tables": found["tables"], "note": ended.note}
            print(f"\n{', '.join(names)}: {ended.seconds:.0f} s. {ended.note}", flush=True)
            publish(record, options.out)
    print(f"written to {options.out}")
    return 0 if tests.code == 0 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=450, help="for all of it")
    parser.add_argument("--out", type=Path, help="a folder in place of benchmarks/results")
    add_options(parser)
    options = parser.parse_args()
    if options.out is None and (options.tiny or options.device == "cpu"):
        parser.error("pass --out: what a CPU or --tiny measures is nothing to publish")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device here, so nothing was run", file=sys.stderr)
        return 2
    options.out = options.out or ROOT / "benchmarks" / "results"
    options.out.mkdir(parents=True, exist_ok=True)
    return measure(options)


if __name__ == "__main__":
    sys.exit(main())

"""What does merging into a checkpoint on the disk cost over copying it, and over loading, merging and saving a model?

A synthetic model of linear layers in bfloat16, in shards, with an adapter on every one, or on q and v alone. Each
candidate runs in a process of its own, whose peak of resident memory is shown, and what it rose by over that after the
imports; the times are without imports, and until the disk has the files, but for the bare copy. PEFT loads the model
with transformers, merges and saves it.

    python benchmarks/checkpoint.py --gigabytes 4 --peft
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import Spread, count
from options import DTYPES, common_parser, parse
from report import Cell, Report
from safetensors.torch import save_file
from torch import nn

import lora_plus

SHARD = 2**28
"""Bytes of a file, about."""

MEASURE = """
import json, os, shutil, sys, time
from pathlib import Path
name, base, adapter, out, threads = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
if name.startswith("merge"):
    from lora_plus import merge_checkpoint
    import lora_plus.surgery.checkpoint.merge
elif name == "peft":
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

def flush(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)

def peak():  # unlike ru_maxrss not the parent's
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

def run():
    if name.startswith("merge"):
        return merge_checkpoint(base, adapter, out)
    if name == "peft":
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="256MB")
    else:
        shutil.copytree(base, out)
    for path in Path(out).iterdir() if name != "copy" else ():
        flush(path)

before = peak()
wall, cpu = time.perf_counter(), time.process_time()
run()
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print("\\n" + json.dumps([wall, cpu, peak(), peak() - before]))
"""


def llama(size: float, dtype: torch.dtype) -> nn.Module:
    """A Llama of about so many bytes, without values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, hidden = 2048, 5632
    layer = (4 * width * width + 3 * width * hidden) * dtype.itemsize
    layers = max(1, round(size / layer))
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=16,
        tie_word_embeddings=False, dtype=dtype,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def prepare(folder: Path, size: float, r: int, dtype: torch.dtype) -> int:
    """Write the checkpoint and its adapters, in PEFT's format, and return the checkpoint's bytes."""
    base = folder / "base"
    base.mkdir()
    model = llama(size, dtype)
    model.config.save_pretrained(base)  # type: ignore[union-attr, operator]
    weight_map, held, used, number, total = {}, {}, 0, 0, 0
    state = list(model.state_dict().items())
    for position, (name, tensor) in enumerate(state):
        held[name] = (torch.randn(tensor.shape) * 0.02).to(dtype)
        used += held[name].nbytes
        total += held[name].nbytes
        weight_map[name] = f"model-{number}.safetensors"
        if used > SHARD or position + 1 == len(state):
            save_file(held, base / weight_map[name], {"format": "pt"})
            held, used, number = {}, 0, number + 1
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    for file, targets in ADAPTERS.items():
        lora_plus.inject_lora(model, targets, exclude=["lm_head"], r=r)
        for module in model.modules():
            if isinstance(module, lora_plus.LoRALinear):
                nn.init.normal_(module.lora_B["default"], std=0.02)
        lora_plus.save_adapter(model, folder / file)
        lora_plus.remove_lora(model)
    return total


ADAPTERS: dict[str, Any] = {"all": "all-linear", "qv": re.compile(r".*\.[qv]_proj")}
"""The adapters' folders, and what they are on."""
CANDIDATES = {"copy": "all", "copy, flushed": "all", "merge q and v": "qv", "merge all": "all", "peft": "all"}
"""What is measured, and with which adapter."""


@dataclass(frozen=True)
class Run:
    """What one run in a process of its own took: seconds, and bytes of memory."""

    wall: float
    cpu: float
    peak: float
    rise: float


def measure(name: str, folder: Path) -> Run:
    """Run a candidate in a process of its own."""
    out = folder / "out"
    os.sync()
    paths = (str(folder / part) for part in ("base", CANDIDATES[name], "out"))
    command = [sys.executable, "-c", MEASURE, name, *paths, str(torch.get_num_threads())]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return Run(*json.loads(done.stdout.splitlines()[-1]))


COLUMNS = (
    "what",
    "CPU",
    "CPU / copying (quartiles)",
    "wall",
    "wall / copying and flushing",
    "peak memory",
    "over the imports",
)


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=1, help="of the checkpoint")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--peft", action="store_true", help="measure loading, merging and saving with PEFT too")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    parser.set_defaults(rounds=5, dtype=["bfloat16"], clock="wall")
    options = parse(parser, gigabytes=0.25)
    report = Report(__doc__, options)
    names = [name for name in CANDIDATES if name != "peft" or options.peft]
    for dtype in options.dtype:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            size = prepare(Path(folder), options.gigabytes * 1e9, options.r, DTYPES[dtype])
            found: dict[str, list[Run]] = {name: [] for name in names}
            for _ in range(options.rounds):
                for name in names:
                    found[name].append(measure(name, Path(folder)))
        cpu = {name: Spread(tuple(run.cpu for run in runs)) for name, runs in found.items()}
        wall = {name: Spread(tuple(run.wall for run in runs)) for name, runs in found.items()}
        rows: list[list[Cell]] = []
        for name, runs in found.items():
            ratios = (cpu[name], cpu[name].over(cpu["copy"]), wall[name], wall[name].over(wall["copy, flushed"]))
            rows.append([name, *ratios, *(count(max(run.__dict__[part] for run in runs)) for part in ("peak", "rise"))])
        report.table(f"{count(size)} in {dtype}, r = {options.r}", COLUMNS, rows, drawn=COLUMNS[2:3])
    report.close()


if __name__ == "__main__":
    main()

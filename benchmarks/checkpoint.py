"""What does merging into a checkpoint on the disk cost over copying it, and over loading, merging and saving a model?

A synthetic model of linear layers in bfloat16, every one with an adapter, in shards. Each candidate runs in a
process of its own, whose peak of resident memory is shown, imports included; the time is without them, and until the
disk has the files. PEFT loads the model with transformers, merges and saves it.

    python benchmarks/checkpoint.py --gigabytes 4 --peft
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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
if name == "lora_plus":
    from lora_plus import merge_checkpoint
elif name == "peft":
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

def flush(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)

def run():
    if name == "lora_plus":
        return merge_checkpoint(base, adapter, out)
    if name == "peft":
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="256MB")
    else:
        shutil.copytree(base, out)
    for path in Path(out).iterdir():
        flush(path)

start = time.perf_counter()
run()
seconds = time.perf_counter() - start
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])  # unlike ru_maxrss not the parent's
print("\\n" + json.dumps([seconds, peak * 1024]))
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
    """Write the checkpoint and its adapter, in PEFT's format, and return the checkpoint's bytes."""
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
    lora_plus.inject_lora(model, "all-linear", exclude=["lm_head"], r=r)
    for module in model.modules():
        if isinstance(module, lora_plus.LoRALinear):
            nn.init.normal_(module.lora_B["default"], std=0.02)
    lora_plus.save_adapter(model, folder / "adapter")
    return total


def measure(name: str, folder: Path) -> tuple[float, float]:
    """Seconds and bytes at the peak of one run in a process of its own."""
    out = folder / "out"
    os.sync()
    command = [
        sys.executable,
        "-c",
        MEASURE,
        name,
        *(str(folder / part) for part in ("base", "adapter", "out")),
        str(torch.get_num_threads()),
    ]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


COLUMNS = ("what", "checkpoint", "time", "speed", "time / copying (quartiles)", "peak memory")


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=1, help="of the checkpoint")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--peft", action="store_true", help="measure loading, merging and saving with PEFT too")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    parser.set_defaults(rounds=5, dtype=["bfloat16"], clock="wall")
    options = parse(parser, gigabytes=0.25)
    report = Report(__doc__, options)
    names = ["copy", "lora_plus", *(["peft"] if options.peft else [])]
    for dtype in options.dtype:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            size = prepare(Path(folder), options.gigabytes * 1e9, options.r, DTYPES[dtype])
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
            for _ in range(options.rounds):
                for name in names:
                    found[name].append(measure(name, Path(folder)))
        spreads = {name: Spread(tuple(seconds for seconds, _ in runs)) for name, runs in found.items()}
        rows: list[list[Cell]] = []
        for name, spread in spreads.items():
            peak = count(max(peak for _, peak in found[name]))
            rows.append([name, count(size), spread, spread.rate(size, "B/s"), spread.over(spreads["copy"]), peak])
        report.table(f"{dtype}, r = {options.r}, wall", COLUMNS, rows, drawn=COLUMNS[4:5])
    report.close()


if __name__ == "__main__":
    main()

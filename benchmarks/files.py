"""What do saving and loading adapters cost over writing and reading the same tensors, here and in PEFT?

The floors are safetensors' own ``save_file``, and ``load_file`` with a copy of each tensor, since ``load_file`` alone
may just map the file into memory. Loading is into a plain model, so it contains the injection; both libraries get a
model whose base weights take up no memory, since neither looks at them. Elapsed time says what a user waits for, the
disk included; CPU time what the library does. lora_plus waits until the disk has the file ("fsync"), which safetensors
and PEFT do not; that is in the elapsed time. "Replace" and "hotswap" put new values into an adapter that the model has.

    python benchmarks/files.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import Call, Task, count, interleaved
from options import common_parser, parse
from peers import build, trainable
from report import Cell, Report
from safetensors.torch import load_file, save_file
from torch import nn
from workloads import LLAMA_TARGETS

import lora_plus
from examples.demo.llama import Config, Llama
from lora_plus.files import adapter_state_dict, to_peft

SHAPES = {
    "smollm2": Config(vocab=49152, width=576, hidden=1536, layers=30, heads=9, kv_heads=3),
    "7B": Config(vocab=32000, width=4096, hidden=11008, layers=32, heads=32, kv_heads=32),
}


def hollow(config: Config) -> nn.Module:
    """A model whose every parameter is one stored number, repeated."""
    with torch.device("meta"):
        model = Llama(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(1).expand(parameter.shape), requires_grad=False))
    return model


def tasks(config: Config, r: int, folder: Path) -> tuple[dict[str, Task | Call], int]:
    """What is timed, and the bytes of the adapter's tensors."""
    plain = hollow(config)
    ours, theirs = (build(name, plain, LLAMA_TARGETS, r) for name in ("lora_plus", "peft"))
    tensors = {name: tensor.detach().clone() for name, tensor in adapter_state_dict(ours).items()}
    raw, native, as_peft, by_peft = (folder / name for name in ("raw", "a.safetensors", "as_peft", "by_peft"))
    written: dict[str, Task | Call] = {
        "safetensors, save": lambda: save_file(tensors, raw),
        "lora_plus, save": lambda: lora_plus.save_adapter(ours, native),
        "lora_plus, save as PEFT": lambda: lora_plus.save_adapter(ours, as_peft),
        "peft, save": lambda: theirs.save_pretrained(str(by_peft)),  # type: ignore[operator]
    }
    for save in written.values():
        save()  # type: ignore[operator]  # so that there is something to load
    loaded: dict[str, Task | Call] = {
        "safetensors, load": lambda: [tensor.clone() for tensor in load_file(raw).values()],
        "safetensors, load by mapping": lambda: load_file(raw),
    }
    for name, path in (("lora_plus, load", native), ("lora_plus, load PEFT's", by_peft)):
        loaded[name] = loading(lora_plus.load_adapter, lora_plus.remove_lora, hollow(config), path)
    loaded["peft, load"] = loading(_load_in_peft, lambda model: model.unload(), hollow(config), by_peft)
    held, swapped = lora_plus.load_adapter(hollow(config), by_peft), _load_in_peft(hollow(config), by_peft)
    loaded["lora_plus, replace PEFT's"] = lambda: lora_plus.load_adapter(held, by_peft, replace=True)
    loaded["lora_plus, replace from memory"] = lambda: lora_plus.load_adapter(held, to_peft(ours), replace=True)
    loaded["peft, hotswap"] = lambda: _hotswap_in_peft(swapped, by_peft)
    return written | loaded, sum(parameter.nbytes for parameter in trainable(ours))


def loading(load: Callable[[Any, Path], Any], unload: Callable[[Any], object], model: nn.Module, path: Path) -> Task:
    """Load into the model, and take the adapter out again."""
    made: list[Any] = []
    return Task(lambda: made.append(load(model, path)), lambda: unload(made.pop()))


def _load_in_peft(model: Any, path: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(model, str(path))


def _hotswap_in_peft(model: Any, path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    hotswap_adapter(model, str(path), "default")


def compare(config: Config, r: int, clock: str, options: argparse.Namespace) -> list[list[Cell]]:
    """A row for each way of saving and loading."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        timed, size = tasks(config, r, Path(folder))
        seconds = interleaved(timed, options, clock=clock)
    rows: list[list[Cell]] = []
    for name, spread in seconds.items():
        floor = seconds["safetensors, save" if "save" in name else "safetensors, load"]
        rows.append([name, count(size), spread, spread.rate(size, "B/s"), spread.over(floor)])
    return rows


COLUMNS = ("what", "tensors", "time", "speed", "time / safetensors (quartiles)")


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--r", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one if not given")
    options = parse(parser, shapes=["smollm2"], r=[8])
    report = Report(__doc__, options)
    for shapes in options.shapes:
        for r in options.r:
            for clock in ("wall", "cpu"):
                rows = compare(SHAPES[shapes], r, clock, options)
                report.table(f"{shapes}, 7 layers a block, r = {r}, {clock}", COLUMNS, rows, drawn=COLUMNS[4:5])
    report.close()


if __name__ == "__main__":
    main()

"""The options that all benchmarks have."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measuring import CLOCKS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def common_parser(question: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=question, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--dtype", nargs="+", choices=DTYPES, help="of the base; float32 on a CPU, bfloat16 on a GPU")
    made.add_argument("--rounds", type=int, default=15, help="samples of each candidate")
    made.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    made.add_argument("--clock", choices=CLOCKS, help="cpu for one thread, wall for several, events on a GPU")
    made.add_argument("--json", type=Path, help="write all figures to this file, those of each round too")
    made.add_argument("--plot", type=Path, help="draw the tables into this file")
    made.add_argument("--short", action="store_true", help="a quick look: small sizes, few rounds")
    return made


def parse(made: argparse.ArgumentParser, **short: object) -> argparse.Namespace:
    """The options; with ``--short`` the named ones take the given values, unless the command line says otherwise."""
    known, _ = made.parse_known_args()
    if known.short:
        made.set_defaults(**{"rounds": 3, **short})
    options = made.parse_args()
    on_gpu = torch.device(options.device).type == "cuda"
    options.dtype = options.dtype or ["bfloat16" if on_gpu else "float32"]
    options.clock = options.clock or ("events" if on_gpu else "cpu" if options.threads == 1 else "wall")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options

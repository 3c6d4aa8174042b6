"""Tables in which the frozen model, this library and PEFT do the same: time, memory, and the norms of gradients."""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from allocations import memory
from measuring import Call, Spread, count, interleaved
from peers import FLOOR, adapter_dtype, build, trainable
from report import Cell, Report
from torch import Tensor, nn
from workloads import Workload, placed, step

Contenders = Mapping[str, tuple[str, Mapping[str, Any]]]
"""Label -> the peer, and its settings in its library's words."""


def contenders(ours: Mapping[str, Any] | None = None, theirs: Mapping[str, Any] | None = None) -> Contenders:
    """The frozen model, this library, and PEFT with factors in float32, its default, and in the dtype of the base."""
    theirs = theirs or {}
    return {
        FLOOR: (FLOOR, {}),
        "lora_plus": ("lora_plus", ours or {}),
        "peft": ("peft", theirs),
        "peft in the base's dtype": ("peft", {**theirs, "autocast_adapter_dtype": False}),
    }


@dataclass(frozen=True)
class Setting:
    """One table: what is adapted, and how it is run."""

    title: str
    workload: Workload
    tokens: tuple[int, int]
    r: int
    among: Contenders = field(default_factory=contenders)
    parts: int = 1
    """The time is that of one of so many equal layers."""
    prepare: Callable[[nn.Module], object] = lambda model: None
    """What is done to a model that has its adapters, in place."""
    replay: bool = False
    optimizer: bool = False


def norms(model: nn.Module) -> list[Cell]:
    """The norms of the gradients of all A and of all B; dashes without adapters.

    Raises:
        ValueError: one is zero or not finite, so that what was timed is no training.
    """
    found: list[Cell] = []
    for part in ("lora_A", "lora_B"):
        named = model.named_parameters()
        gradients = [p.grad.float() for name, p in named if part in name and p.grad is not None]
        norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm()) if gradients else math.nan
        if trainable(model) and not (math.isfinite(norm) and norm > 0):
            raise ValueError(f"the gradient of {part} is {norm}")
        found.append(count(norm, "norm") if trainable(model) else "-")
    return found


def backward_once(workload: Workload, model: nn.Module, x: Tensor) -> None:
    """Gradients, the same ones for the same function."""
    torch.manual_seed(0)
    y = workload.output(model, x)
    y.backward(torch.randn_like(y) if y.ndim else None)


def held(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of a model and of an optimizer's state."""
    states = optimizer.state.values() if optimizer else ()
    tensors = [*model.parameters(), *(tensor for state in states for tensor in state.values())]
    return sum(tensor.nbytes for tensor in tensors)


def captured(run: Call) -> Call:
    """The same work as one CUDA graph, which is launched at once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def why(error: Exception) -> str:
    """What a cell says of a failure."""
    if isinstance(error, ImportError):
        return "not installed"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:80]}"


STEP = ("what", "adapters", "step", "step / frozen (quartiles)", "tokens/s")
NORMS = ("grad A", "grad B")
REPLAYED = ("replayed", "replayed / frozen (quartiles)")


def compare(setting: Setting, base: nn.Module, x: Tensor, options: argparse.Namespace) -> list[list[Cell]]:
    """A line for each implementation; one that fails says why."""
    steps, replays, facts = dict[str, Call](), dict[str, Call](), dict[str, list[Cell]]()
    adapters, failures = dict[str, str](), dict[str, str]()
    for label, (peer, own) in setting.among.items():
        try:
            model = build(peer, base, setting.workload.targets, setting.r, **own)
            setting.prepare(model)
            backward_once(setting.workload, model, x)
            of_gradients = norms(model)
            trained = trainable(model)
            optimizer = torch.optim.AdamW(trained, lr=1e-6) if setting.optimizer and trained else None
            run = step(setting.workload, model, x, optimizer)
            run()  # which clears the gradients
            peak, _ = memory(run, options.device)
            facts[label] = [count(peak.median + held(model, optimizer)), *of_gradients]
            adapters[label], steps[label] = adapter_dtype(model), run
            if setting.replay and options.device == "cuda":
                replays[label] = captured(run)
        except Exception as error:
            failures[label] = why(error)
            x.grad = None
            gc.collect()
            torch.cuda.empty_cache()
    seconds, replayed = (timed(calls, setting.parts, options) for calls in (steps, replays))
    lines: list[list[Cell]] = []
    for label in setting.among:
        if label not in seconds:
            lines.append([label, failures[label], *[""] * (len(columns(setting)) - 2)])
            continue
        rate = seconds[label].rate(math.prod(setting.tokens), "tokens/s")
        line: list[Cell] = [label, adapters[label], seconds[label], over(seconds, label), rate]
        if setting.replay:
            line += [replayed.get(label, failures.get(label, "")), over(replayed, label)]
        lines.append([*line, *facts[label]])
    return lines


def columns(setting: Setting) -> tuple[str, ...]:
    return (*STEP, *(REPLAYED if setting.replay else ()), "peak", *NORMS)


def timed(calls: Mapping[str, Call], parts: int, options: argparse.Namespace) -> dict[str, Spread]:
    """Seconds of each, for one of so many parts."""
    found = interleaved(calls, options) if calls else {}
    return {label: spread.per(parts, "s") for label, spread in found.items()}


def over(seconds: Mapping[str, Spread], label: str) -> Cell:
    """The ratio to the frozen model; empty where either was not timed."""
    return seconds[label].over(seconds[FLOOR]) if label in seconds and FLOOR in seconds else ""


def show(report: Report, settings: Sequence[Setting], options: argparse.Namespace) -> None:
    """A table for each setting; all are of one model."""
    model, given = None, None
    for setting in settings:
        if model is None or given is None or given.shape[:2] != setting.tokens:
            model, given = placed(setting.workload, setting.tokens, options.dtype[0], options.device)
        report.table(setting.title, columns(setting), compare(setting, model, given, options))

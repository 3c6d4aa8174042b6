"""What does torch.compile have to compile again when adapters change, here and in PEFT?

A small language model is compiled for a backend that counts the graphs it is given. Each line of the table is a change
of the state and a step after it: forward and backward. "3" means three graphs were compiled in that step, "0" that
everything compiled before was used again; "raises" that the step failed. ``--time`` also times a step that Inductor has
compiled, beside the frozen model's.

    python benchmarks/compile.py --time
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from options import common_parser, parse
from peers import build
from report import Cell, Report
from step import COLUMNS, compare
from torch import Tensor, nn
from workloads import LLAMA_TARGETS, add_options

import lora_plus
from examples.demo import llama


@dataclass(frozen=True)
class Library:
    """How one implementation does what is measured."""

    add: Callable[[Any, str, int], object]
    """(model, adapter, r)"""
    use: Callable[[Any, str], object]
    disabled: Callable[[Any], Any]
    merge: Callable[[Any], object]
    unmerge: Callable[[Any], object]


def _inject(model: nn.Module, adapter: str, r: int) -> None:
    lora_plus.inject_lora(model, LLAMA_TARGETS, r=r, alpha=2 * r, adapter=adapter)


def _add_to_peft(model: Any, adapter: str, r: int) -> None:
    import peft

    model.add_adapter(adapter, peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(LLAMA_TARGETS)))


LIBRARIES = {
    "lora_plus": Library(
        _inject, lora_plus.set_adapter, lora_plus.disabled, lora_plus.merge_lora, lora_plus.unmerge_lora
    ),
    "peft": Library(
        _add_to_peft,
        lambda model, adapter: model.set_adapter(adapter),
        lambda model: model.disable_adapter(),
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
    ),
}


@dataclass
class State:
    """A model and what has been entered."""

    model: Any
    library: Library | None
    entered: ExitStack = field(default_factory=ExitStack)


def _both(use: Callable[[Any, Library], object]) -> Callable[[State], object]:
    """An event that the frozen model does not have."""
    return lambda state: None if state.library is None else use(state.model, state.library)


def _disable(state: State) -> None:
    if state.library is not None:
        state.entered.enter_context(state.library.disabled(state.model))


EVENTS: dict[str, Callable[[State], object]] = {
    "first step": lambda state: None,
    "the same again": lambda state: None,
    "adapters disabled": _disable,
    "enabled again": lambda state: state.entered.close(),
    "another adapter of the same rank": _both(lambda model, library: library.use(model, "same")),
    "the first adapter again": _both(lambda model, library: library.use(model, "default")),
    "the other of the same rank again": _both(lambda model, library: library.use(model, "same")),
    "an adapter of another rank": _both(lambda model, library: library.use(model, "wider")),
    "the first adapter, back from it": _both(lambda model, library: library.use(model, "default")),
    "eval()": lambda state: state.model.eval(),
    "merged, in eval()": _both(lambda model, library: library.merge(model)),
    "unmerged": _both(lambda model, library: library.unmerge(model)),
    "train() again": lambda state: state.model.train(),
}
"""What happens before a step, in this order."""


def graphs(name: str, options: argparse.Namespace) -> list[str]:
    """Graphs compiled in the step after each event."""
    torch._dynamo.reset()
    base = llama.Llama(llama.TINY)
    base.embed = nn.Identity()  # type: ignore[assignment]
    state = State(build(name, base.to(options.device), LLAMA_TARGETS, 4), LIBRARIES.get(name))
    if state.library is not None:
        state.library.add(state.model, "same", 4)
        state.library.add(state.model, "wider", 8)
        state.library.use(state.model, "default")
    x = torch.randn(2, 16, llama.TINY.width, device=options.device, requires_grad=True)
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal compiled
        compiled += 1
        return graph.forward

    run = torch.compile(state.model, backend=backend)
    cells = []
    for event in EVENTS.values():
        before = compiled
        try:
            event(state)
            run(x).square().mean().backward()
            cells.append(str(compiled - before))
        except Exception as error:
            cells.append(f"raises {type(error).__name__}")
    return [*cells, str(compiled)]


def main() -> None:
    parser = common_parser(__doc__)
    add_options(parser, "bert")
    parser.add_argument("--time", action="store_true", help="time a compiled step of --model too")
    parser.add_argument("--r", type=int, default=8)
    options = parse(parser, tokens=(1, 128))
    options.compile, options.optimizer, options.dora, options.peers = (
        True,
        False,
        False,
        ["frozen", "lora_plus", "peft", "naive"],
    )
    report = Report(__doc__, options)
    torch._dynamo.config.recompile_limit = 64  # above it torch stops compiling, and counting would end
    names = ("frozen", "lora_plus", "peft")
    counted = {name: graphs(name, options) for name in names}
    rows: list[list[Cell]] = [
        [event, *cells] for event, *cells in zip([*EVENTS, "in all"], *counted.values(), strict=True)
    ]
    report.table("graphs compiled in the step after", ("event", *names), rows)
    for model in options.model if options.time else ():
        for dtype in options.dtype:
            rows = compare(model, dtype, options.r, options)
            report.table(f"{model} compiled, {dtype}, r = {options.r}", COLUMNS, rows, drawn=COLUMNS[3:4])
    report.close()


if __name__ == "__main__":
    main()

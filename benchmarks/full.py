"""What does LoRA save? Full fine-tuning beside LoRA, both with AdamW: what a step holds, its time, the checkpoint.

Bytes are counted: parameters, gradients and Adam's state by their tensors; activations are what the forward keeps for
the backward, every storage once and parameters left out. The peak is the most that tensors take up at one moment of a
step, parameters and Adam's state included; it is less than the sum, as activations go while gradients come. The usual
estimate is in multiples of the model: 4 for full training, 1 + 4 m where LoRA trains the part m of the weights.

    python benchmarks/full.py --model smollm2 bert --dtype float32 bfloat16
    python benchmarks/full.py --docs docs    # and write the table and the picture of the page docs/savings.md
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import workloads
from allocations import memory
from measuring import Spread, count, interleaved
from memory import saved
from options import DTYPES, common_parser, parse
from peers import trainable
from report import Cell, Report, Shown
from safetensors.torch import save_model
from torch import Tensor, nn

import lora_plus

Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Subject:
    """A model that is trained, on random tokens."""

    make: Callable[[argparse.Namespace], nn.Module]
    """In float32 on the CPU."""
    targets: tuple[str, ...]
    """The last parts of the names of the layers that LoRA adapts."""
    vocabulary: int
    loss: Callable[[nn.Module, Tensor], Tensor]


SUBJECTS = {
    "smollm2": Subject(
        workloads.smollm2_model,
        workloads.LLAMA_TARGETS,
        workloads.SMOLLM2.vocab,
        lambda model, tokens: F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten()),
    ),
    "bert": Subject(
        workloads.bert_model,
        workloads.BERT_TARGETS,
        30522,
        lambda model, tokens: model(input_ids=tokens).last_hidden_state.float().square().mean(),
    ),
}


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind the tensors, each storage once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class Held:
    """Bytes that a training step holds."""

    parameters: int
    gradients: int
    state: int
    """Of the optimizer."""
    activations: int
    peak: int


def training_step(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer) -> None:
    """Forward, backward, and the optimizer's part; no gradient is left."""
    loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def held(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, device: str = "cpu") -> Held:
    """What a step holds once the optimizer has its state."""
    step = partial(training_step, model, loss, optimizer)
    gradients: list[int] = []

    def look(*_: object) -> None:
        gradients.append(size(p.grad for p in model.parameters() if p.grad is not None))

    hook = optimizer.register_step_pre_hook(look)
    step()
    hook.remove()
    parameters = size(model.parameters())
    state = size(value for values in optimizer.state.values() for value in values.values())
    activations = saved(partial(loss, model), model)
    peak, _ = memory(step, device)
    held_at_once = parameters + state + int(peak.median)
    return Held(parameters, gradients[0], state, int(activations.median), held_at_once)


def checkpoint_size(model: nn.Module, full: bool) -> int:
    """Bytes of the file that keeps what was trained: the model, or the adapter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.safetensors")
        if full:
            save_model(model, str(path))
        else:
            lora_plus.save_adapter(model, path)
        return path.stat().st_size


def candidates(base: nn.Module, targets: tuple[str, ...], ranks: Iterable[int]) -> Iterator[tuple[str, nn.Module]]:
    """Copies of the model, to be trained in full and with LoRA of each rank; the latter share its weights."""
    yield "full", copy.deepcopy(base)
    for r in ranks:
        shared: Any = {id(parameter): parameter for parameter in base.parameters()}
        yield f"LoRA, r = {r}", lora_plus.inject_lora(copy.deepcopy(base, shared), targets, r=r)


COLUMNS = (
    "training", "trained", "parameters", "gradients", "Adam", "activations", "peak", "estimate", "step", "checkpoint"
)  # fmt: skip
PARTS = COLUMNS[2:6]


def compare(name: str, dtype: str, options: argparse.Namespace) -> list[list[Cell]]:
    """A row for each way of training."""
    subject = SUBJECTS[name]
    base = subject.make(options).to(device=options.device, dtype=DTYPES[dtype]).train()
    tokens = torch.randint(subject.vocabulary, options.tokens, device=options.device)
    loss: Loss = lambda model: subject.loss(model, tokens)  # noqa: E731
    whole, numbers = size(base.parameters()), sum(parameter.numel() for parameter in base.parameters())
    rows, steps = list[list[Cell]](), {}
    for training, model in candidates(base, subject.targets, options.r):
        parameters = trainable(model)
        optimizer = torch.optim.AdamW(parameters, lr=1e-6)
        found = held(model, loss, optimizer, options.device)
        part = sum(parameter.numel() for parameter in parameters)
        estimate = whole * (4 * part if training == "full" else numbers + 4 * part) / numbers
        steps[training] = partial(training_step, model, loss, optimizer)
        bytes_of_parts = (found.parameters, found.gradients, found.state, found.activations, found.peak, estimate)
        rows.append([training, f"{100 * part / numbers:.3g} %", *map(count, bytes_of_parts)])
        rows[-1].append(count(checkpoint_size(model, training == "full")))
    for row, seconds in zip(rows, interleaved(steps, options).values(), strict=True):
        row.insert(-1, seconds)
    return rows


# ---- the page --------------------------------------------------------------------------------------------------------

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
"""Told apart by all kinds of colour vision (Okabe & Ito)."""
INK = "#808080"
"""Readable on white and on black."""


def markdown(tables: Iterable[Shown]) -> str:
    """All tables as one, with the title of each in the first column."""
    rows: list[Sequence[str]] = [["model", *COLUMNS], ["---", "---", *["---:"] * (len(COLUMNS) - 1)]]
    rows += [[table.title, *map(str, row)] for table in tables for row in table.rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw(tables: list[Shown], path: Path) -> None:
    """A panel for each table: the parts of what a step holds, its peak, and the estimate."""
    import matplotlib
    from matplotlib.figure import Figure

    looks = {"text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    with matplotlib.rc_context({**looks, "svg.hashsalt": "full", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(4.8, 1 + 1.1 * len(tables)), layout="constrained")  # as wide as a phone shows it
        panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
        for table, panel in zip(tables, panels, strict=True):
            figures = {
                name: [row[n].median / 2**20 for row in table.rows]  # type: ignore[union-attr]
                for n, name in enumerate(table.columns)
                if isinstance(table.rows[0][n], Spread)
            }
            rows, left = range(len(table.rows)), [0.0] * len(table.rows)
            for name, colour in zip(PARTS, COLOURS, strict=True):
                panel.barh(rows, figures[name], left=left, color=colour, label=name)
                left = [a + b for a, b in zip(left, figures[name], strict=True)]
            panel.plot(figures["peak"], rows, "D", color=INK, label="peak")
            panel.plot(figures["estimate"], rows, "|", color=INK, markersize=20, markeredgewidth=2, label="estimate")
            panel.set_yticks(rows, [str(row[0]) for row in table.rows])
            panel.invert_yaxis()
            panel.set_title(f"{table.title} [MiB]", loc="left", fontsize=9)
            panel.set_facecolor("none")
            panel.spines[["top", "right"]].set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, transparent=True, metadata={"Date": None})


def write(tables: list[Shown], folder: Path) -> None:
    """Replace the table on the page of the documentation, and its picture."""
    page = folder / "savings.md"
    page.write_text(re.sub(r"(^\|.*\n)+", lambda _: markdown(tables), page.read_text(), count=1, flags=re.MULTILINE))
    draw(tables, folder / "savings.svg")


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--tokens", type=workloads.sizes, metavar="BxT", default=(1, 256))
    parser.add_argument("--r", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--random-weights", action="store_true", help="do not fetch those of smollm2")
    parser.add_argument("--docs", type=Path, help="the folder of the documentation, to write its table and picture")
    parser.set_defaults(rounds=5)
    options = parse(parser, tokens=(1, 64))
    report = Report(__doc__, options)
    for name, dtype in itertools.product(options.model, options.dtype):
        report.table(f"{name}, {dtype}", COLUMNS, compare(name, dtype, options), drawn=("peak",))
    report.close()
    if options.docs:
        write(report.tables, options.docs)


if __name__ == "__main__":
    main()

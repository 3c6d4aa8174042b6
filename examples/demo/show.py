"""What the demo prints."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from .answers import Example, Verdict

QUIET_EVERY = 10
"""Steps between two lines where no progress bar can be drawn, in a log file for example."""

MERGE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far the held-out loss, in nats per token, may move when the adapter is merged into weights of a dtype.

Rounding the merged weights moves single tokens by about 1e-5 and 0.2, in either direction; their mean moves by
about 1e-7 and 2e-3. An adapter that is lost or wrongly scaled moves it by far more than the limits.
"""


@contextmanager
def progress(console: Console, steps: int) -> Iterator[Callable[[float, int], None]]:
    """A progress bar; the function it gives is called with the loss and the number of tokens of each step."""
    start, seen = perf_counter(), 0
    with Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s  left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("training", total=steps, loss=float("nan"), speed=0.0)

        def report(loss: float, tokens: int) -> None:
            nonlocal seen
            seen += tokens
            bar.update(task, advance=1, loss=loss, speed=seen / (perf_counter() - start))
            step = int(bar.tasks[task].completed)
            if not console.is_terminal and step % QUIET_EVERY == 0:
                console.print(f"step {step}/{steps}  loss {loss:.3f}")

        yield report
    done = int(bar.tasks[task].completed)
    console.print(f"{done} of {steps} steps, {perf_counter() - start:.0f} seconds of training", highlight=False)


def comparison(
    console: Console,
    examples: Sequence[Example],
    before: tuple[Verdict, Sequence[str]],
    after: tuple[Verdict, Sequence[str]],
) -> None:
    """A table of what the model answered before and after the training, and how many answers were right.

    Args:
        console: Where it is printed.
        examples: The held-out examples, all of which were judged; the first ones were also written out.
        before: The verdict on all of them, and the texts of the first ones.
        after: The same, after the training.
    """
    table = Table(
        "prompt", Column("before", no_wrap=True, max_width=18), Column("after", no_wrap=True), box=box.SIMPLE_HEAD
    )
    for example, *texts in zip(examples, before[1], after[1], strict=False):
        table.add_row(Text(example.prompt), *(marked(text, example.answer) for text in texts))
    table.add_section()
    judged = [before[0], after[0]]
    table.add_row(f"right, of {len(examples)} held out", *(f"{verdict.right.sum()}" for verdict in judged))
    table.add_row("held-out loss, nats per token", *(f"{verdict.losses.mean():.3f}" for verdict in judged))
    console.print(table, highlight=False)


def marked(text: str, answer: str) -> Text:
    """The model's text behind a mark that says whether it begins with the answer."""
    text = " ".join(text.split())
    mark, style = ("✓", "green") if text.startswith(answer) else ("✗", "red")
    return Text.assemble((f"{mark} ", style), printable(text))


def printable(text: str) -> str:
    """The text with an escape such as ``\\x1b`` for each character that would act on the terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def agreement(
    console: Console, path: Path, dtype: torch.dtype, trained: Tensor, reloaded: Tensor, merged: Tensor
) -> bool:
    """Lines that compare the losses ``(n,)`` of the held-out tokens; returns whether the three models agree.

    Reloading must give back every bit. Merging rounds each weight once to the base's ``dtype``, so there the
    mean may move by ``MERGE_TOLERANCE[dtype]``.
    """
    shift = (merged.double() - trained.double()).mean().item()
    lines = {
        "reloaded into a fresh model: every held-out loss is the same": torch.equal(reloaded, trained),
        f"merged into the weights: the held-out loss moved by {shift:+.1e}": abs(shift) <= MERGE_TOLERANCE[dtype],
    }
    where = Text(printable(f"adapter saved to {path} ({path.stat().st_size / 2**20:.1f} MiB)"))
    console.print(where, highlight=False, soft_wrap=True)
    for line, agrees in lines.items():
        verdict = "[green]✓ agrees[/]" if agrees else "[red]✗ DIFFERS[/]"
        console.print(f"{verdict}, {line}", highlight=False)
    return all(lines.values())

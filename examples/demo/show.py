"""What the demo prints."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .phonemes import Entry

QUIET_EVERY = 10
"""Steps between two lines where no progress bar can be drawn, in a log file for example."""


MERGE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far the held-out loss, in nats per token, may move when the adapter is merged into weights of a dtype.

Rounding the merged weights moves single tokens by about 1e-5 and 0.2, in either direction; their mean moves by
about 1e-7 and 2e-3. An adapter that is lost or wrongly scaled moves it by far more than the limits.
"""


def samples(console: Console, when: str, losses: Tensor, entries: Sequence[Entry], answers: Sequence[str]) -> None:
    """A table of words, their phonemes in the dictionary, and what the model answers."""
    title = f"[bold]{when}[/]: held-out loss {losses.mean():.3f} nats per token"
    table = Table("word", "dictionary", "the model's answer", title=title, title_justify="left", title_style="")
    for entry, answer in zip(entries, answers, strict=True):
        cells = (entry.word, entry.phonemes, " ".join(answer.split()))
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console.print(table)


def printable(text: str) -> str:
    """The text with an escape such as ``\\x1b`` for each character that would act on the terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


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


def agreement(
    console: Console, path: Path, dtype: torch.dtype, trained: Tensor, reloaded: Tensor, merged: Tensor
) -> bool:
    """A table that compares the losses ``(n,)`` of the held-out tokens; returns whether the three models agree.

    Reloading must give back every bit. Merging rounds each weight once to the base's ``dtype``, so there the
    mean may move by ``MERGE_TOLERANCE[dtype]``.
    """
    tolerance = MERGE_TOLERANCE[dtype]
    rows = {  # model -> its losses, what is expected of them, and the test of it
        "trained": (trained, "", lambda shift: True),
        "reloaded": (reloaded, "bit-equal", lambda shift: torch.equal(reloaded, trained)),
        "merged": (merged, f"loss within {tolerance:g}", lambda shift: abs(shift) <= tolerance),
    }
    table = Table("model", "held-out loss", "shift of the loss", "largest of a token", "expected", "")
    agreed = True
    for name, (losses, expected, test) in rows.items():
        difference = losses.double() - trained.double()
        shift = difference.mean().item()
        agrees = test(shift)
        agreed &= agrees
        table.add_row(
            name,
            f"{losses.double().mean():.6f}",
            f"{shift:+.1e}",
            f"{difference.abs().max():.1e}",
            expected,
            "[green]agrees[/]" if agrees else "[red]DIFFERS[/]",
        )
    where = Text(printable(f"adapter saved to {path} ({path.stat().st_size / 2**20:.1f} MiB)"))
    console.print(where, highlight=False, soft_wrap=True)
    console.print(table)
    return agreed

"""What commands print: tables, JSON, errors and progress, in a terminal and elsewhere."""

import dataclasses
import functools
import json
import math
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_plus.text import aligned, printable

from .usage import UsageError

TRACEBACK = "LORA_PLUS_TRACEBACK"
"""The environment variable that shows where an unexpected error came from."""


def say(line: object, *, err: bool = False) -> None:
    """Print one line; texts of files and names of paths in it cannot act on the terminal."""
    typer.echo(printable(line), err=err)


def complain(as_json: bool, kind: str, message: object) -> None:
    """Print an error or a warning on stderr: as text, which may have several lines, or as a line of JSON."""
    if not as_json:
        for line in f"{kind}: {message}".split("\n"):
            say(line, err=True)
        return
    problems = getattr(message, "problems", None)
    typer.echo(_json({kind: str(message), **({} if problems is None else {"problems": problems})}), err=True)


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """The command with errors and warnings as one text each on stderr, or with ``--json`` as one line of JSON each.

    After an error the exit status is 1, after Ctrl-C 130. An error that a file or an argument should not be able to
    cause says that it is a defect of this program; its status is 70.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        told: set[str] = set()
        say_so = functools.partial(complain, bool(kwargs.get("as_json")))

        def tell(message: Warning | str, *_: Any, **__: Any) -> None:
            if str(message) not in told:
                told.add(str(message))
                say_so("warning", message)

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)  # of packages among themselves
            warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's, on import; no command needs it
            warnings.showwarning = tell
            try:
                command(*args, **kwargs)
            except (typer.Exit, typer.Abort, UsageError, BrokenPipeError):
                raise  # not errors of the command; typer ends silently where nobody reads the output
            except KeyboardInterrupt:
                raise typer.Exit(130) from None
            except (OSError, ValueError, MemoryError, ImportError) as error:  # what is not installed says how
                say_so("error", "there is not enough memory" if isinstance(error, MemoryError) else error)
                raise typer.Exit(1) from error
            except Exception as error:
                first, *_ = str(error).split("\n")  # torch adds its own stack
                say_so("error", f"unexpected {type(error).__name__}: {first}")
                if os.environ.get(TRACEBACK):
                    say_so("where", traceback.format_exc().rstrip())
                else:
                    advice = f"with {TRACEBACK}=1 in the environment it shows where"
                    say_so("note", f"this is a defect of lora-plus; {advice}")
                raise typer.Exit(70) from error

    return run


def emit(as_json: bool, data: Mapping[str, Any], *lines: str) -> None:
    """Print the data as JSON, or these lines for a reader."""
    if as_json:
        typer.echo(_json(data, indent=2))
        return
    for line in lines:
        say(line)


def _json(data: Mapping[str, Any], **options: Any) -> str:
    text = json.dumps(_plain(data), allow_nan=False, **options)
    return text.replace("\x7f", "\\u007f")  # the one control character that JSON allows in a text


def _plain(value: Any) -> Any:
    """The value in JSON's types; an infinite number is a text."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table, numbers to the right; no width cuts them."""
    numbers = [n for n in range(len(head)) if all(isinstance(row[n], (int, float, type(None))) for row in rows)]
    return aligned([head, *([_cell(value) for value in row] for row in rows)], numbers)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def span(values: Sequence[Any]) -> Any:
    """The value that all have, or ``lowest to highest``."""
    lowest, highest = min(values), max(values)
    return lowest if lowest == highest else f"{_cell(lowest)} to {_cell(highest)}"


def size(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def readable(count: int) -> str:
    """A number of bytes in a unit that suits it."""
    power = min(3, max(0, (count.bit_length() - 1) // 10))
    return f"{count / 1024**power:.{min(power, 1)}f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr where that is a terminal; the function it gives is told how many are done, and of how many."""
    console = Console(stderr=True)
    if not console.is_terminal:  # some versions of rich end even a bar that is not drawn with an empty line
        yield lambda done, total: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

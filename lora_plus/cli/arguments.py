"""Arguments and options that several commands have, and how they are checked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer


def pairs(values: list[str] | None) -> list[str] | None:
    """A check that options have the form ``old=new``."""
    for value in values or ():
        if "=" not in value:
            raise typer.BadParameter(f"{value!r} has no '='; write for example old=new")
    return values


def mapping(values: Sequence[str] | None) -> dict[str, str]:
    """What `pairs` has checked, as a mapping."""
    return {old: new for old, _, new in (value.partition("=") for value in values or ())}


def check_free(out: Path, force: bool) -> None:
    """Raise if something is there that would be overwritten."""
    from lora_plus.files.atomic import is_free

    if out.name == "..":
        raise ValueError(f"{str(out)!r} ends in '..'; give the path of the folder itself")
    if not force and not is_free(out):
        raise FileExistsError(f"{str(out)!r} exists already; give another name, or pass --force to overwrite it")


@contextmanager
def saving(out: Path, force: bool) -> Iterator[Path]:
    """Where to save what is to become ``out``; it is checked again then that nothing is overwritten."""
    from lora_plus.files.atomic import publish, workspace

    check_free(out, force)
    if force or out.is_dir():
        yield out
        return
    with workspace(out) as folder:
        made = folder / "made" / out.name  # the folder itself is locked, and saving locks the one that it saves to
        yield made
        publish(made, out)


def one_of(names: Sequence[str], module: str, table: str, *flags: str, what: str, **settings: Any) -> Any:
    """An option that takes a name of a table of the library.

    Help and completion show ``names`` and import nothing for it: torch takes seconds. Another name is looked up in the
    table, which may have more.
    """

    def check(value: str | None) -> str | None:
        if value not in (None, *names) and value not in (known := list(getattr(import_module(module), table))):
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(map(repr, known))}.")
        return value

    text = f"{what}: {', '.join(names[:-1])} or {names[-1]}."
    return typer.Option(*flags, callback=check, autocompletion=lambda: list(names), help=text, **settings)


FORMAT_NAMES = ("native", "peft", "kohya", "diffusers")
METHOD_NAMES = ("sum", "svd", "ties", "dare", "dare_ties")

In = Annotated[Path, typer.Argument(help="An adapter file, or a folder in PEFT's format.", show_default=False)]
Out = Annotated[
    Path, typer.Argument(help="The new adapter: a .safetensors file, or a folder for PEFT.", show_default=False)
]
To = Annotated[
    str | None,
    one_of(
        FORMAT_NAMES, "lora_plus.files", "FORMATS", "--to",
        metavar="FORMAT", what="The format; by default the name of OUT decides",
    ),
]  # fmt: skip
Method = Annotated[
    str,
    one_of(
        METHOD_NAMES, "lora_plus.surgery.methods", "METHODS", "--method",
        metavar="METHOD", what="How they are combined",
    ),
]  # fmt: skip
Weight = Annotated[
    list[float] | None,
    typer.Option(help="A factor for each adapter, in order, each with its own --weight; by default 1 each."),
]
Rank = Annotated[int, typer.Option("--r", min=1, help="Rank.")]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the random numbers, if there are any.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite OUT if it exists.")]

"""Arguments and options that several commands have, and how they are checked."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer

from lora_plus.io import FORMATS


def one_of(known: Collection[str]) -> Callable[[str | None], str | None]:
    """A check that an option is one of these."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(map(repr, known))}")
        return value

    return check


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
    if not force and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{str(out)!r} exists already; give another name, or pass --force to overwrite it")


In = Annotated[Path, typer.Argument(help="An adapter file, or a folder in PEFT's format.", show_default=False)]
Out = Annotated[
    Path, typer.Argument(help="The new adapter: a .safetensors file, or a folder for PEFT.", show_default=False)
]
To = Annotated[
    str | None,
    typer.Option(
        "--to", help=f"Format: {', '.join(FORMATS)}; by the name of OUT if not given.", callback=one_of(FORMATS)
    ),
]
Rank = Annotated[int, typer.Option("--r", min=1, help="Rank.")]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the random numbers, where there are any.")]


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead, for other programs.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite OUT if it is there.")]

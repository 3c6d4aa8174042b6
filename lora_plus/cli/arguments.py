"""Arguments and options that several commands have, and how they are checked."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from lora_plus.files import SavedAdapter
    from lora_plus.files.save import FormatName


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


def write(adapter: "SavedAdapter", out: Path, to: str | None, force: bool) -> list[str]:
    """Write an adapter, without those texts of the user that the format has no room for; the keys of these."""
    from lora_plus.files import FORMATS, write_adapter

    left_out = FORMATS[format_of(out, to)].without_room(adapter.metadata)
    kept = {key: text for key, text in adapter.metadata.items() if key not in left_out}
    with saving(out, force) as path:
        write_adapter(replace(adapter, metadata=kept), path, format=cast("FormatName | None", to))
    return left_out


def format_of(out: Path, to: str | None) -> str:
    """The name of the format that ``out`` gets."""
    from lora_plus.files.formats import usual_format

    return to or usual_format(str(out))


def formats() -> list[str]:
    """The names of the library's formats."""
    from lora_plus.files import FORMATS

    return list(FORMATS)


def methods() -> list[str]:
    """The names of the library's methods of combining."""
    from lora_plus.surgery.methods import METHODS

    return list(METHODS)


def one_of(names: Callable[[], list[str]]) -> Callable[[str | None], str | None]:
    """A check that an option is one of the names, which are asked for only when it is given: they need torch."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in (known := names()):
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(map(repr, known))}.")
        return value

    return check


In = Annotated[Path, typer.Argument(help="An adapter file, or a folder in PEFT's format.", show_default=False)]
Out = Annotated[
    Path, typer.Argument(help="The new adapter: a .safetensors file, or a folder for PEFT.", show_default=False)
]
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="FORMAT",
        help="native, peft, kohya or diffusers; by the name of OUT if not given.",
        callback=one_of(formats),
        autocompletion=formats,
    ),
]
Method = Annotated[
    str,
    typer.Option(
        metavar="METHOD",
        help="How they are combined: sum, svd, ties, dare or dare_ties.",
        callback=one_of(methods),
        autocompletion=methods,
    ),
]
Rank = Annotated[int, typer.Option("--r", min=1, help="Rank.")]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the random numbers, where there are any.")]


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead, for other programs.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite OUT if it is there.")]

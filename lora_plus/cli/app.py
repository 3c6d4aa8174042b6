"""The command line ``lora-plus``: a table of commands."""

import io
import sys
from collections.abc import Callable
from typing import Annotated

from lora_plus.packages import lacking
from lora_plus.version import __version__

missing = lacking("lora-plus", "typer", "rich")
if missing is None:
    import typer

    from . import adapters, checkpoints
    from .show import reported
    from .usage import Command, Group

    COMMANDS: list[Callable[..., None]] = [
        adapters.inspect, adapters.convert, adapters.diff, adapters.combine, adapters.resize,
        checkpoints.merge, checkpoints.extract, checkpoints.verify,
    ]  # fmt: skip
    app = typer.Typer(cls=Group, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    for command in COMMANDS:
        app.command(cls=Command)(reported(command))

    def tell_version(wanted: bool) -> None:
        """Print the version and end."""
        if wanted:
            typer.echo(f"lora-plus {__version__}")
            raise typer.Exit

    @app.callback()
    def lora_plus(
        version: Annotated[
            bool, typer.Option("--version", help="Show the version.", callback=tell_version, is_eager=True)
        ] = False,
    ) -> None:
        """LoRA and LoRA+ for any PyTorch model."""


def main() -> None:
    """Run the command line; without the optional packages, say how to install them and exit with status 1."""
    if missing:
        sys.exit(missing)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name may have letters that the encoding lacks
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="lora-plus")

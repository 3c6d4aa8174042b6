"""The command line ``lora-plus``: a table of commands."""

import sys
from collections.abc import Callable

EXTRAS = {
    "cli": {"typer", "rich"},
    "demo": {"platformdirs", "tokenizers", "gguf", "numpy"},
}
"""The packages of each optional extra, by the names they are imported under."""


def hint(extra: str, error: ModuleNotFoundError) -> str:
    """What to install where a package of an extra is missing; another one that is missing is an error."""
    if error.name not in EXTRAS[extra]:
        raise error
    return f'lora-plus needs {error.name}, which is not installed: pip install "lora-plus[{extra}]"'


missing: str | None = None
try:
    import typer

    from lora_plus.commands import adapters, checkpoints
    from lora_plus.commands.show import reported
except ModuleNotFoundError as error:
    missing = hint("cli", error)
else:
    COMMANDS: list[Callable[..., None]] = [
        adapters.inspect,
        adapters.convert,
        adapters.diff,
        adapters.combine,
        adapters.resize,
        checkpoints.merge,
        checkpoints.extract,
        checkpoints.verify,
    ]
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    for command in COMMANDS:
        app.command()(reported(command))
    try:
        from lora_plus.demo.command import demo

        app.command()(reported(demo))
    except ModuleNotFoundError as error:
        absent = hint("demo", error)

        @app.command("demo", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
        def install_demo() -> None:
            """Teach a small language model; needs packages that `pip install "lora-plus[demo]"` brings."""
            typer.echo(absent, err=True)
            raise typer.Exit(1)

    @app.callback()
    def lora_plus() -> None:
        """LoRA and LoRA+ for any PyTorch model."""


def main() -> None:
    """Run the command line; without the optional packages, say how to install them and exit with status 1."""
    if missing:
        sys.exit(missing)
    app(prog_name="lora-plus")

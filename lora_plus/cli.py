"""The command line ``lora-plus``: a table of commands."""

import sys

EXTRA = {"typer", "rich", "platformdirs", "tokenizers", "gguf", "numpy"}
"""The packages of the optional extra ``demo``, by the names they are imported under."""

missing: str | None = None
try:
    import typer

    from lora_plus.demo.command import demo
except ModuleNotFoundError as error:
    if error.name not in EXTRA:
        raise
    missing = error.name
else:
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    app.command()(demo)

    @app.callback()
    def lora_plus() -> None:
        """LoRA and LoRA+ for any PyTorch model."""


def main() -> None:
    """Run the command line; without the optional packages, say how to install them and exit with status 1."""
    if missing:
        sys.exit(f'lora-plus needs {missing}, which is not installed: pip install "lora-plus[demo]"')
    app()

"""The command line of the demo: ``python -m examples.demo --help``."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from .settings import TARGETS, Settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

EXAMPLES = 10_000
"""Dates that are held out or trained on; a longer training sees them again."""
DEFAULT = Settings()
DEFAULT_TARGETS = [",".join(TARGETS)]


def positive(value: float) -> float:
    """The value, if it is above zero and finite."""
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"{value} is not a finite number above zero")
    return value


def names(values: list[str]) -> list[str]:
    """Target names from options that may each hold several, separated by commas."""
    found = [name.strip() for value in values for name in value.split(",")]
    if not all(found):
        raise typer.BadParameter(f"{','.join(values)!r} has an empty name; write for example q,v")
    return found


@app.command()
def demo(
    targets: Annotated[
        list[str],
        typer.Option(
            help="Linear layers to adapt: names separated by commas (or the option repeated), or all-linear.",
            callback=names,
        ),
    ] = DEFAULT_TARGETS,
    r: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = DEFAULT.r,
    alpha: Annotated[
        float, typer.Option(callback=positive, help="Strength: the update is scaled by alpha / r.")
    ] = DEFAULT.alpha,
    lr: Annotated[float, typer.Option(callback=positive, help="Learning rate of the A matrices.")] = DEFAULT.lr,
    lr_ratio: Annotated[
        float,
        typer.Option(callback=positive, help="LoRA+: the B matrices learn at lr times this; 1 is LoRA."),
    ] = DEFAULT.lr_ratio,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = DEFAULT.steps,
    batch: Annotated[int, typer.Option(min=1, help="Dates in a step.")] = DEFAULT.batch,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the dates and of the adapters.")] = DEFAULT.seed,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder that receives adapter.safetensors.")] = DEFAULT.out,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Number format of the base model; auto takes what this processor computes faster."),
    ] = "auto",
) -> None:
    """Teach a small language model to read dates in six languages, with LoRA+ on this CPU, in a few minutes.

    SmolLM2-135M-Instruct is asked for dates in ISO format that it is not trained on, before and after. The adapter
    is saved, reloaded into a fresh model and merged, and the three must agree. Ctrl-C ends the training early and
    keeps what has been learnt.

    The first run fetches 93 MB with pip into the user's cache folder; later runs need no network.
    """
    settings = Settings(
        targets=targets,
        r=r,
        alpha=alpha,
        lr=lr,
        lr_ratio=lr_ratio,
        steps=steps,
        batch=batch,
        seed=seed,
        out=out,
    )
    try:
        run(settings, dtype)
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def run(settings: Settings, dtype: str) -> None:
    """Fetch the model and run the demo with it in a number format of `DTYPES`."""
    import gguf

    from . import assets, dates, finetune, smollm2
    from .dtype import DTYPES

    console = Console()
    with console.status("fetching the model (93 MB, once)"):
        weights = assets.extract(assets.MODEL, assets.fetch(assets.MODEL, assets.cache_folder()))
    with console.status("reading the model"):
        reader = gguf.GGUFReader(weights)
        tokenizer = smollm2.load_tokenizer(reader)
    chosen = DTYPES[dtype]()
    console.print(f"[dim]{assets.MODEL.credit} in {chosen}[/]", highlight=False)
    agreed = finetune.run(
        settings,
        lambda: smollm2.load_model(reader, chosen),
        tokenizer,
        dates.examples(EXAMPLES, settings.seed),
        console,
    )
    if not agreed:
        raise ValueError("the trained, the reloaded and the merged model disagree")


if __name__ == "__main__":
    app(prog_name="python -m examples.demo")

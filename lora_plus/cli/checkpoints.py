"""Commands on checkpoints on the disk, without building a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from lora_plus.text import counted

from .arguments import Force, In, Json, Out, Rank, To, Weight, mapping, pairs, saving
from .show import emit, progress

if TYPE_CHECKING:
    from lora_plus.files.save import FormatName

Base = Annotated[
    Path,
    typer.Argument(
        help="A .safetensors file, or a folder with one or with shards and their index.", show_default=False
    ),
]
Rename = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OLD=NEW",
        help="A prefix of names in the adapter, and its replacement in the checkpoint.",
        callback=pairs,
    ),
]


def merge(
    base: Base,
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="One adapter, or several.")],
    out: Annotated[Path, typer.Argument(help="The new checkpoint; it must not exist.", show_default=False)],
    weight: Weight = None,
    rename: Rename = None,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32", "float64"] | None,
        typer.Option(help="Dtype of the new checkpoint; by default each tensor keeps its own."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge adapters into a checkpoint, with only a few tensors in memory at a time.

    - `lora-plus merge base-folder adapter.safetensors merged-folder`
    - `lora-plus merge base.safetensors a.safetensors b.safetensors out.safetensors --weight 1 --weight 0.5`
    - `lora-plus merge base-folder peft-folder merged-folder --dtype bfloat16 --rename model=`
    """
    import torch

    from lora_plus.surgery.checkpoint.merge import merge_checkpoint

    with progress("tensors") as report_progress:
        report = merge_checkpoint(
            base, adapters, out, dtype=None if dtype is None else getattr(torch, dtype), weights=weight or None,
            names=mapping(rename), progress=report_progress,
        )  # fmt: skip
    emit(as_json, {"path": out, **vars(report)}, *str(report).split("\n"), f"wrote {out}")


def extract(
    base: Base,
    tuned: Annotated[Path, typer.Argument(help="The fine-tuned checkpoint.", show_default=False)],
    out: Out,
    r: Rank,
    target: Annotated[
        list[str] | None, typer.Option(help="Name or glob of layers; by default all that differ.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Name or glob of layers to leave out.")] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=KIND",
            callback=pairs,
            help="Kind of layers that are not linear, such as embed_tokens=Embedding or c_attn=TransposedLinear.",
        ),
    ] = None,
    to: To = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make the adapter that is nearest to a fine-tuned checkpoint, and report its error.

    A checkpoint does not say what kind of layers it has. Weights of two dimensions count as linear layers, or as
    embeddings if they have a usual name (embed_tokens, wte). --kind changes that. Other tensors that differ are listed.

    - `lora-plus extract base-folder tuned-folder adapter.safetensors --r 16`
    - `lora-plus extract base-folder tuned-folder out --r 8 --to peft --kind embed_tokens=Embedding --exclude lm_head`
    """
    from lora_plus.surgery.checkpoint.extract import extract_checkpoint

    with saving(out, force) as path, progress("tensors") as report_progress:
        report = extract_checkpoint(
            base, tuned, path, r=r, targets=target or None, exclude=exclude or (), kinds=mapping(kind),
            format=cast("FormatName | None", to), progress=report_progress,
        )  # fmt: skip
    emit(as_json, {"path": out, **vars(report)}, *str(report).split("\n"), f"wrote {out}")


def verify(base: Base, adapter: In, rename: Rename = None, as_json: Json = False) -> None:
    """Check that an adapter fits a checkpoint, and list all problems. Nothing is written.

    It checks that files are complete, values finite, ranks and shapes right, and that the checkpoint has each tensor.
    The exit status is 1 if the adapter does not fit.

    - `lora-plus verify base-folder adapter.safetensors`
    """
    from lora_plus.surgery.checkpoint.folder import checkpoint_for
    from lora_plus.surgery.checkpoint.plan import planned

    if not base.exists():
        raise FileNotFoundError(f"there is no checkpoint at {str(base)!r}")
    plan = planned(checkpoint_for([adapter], base), [adapter], [1.0], mapping(rename))
    replaced = sum(change.replacement is not None for change in plan.changes.values())
    found = {"adapted": len(plan.changes) - replaced, "replaced": replaced}
    lines = [f"{adapter} fits {base}: {counted(found['adapted'], 'tensor')} adapted, {replaced} replaced"]
    if plan.problems:
        lines = [f"{adapter} does not fit {base}:", *(f"  {problem}" for problem in plan.problems)]
    lines += [f"note: {doubt}" for doubt in plan.doubts]
    emit(as_json, {"fits": not plan.problems, **found, "problems": plan.problems, "doubts": plan.doubts}, *lines)
    if plan.problems:
        raise typer.Exit(1)

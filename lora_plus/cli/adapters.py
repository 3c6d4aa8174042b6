"""Commands on adapter files and PEFT folders, without their models."""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from lora_plus.text import counted

from .arguments import Force, In, Json, Method, Out, Rank, Seed, To, Weight, check_free, saving
from .show import emit, readable, size, span, table

if TYPE_CHECKING:
    from lora_plus.files import SavedAdapter
    from lora_plus.files.save import FormatName
    from lora_plus.surgery.draft import CombineReport
    from lora_plus.surgery.measures import LayerDifference, LayerMeasures


def inspect(
    file: In,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show a row for each layer; by default similar layers share a row.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw norms and spectra of the updates into a .svg, .png or .pdf file."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file of --plot if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Check an adapter and show what is in it: layers, ranks, scales, norms and spectra of the updates.

    It needs no model: norms and singular values of the updates s B A are computed from A and B.

    - `lora-plus inspect adapter.safetensors`
    - `lora-plus inspect peft-folder --layers`
    - `lora-plus inspect adapter.safetensors --json`
    - `lora-plus inspect adapter.safetensors --plot adapter.svg`
    """
    from lora_plus.files import read_adapter
    from lora_plus.surgery.measures import measure

    if plot is not None:
        _check_plot(plot, force)
    adapter = read_adapter(file)
    figures = [measure(name, layer) for name, layer in adapter.layers.items()]
    count = sum(tensor.numel() for layer in adapter.layers.values() for tensor in layer.tensors.values())
    trained = {name: sum(tensor.numel() for tensor in found.values()) for name, found in adapter.trained.items()}
    facts = {"path": file, "format": adapter.format, "bytes": size(file), "parameters": count}
    lines = [f"{file}: {adapter.format} format, {readable(size(file))}, valid"]
    dtypes = span([each.dtype for each in figures])
    lines.append(f"{counted(len(figures), 'layer')}, {counted(count, 'parameter')}, {dtypes}")
    lines += [f"trained in full: {name or _MODEL}, {counted(numbers, 'number')}" for name, numbers in trained.items()]
    lines += [f"{key}: {text}" for key, text in adapter.metadata.items()]
    lines += ["", *(_by_layer(figures) if layers else _by_group(figures))]
    if plot is not None:
        _draw(figures, plot, force)
        lines += ["", f"wrote {plot}: {readable(size(plot))}"]
    facts |= {"layers": figures, "trained": trained, "metadata": adapter.metadata, "plot": plot}
    emit(as_json, facts, *lines)


def convert(
    file: In,
    out: Out,
    to: To = None,
    keep_metadata: Annotated[bool, typer.Option(help="Keep the file's metadata, if the format can hold it.")] = True,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write an adapter in another format, exactly. What that format cannot express is refused with the reason.

    - `lora-plus convert peft-folder adapter.safetensors`
    - `lora-plus convert adapter.safetensors peft-folder --to peft`
    """
    from lora_plus.files import read_adapter

    check_free(out, force)
    adapter = read_adapter(file)
    _finish(adapter if keep_metadata else replace(adapter, metadata={}), out, to, force, as_json)


def diff(first: In, second: In, as_json: Json = False) -> None:
    """Compare two adapters: their settings, and the distance of their updates in each layer.

    The updates s B A are compared, not A and B, so the ranks may differ. 0 means equal bit for bit.

    - `lora-plus diff before.safetensors after.safetensors`
    """
    from lora_plus.files import read_adapter
    from lora_plus.surgery.measures import diff_saved

    found = diff_saved(read_adapter(first), read_adapter(second))
    only = f"{len(found.only_a)} only in the first, {len(found.only_b)} only in the second"
    lines = [f"{counted(len(found.layers), 'layer')} in both, {only}"]
    lines += [f"only in the first: {name or _MODEL}" for name in found.only_a]
    lines += [f"only in the second: {name or _MODEL}" for name in found.only_b]
    lines += [f"trained in full: {name} differs by {_apart(value)}" for name, value in found.trained.items()]
    head = ("layer", "||first - second|| / ||first||", "of the magnitudes", "settings that differ")
    rows = [(layer.name or _MODEL, layer.relative, layer.magnitude, _settings(layer)) for layer in found.layers]
    lines += ["no difference"] if found.equal else []
    emit(as_json, {"a": first, "b": second, "equal": found.equal, **vars(found)}, *lines, "", *table(head, rows))


def combine(
    files: Annotated[list[Path], typer.Argument(metavar="FILE FILE...", help="Two adapters or more.")],
    out: Out,
    method: Method = "sum",
    weight: Weight = None,
    r: Annotated[int | None, typer.Option("--r", min=1, help="Rank; for all methods except sum.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Fraction of the entries to keep; for ties, dare and dare_ties.")
    ] = None,
    seed: Seed = 0,
    to: To = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Combine several adapters into one. Their updates are combined; with sum exactly, and ranks add up.

    - `lora-plus combine math.safetensors code.safetensors both.safetensors`
    - `lora-plus combine math.safetensors code.safetensors out.safetensors --weight 1 --weight -0.5`
    - `lora-plus combine a b c merged.safetensors --method ties --r 16 --density 0.3`
    """
    import torch

    from lora_plus.files import read_adapter
    from lora_plus.surgery.combine import combine_saved
    from lora_plus.surgery.methods import METHODS

    if len(files) < 2:
        raise typer.BadParameter("name two adapters or more, and then OUT")
    check_free(out, force)
    adapters: dict[str, SavedAdapter] = {}
    for number, path in enumerate(files, 1):
        adapters[f"{path} ({number})" if str(path) in adapters else str(path)] = read_adapter(path)
    generator = torch.Generator().manual_seed(seed) if "generator" in METHODS[method].options else None
    combined, report = combine_saved(
        adapters, weights=weight or None, method=method, r=r, density=density, generator=generator
    )
    _finish(combined, out, to, force, as_json, report)


def resize(
    file: In, out: Out, r: Rank, seed: Seed = 0, to: To = None, force: Force = False, as_json: Json = False
) -> None:
    """Change the rank of an adapter: a lower rank takes the nearest update, a higher one keeps the update.

    - `lora-plus resize adapter.safetensors small.safetensors --r 4`
    """
    import torch

    from lora_plus.errors import Problems
    from lora_plus.files import read_adapter
    from lora_plus.surgery.resize import resize_saved

    check_free(out, force)
    adapter = read_adapter(file)
    try:
        resized, report = resize_saved(adapter, r=r, generator=torch.Generator().manual_seed(seed))
    except Problems as error:
        raise Problems(f"adapter {str(file)!r} cannot be resized", error.problems) from error
    _finish(resized, out, to, force, as_json, report)


def _check_plot(plot: Path, force: bool) -> None:
    """Raise before an adapter is read if its picture could not be drawn."""
    from lora_plus.training.drawing import check_picture

    check_free(plot, force)
    check_picture(plot)


def _draw(figures: list["LayerMeasures"], plot: Path, force: bool) -> None:
    from lora_plus.files.atomic import replacing
    from lora_plus.surgery.plots import plot_measures

    with replacing(plot) as (made,):
        plot_measures(figures, made)
        check_free(plot, force)


def _finish(
    adapter: "SavedAdapter",
    out: Path,
    to: str | None,
    force: bool,
    as_json: bool,
    report: "CombineReport | None" = None,
) -> None:
    """Write an adapter, without those texts of the user that the format has no room for, and tell of it."""
    from lora_plus.files import FORMATS, write_adapter
    from lora_plus.files.formats import usual_format

    name = to or usual_format(str(out))
    left_out = FORMATS[name].without_room(adapter.metadata)
    kept = {key: text for key, text in adapter.metadata.items() if key not in left_out}
    with saving(out, force) as path:
        write_adapter(replace(adapter, metadata=kept), path, format=cast("FormatName | None", to))
    made = {} if report is None else {"ranks": report.ranks, "errors": report.errors}
    lines = [] if report is None else str(report).split("\n")
    lines += [f"left out, because the format cannot hold it: {key}" for key in left_out]
    facts = {"path": out, "format": name, "bytes": size(out), "left_out": left_out}
    emit(as_json, facts | made, *lines, f"wrote {out}: {readable(size(out))}")


_MODEL = "(model)"
"""What the model itself is called, which has no name."""

_HEAD = ("r", "alpha", "scale", "variant", "||sBA||", "top share", "eff. rank")
_FIELDS = ("r", "alpha", "scale", "variant", "norm", "largest_share", "effective_rank")
"""What the figures of a layer call these."""


def _by_layer(figures: list["LayerMeasures"]) -> list[str]:
    rows = [(each.name or _MODEL, each.kind, *(getattr(each, field) for field in _FIELDS)) for each in figures]
    return table(("layer", "kind", *_HEAD), rows)


def _by_group(figures: list["LayerMeasures"]) -> list[str]:
    """A row for the layers whose names differ in numbers only, with medians of the figures."""
    from lora_plus.training.layer_map import parted

    groups: dict[tuple[str, str], list[LayerMeasures]] = {}
    for each in figures:
        groups.setdefault((parted(each.name)[0] or _MODEL, each.kind), []).append(each)
    rows = []
    for (name, kind), alike in groups.items():
        columns = [[getattr(one, field) for one in alike] for field in _FIELDS]
        rows.append((name, kind, len(alike), *map(span, columns[:4]), *map(_median, columns[4:])))
    return table(("layers (medians)", "kind", "number", *_HEAD), rows)


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _settings(layer: "LayerDifference") -> str:
    if layer.relative is None:
        return "different layers"
    return ", ".join(f"{name} {ours} and {theirs}" for name, (ours, theirs) in layer.settings.items())


def _apart(value: float | None) -> str:
    return "shape, or one lacks it" if value is None else f"{value:.4g} (relative)"

"""Saves an adapter: describes it as plain data, gives it a format, and writes that whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from lora_plus.errors import Problems, named_keywords
from lora_plus.layers.adapter import Adapter
from lora_plus.model.inject import gc_paused
from lora_plus.model.places import Place, adapted_places
from lora_plus.model.state import Need, State, require
from lora_plus.model.train_also import units_in
from lora_plus.model.tree import is_spare_replica
from lora_plus.model.unsaved import check_saved
from lora_plus.text import join

from .atomic import replacing
from .checks import adapter_problems, not_finite
from .formats import FORMATS, Contents, Files, Format, Inexpressible, usual_format
from .paths import PathLike, stated
from .saved_adapter import SavedAdapter, SavedLayer
from .target import ModelTarget, Target
from .tensor_writer import write_tensors

FormatName = Literal["native", "peft", "kohya", "diffusers"]
"""Name of a format of the library; names of your own entries in `FORMATS` work, too."""


@named_keywords
@gc_paused()
def save_adapter(
    model: nn.Module,
    path: PathLike,
    *,
    adapter: str = "default",
    format: FormatName | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save one adapter, and the modules trained with it, to disk.

    Without a format, a path that ends in ``.safetensors`` gets the native format, and any other path becomes a folder
    in PEFT's format. The formats of kohya (without dropout) and diffusers name the parts of a pipeline after the
    model's children ``unet``, ``transformer``, ``text_encoder`` and ``text_encoder_2``: put these into an
    ``nn.ModuleDict``. A model without such children counts as a U-Net for kohya, and gets no part's name for diffusers.

    A file appears whole or not at all, and the same adapter gives the same bytes. Only regular files are replaced; they
    keep their permissions, and a link is followed. With sharded parameters every rank must call this: one writes, and
    all return or raise together. With DistributedDataParallel the first rank writes, and the others return at once. A
    warning names trainable parameters that are saved with no adapter.

    Args:
        model: the model that holds the adapter.
        path: file or folder; missing folders are made. The ending of a pickle, such as ``.pt``, is refused.
        adapter: the adapter's name.
        format: the format; None to choose it by the path.
        metadata: texts to save with the adapter. PEFT's format can hold only ``base_model_name_or_path``, ``revision``
            and ``task_type``, kohya's and diffusers' formats none.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: if the adapter has non-finite values, the format cannot express it exactly, or a tensor is trainable
            that must be frozen: a weight under the adapter, or one that its variant or init fixes. Nothing is written
            then.
        OSError: if the disk is full or cannot be written, or the path exists and is not a regular file; it names the
            path. The old files are as they were.
    """
    unsaved = f"adapter {adapter!r} was not saved"
    state = require(model, "saving an adapter", Need.TRAINED, adapters=[adapter])
    real, chosen = _destination(path, format, metadata or {})
    check_saved(state, adapter, unsaved)
    if is_spare_replica(model):
        return
    data = describe(state, adapter, metadata)
    state.storage.on_one_rank(
        lambda: _write(data, real, chosen, ModelTarget(state.names), unsaved, values_not_finite(data, state))
    )


def write_adapter(adapter: SavedAdapter, path: PathLike, *, format: FormatName | None = None) -> None:
    """Save an adapter that is plain data, as `save_adapter` saves one of a model.

    Raises:
        ValueError: if something is wrong with it, or the format cannot express it exactly, or needs the model to do so.
        OSError: if the disk is full or cannot be written, or the path exists and is not a regular file.
    """
    real, chosen = _destination(path, format, adapter.metadata)
    broken = list(adapter_problems(adapter))
    _write(adapter, real, chosen, Target(), "the adapter cannot be written", broken)


def _destination(path: PathLike, name: str | None, metadata: Mapping[str, str]) -> tuple[Path, Format]:
    """Where a path of the user leads, and the format of what is written there; the user's texts are checked."""
    if name is None and Path(path).suffix in _PICKLES:
        raise ValueError(
            f"{Path(path).name!r} is the name of a pickle, which is not written; end it in '.safetensors' for a file, "
            "or leave the ending out for a folder in PEFT's format"
        )
    real = Path(os.path.realpath(stated(path)))
    if name is not None and name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; choose one of {sorted(FORMATS)}, or None to go by the path")
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata must map str to str, got {key!r}: {text!r}")
    return real, FORMATS[usual_format(str(path)) if name is None else name]


_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


def _write(adapter: SavedAdapter, path: Path, format: Format, target: Target, unsaved: str, broken: list[str]) -> None:
    """Write an adapter, unless something is wrong with it; ``unsaved`` says that it was not, where it is broken."""
    if broken:
        raise Problems(unsaved, broken)
    problems: list[str] = []
    files = format.write(adapter, target, problems)
    only = f" but {', '.join(format.metadata)}" if format.metadata else ""
    problems += [
        f"metadata {key!r}: {format.title} has no room for texts{only}" for key in format.without_room(adapter.metadata)
    ]
    if problems:
        raise Inexpressible(f"the adapter cannot be written in {format.title}", problems)
    write_files(path, files)


def write_files(path: Path, files: Files) -> None:
    """Write the files of an adapter, all of them or none."""
    with replacing(*(path / name if name else path for name in files)) as temporaries:
        for temporary, content in zip(temporaries, files.values(), strict=True):
            if isinstance(content, Contents):
                write_tensors(temporary, *content)
            else:
                text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
                temporary.write_text(text, encoding="utf-8", newline="")


def adapter_state_dict(model: nn.Module, *, adapter: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors, detached: ``<module>.lora_A``, ``<module>.lora_B``, ... and modules trained with it.

    Names are those of the plain model, without prefixes of wrappers. With sharded parameters (``fully_shard``, tensor
    parallelism, FullyShardedDataParallel, ZeRO-3) every rank must call this, and each gets the whole tensors, gathered
    layer by layer. A warning names trainable parameters that belong to no adapter, as in `save_adapter`.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: if a tensor is trainable that must be frozen (`save_adapter`), or the adapters are disabled.
    """
    state = require(model, "taking an adapter's tensors", Need.TRAINED, adapters=[adapter])
    check_saved(state, adapter, f"the tensors of adapter {adapter!r} were not taken")
    placed, trained = _held(state, adapter)
    parts = {place.name: state.storage.read(each.tensors()) for place, each in placed} | trained
    return {join(path, name): tensor for path, tensors in parts.items() for name, tensor in tensors.items()}


def describe(state: State, adapter: str, metadata: Mapping[str, str] | None = None) -> SavedAdapter:
    """One adapter of a model as plain data. Sharded tensors are gathered, so every rank must call this."""
    storage, layers = state.storage, {}
    placed, trained = _held(state, adapter)
    for place, each in placed:
        base = place.base()
        if storage.flat:
            base = replace(base, shape=storage.shape(place.stored()))
        layers[place.name] = SavedLayer(base, *each.as_saved(storage.read))
    return SavedAdapter(layers, trained, dict(metadata or {}))


def _held(state: State, adapter: str) -> tuple[list[tuple[Place, Adapter]], dict[str, dict[str, Tensor]]]:
    """Where an adapter is, and the tensors of what is trained in full with it."""
    trained = {head.unit.name: state.storage.read(head.tensors()) for head in state.trained(adapter)}
    return list(adapted_places(state.modules, adapter)), trained


def values_not_finite(data: SavedAdapter, state: State) -> list[str]:
    """The tensors of a model's adapter, and the parameters trained with it, that have values that are not finite."""
    tensors = {join(name, part): each for name, layer in data.layers.items() for part, each in layer.tensors.items()}
    for unit, record in units_in(state) if data.trained else ():
        kept, own = data.trained.get(unit.name, {}), record.held[None]
        tensors |= {join(unit.name, part): kept[part] for part in kept if isinstance(own[part], nn.Parameter)}
    return list(not_finite(tensors).values())

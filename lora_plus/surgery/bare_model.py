"""A model with nothing in it but the layers that adapter files name: what works over a model then works over files.

The weights of these layers are on the meta device: they have the shapes that the files say, and no values. Modules
trained in full have their values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

from lora_plus.errors import Problems
from lora_plus.files.checks import base_problem
from lora_plus.files.load import load_adapter
from lora_plus.files.read import described
from lora_plus.files.saved_adapter import SavedAdapter, SavedLayer
from lora_plus.files.target import Target
from lora_plus.layers.base import BaseLayer

from .bare_tree import bare_tree

PathLike = str | os.PathLike[str]


class Opened(NamedTuple):
    """SavedAdapter files as a model."""

    model: nn.Module
    metadata: dict[str, dict[str, str]]
    """By adapter, what the user wrote beside it."""


def bare_model(path: PathLike | Mapping[str, PathLike]) -> nn.Module:
    """A model with just the layers that an adapter file or PEFT folder names, and with that adapter in it.

    Whatever is done to adapters over a model can be done to this one, where no values of the weights are needed:
    `save_adapter` in another format, `combine_adapters`, `resize_adapter`, `lora_summary`. It computes nothing.

    A PEFT folder does not say what its layers are. Embeddings and convolutions show in its tensors; all others are
    taken for linear layers, whose weights are stored as ``fan_in_fan_out`` says.

    Example:
        >>> _ = inject_lora(model := nn.Sequential(nn.Linear(8, 4)), ["0"], r=2)
        >>> save_adapter(model, "adapter.safetensors")
        >>> _ = resize_adapter(small := bare_model("adapter.safetensors"), r=1)
        >>> save_adapter(small, "small.safetensors")

    Args:
        path: a file or folder that `load_adapter` reads, which becomes the adapter ``"default"``; or several, by the
            names that their adapters get. The last one is the active one.

    Returns:
        The model; its adapters are frozen.

    Raises:
        ValueError: one error with everything that is wrong with a file, that two files say differently of a layer, or
            that cannot be told without the model.
        FileNotFoundError: if there is no such file or folder.
    """
    return open_adapters(path if isinstance(path, Mapping) else {"default": path}).model


def open_adapters(paths: Mapping[str, PathLike]) -> Opened:
    """The bare model of some files, by the names of their adapters, and what else is in these."""
    files = {adapter: _read(Path(path)) for adapter, path in paths.items()}
    bases: dict[str, BaseLayer] = {}
    problems = []
    for adapter, data in files.items():
        for name, layer in data.layers.items():
            base = bases.setdefault(name, layer.base)
            if base != layer.base:
                problems.append(
                    f"{name!r} is a {_told(layer.base)} in {adapter!r}, and a {_told(base)} in another file"
                )
    there = " and ".join(repr(str(path)) for path in paths.values())
    if problems:
        raise Problems(f"{there} belong to different models", problems)
    trained = {name: tensors for data in files.values() for name, tensors in data.trained.items()}
    model = bare_tree(bases, trained, there)
    for adapter, path in paths.items():
        load_adapter(model, path, adapter=adapter)
    return Opened(model, {adapter: data.metadata for adapter, data in files.items()})


def _read(path: Path) -> SavedAdapter:
    """The adapter that a file describes, as far as that can be told without its model."""
    problems: list[str] = []
    data = described(path, Target(), problems)
    if not problems and not data.layers:
        problems.append("it has no adapted layer")
    problems += [f"{name!r}: {why}" for name, layer in data.layers.items() if (why := _untold(layer)) is not None]
    if problems:
        raise Problems(f"adapter {str(path)!r} cannot be read", problems)
    return data


def _told(base: BaseLayer) -> str:
    return " ".join([base.kind, str(base.shape), *(f"{name} {value}" for name, value in base.facts.items())])


def _untold(layer: SavedLayer) -> str | None:
    """Why no layer can be made from what a file says of it; None if one can."""
    if layer.base.kind:
        return base_problem(layer.base)
    shapes = {part: tuple(tensor.shape) for part, tensor in layer.tensors.items()}
    return f"what kind of layer it belongs to cannot be told from its tensors, {shapes}"

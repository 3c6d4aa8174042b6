"""Writes an adapter as a folder in PEFT's format."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from torch import nn

from lora_plus.errors import Problems
from lora_plus.files.atomic import replacing, serialize
from lora_plus.files.model_target import outline
from lora_plus.files.saved_adapter import SavedAdapter
from lora_plus.model.places import find_modules
from lora_plus.model.tree import named_parameters

from . import write as peft


class Inexpressible(Problems):
    """Why PEFT's format cannot hold an adapter exactly."""


def write_folder(
    path: Path,
    data: SavedAdapter,
    model: nn.Module,
    head: str = "the adapter cannot be written in PEFT's format",
    problems: Sequence[str] = (),
) -> None:
    """Write a PEFT folder, whole or not at all.

    Args:
        path: the folder; it is made if it is missing.
        data: the adapter.
        model: the model that it belongs to.
        head: what the error says before the problems.
        problems: why it cannot be written, as far as that is known already.

    Raises:
        Problems: with those, and with every layer or setting that PEFT's format cannot express exactly; an
            `Inexpressible` where there are only such.
    """
    around = outline(find_modules(model))
    limits = [
        f"train_also {name!r} is tied to {other!r}, and PEFT would untie them; train both, or save a file"
        for name, other in tied_to_others(model, data.trained)
    ]
    limits += peft.refusals(data, around)
    if problems:
        raise Problems(head, [*problems, *limits])
    if limits:
        raise Inexpressible(head, limits)
    tensors, config = peft.write(data, around)
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with replacing(path / peft.WEIGHTS, path / peft.CONFIG) as (weights, config_file):
        serialize(weights, tensors, peft.METADATA)
        config_file.write_text(text, encoding="utf-8", newline="")


def tied_to_others(model: nn.Module, trained: Collection[str]) -> list[tuple[str, str]]:
    """Parameters of modules trained in full that modules outside share, with their names there: PEFT unties them."""
    inside: dict[int, str] = {}
    outside: dict[int, str] = {}
    for name, parameter in named_parameters(model):
        owned = any(not path or name.startswith(f"{path}.") for path in trained)
        (inside if owned else outside).setdefault(id(parameter), name)
    return [(name, outside[key]) for key, name in inside.items() if key in outside]

"""A PEFT folder whose modules have other names than what it is loaded into.

PEFT's config speaks of modules by patterns of their names, so a folder is read under its own names, and what it is
loaded into takes these on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lora_plus.files.rename import Renaming
from lora_plus.layers.base import BaseLayer
from lora_plus.text import join

from .names import PREFIX, Outline, around, split_key

Bases = Mapping[str, BaseLayer | None]


def without_left_out(tensors: dict[str, Tensor], config: Any, rename: Renaming) -> tuple[dict[str, Tensor], Any]:
    """A folder's tensors and config without the modules that the user leaves out."""
    modules = {key: _module(key) for key in tensors} if rename.given else {}
    left_out = {module for module in modules.values() if rename(module) is None}
    if not left_out or not isinstance(config, dict):
        return tensors, config

    def stays(module: str) -> bool:
        named = [
            inner for inner in modules.values() if any(outer.endswith(module) for outer in (inner, *around(inner)))
        ]
        return not named or not left_out.issuperset(named)

    entries = {field: config.get(field) for field in ("modules_to_save", "target_parameters")}
    owners: dict[str, Callable[[str], str]] = {
        "modules_to_save": str, "target_parameters": lambda name: name.rpartition(".")[0]
    }  # fmt: skip
    kept = {
        field: [name for name in names if not isinstance(name, str) or stays(owners[field](name))]
        for field, names in entries.items()
        if isinstance(names, list)
    }
    return {key: tensor for key, tensor in tensors.items() if modules[key] not in left_out}, {**config, **kept}


def in_file_names(
    tensors: Mapping[str, Tensor], bases: Bases, outline: Outline, rename: Renaming
) -> tuple[Bases, Outline]:
    """What PEFT's format leaves to a model, under the names that the file has for it.

    A module that the file does not name takes that of the nearest one around it which the file names.

    Args:
        tensors: the tensors of the folder.
        bases: every module and place of the model with its base layer.
        outline: the names of the model's parts.
        rename: the user's map from the names in the file to the model's.
    """
    named: dict[str, str] = {}
    for module in dict.fromkeys(map(_module, tensors)):
        for old in (module, *around(module)):
            new = rename(old)
            if new is not None:
                named.setdefault(new, old)

    def in_file(name: str) -> str | None:
        outer = next((path for path in (name, *around(name), "") if path in named), None)
        return None if outer is None else join(named[outer], name[len(outer) :].lstrip("."))

    def moved(base: BaseLayer | None) -> BaseLayer | None:
        if base is None or "parameter" not in base.facts:
            return base
        owner, _, parameter = base.facts["parameter"].rpartition(".")
        return replace(base, facts={**base.facts, "parameter": join(in_file(owner) or owner, parameter)})

    def each(names: Iterable[str]) -> dict[str, str]:
        return {old: name for name in names if (old := in_file(name)) is not None}

    return {old: moved(bases[name]) for old, name in each(bases).items()}, Outline(
        {old: outline.modules[name] for old, name in each(outline.modules).items()},
        dict.fromkeys(each(outline.names)),
        each(outline.containers).keys(),
        each(outline.uncalled).keys(),
        each(outline.transposed).keys(),
    )


def _module(key: str) -> str:
    """The module that a tensor of the folder belongs to, without what PEFT wraps around it."""
    name = key.removeprefix(PREFIX)
    split = split_key(name)
    path = name.rpartition(".")[0] if split is None else split[0]
    return ".".join(part for part in path.split(".") if part != "base_layer")

"""A PEFT folder whose modules have other names than what it is loaded into.

PEFT's config speaks of modules by patterns of their names, so a folder is read under its own names, and what it is
loaded into takes these on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lora_plus.files.outline import Outline, readers_in
from lora_plus.files.rename import Renaming
from lora_plus.files.target import ModelTarget, Target
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.text import join, parents

from .names import PREFIX, split_key


def without_left_out(tensors: Mapping[str, Tensor], config: Any, rename: Renaming) -> tuple[Mapping[str, Tensor], Any]:
    """A folder's tensors and config without the modules that the user leaves out."""
    modules = {key: _module(key) for key in tensors}
    left_out = {module for module in modules.values() if rename(module) is None}
    if not left_out or not isinstance(config, dict):
        return tensors, config

    def stays(module: str) -> bool:
        named = [
            inner for inner in modules.values() if any(outer.endswith(module) for outer in (inner, *parents(inner)))
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


@dataclass(frozen=True)
class FolderTarget:
    """A `Target` as a folder calls its parts, or as it implies them; all names are those of the folder."""

    outline: Outline
    base: Callable[[str], BaseLayer | None]
    repeats: Callable[[str, Tensor], bool | None]
    readers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    parameter: Callable[[str], Tensor | None] = lambda name: None
    """The parameter of a full name; None where it is not known."""
    whole: bool = True
    """Whether all parameters are known."""


def parameters_of(target: Target) -> Callable[[str], Tensor | None]:
    """The parameters of a model or a checkpoint by their full names; of anything else none is known."""

    def parameter(name: str) -> Tensor | None:
        if not isinstance(target, ModelTarget):
            return target.tensor(name)
        unit = target.units.get(name)
        return unit.tensors()[""] if unit is not None and unit.parameter else None

    return parameter


def in_file_names(target: Target, outline: Outline, tensors: Mapping[str, Tensor]) -> FolderTarget:
    """A target with this outline under the names that a folder has for its parts.

    A module that the file does not name takes that of the nearest one around it which the file names.
    """
    named: dict[str, str] = {}
    for module in dict.fromkeys(map(_module, tensors)):
        for old in (module, *parents(module)):
            new = target.rename(old)
            if new is not None:
                named.setdefault(new, old)

    def in_file(name: str) -> str | None:
        outer = next((path for path in (name, *parents(name), "") if path in named), None)
        return None if outer is None else join(named[outer], name[len(outer) :].lstrip("."))

    def each(names: Iterable[str]) -> dict[str, str]:
        return {old: name for name in names if (old := in_file(name)) is not None}

    modules = each(outline.names)

    def base(name: str) -> BaseLayer | None:
        owner, _, last = name.rpartition(".")
        new = modules.get(name, join(modules[owner], last) if owner in modules else None)
        found = None if new is None else target.base(new)
        if found is None or "parameter" not in found.facts:
            return found
        owner, _, parameter = found.facts["parameter"].rpartition(".")
        return replace(found, facts={**found.facts, "parameter": join(in_file(owner) or owner, parameter)})

    inner = Outline(
        {old: outline.modules[name] for old, name in each(outline.modules).items()},
        dict.fromkeys(modules),
        each(outline.containers).keys(),
        each(outline.uncalled).keys(),
        each(outline.transposed).keys(),
    )
    there = readers_in(target)
    readers = {old: list(each(there[name])) for old, name in each(there).items()}
    own = parameters_of(target)

    def parameter(name: str) -> Tensor | None:
        owner, _, last = name.rpartition(".")
        return own(join(modules[owner], last)) if owner in modules else None

    return FolderTarget(inner, base, target.repeats, readers, parameter)


def _module(key: str) -> str:
    """The module that a tensor of the folder belongs to, without what PEFT wraps around it."""
    name = key.removeprefix(PREFIX)
    split = split_key(name)
    path = name.rpartition(".")[0] if split is None else split[0]
    return ".".join(part for part in path.split(".") if part != "base_layer")

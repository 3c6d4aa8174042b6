"""The names of PEFT's tensors: which module or parameter a key belongs to.

PEFT wraps a module once for each of its parameters that is adapted, in the order in which the module has them, the
last one outermost. Inside a wrapper, what is wrapped is called ``base_layer``, in the keys of all that is in it too.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from lora_plus.files.outline import Outline
from lora_plus.text import endings, parents

PREFIX = "base_model.model."

TENSORS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
"""How the name of an adapter's tensor ends, by what it is to us."""

EMBEDDING_TENSORS = TENSORS | {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
"""The same for an embedding."""

_PARTS = {end: part for names in (TENSORS, EMBEDDING_TENSORS) for part, end in names.items()}

OUT_PROJECTION = ".base_layer.out_proj"
"""Where PEFT has the adapter of an attention module's second weight, from the module on."""


class Nesting:
    """The wrappers that PEFT puts around modules whose parameters, given by full names, are adapted."""

    def __init__(self, parameters: Collection[str], outline: Outline) -> None:
        self.owners: dict[str, str] = {}
        """Where PEFT has each such module itself, by its name."""
        self.paths: dict[str, str] = {}
        """The full name of each adapted parameter by the path at which PEFT has its adapter."""
        wanted = set(parameters)
        # the last parameter has the outermost wrapper
        for full in reversed(outline.parameters) if wanted else ():
            if full in wanted:
                owner = full.rpartition(".")[0]
                path = self.owners.get(owner, owner)
                self.paths[path], self.owners[owner] = full, f"{path}.base_layer"

    def wrapped(self, module: str) -> str:
        """The path at which PEFT has a module."""
        owner = self._owner_around(module)
        return module if owner is None else f"{self.owners[owner]}{module.removeprefix(owner)}"

    def unwrapped(self, path: str) -> str:
        """The module that PEFT has at a path."""
        owner = self._owner_around(path)
        if owner is None or not path.startswith(f"{self.owners[owner]}."):
            return path
        return f"{owner}{path.removeprefix(self.owners[owner])}"

    def _owner_around(self, path: str) -> str | None:
        return next((outer for outer in parents(path) if outer in self.owners), None) if self.owners else None


def named_parameters(entries: Collection[str], outline: Outline) -> list[str]:
    """The parameters inside a model that PEFT takes the entries of ``target_parameters`` for."""
    wanted = set(entries)
    return [
        full
        for full in outline.parameters
        if "." in full and (full in wanted or any(ending in wanted for ending in endings(full)))
    ]


def split_key(name: str) -> tuple[str, str] | None:
    """The path of an adapter and which of its tensors it is; None for a tensor that is not an adapter's."""
    for end, part in _PARTS.items():
        if name.endswith(f".{end}"):
            return name.removesuffix(f".{end}"), part
    return None


def anchored(name: str) -> str:
    """The key of a pattern that matches just this name."""
    return f"^{re.escape(name)}"

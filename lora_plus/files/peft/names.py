"""The names of PEFT's tensors: which module or parameter a key belongs to.

PEFT wraps a module once for each of its parameters that is adapted, in the order in which the module has them, the
last one outermost. Inside a wrapper, what is wrapped is called ``base_layer``, in the keys of all that is in it too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lora_plus.files.outline import Outline
from lora_plus.text import endings, parents

PREFIX = "base_model.model."

SUFFIXES = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
}
"""How the name of an adapter's tensor ends, and what it is to us."""

OUT_PROJECTION = ".base_layer.out_proj"
"""Where PEFT has the adapter of an attention module's second weight, from the module on."""


@dataclass(frozen=True)
class Nesting:
    """The wrappers that PEFT puts around modules whose parameters are adapted."""

    owners: Mapping[str, Sequence[str]]
    """Each such module with its adapted parameters, from the innermost wrapper to the outermost."""

    def paths(self) -> dict[str, str]:
        """The full name of each adapted parameter by the path at which PEFT has its adapter."""
        return {
            owner + ".base_layer" * (len(own) - 1 - depth): f"{owner}.{name}"
            for owner, own in self.owners.items()
            for depth, name in enumerate(own)
        }

    def wrapped(self, module: str) -> str:
        """The path at which PEFT has a module."""
        owner = self._owner_around(module)
        return module if owner is None else f"{self._inside(owner)}{module.removeprefix(owner)}"

    def unwrapped(self, path: str) -> str:
        """The module that PEFT has at a path."""
        owner = self._owner_around(path)
        if owner is None or not path.startswith(f"{self._inside(owner)}."):
            return path
        return f"{owner}{path.removeprefix(self._inside(owner))}"

    def _owner_around(self, path: str) -> str | None:
        return next((outer for outer in parents(path) if outer in self.owners), None)

    def _inside(self, owner: str) -> str:
        return owner + ".base_layer" * len(self.owners[owner])


def nesting(parameters: Collection[str], outline: Outline) -> Nesting:
    """The wrappers for these parameters, which are given by their full names."""
    wanted, owners = set(parameters), dict[str, list[str]]()
    for full in outline.parameters if wanted else ():
        if full in wanted:
            owner, _, name = full.rpartition(".")
            owners.setdefault(owner, []).append(name)
    return Nesting(owners)


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
    for end, part in SUFFIXES.items():
        if name.endswith(f".{end}"):
            return name.removesuffix(f".{end}"), part
    return None


def anchored(name: str) -> str:
    """The key of a pattern that matches just this name."""
    return f"^{re.escape(name)}"

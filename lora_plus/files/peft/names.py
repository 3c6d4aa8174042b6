"""The names of PEFT's tensors: which module or parameter a key belongs to.

PEFT wraps a module once for each of its parameters that is adapted, in the order in which the module has them, the
last one outermost. Inside a wrapper, what is wrapped is called ``base_layer``, in the keys of all that is in it too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

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
class Outline:
    """What decides how PEFT names and reads the parts of a model."""

    modules: Mapping[str, Sequence[str]]
    """Every module under its first name, in the order of the model, with its own parameters in their order."""
    names: Mapping[str, None]
    """All names of all modules, in the same order."""
    containers: Collection[str]
    """The modules that PEFT calls containers, such as an ``nn.ModuleList``."""
    uncalled: Collection[str]
    """The modules that have no forward of their own."""
    transposed: Collection[str]
    """The modules that say of themselves that they store experts as (stack, in, out)."""
    whole: bool = True
    """Whether these are all parts of the model; if not, they are those that an adapter names."""

    def parameters(self) -> list[str]:
        """The full names of all parameters."""
        return [f"{module}.{name}" if module else name for module, own in self.modules.items() for name in own]


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
        return next((outer for outer in around(path) if outer in self.owners), None)

    def _inside(self, owner: str) -> str:
        return owner + ".base_layer" * len(self.owners[owner])


def nesting(parameters: Collection[str], outline: Outline) -> Nesting:
    """The wrappers for these parameters, which are given by their full names."""
    wanted, owners = set(parameters), dict[str, list[str]]()
    for full in outline.parameters():
        if full in wanted:
            owner, _, name = full.rpartition(".")
            owners.setdefault(owner, []).append(name)
    return Nesting(owners)


def named_parameters(entries: Collection[str], outline: Outline) -> list[str]:
    """The parameters inside a model that PEFT takes the entries of ``target_parameters`` for."""
    wanted = set(entries)
    return [
        full
        for full in outline.parameters()
        if "." in full and (full in wanted or any(ending in wanted for ending in endings(full)))
    ]


def endings(name: str) -> Iterator[str]:
    """What a dotted name ends in, the name itself left out: ``a.b.c`` in ``b.c`` and ``c``."""
    while "." in name:
        name = name.partition(".")[2]
        yield name


def around(name: str) -> Iterator[str]:
    """The modules around something, from the next one outwards: ``a.b`` and ``a`` around ``a.b.c``."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def split_key(name: str) -> tuple[str, str] | None:
    """The path of an adapter and which of its tensors it is; None for a tensor that is not an adapter's."""
    for end, part in SUFFIXES.items():
        if name.endswith(f".{end}"):
            return name.removesuffix(f".{end}"), part
    return None


def anchored(name: str) -> str:
    """The key of a pattern that matches just this name."""
    return f"^{re.escape(name)}"

"""The names of PEFT's tensors: which module or parameter a key belongs to.

PEFT wraps a module once for each of its parameters that is adapted, in the order in which the module has them, the
last one outermost. Inside a wrapper, what is wrapped is called ``base_layer``, in the keys of all that is in it too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lora_plus.files.outline import Outline
from lora_plus.text import parents

PREFIX = "base_model.model."

TENSORS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
"""How the name of an adapter's tensor ends, by what it is to us."""

EMBEDDING_TENSORS = TENSORS | {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
"""The same for an embedding."""

LORA_BIAS = "lora_B.bias"
"""How the name of a bias of B ends, and what it is to us."""

_PARTS = {f".{end}": part for names in (TENSORS, EMBEDDING_TENSORS) for part, end in names.items()}
_PARTS[f".{LORA_BIAS}"] = LORA_BIAS

OUT_PROJECTION = ".base_layer.out_proj"
"""Where PEFT has the adapter of an attention module's second weight, from the module on."""


def split_key(name: str) -> tuple[str, str] | None:
    """The path of an adapter and which of its tensors it is; None for a tensor that is not an adapter's."""
    for end, part in _PARTS.items():
        if name.endswith(end):
            return name.removesuffix(end), part
    return None


def wrappers(parameters: Collection[str], outline: Outline) -> tuple[dict[str, str], dict[str, str]]:
    """The wrappers that PEFT puts around modules whose parameters, given by full names, are adapted.

    Returns:
        Each of these parameters by the path at which PEFT has its adapter; and by module, where PEFT has that itself.
    """
    paths: dict[str, str] = {}
    owners: dict[str, str] = {}
    wanted = set(parameters)
    for full in reversed(outline.parameters) if wanted else ():  # the last parameter has the outermost wrapper
        if full in wanted:
            owner = full.rpartition(".")[0]
            path = owners.get(owner, owner)
            paths[path], owners[owner] = full, f"{path}.base_layer"
    return paths, owners


def moved(path: str, places: Mapping[str, str]) -> str:
    """A path inside one of these places, with what the place is mapped to in front."""
    outer = next((outer for outer in parents(path) if outer in places), None) if places else None
    return path if outer is None else f"{places[outer]}{path.removeprefix(outer)}"

"""Reads an adapter from the disk, in whichever format it is, and checks what can be checked without its model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_plus.layers.base import PARAMETER, BaseLayer
from lora_plus.layers.kinds import DTYPES, kinds_by_name
from lora_plus.model.parts import PARTS
from lora_plus.model.settings import LAYOUTS
from lora_plus.tensors import matrix as functional
from lora_plus.tensors.variant import adapter_tensor_specs
from lora_plus.text import join

from . import diffusers, kohya, native
from .json_text import parsed
from .peft import write as peft
from .peft.renaming import without_left_out
from .regular import irregular
from .saved_adapter import SavedAdapter, SavedLayer
from .target import Target
from .unread_tensors import open_safetensors, read, read_text


@dataclass(frozen=True)
class Format:
    """A format of one safetensors file."""

    recognises: Callable[[Collection[str], Mapping[str, str]], bool]
    """Whether a file is in it, from the names of its tensors and the metadata of its header."""
    read: Callable[[dict[str, Tensor], Mapping[str, str], Target, list[str]], SavedAdapter]
    """The adapter, from tensors, metadata, what it is loaded into, and the list of problems."""


FORMATS = {
    "native": Format(native.recognises, native.read),
    "kohya": Format(kohya.recognises, kohya.read),
    "diffusers": Format(diffusers.recognises, diffusers.read),
}
"""The formats of one file, in the order in which they are tried."""


def read_adapter(path: Path, target: Target, problems: list[str]) -> SavedAdapter:
    """The adapter at a path; what is wrong with it is added to ``problems``.

    Its layers have the names of the file, or those of the target where it is ``resolved``. Its tensors are unread where
    what they mean does not depend on their values: see `unread_tensors`.

    Raises:
        FileNotFoundError: if there is no such file or folder.
    """
    if path.is_dir():
        return _read_peft(path, target, problems)
    if not path.exists():
        raise FileNotFoundError(f"there is no adapter at {str(path)!r}")
    tensors, metadata = _read_safetensors(path, problems)
    if problems:
        return SavedAdapter({}, {})
    fitting = next((format for format in FORMATS.values() if format.recognises(tensors, metadata)), None)
    if fitting is None:
        hint = f"; give the folder {str(path.parent)!r}" if (path.parent / peft.CONFIG).exists() else ""
        problems.append(f"it is a safetensors file, but its header does not describe an adapter{hint}")
        return SavedAdapter({}, {})
    return fitting.read(tensors, metadata, target, problems)


def _read_peft(path: Path, target: Target, problems: list[str]) -> SavedAdapter:
    present = [name for name in (peft.CONFIG, peft.WEIGHTS) if (path / name).exists()]
    inner = sorted(file.parent.name for file in path.glob(f"*/{peft.CONFIG}"))
    if not present and inner:
        problems.append(
            f"the folder has no {peft.CONFIG}, but folders that have one: {', '.join(map(repr, inner))}; "
            f"give one of them, such as {str(path / inner[0])!r}"
        )
        return SavedAdapter({}, {})
    for name in {peft.CONFIG, peft.WEIGHTS} - set(present):
        pickled = (path / name).with_suffix(".bin").exists()
        hint = "; there is a .bin file, which is a pickle and is not read: convert it to safetensors" if pickled else ""
        problems.append(f"the folder has no {name}{hint}")
    if peft.CONFIG in present and (what := irregular(path / peft.CONFIG)) is not None:
        problems.append(f"{peft.CONFIG} is {what}, not a regular file")
    if problems:
        return SavedAdapter({}, {})
    text = None
    try:
        text = read_text(path / peft.CONFIG)
        config = parsed(text)
    except (ValueError, OSError) as error:
        problems.append(f"{peft.CONFIG} is not valid JSON: {error}")
    tensors, _ = _read_safetensors(path / peft.WEIGHTS, problems)
    if not problems and not _still_says(path / peft.CONFIG, text):
        problems.append("another process wrote to the folder while it was read; load it again")
    if problems:
        return SavedAdapter({}, {})
    tensors, config = without_left_out(tensors, config, target.rename)
    bases, outline = target.peft(tensors, config, problems)
    return SavedAdapter({}, {}) if problems else peft.read(tensors, config, bases, outline, target.repeats, problems)


def _still_says(path: Path, text: str | None) -> bool:
    """Whether a config is what it was; if it is not, the weights may belong to another one."""
    try:
        return read_text(path) == text
    except (ValueError, OSError):
        return False


def _read_safetensors(path: Path, problems: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    if (what := irregular(path)) is not None:
        problems.append(f"{path.name} is {what}, not a regular file")
        return {}, {}
    try:
        return open_safetensors(path, problems)
    except (OSError, ValueError) as error:
        hint = _UNPICKLE if _is_pickle(path) else ""
        problems.append(f"{path.name} is not a whole safetensors file: {error}{hint}")
        return {}, {}


_UNPICKLE = "; it is a pickle, as torch.save writes them, which is not read: convert it to safetensors"


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as those do that torch.save writes."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4).startswith((b"PK\3\4", b"\x80"))


def base_problem(base: BaseLayer) -> str | None:
    """What is wrong with what a file says of a layer; None if an adapter can belong to such a one."""
    if base.layout not in _layouts(base.kind):
        return f"unknown kind of layer {base.kind!r} with layout {base.layout!r}"
    stored = base.layout.split(" -> ")[0]
    if len(stored.split()) != len(base.shape) or not all(type(n) is int and n > 0 for n in base.shape):
        return f"its weight has shape {base.shape}, which is not {stored!r}"
    if math.prod(base.shape) >= 2**59:  # elements have at most 16 bytes
        return f"its weight has shape {base.shape}, which no tensor can have"
    for fact, value in base.facts.items():
        if not _FACTS[fact](base, value):
            return f"{fact} is {value!r}, which {base.kind} of shape {base.shape} cannot have"
    *stack, out_features, _ = functional.matrix_shape(base.layout, base.shape)
    if "rows" in base.facts and stack:
        return "it has rows of a stack of matrices"
    if "rows" in base.facts and base.facts["rows"][1] > out_features:
        return f"rows {base.facts['rows']} of a weight that has {out_features}"
    if "parameter" not in base.facts and (base.kind == PARAMETER or "rows" in base.facts):
        return "it does not say of which parameter it is"
    return None


_FACTS: dict[str, Callable[[BaseLayer, Any], bool]] = {
    "groups": lambda base, groups: (
        base.kind.startswith("Conv") and type(groups) is int and groups > 0 and base.shape[0] % groups == 0
    ),
    "max_norm": lambda base, norm: base.kind == "Embedding" and type(norm) in (int, float) and 0 <= norm <= 1e308,
    "parameter": lambda base, name: isinstance(name, str) and (base.kind == PARAMETER or "rows" in base.facts),
    "rows": lambda base, rows: (
        isinstance(rows, list) and [type(row) for row in rows] == [int, int] and 0 <= rows[0] < rows[1]
    ),
    "of": lambda base, reader: base.kind == PARAMETER and reader in [known.__name__ for known in PARTS],
}
"""What a file says of a layer besides, and whether it can be so."""


def _layouts(kind: str) -> tuple[str, ...]:
    """How a layer of this kind can store its weight; empty for a kind that is not known."""
    if kind == PARAMETER:
        return (*LAYOUTS, "n d -> d n", "o i j -> o (i j)")  # those of nn.EmbeddingBag and nn.Bilinear too
    known = kinds_by_name().get(kind)
    return () if known is None else (known.layout,)


def value_problems(name: str, layer: SavedLayer) -> Iterator[str]:
    """What is wrong with the values of a layer's adapter, which are read."""
    for part, tensor in layer.tensors.items():
        layer.tensors[part] = tensor = read(tensor)
        if tensor.dtype not in DTYPES:
            yield f"{join(name, part)!r} is {tensor.dtype}, expected one of {DTYPES}"
        elif not is_finite(tensor):
            yield f"{join(name, part)!r} has values that are not finite"


def shape_problems(layer: SavedLayer) -> list[str]:
    """What is wrong with the shapes of a layer's adapter, given its base."""
    base = layer.base
    *stack, out_features, in_features = functional.matrix_shape(base.layout, base.shape)
    if "rows" in base.facts:
        out_features = base.facts["rows"][1] - base.facts["rows"][0]
    specs, matrix = adapter_tensor_specs(layer.spec.variant), (*stack, out_features, in_features)
    expected = {part: specs[part].shape(matrix, layer.spec.r) for part in layer.tensors}
    return [
        f"{part} has shape {tuple(tensor.shape)}, expected {expected[part]}"
        for part, tensor in layer.tensors.items()
        if tuple(tensor.shape) != expected[part]
    ]


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a tensor are finite; other dtypes than those of weights are."""
    if tensor.dtype not in DTYPES or math.isfinite(tensor.sum(dtype=torch.float32)):
        return True
    return bool(torch.isfinite(tensor).all())  # a sum of finite numbers can be too large

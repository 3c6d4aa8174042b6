"""Reads an adapter from the disk, in whichever format it is, and checks what can be checked without its model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import functional
from .config import LAYOUTS
from .formats import diffusers, kohya, native, peft
from .formats.adapter import PARAMETER, Adapter, BaseLayer, LayerAdapter
from .formats.peft_renaming import without_left_out
from .formats.target import Target
from .layers import DTYPES, KINDS, LOOKALIKES
from .names import join
from .regular_files import irregular, state_of
from .variants import AdapterSpec, adapter_tensor_specs


@dataclass(frozen=True)
class Format:
    """A format of one safetensors file."""

    recognises: Callable[[Collection[str], Mapping[str, str]], bool]
    """Whether a file is in it, from the names of its tensors and the metadata of its header."""
    read: Callable[
        [dict[str, Tensor], Mapping[str, str], Target, Callable[[dict[str, Any]], float], list[str]], Adapter
    ]
    """The adapter, from tensors, metadata, what it is loaded into, the rule for scales, and the list of problems."""


FORMATS = {
    "native": Format(native.recognises, native.read),
    "kohya": Format(kohya.recognises, kohya.read),
    "diffusers": Format(diffusers.recognises, diffusers.read),
}
"""The formats of one file, in the order in which they are tried."""


def read_adapter(path: Path, target: Target, problems: list[str]) -> Adapter:
    """The adapter at a path; what is wrong with it is added to ``problems``.

    Its layers have the names of the file, or those of the target where it is ``resolved``.

    Raises:
        FileNotFoundError: if there is no such file or folder.
    """
    if path.is_dir():
        return _read_peft(path, target, problems)
    if not path.exists():
        raise FileNotFoundError(f"there is no adapter at {str(path)!r}")
    tensors, metadata = _read_safetensors(path, problems)
    if problems:
        return Adapter({}, {})
    fitting = next((format for format in FORMATS.values() if format.recognises(tensors, metadata)), None)
    if fitting is None:
        hint = f"; give the folder {str(path.parent)!r}" if (path.parent / peft.CONFIG).exists() else ""
        problems.append(f"it is a safetensors file, but its header does not describe an adapter{hint}")
        return Adapter({}, {})
    return fitting.read(tensors, metadata, target, _scale, problems)


def _read_peft(path: Path, target: Target, problems: list[str]) -> Adapter:
    present = [name for name in (peft.CONFIG, peft.WEIGHTS) if (path / name).exists()]
    inner = sorted(file.parent.name for file in path.glob(f"*/{peft.CONFIG}"))
    if not present and inner:
        problems.append(
            f"the folder has no {peft.CONFIG}, but folders that have one: {', '.join(map(repr, inner))}; "
            f"give one of them, such as {str(path / inner[0])!r}"
        )
        return Adapter({}, {})
    for name in {peft.CONFIG, peft.WEIGHTS} - set(present):
        pickled = (path / name).with_suffix(".bin").exists()
        hint = "; there is a .bin file, which is a pickle and is not read: convert it to safetensors" if pickled else ""
        problems.append(f"the folder has no {name}{hint}")
    if peft.CONFIG in present and (what := irregular(path / peft.CONFIG)) is not None:
        problems.append(f"{peft.CONFIG} is {what}, not a regular file")
    if problems:
        return Adapter({}, {})
    text = None
    try:
        text = (path / peft.CONFIG).read_text(encoding="utf-8")
        config = json.loads(text)
    except (ValueError, OSError, RecursionError) as error:
        problems.append(f"{peft.CONFIG} is not valid JSON: {error}")
    tensors, _ = _read_safetensors(path / peft.WEIGHTS, problems)
    if not problems and not _still_says(path / peft.CONFIG, text):
        problems.append("another process wrote to the folder while it was read; load it again")
    if problems:
        return Adapter({}, {})
    tensors, config = without_left_out(tensors, config, target.rename)
    bases, outline = target.peft(tensors, config, problems)
    return Adapter({}, {}) if problems else peft.read(tensors, config, bases, outline, _scale, problems)


def _still_says(path: Path, text: str | None) -> bool:
    """Whether a config is what it was; if it is not, the weights may belong to another one."""
    try:
        return path.read_text(encoding="utf-8") == text
    except (ValueError, OSError):
        return False


def _scale(settings: dict[str, Any]) -> float:
    return AdapterSpec(**settings).scale


def _read_safetensors(path: Path, problems: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    if (what := irregular(path)) is not None:
        problems.append(f"{path.name} is {what}, not a regular file")
        return {}, {}
    try:
        return read_safetensors(path)
    except (SafetensorError, OSError) as error:
        hint = _UNPICKLE if _is_pickle(path) else ""
        problems.append(f"{path.name} is not a whole safetensors file: {error}{hint}")
        return {}, {}


_UNPICKLE = "; it is a pickle, as torch.save writes them, which is not read: convert it to safetensors"


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as those do that torch.save writes."""
    with open(path, "rb") as file:
        return file.read(4).startswith((b"PK\3\4", b"\x80"))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, in memory of their own, and the metadata of its header.

    The file is read at once, because asking `safe_open` for thousands of small tensors takes five times as long. Where
    another process replaces it or writes to it meanwhile, it is read again.

    Raises:
        SafetensorError, OSError: if it is not a whole safetensors file, or changes each time that it is read.
    """
    for _ in range(_TRIES):
        with open(path, "rb") as raw:
            before = state_of(raw.fileno())
            try:
                found = _read_open(path, raw)
            except (SafetensorError, OSError, ValueError, RuntimeError):  # of two files mixed anything can be said
                if state_of(path) == before:
                    raise
            else:
                if state_of(path) == before:
                    return found
    raise OSError(f"{str(path)!r} was replaced or written to while it was read, {_TRIES} times; read it again later")


_TRIES = 10
"""How often a file is read that changes while it is read."""


def _read_open(path: Path, raw: BufferedReader) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(str(path), framework="pt") as file:  # which checks the header
        start = 8 + int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(start - 8))
        metadata = header.pop("__metadata__", None) or {}
        data = bytearray(os.fstat(raw.fileno()).st_size - start)
        raw.readinto(data)
        tensors: dict[str, Tensor] = {}
        for name in sorted(header):
            entry = header[name]
            (begin, end), dtype = entry["data_offsets"], _USUAL.get(entry["dtype"])
            if dtype is None or begin == end:
                tensors[name] = file.get_tensor(name).clone()  # which may be a window on the file
                continue
            values = torch.frombuffer(data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin)
            tensors[name] = values.reshape(entry["shape"]).clone()
    return tensors, metadata


_USUAL = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""What adapters are stored in."""


def base_problem(base: BaseLayer) -> str | None:
    """What is wrong with what a file says of a layer; None if an adapter can belong to such a one."""
    if base.layout not in _layouts(base.kind):
        return f"unknown kind of layer {base.kind!r} with layout {base.layout!r}"
    stored = base.layout.split(" -> ")[0]
    if len(stored.split()) != len(base.shape) or not all(isinstance(n, int) and n > 0 for n in base.shape):
        return f"its weight has shape {base.shape}, which is not {stored!r}"
    if "rows" in base.facts and len(functional.matrix_shape(base.layout, base.shape)) > 2:
        return "it has rows of a stack of matrices"
    return None


def _layouts(kind: str) -> tuple[str, ...]:
    """How a layer of this kind can store its weight; empty for a kind that is not known."""
    if kind == PARAMETER:
        return (*LAYOUTS, "n d -> d n", "o i j -> o (i j)")  # those of nn.EmbeddingBag and nn.Bilinear too
    return tuple(known.layout for known in (*KINDS.values(), *LOOKALIKES) if known.kind_name() == kind)


def value_problems(name: str, layer: LayerAdapter) -> Iterator[str]:
    """What is wrong with the values of a layer's adapter."""
    for part, tensor in layer.tensors.items():
        if tensor.dtype not in DTYPES:
            yield f"{join(name, part)!r} is {tensor.dtype}, expected one of {DTYPES}"
        elif not is_finite(tensor):
            yield f"{join(name, part)!r} has values that are not finite"


def shape_problems(layer: LayerAdapter) -> list[str]:
    """What is wrong with the shapes of a layer's adapter, given its base."""
    base = layer.base
    *stack, out_features, in_features = functional.matrix_shape(base.layout, base.shape)
    if "rows" in base.facts and base.facts["rows"][1] > out_features:
        return [f"rows {base.facts['rows']} of a weight that has {out_features}"]
    if "rows" in base.facts:
        out_features = base.facts["rows"][1] - base.facts["rows"][0]
    specs, matrix = adapter_tensor_specs(layer.settings["variant"]), (*stack, out_features, in_features)
    expected = {part: specs[part].shape(matrix, layer.settings["r"]) for part in layer.tensors}
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

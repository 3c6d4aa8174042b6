"""Writing files whole or not at all, and reading them whole."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import TensorSpec, safe_open, serialize_file
from torch import Tensor


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, with a header that is the same for the same contents."""
    with replacing(path) as (temporary,):
        serialize(temporary, tensors, metadata)


def serialize(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in place; it needs no numpy, and sorted names make the bytes the same each time."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape), data_ptr=tensor.data_ptr(),
            data_len=tensor.numel() * tensor.element_size(),
        )
        for name, tensor in held.items()
    }  # fmt: skip
    serialize_file(specs, str(path), dict(metadata))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, in memory of their own, and the metadata of its header.

    The file is read at once, because asking `safe_open` for thousands of small tensors takes five times as long.

    Raises:
        SafetensorError, OSError: if it is not a whole safetensors file.
    """
    with safe_open(str(path), framework="pt") as file, open(path, "rb") as raw:  # which checks the header
        start = 8 + int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(start - 8))
        metadata = header.pop("__metadata__", None) or {}
        data = bytearray(path.stat().st_size - start)
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


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Temporary paths beside ``paths`` that take their places when the block ends well, and are removed otherwise.

    What was written is on the disk before a name changes, so a crash leaves the old file or the new one, whole. Of
    several files the last is the one without which the others are not read: where it changes, it is out of the way
    until the others are in place, so a crash between two renames leaves no mixture of old and new that could be read.
    """
    temporaries = [path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp") for path in paths]
    last, aside = paths[-1], temporaries[-1].with_suffix(".old")
    try:
        for path, temporary in zip(paths, temporaries, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
        modes = [temporary.stat().st_mode for temporary in temporaries]
        yield temporaries
        for temporary, mode in zip(temporaries, modes, strict=True):
            temporary.chmod(mode)  # safetensors makes its files readable by the owner only
            flush(temporary)
        if len(paths) > 1 and last.exists() and last.read_bytes() != temporaries[-1].read_bytes():
            os.replace(last, aside)
        for path, temporary in zip(paths, temporaries, strict=True):
            os.replace(temporary, path)
        if os.name == "posix":  # a rename is lasting once its folder is written; elsewhere folders cannot be opened
            for folder in {path.parent for path in paths}:
                flush(folder)
    finally:
        if aside.exists() and temporaries[0].exists():  # nothing took its place yet
            os.replace(aside, last)
        for leftover in (*temporaries, aside):
            leftover.unlink(missing_ok=True)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Writing files whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import TensorSpec, serialize_file
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

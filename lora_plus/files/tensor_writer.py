"""Writes safetensors files, tensor after tensor: never more than one of them in memory besides those that are there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from .atomic import naming, replacing
from .tensor_file import DTYPES, NAMES, StoredTensor, TensorFile, memory_of


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically."""
    with replacing(path) as (temporary,):
        write_tensors(temporary, tensors, metadata)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; the same contents give the same bytes."""
    unknown = [f"{name!r} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in NAMES]
    if unknown:
        raise ValueError(f"safetensors files cannot hold what {'; '.join(unknown)}")
    entries = {
        name: StoredTensor(NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())
        for name, tensor in sorted(tensors.items())
    }
    with path.open("wb", buffering=2**20) as file:  # tensors can be many and small
        for name in _begin(file, entries, metadata):
            held = tensors[name].detach().cpu().contiguous()
            _write(file, memory_of(held))


def write_stream(
    path: Path,
    source: TensorFile,
    tensors: Mapping[str, StoredTensor],
    changed: Callable[[str], Tensor | None],
) -> None:
    """Write a file with the metadata of ``source`` and the tensors named, one after the other; it is on the disk then.

    Args:
        path: the new file.
        source: the file that unchanged tensors are copied from.
        tensors: those of the new file, with their new dtypes.
        changed: gives the new values of a tensor, in its new dtype; None for those whose bytes are copied.

    Raises:
        OSError: also if ``source`` was replaced or written to meanwhile.
    """
    with source.path.open("rb", buffering=0) as old, path.open("xb", buffering=0) as new:
        source.check(old.fileno())
        for name in _begin(new, tensors, source.metadata):
            tensor, entry = changed(name), tensors[name]
            if tensor is None:
                _copy(old, source.tensors[name].start, entry.size, new)
            else:
                assert tensor.dtype == DTYPES[entry.dtype] and tensor.shape == entry.shape and tensor.is_contiguous()
                _write(new, memory_of(tensor))
        source.check()
        os.fsync(new.fileno())


def _begin(file: BinaryIO | FileIO, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> list[str]:
    """Write the header, and give the names in the order in which the data of the tensors has to follow."""
    # readers map the data into memory, where elements have to lie at multiples of their size
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    stop = 0
    for name in names:
        start, stop = stop, stop + tensors[name].size
        header[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": [start, stop]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _write(file, memoryview(len(text).to_bytes(8, "little") + text))
    return names


def _write(file: BinaryIO | FileIO, data: memoryview) -> None:
    while data:  # a call need not write all
        data = data[file.write(data) :]


def _copy(source: FileIO, start: int, size: int, target: FileIO) -> None:
    source.seek(start)
    while size:
        with naming(source.name):
            piece = source.read(min(size, _PIECE))
        if not piece:
            raise OSError(f"{source.name!r} became shorter while it was read")
        _write(target, memoryview(piece))
        size -= len(piece)


_PIECE = 2**22
"""Bytes that are copied at a time."""

"""Safetensors files tensor after tensor: never more than one of them in memory, whatever the file's size.

safetensors itself writes a file from tensors that are all there. A file is eight bytes with the length of the header,
the header in JSON, and the data of the tensors without gaps
(https://github.com/huggingface/safetensors/blob/main/README.md#format).
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .atomic import naming
from .regular import irregular, state_of

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
"""What files call the dtypes whose tensors torch can hold as they are stored."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    dtype: str
    """As the file calls it."""
    shape: tuple[int, ...]
    start: int
    """Where its first byte is, in the file."""
    size: int
    """Its bytes."""

    def element_size(self) -> int:
        """Bytes of an element; at least 1."""
        return max(1, self.size // max(1, math.prod(self.shape)))

    def in_dtype(self, dtype: torch.dtype) -> StoredTensor:
        """The same tensor in another dtype."""
        return StoredTensor(_NAMES[dtype], self.shape, self.start, math.prod(self.shape) * dtype.itemsize)


class TensorFile:
    """A safetensors file to read from.

    It is opened when something is read, because a checkpoint may have more files than a process may have open. What is
    read is of the file whose header was read, or there is an error.

    Args:
        path: the file.

    Raises:
        SafetensorError, OSError: if it is not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        if (what := irregular(path)) is not None:
            raise OSError(f"it is {what}")
        self.path = path
        with path.open("rb") as file:
            self._state = state_of(file.fileno())
            with safe_open(str(path), framework="pt"):
                pass  # it checks that the tensors fill the file, without gaps or overlaps
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        self.check()
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        found = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            found[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), 8 + length + start, stop - start)
        self.tensors = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].size)))
        """In the order of their data."""

    def check(self, descriptor: int | None = None) -> None:
        """Raise if the file at the path, or an open one, is not as it was when its header was read.

        Raises:
            OSError: it names the file.
        """
        if state_of(self.path if descriptor is None else descriptor) != self._state:
            raise OSError(f"{str(self.path)!r} was replaced or written to while it was read; start again")

    @contextmanager
    def opened(self) -> Iterator[FileIO]:
        """The file, open to read from."""
        with self.path.open("rb", buffering=0) as file:
            self.check(file.fileno())
            yield file

    def read(self, name: str) -> Tensor:
        """A tensor whose memory is a window on the file; writing to it leaves the file alone.

        What is written to the file later shows in it, so `check` when it has been used. Each tensor has a window of its
        own, because pages of the file count as memory until their window is closed.
        """
        entry = self.tensors[name]
        dtype = DTYPES[entry.dtype]
        if not entry.size:
            return torch.empty(entry.shape, dtype=dtype)
        first = entry.start - entry.start % mmap.ALLOCATIONGRANULARITY
        with self.opened() as file:
            window = mmap.mmap(file.fileno(), entry.start + entry.size - first, access=mmap.ACCESS_COPY, offset=first)
        return torch.frombuffer(
            window, dtype=dtype, offset=entry.start - first, count=math.prod(entry.shape)
        ).reshape(entry.shape)  # fmt: skip


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
    # readers map the data into memory, where elements have to lie at multiples of their size
    entries = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header: dict[str, object] = {"__metadata__": source.metadata} if source.metadata else {}
    stop = 0
    for name, entry in entries.items():
        start, stop = stop, stop + entry.size
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with source.opened() as old, path.open("xb", buffering=0) as new:
        _write(new, memoryview(len(text).to_bytes(8, "little") + text))
        for name, entry in entries.items():
            tensor = changed(name)
            if tensor is None:
                _copy(old, source.tensors[name].start, entry.size, new)
            else:
                _write(new, _bytes(tensor, entry))
        source.check()
        os.fsync(new.fileno())


def _bytes(tensor: Tensor, entry: StoredTensor) -> memoryview:
    """The memory of a tensor; the tensor must live as long."""
    assert tensor.dtype == DTYPES[entry.dtype] and tensor.shape == entry.shape and tensor.is_contiguous()
    return memoryview((ctypes.c_char * entry.size).from_address(tensor.data_ptr()) if entry.size else b"").cast("B")


def _write(file: FileIO, data: memoryview) -> None:
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

"""A safetensors file whose header is read at once, and each tensor when somebody needs its values.

So a file is refused for what its header says, whatever size it has.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import weakref
from collections.abc import Iterable
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .json_text import parsed
from .regular import irregular, state_of
from .streaming import DTYPES, StoredTensor

_FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
_STORED = DTYPES | {name: getattr(torch, dtype) for name, dtype in _FLOAT8.items() if hasattr(torch, dtype)}

LONGEST_NAME = 1000
"""Characters that the name of a tensor may have; all that is said of a name costs its length and more."""

_LONGEST_TEXT = 100_000_000
"""Bytes of a text, as safetensors allows a header."""


class UnreadTensor(Tensor):
    """A tensor in a file, of which the shape and the dtype are known; whatever else is asked of it reads its values."""

    _file: _OpenFile
    _entry: StoredTensor
    _loaded: Tensor | None = None

    @staticmethod
    def of(file: _OpenFile, entry: StoredTensor) -> UnreadTensor:
        """The tensor of this entry in the file's header."""
        tensor: UnreadTensor = Tensor._make_subclass(UnreadTensor, _NOTHING)  # type: ignore[assignment]
        tensor._file, tensor._entry = file, entry
        return tensor

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return torch.Size(self._entry.shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return _STORED[self._entry.dtype]

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return len(self._entry.shape)

    def __len__(self) -> int:
        return self._entry.shape[0]

    def numel(self) -> int:
        return math.prod(self._entry.shape)

    def loaded(self) -> Tensor:
        """The tensor, in memory of its own."""
        if self._loaded is None:
            self._loaded = self._file.read(self._entry)
        return self._loaded

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # not __torch_dispatch__, for which torch loads sympy
        return func(*tree_map(read, args), **tree_map(read, kwargs or {}))


_NOTHING = torch.empty(0)


def read(value: Any) -> Any:
    """An unread tensor with its values; anything else as it is.

    Raises:
        OSError: if the file cannot be read, or was written to since its header was read; it names the file.
    """
    return value.loaded() if isinstance(value, UnreadTensor) else value


def read_all(groups: Iterable[dict[str, Tensor]]) -> None:
    """Put tensors with their values in the place of unread ones."""
    for tensors in groups:
        for name, tensor in tensors.items():
            tensors[name] = read(tensor)


def equal_in_dtype(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor, which is read if it has the shape, equals another one in the dtype of that."""
    return tensor.shape == own.shape and torch.equal(read(tensor).to(own.device, own.dtype), own)


def read_text(path: Path) -> str:
    """The text of a regular file.

    Raises:
        OSError, UnicodeDecodeError: if it cannot be read, or is longer than any that is meant.
    """
    file = _OpenFile(path)
    if file.size > _LONGEST_TEXT:
        raise OSError(f"{str(path)!r} has {file.size:,} bytes, expected at most {_LONGEST_TEXT:,}")
    return file.raw.read().decode("utf-8")


class _OpenFile:
    """A regular file, open to read from until nothing refers to it.

    Args:
        path: the file.

    Raises:
        OSError: if it cannot be opened, or is something else, such as a pipe, on which a reader would wait.
    """

    def __init__(self, path: Path) -> None:
        if (what := irregular(path)) is not None:
            raise OSError(f"{str(path)!r} is {what}, not a regular file")
        self.path, self.raw = path, BufferedReader(FileIO(path, "r"))
        weakref.finalize(self, self.raw.close)
        self.state = state_of(self.raw.fileno())
        self.size = os.fstat(self.raw.fileno()).st_size

    def read(self, entry: StoredTensor) -> Tensor:
        """A tensor of the file."""
        try:
            tensor = torch.empty(entry.shape, dtype=_STORED[entry.dtype])
        except RuntimeError:
            text = f"no memory for a tensor of {entry.size:,} bytes"
            raise OSError(errno.ENOMEM, text, str(self.path)) from None
        if entry.size:
            data = memoryview((ctypes.c_char * entry.size).from_address(tensor.data_ptr())).cast("B")
            self.raw.seek(entry.start)
            while data and (count := self.raw.readinto(data)):  # a call need not read all
                data = data[count:]
            if data or state_of(self.raw.fileno()) != self.state:
                raise OSError(f"{str(self.path)!r} was written to while it was read; start again")
        return tensor


def open_safetensors(path: Path, problems: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, unread, and the metadata of its header.

    Where another process replaces it or writes to it meanwhile, it is opened again. What is read later is of this file
    too, whatever has taken its place.

    Args:
        path: the file.
        problems: tensors that are not read are added.

    Raises:
        OSError, ValueError: if it is not a whole safetensors file, or changes each time that it is opened.
    """
    for _ in range(_TRIES):
        file = _OpenFile(path)
        try:
            entries, metadata = _described(file)
        except ValueError:  # of a file that is written to anything can be said
            if state_of(path) == file.state:
                raise
        else:
            if state_of(path) == file.state:
                break
    else:
        raise OSError(
            f"{str(path)!r} was replaced or written to while it was read, {_TRIES} times; read it again later"
        )
    wrong = {name: why for name, entry in entries.items() if (why := _unfit(name, entry)) is not None}
    problems += [f"tensor {name[:LONGEST_NAME]!r} {why}" for name, why in wrong.items()]
    return {name: UnreadTensor.of(file, entry) for name, entry in entries.items() if name not in wrong}, metadata


_TRIES = 10
"""How often a file is opened that changes meanwhile."""


def _described(file: _OpenFile) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file by name, which fill it without gaps or overlaps, and its metadata."""
    header, start = _header(file)
    metadata: Any = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("the metadata of its header is no object of texts")
    entries = {name: _entry(name, entry, start) for name, entry in sorted(header.items())}
    stop = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.size)):
        if entry.start != stop:
            raise ValueError(f"its tensors overlap or leave a gap at byte {stop:,}")
        stop += entry.size
    if stop != file.size:
        raise ValueError(f"it has {file.size:,} bytes, and its header says {stop:,}")
    return entries, metadata


def _header(file: _OpenFile) -> tuple[dict[str, Any], int]:
    """What the header says, and where the data begins."""
    size = file.size
    length = int.from_bytes(file.raw.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST_TEXT):
        raise ValueError(f"it has {size:,} bytes, and no header of {length:,} bytes fits into it")
    header = parsed(file.raw.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header, 8 + length


def _entry(name: str, entry: Any, start: int) -> StoredTensor:
    """A tensor of the header, with the place of its data in the file, which begins at ``start``."""
    dtype, shape, offsets = (entry.get(key) if isinstance(entry, dict) else None for key in _KEYS)
    if not (
        isinstance(dtype, str) and dtype in _BITS and _are_counts(shape) and _are_counts(offsets) and len(offsets) == 2
    ):
        raise ValueError(f"its header says of tensor {name!r}: {entry!r}")
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {len(shape):,} dimensions, expected at most {_MOST_DIMENSIONS}")
    begin, end = offsets
    if math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
        raise ValueError(f"tensor {name!r} has {end - begin:,} bytes, and is {dtype} of shape {shape}")
    return StoredTensor(dtype, tuple(shape), start + begin, end - begin)


_MOST_DIMENSIONS = 64
"""Of a tensor in torch. The product of more extents could take hours."""

_KEYS = ("dtype", "shape", "data_offsets")
_BITS = {name: 8 * dtype.itemsize for name, dtype in _STORED.items()} | {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
}  # fmt: skip
"""Of an element of each dtype that the format has."""


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _unfit(name: str, stored: StoredTensor) -> str | None:
    """Why a tensor is not read; None if it is."""
    if len(name) > LONGEST_NAME:
        return f"has a name of {len(name)} characters, expected at most {LONGEST_NAME}"
    if stored.dtype not in _STORED:
        return f"is stored as {stored.dtype}, which is not read"
    if math.prod(max(1, extent) for extent in stored.shape) >= 2**59:  # elements have at most 16 bytes
        return f"has shape {stored.shape}, which no tensor can have"
    return None

"""Safetensors files to read from: the header at once, and each tensor when somebody needs its values.

So a file is refused for what its header says, whatever size it has. It is eight bytes with the length of the header,
the header in JSON, and the data of the tensors without gaps
(https://github.com/huggingface/safetensors/blob/main/README.md#format).
"""

from __future__ import annotations

import ctypes
import errno
import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .json_text import LONGEST as LONGEST_HEADER
from .json_text import parsed
from .paths import file_state, open_regular

_ELEMENTS = {
    "BOOL": (8, "bool"), "F4": (4, ""), "F6_E2M3": (6, ""), "F6_E3M2": (6, ""), "U8": (8, "uint8"), "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"), "F8_E4M3": (8, "float8_e4m3fn"), "F8_E8M0": (8, "float8_e8m0fnu"),
    "I16": (16, "int16"), "U16": (16, "uint16"), "F16": (16, "float16"), "BF16": (16, "bfloat16"),
    "I32": (32, "int32"), "U32": (32, "uint32"), "F32": (32, "float32"), "C64": (64, "complex64"),
    "F64": (64, "float64"), "I64": (64, "int64"), "U64": (64, "uint64"),
}  # fmt: skip
"""What files call a dtype -> bits of an element, and the dtype of torch that holds it as it is stored."""

DTYPES = {name: getattr(torch, held) for name, (_, held) in _ELEMENTS.items() if hasattr(torch, held or "-")}
"""What files call a dtype -> the dtype of torch."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

LONGEST_NAME = 1000
"""Characters that the name of a tensor may have; all that is said of a name costs its length and more."""

_MOST_DIMENSIONS = 64
"""Of a tensor in torch. The product of more extents could take hours."""


class StoredTensor(NamedTuple):
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


class Changed(OSError):
    """A file is not the one whose header was read."""


class TensorFile:
    """A safetensors file. What is read is of the file whose header was read, or there is an error.

    Args:
        path: the file.
        keep: whether it stays open, so that what takes its place makes no difference. Otherwise it is opened when
            something is read, because a checkpoint may have more files than a process may have open.

    Raises:
        OSError: if it cannot be opened, is no regular file, or was written to meanwhile (`Changed`).
        ValueError: if it is not a whole safetensors file.
    """

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        self.path = path
        raw = open_regular(path)
        weakref.finalize(self, raw.close)
        self._state = file_state(raw.fileno())
        try:
            self.tensors, self.metadata = _described(raw, self._state[0])
        except ValueError:
            self.check()  # of a file that is written to anything can be said
            raise
        self.check()
        self._raw = raw if keep else None
        if not keep:
            raw.close()

    def check(self, descriptor: int | None = None) -> None:
        """Raise `Changed` if the file at the path, or an open one, is not as it was when its header was read."""
        if file_state(self.path if descriptor is None else descriptor) != self._state:
            raise Changed(f"{str(self.path)!r} was replaced or written to while it was read; start again")

    @contextmanager
    def opened(self) -> Iterator[BufferedReader]:
        """The file, open to read from. What was read is of no use if the end of the block raises `Changed`."""
        with self.path.open("rb") if self._raw is None else nullcontext(self._raw) as file:
            if self._raw is None:
                self.check(file.fileno())
            yield file
            self.check(file.fileno())

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        return self.read_many([name])[0]

    def read_many(self, names: Iterable[str]) -> list[Tensor]:
        """Tensors, each in memory of its own; opening and checking the file for each would take longer than reading."""
        tensors = []
        with self.opened() as file:
            for entry in map(self.tensors.__getitem__, names):
                try:
                    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="cpu")
                except RuntimeError:
                    text = f"no memory for a tensor of {entry.size:,} bytes"
                    raise OSError(errno.ENOMEM, text, str(self.path)) from None
                fill(tensor, file, entry.start)
                tensors.append(tensor)
        return tensors


def fill(tensor: Tensor, file: BufferedReader, start: int) -> None:
    """Read the bytes of a contiguous tensor on the CPU, from this one of a file on.

    Raises:
        OSError: if the file cannot be read, or ends before (`Changed`); it names the file.
    """
    data = memory_of(tensor)
    try:
        file.seek(start)
        while data and (count := file.readinto(data)):  # a call need not read all
            data = data[count:]
    except OSError as error:
        error.filename = str(file.name)
        raise
    if data:
        raise Changed(f"{str(file.name)!r} became shorter while it was read; start again")


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which must live as long."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b"").cast("B")


# ---- the header ------------------------------------------------------------------------------------------------------


def _described(file: BufferedReader, size: int) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file, which fill it without gaps or overlaps, in the order of their data; and its metadata."""
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if size < 8 or length > min(size - 8, LONGEST_HEADER):
        told = [what for start, what in _OTHERS.items() if length > LONGEST_HEADER and first.startswith(start)]
        told += [f"it has {size:,} bytes, and no header of {length:,} bytes fits into it" if size else "it is empty"]
        raise ValueError(told[0])
    header = parsed(file.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    metadata: Any = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("the metadata of its header is no object of texts")
    found = [(name, _entry(name, entry, 8 + length)) for name, entry in sorted(header.items())]
    entries = dict(sorted(found, key=lambda item: (item[1].start, item[1].size)))
    stop = 8 + length
    for entry in entries.values():
        if entry.start != stop:
            raise ValueError(f"its tensors overlap or leave a gap at byte {stop:,}")
        stop += entry.size
    if stop != size:
        raise ValueError(f"it has {size:,} bytes, and its header says {stop:,}")
    return entries, metadata


_PICKLE = "it is a pickle, as torch.save writes them, which is not read: convert it to safetensors"
_OTHERS = {b"PK\3\4": _PICKLE, b"\x80": _PICKLE, b"{": "it is a text, which begins as JSON does"}
"""How other files begin, and what to say of them."""


def _entry(name: str, entry: Any, start: int) -> StoredTensor:
    """A tensor of the header, with the place of its data in the file, which begins at ``start``."""
    dtype, shape, offsets = map(entry.get, _KEYS) if isinstance(entry, dict) else (None, None, None)
    if not (
        isinstance(dtype, str)
        and dtype in _ELEMENTS
        and _are_counts(shape)
        and _are_counts(offsets)
        and len(offsets) == 2
    ):
        raise ValueError(f"its header says of tensor {name!r}: {entry!r}")
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {len(shape):,} dimensions, expected at most {_MOST_DIMENSIONS}")
    begin, end = offsets
    if math.prod(shape) * _ELEMENTS[dtype][0] != 8 * (end - begin):
        raise ValueError(f"tensor {name!r} has {end - begin:,} bytes, and is {dtype} of shape {shape}")
    return StoredTensor(dtype, tuple(shape), start + begin, end - begin)


_KEYS = ("dtype", "shape", "data_offsets")


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and {*map(type, values)} <= {int} and min(values, default=0) >= 0


# ---- tensors that are read later -------------------------------------------------------------------------------------


class UnreadTensor(Tensor):
    """A tensor in a file, of which the shape and the dtype are known; whatever else is asked of it reads its values."""

    _file: TensorFile
    _name: str
    _entry: StoredTensor
    _loaded: Tensor | None = None
    layout, is_meta = torch.strided, False  # type: ignore[assignment]  # as of all in a file, which is not read for it

    def __new__(cls, file: TensorFile, name: str) -> UnreadTensor:  # of a file that stays open
        tensor: UnreadTensor = Tensor._make_subclass(cls, _NOTHING)  # type: ignore[assignment]
        tensor._file, tensor._name, tensor._entry = file, name, file.tensors[name]
        return tensor

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return torch.Size(self._entry.shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return DTYPES[self._entry.dtype]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # not __torch_dispatch__, for which torch loads sympy
        return func(*tree_map(read, args), **tree_map(read, kwargs or {}))


_NOTHING = torch.empty(0, device="cpu")


def read(value: Any) -> Any:
    """An unread tensor with its values, in memory of its own; anything else as it is. Errors name the file."""
    if not isinstance(value, UnreadTensor):
        return value
    if value._loaded is None:
        value._loaded = value._file.read(value._name)
    return value._loaded


def read_all(groups: Iterable[dict[str, Tensor]]) -> None:
    """Put tensors with their values in the place of unread ones; a file is gone through once, in its order."""
    held = [(tensors, name, tensor) for tensors in groups for name, tensor in tensors.items()]
    files: dict[TensorFile, dict[str, UnreadTensor]] = {}
    for _, _, tensor in held:
        if isinstance(tensor, UnreadTensor):
            files.setdefault(tensor._file, {})[tensor._name] = tensor
    for file, unread in files.items():
        names = [name for name in file.tensors if name in unread and unread[name]._loaded is None]
        for name, values in zip(names, file.read_many(names), strict=True):
            unread[name]._loaded = values
    for tensors, name, tensor in held if files else ():
        tensors[name] = read(tensor)


def equal_in_dtype(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor, which is read if it has the shape, equals another one in the dtype of that."""
    return tensor.shape == own.shape and torch.equal(read(tensor).to(own.device, own.dtype), own)


def open_safetensors(path: Path, problems: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, unread, and the metadata of its header; those that are not read are added to problems.

    Where another process writes to it meanwhile, it is opened again. What is read later is of this file too, whatever
    has taken its place. Raises as `TensorFile`, also if the file changes each time that it is opened.
    """
    for _ in range(_TRIES):
        try:
            file = TensorFile(path, keep=True)
            break
        except Changed:
            pass
    else:
        raise OSError(
            f"{str(path)!r} was replaced or written to while it was read, {_TRIES} times; read it again later"
        )
    wrong = {name: why for name, entry in sorted(file.tensors.items()) if (why := _problem(name, entry)) is not None}
    problems += [f"tensor {name[:LONGEST_NAME]!r} {why}" for name, why in wrong.items()]
    return {name: UnreadTensor(file, name) for name in sorted(file.tensors.keys() - wrong.keys())}, file.metadata


_TRIES = 10
"""How often a file is opened that changes meanwhile."""


def _problem(name: str, stored: StoredTensor) -> str | None:
    """Why a tensor is not read; None if it is."""
    if len(name) > LONGEST_NAME:
        return f"has a name of {len(name)} characters, expected at most {LONGEST_NAME}"
    if stored.dtype not in DTYPES:
        return f"is stored as {stored.dtype}, which is not read"
    # elements have at most 16 bytes, and all but those of an empty tensor are in the file
    if not stored.size and math.prod(max(1, extent) for extent in stored.shape) >= 2**59:
        return f"has shape {stored.shape}, which no tensor can have"
    return None

"""A checkpoint's file written while another one is read: what stays is copied, and weights come block after block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from io import BufferedReader, FileIO
from pathlib import Path

import torch
from torch import Tensor

from lora_plus.files.tensor_file import StoredTensor, TensorFile, fill, memory_of
from lora_plus.files.tensor_writer import begin, write_bytes
from lora_plus.tensors.matrix import Index

Shape = tuple[int, ...]
Blocks = list[tuple[Index, Index]]


def write_stream(
    path: Path,
    source: TensorFile,
    tensors: Mapping[str, StoredTensor],
    changed: Callable[[str, BufferedReader], Iterable[Tensor] | None],
) -> None:
    """Write a file as ``source`` is, with other values or dtypes of some tensors. It may not be on the disk yet.

    Where no dtype changes, the header and the order of the tensors are those of ``source``, too.

    Args:
        path: the new file.
        source: the file that unchanged tensors are copied from, each stretch of neighbours at once.
        tensors: those of the new file, with their new dtypes.
        changed: gives the new values of a tensor in its new dtype, in pieces, each of which is written before the next
            one is asked for; None for a tensor whose bytes are copied. Also gets ``source``, open to read from.

    Raises:
        OSError: also if ``source`` was replaced or written to meanwhile.
    """
    with source.opened() as old, path.open("xb", buffering=0) as new:
        start = stop = 0
        if tensors == source.tensors:
            size = os.fstat(old.fileno()).st_size  # of a file without tensors, the header's
            names, stop = list(tensors), min((entry.start for entry in tensors.values()), default=size)
        else:
            names = begin(new, tensors, source.metadata)
        for name in names:
            pieces, entry = changed(name, old), source.tensors[name]
            if pieces is not None or entry.start != stop:
                _copy(old, start, stop, new)
                start = stop = entry.start
            stop = entry.start + entry.size
            if pieces is not None:
                for piece in pieces:
                    write_bytes(new, memory_of(piece))
                start = stop
        _copy(old, start, stop, new)


def _copy(source: BufferedReader, start: int, stop: int, target: FileIO) -> None:
    with suppress(AttributeError, OSError):  # not all systems have it, nor between all file systems
        while count := os.copy_file_range(source.fileno(), target.fileno(), stop - start, offset_src=start):
            start += count
    while start < stop:
        piece = torch.empty(min(stop - start, _PIECE), dtype=torch.uint8, device="cpu")
        fill(piece, source, start)
        write_bytes(target, memory_of(piece))
        start += len(piece)


_PIECE = 2**22
"""Bytes that are copied at a time."""


def stretches(shape: Shape, blocks: Iterable[tuple[Index, Index]]) -> Iterator[tuple[int, Shape, Blocks]]:
    """Blocks of a stored weight, gathered into the shortest stretches of its file that have whole blocks.

    A block of the usual weight, whose rows follow one another, is a stretch of its own. Blocks that lie across the
    rows of the file, as those of a transposed weight, have the whole weight in common, or one matrix of a stack.

    Args:
        shape: that of the stored weight.
        blocks: as `functional.blocks` gives them.

    Yields:
        From the start of the file on: at which element of the weight the stretch begins, its shape, and its blocks, as
        indices in the stretch and in the rows of the matrix view.
    """
    weight = torch.empty(shape, device="meta")
    found: dict[int, tuple[Shape, Blocks]] = {}
    for index, rows in blocks:
        depth = next(depth for depth in range(len(index), -1, -1) if weight[index[:depth]].is_contiguous())
        stretch = weight[index[:depth]]
        inner = (*[slice(None)] * depth, *index[depth:])
        found.setdefault(int(stretch.storage_offset()), (tuple(stretch.shape), []))[1].append((inner, rows))
    for start in sorted(found):
        yield start, *found[start]

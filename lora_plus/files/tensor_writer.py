"""Writes safetensors files, tensor after tensor: never more than one of them in memory besides those that are there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from .atomic import replacing
from .tensor_file import NAMES, StoredTensor, memory_of


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
        for name in begin(file, entries, metadata):
            held = tensors[name].detach().cpu().contiguous()
            write_bytes(file, memory_of(held))


def begin(file: BinaryIO | FileIO, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> list[str]:
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
    write_bytes(file, memoryview(len(text).to_bytes(8, "little") + text))
    return names


def write_bytes(file: BinaryIO | FileIO, data: memoryview) -> None:
    """Write all of the data."""
    while data:  # a call need not write all
        data = data[file.write(data) :]

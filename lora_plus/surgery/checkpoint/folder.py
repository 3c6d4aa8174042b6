"""A checkpoint on the disk: one safetensors file, or a folder with several; and a folder that appears whole."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lora_plus.errors import Problems
from lora_plus.files.atomic import flush, publish, workspace
from lora_plus.files.formats import FORMATS, Contents
from lora_plus.files.json_text import parsed, read_text
from lora_plus.files.paths import irregular
from lora_plus.files.tensor_file import DTYPES, StoredTensor, TensorFile, fill

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_INDEX_ENDING = ".safetensors.index.json"
"""How the names of indexes end, whatever a library calls the model."""

HOLDS_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
"""How the names of files end that hold weights."""


class Checkpoint:
    """The safetensors files of a checkpoint, a file or a folder. Raises `Problems` if there is no whole one."""

    def __init__(self, base: Path) -> None:
        self.base, self.single = base, base.is_file()
        self.folder = base.parent if self.single else base
        problems: list[str] = []
        self.index: dict[str, Any] = {}
        """What the index of the shards says; empty where there is none."""
        self.index_name, self.index_text = INDEX, ""
        names = [base.name] if self.single else self._shards(problems)
        self.files: dict[str, TensorFile] = {}
        for name in names:
            try:
                self.files[name] = TensorFile(self.folder / name)
            except (ValueError, OSError) as error:
                problems.append(f"{name} is not a whole safetensors file: {error}")
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}
        there: dict[str, str] = {}
        for name, file in self.files.items():
            self.metadata |= file.metadata
            twice = [tensor for tensor in file.tensors if tensor in there]
            problems += [f"{tensor!r} is both in {there[tensor]} and {name}" for tensor in twice]
            there |= dict.fromkeys(file.tensors, name)
            self.tensors |= file.tensors
        if self.index and not problems:
            said, index = self.index["weight_map"], self.index_name
            problems += [
                f"{tensor!r} is in {there.get(tensor, 'no file')}, and {index} says {said.get(tensor, 'nothing of it')}"
                for tensor in sorted(said.keys() | there.keys())
                if said.get(tensor) != there.get(tensor)
            ]
        if problems:
            raise Problems(f"checkpoint {str(base)!r} cannot be read", problems)

    def _shards(self, problems: list[str]) -> list[str]:
        """The names of a folder's files."""
        if not self.folder.is_dir():
            problems.append(f"it is {irregular(self.folder)}, neither a file nor a folder")
            return []
        indexes = sorted(path.name for path in self.folder.glob(f"*{_INDEX_ENDING}"))
        there = [*([WEIGHTS] if (self.folder / WEIGHTS).exists() else []), *indexes]
        if there == [WEIGHTS]:
            return there
        if len(there) == 1:
            self.index_name = there[0]
            return self._indexed(problems)
        if there:
            problems.append(f"the folder has both {' and '.join(there)}; remove what is not used")
        else:
            others = sorted(path.name for path in self.folder.iterdir() if path.suffix in HOLDS_WEIGHTS)
            hint = f"; it has {', '.join(others)}: give a .safetensors file itself, convert others" if others else ""
            problems.append(f"the folder has neither {WEIGHTS} nor {INDEX} or another index of shards{hint}")
        return []

    def _indexed(self, problems: list[str]) -> list[str]:
        if (what := irregular(self.folder / self.index_name)) is not None:
            problems.append(f"{self.index_name} is {what}")
            return []
        try:
            self.index_text = read_text(self.folder / self.index_name)
            index = parsed(self.index_text)
        except (ValueError, OSError) as error:
            problems.append(f"{self.index_name} is not valid JSON: {error}")
            return []
        found = index.get("weight_map") if isinstance(index, dict) else None
        shards: list[Any] = list(found.values()) if isinstance(found, dict) else [None]
        for name in shards:
            if not (isinstance(name, str) and name and name.isprintable() and Path(name).name == name):
                wrong = f"weight_map must give the name of a file for each tensor, got {name!r}"
                problems.append(f"{self.index_name}: {wrong}")
                return []
        self.index = index
        return sorted(set(shards))

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        return next(file for file in self.files.values() if name in file.tensors).read(name)

    def rows(self, name: str, ids: Sequence[int]) -> Tensor:
        """These rows of a matrix ``(n, dim)``, which is not read as a whole."""
        file = next(file for file in self.files.values() if name in file.tensors)
        entry = file.tensors[name]
        rows = torch.empty(len(ids), *entry.shape[1:], dtype=DTYPES[entry.dtype])
        step = entry.size // entry.shape[0]
        with file.opened() as opened:
            for row, each in zip(rows, ids, strict=True):
                fill(row, opened, entry.start + each * step)
        return rows

    def check(self) -> None:
        """Raise if a file is not as it was when its header was read, as `TensorFile.check`."""
        for file in self.files.values():
            file.check()

    def config(self) -> dict[str, Any]:
        """What ``config.json`` says; nothing where there is none that can be read."""
        try:
            config = {} if self.single else parsed(read_text(self.folder / "config.json"))
        except (ValueError, OSError):
            return {}
        return config if isinstance(config, dict) else {}


def checkpoint_for(adapters: Sequence[Path], base: Path) -> Checkpoint:
    """The checkpoint that adapters are to be merged into. Raises where an adapter is given in its place."""
    if _is_adapter(base):
        other = next((path for path in adapters if not _is_adapter(path)), None)
        why = "a checkpoint was expected" if other is None else f"{str(other)!r} is none: the two seem swapped"
        raise ValueError(f"{str(base)!r} is an adapter, and {why}; give the checkpoint first, and then its adapters")
    return Checkpoint(base)


def _is_adapter(path: Path) -> bool:
    """Whether a file or folder says that it is an adapter, and has no weights of a model."""
    if path.is_dir():
        model = [*path.glob(WEIGHTS), *path.glob(f"*{_INDEX_ENDING}")]
        return not model and any((path / name).is_file() for format in FORMATS.values() for name in format.folder)
    try:
        file = TensorFile(path)
    except (ValueError, OSError):
        return False
    contents = Contents(cast("dict[str, Tensor]", file.tensors), file.metadata)
    return any(format.recognises(contents) for format in FORMATS.values())


def side_files(folder: Path) -> tuple[list[str], list[str]]:
    """Files of a checkpoint that do not hold weights, at every depth, and what else is there, both as relative paths.

    Of links only those to files are followed, and only inside the folder, or into the ``blobs`` of the model cache that
    it is in: a folder that was downloaded could otherwise have the result hold any file of this machine.
    """
    root = Path(os.path.realpath(folder))
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    found: list[str] = []
    others: list[str] = []
    folders = [root]
    while folders:
        for entry in os.scandir(folders.pop()):
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False) and not _is_left_out(path.relative_to(root)):
                folders.append(path)
            else:
                target = Path(os.path.realpath(path))
                inside = target.relative_to(root) if target.is_relative_to(root) else None
                names = [path.relative_to(root), *([inside] if inside else [])]
                fine = target.is_file() and (inside or target.parent == blobs) and not any(map(_is_left_out, names))
                (found if fine else others).append(path.relative_to(root).as_posix())
    return sorted(found), sorted(others)


def _is_left_out(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or path.suffix.lower() in HOLDS_WEIGHTS or path.name == "adapter_config.json"


@contextmanager
def appearing(out: Path, single: bool) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes it, or whose one file does, when the block ends well."""
    with workspace(out) as folder:
        yield folder
        flush(folder)
        publish(next(folder.iterdir()) if single else folder, out)

"""Merge adapters into a checkpoint on the disk, tensor after tensor, without building a model."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_plus.errors import Problems
from lora_plus.files.atomic import flush, is_free
from lora_plus.files.checks import is_finite
from lora_plus.files.paths import PathLike, stated
from lora_plus.files.rename import Names
from lora_plus.files.tensor_file import DTYPES as STORED
from lora_plus.files.tensor_file import StoredTensor, TensorFile
from lora_plus.files.tensor_writer import write_stream
from lora_plus.layers.kinds import DTYPES
from lora_plus.model.merge import MergeReport
from lora_plus.tensors.merged_weight import as_finite_as, merged_weight
from lora_plus.text import counted, printable

from .folder import Checkpoint, appearing, copy_file, side_files
from .plan import Plan, planned

Progress = Callable[[int, int], None]
"""Is told how many things are done, and how many there are."""


@dataclass(frozen=True)
class CheckpointReport:
    """What `merge_checkpoint` did. ``str()`` of it is one line for each thing worth knowing."""

    merged: list[str]
    """Names of the tensors with adapters merged into them."""
    lost: dict[str, float]
    """As in `MergeReport`, by the names of tensors."""
    replaced: list[str]
    """Tensors of modules that were trained in full."""
    copied: list[str]
    """All other tensors."""
    left_out: list[str]
    """Files and folders that were not copied: weights, adapters, hidden ones, and links out of the folder or to one."""

    def __str__(self) -> str:
        lines = [str(MergeReport(self.merged, self.lost, []))]
        if self.replaced:
            lines.append(f"replaced {counted(len(self.replaced), 'tensor')} of modules trained in full")
        lines.append(f"copied {counted(len(self.copied), 'tensor')}")
        if self.left_out:
            left_out = printable(", ".join(self.left_out))
            lines.append(f"left out {left_out}: weights that are not merged, hidden, or links")
        return "\n".join(lines)


def merge_checkpoint(
    base: PathLike,
    adapter: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    dtype: torch.dtype | None = None,
    weights: Sequence[float] | None = None,
    names: Names | None = None,
    progress: Progress | None = None,
) -> CheckpointReport:
    """Write a checkpoint whose weights contain the adapters, with the bits that `merge_lora` in the model would give.

    A changed tensor is computed in float32, or float64 where it or the adapter is, and rounded once; all others are
    copied byte for byte. A few times the largest tensor is in memory. ``out`` appears whole or not at all; the next run
    clears what a killed one left beside it. A module whose own forward does not use its weight as it is cannot be known
    here; `merge_lora` finds out.

    Args:
        base: a ``.safetensors`` file, or a folder with ``model.safetensors``, or with shards and their index, whose
            other files are taken over.
        adapter: a file or folder that `load_adapter` reads, or several, whose updates are added up.
        out: the new file or folder; a folder may be there if it is empty.
        dtype: of the new checkpoint's floating-point tensors; None to keep each one's. Files such as config.json stay.
        weights: a factor for each adapter; 1 each if not given.
        names: from the names of tensors in the adapter's model to those in the checkpoint, as in `load_adapter`; such
            as ``{"model": ""}`` for ``model.layers.0.q.weight`` that is ``layers.0.q.weight`` here. In a file of
            kohya's the names are those of modules, with underscores.
        progress: called with the number of tensors that have been taken on, and of all.

    Raises:
        ValueError: one error with everything that is wrong with the files or does not fit, or a new weight that is not
            finite. Nothing stays then.
        FileNotFoundError, FileExistsError: if base or an adapter is not there, or ``out`` is, or appears meanwhile.
        OSError: if a file of base is replaced or written to meanwhile, or ``out`` cannot be written; nothing stays.
    """
    base, out = stated(base), Path(os.path.abspath(stated(out)))
    paths = [stated(path) for path in ([adapter] if isinstance(adapter, (str, os.PathLike)) else adapter)]
    factors = [1.0] * len(paths) if weights is None else [float(factor) for factor in weights]
    _check_arguments(base, paths, out, dtype, factors)
    checkpoint = Checkpoint(base)
    plan = planned(checkpoint, paths, factors, names)
    if plan.problems:
        what = f"adapter {str(paths[0])!r} was not" if len(paths) == 1 else "nothing was"
        raise Problems(f"{what} merged into {str(base)!r}", plan.problems)
    for doubt in plan.doubts:
        warnings.warn(doubt, stacklevel=2)
    writer = _Writer(checkpoint, plan, dtype, progress)
    with appearing(out, checkpoint.single) as folder:
        writer.write(folder)
    return writer.report


def _check_arguments(base: Path, paths: list[Path], out: Path, dtype: Any, factors: list[float]) -> None:
    if not paths:
        raise ValueError("no adapter given")
    if len(factors) != len(paths):
        raise ValueError(f"weights has {len(factors)} factors for {len(paths)} adapters")
    wrong = [factor for factor in factors if not math.isfinite(factor) or not factor]
    if wrong:
        raise ValueError(f"weights must be finite and not zero (leave such an adapter out), got {wrong[0]}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES} or None, got {dtype!r}")
    if not base.exists():
        raise FileNotFoundError(f"there is no checkpoint at {str(base)!r}")
    if base.is_file() and out.suffix != ".safetensors":
        raise ValueError(f"out must end in '.safetensors' where base is a file, got {str(out)!r}")
    if not is_free(out) or (base.is_file() and out.is_dir()):
        raise FileExistsError(f"{str(out)!r} exists already; give another name, or remove it first")
    if base.is_dir() and base.resolve() in out.resolve().parents:
        raise ValueError(f"out lies inside of base, {str(base)!r}; give a name outside")


class _Writer:
    """Writes a checkpoint with its changes into a folder, and keeps the report."""

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype | None, progress: Progress | None
    ) -> None:
        self.checkpoint, self.changes, self.dtype, self.progress = checkpoint, plan.changes, dtype, progress
        self.nothing = f"nothing was merged into {str(checkpoint.base)!r}"
        self.done = 0
        self.report = CheckpointReport([], {}, [], [], [])

    def write(self, folder: Path) -> None:
        """Write all files, the small ones first: one that cannot be read fails before the work."""
        files = self.checkpoint.files
        stored = {name: {key: self._stored(each) for key, each in file.tensors.items()} for name, file in files.items()}
        if not self.checkpoint.single:
            self._write_others(folder, sum(entry.size for tensors in stored.values() for entry in tensors.values()))
        for name, file in files.items():
            tensors = stored[name]
            if tensors == file.tensors and not self.changes.keys() & tensors.keys():
                copy_file(file.path, folder / name)
                file.check()
                self.report.copied.extend(tensors)
                self._advance(len(tensors))
            else:
                write_stream(folder / name, file, tensors, partial(self._changed, file, tensors))

    def _advance(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, len(self.checkpoint.tensors))

    def _stored(self, entry: StoredTensor) -> StoredTensor:
        return entry.in_dtype(self.dtype) if self.dtype and STORED.get(entry.dtype) in DTYPES else entry

    @torch.no_grad()
    def _changed(self, file: TensorFile, tensors: Mapping[str, StoredTensor], name: str) -> Tensor | None:
        """The new values of a tensor; None if it stays as it is."""
        self._advance(1)
        change = self.changes.get(name)
        if change is None and tensors[name] == file.tensors[name]:
            self.report.copied.append(name)
            return None
        dtype, replacement = STORED[tensors[name].dtype], None if change is None else change.replacement
        old = file.window(name) if replacement is None else replacement
        if change is None or replacement is not None:
            (self.report.copied if change is None else self.report.replaced).append(name)
            new = old.to(dtype).contiguous()
            if dtype in DTYPES and not is_finite(new) and not as_finite_as(new, old):
                raise ValueError(f"{name!r} is not finite in {dtype}; {self.nothing}")
            return new
        try:
            values, lost = merged_weight(old, change.layout, change.summands(old.shape), dtype)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}; {self.nothing}") from None
        self.report.merged.append(name)
        if lost is not None:
            self.report.lost[name] = lost
        return values

    def _write_others(self, folder: Path, size: int) -> None:
        done, index, index_name = {*self.checkpoint.files}, self.checkpoint.index, self.checkpoint.index_name
        if index:
            text, metadata = self.checkpoint.index_text, index.get("metadata")
            if self.dtype is not None and isinstance(metadata, dict) and "total_size" in metadata:
                text = json.dumps({**index, "metadata": {**metadata, "total_size": size}}, indent=2) + "\n"
            (folder / index_name).write_text(text, encoding="utf-8", newline="")
            flush(folder / index_name)
            done.add(index_name)
        found, others = side_files(self.checkpoint.folder)
        self.report.left_out.extend(name for name in others if name not in done)
        for name in found:
            if name not in done:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                copy_file(self.checkpoint.folder / name, folder / name)

"""Merge adapters into a checkpoint on the disk, block after block, without building a model."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lora_plus.errors import Problems, named_keywords, warn_user
from lora_plus.files.atomic import flush, is_free
from lora_plus.files.checks import is_finite
from lora_plus.files.paths import PathLike, stated
from lora_plus.files.rename import Names
from lora_plus.files.tensor_file import DTYPES as STORED
from lora_plus.files.tensor_file import NAMES, StoredTensor, TensorFile, fill
from lora_plus.layers.kinds import DTYPES
from lora_plus.model.merge import MergeReport
from lora_plus.tensors.merged_weight import BlockMerge, Memory
from lora_plus.text import counted, printable

from .folder import Checkpoint, appearing, checkpoint_for, side_files
from .plan import Plan, planned
from .stream import stretches, write_stream

Progress = Callable[[int, int], None]
"""Called with the number of things that are done, and of all."""


@dataclass(frozen=True)
class CheckpointReport:
    """The report of `merge_checkpoint`. ``str()`` of it is a short text."""

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


@named_keywords
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
    """Merge adapters into a checkpoint on disk, without building the model. The bits are those of `merge_lora`.

    A changed tensor is computed in float32, or in float64 if it or the adapter is float64, and rounded once. All others
    are copied byte for byte. Memory holds the adapter and a few megabytes, or one whole weight if it is stored
    transposed. ``out`` appears whole or not at all; the next run removes what a killed one left. Modules whose forward
    changes their weight before using it cannot be detected here; `merge_lora` detects them.

    Args:
        base: a ``.safetensors`` file, or a folder with ``model.safetensors``, or with shards and their index. Other
            files of the folder are copied.
        adapter: a file or folder that `load_adapter` reads, or several, whose updates are added.
        out: the new file or folder; an existing folder must be empty.
        dtype: dtype of the new checkpoint's floating-point tensors; None to keep each one's. Files such as config.json
            are not changed.
        weights: a factor for each adapter; None for 1 each.
        names: from the names of tensors in the adapter's model to those in the checkpoint, as in `load_adapter`, such
            as ``{"model": ""}`` if ``model.layers.0.q.weight`` is ``layers.0.q.weight`` in the checkpoint. In a kohya
            file the names are those of modules, with underscores.
        progress: called with the number of tensors that are started, and of all.

    Raises:
        ValueError: one error with all problems of the files, all that does not fit, and new weights that are not
            finite.
        FileNotFoundError, FileExistsError: if base or an adapter does not exist, or if ``out`` exists or appears
            meanwhile.
        OSError: if a file of base changes meanwhile, or ``out`` cannot be written. After any error nothing is left on
            disk.
    """
    base, out = stated(base), Path(os.path.abspath(stated(out)))
    alone = isinstance(adapter, (str, os.PathLike)) or not isinstance(adapter, Iterable)
    paths = [stated(path) for path in cast("Sequence[PathLike]", [adapter] if alone else adapter)]
    if not isinstance(weights, Iterable | None):
        raise TypeError(f"weights must be a list with a factor for each adapter, got {weights!r}")
    factors = [1.0] * len(paths) if weights is None else [float(factor) for factor in weights]
    _check_arguments(base, paths, out, dtype, factors)
    checkpoint = checkpoint_for(paths, base)
    plan = planned(checkpoint, paths, factors, names)
    if plan.problems:
        what = f"adapter {str(paths[0])!r} was not" if len(paths) == 1 else "nothing was"
        raise Problems(f"{what} merged into {str(base)!r}", plan.problems)
    for doubt in plan.doubts:
        warn_user(doubt)
    writer = _Writer(checkpoint, plan, dtype, progress)
    with appearing(out, checkpoint.single) as folder:
        writer.write(folder)
    return writer.report


def _check_arguments(base: Path, paths: list[Path], out: Path, dtype: Any, factors: list[float]) -> None:
    if not paths:
        raise ValueError("no adapter given")
    if len(factors) != len(paths):
        raise ValueError(f"weights has {counted(len(factors), 'factor')} for {counted(len(paths), 'adapter')}")
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
        self.old, self.new, self.between = Memory(), Memory(), Memory()

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        """Write all files, the small ones first: one that cannot be read fails before the work.

        The system brings a file to the disk while the next one is computed.
        """
        files = self.checkpoint.files
        stored = {name: {key: self._stored(each) for key, each in file.tensors.items()} for name, file in files.items()}
        with ThreadPoolExecutor(1) as flushing:
            flushed = []
            if not self.checkpoint.single:
                size = sum(entry.size for tensors in stored.values() for entry in tensors.values())
                flushed += [flushing.submit(flush, path) for path in self._write_others(folder, size)]
            for name, file in files.items():
                write_stream(folder / name, file, stored[name], partial(self._changed, file, stored[name]))
                flushed.append(flushing.submit(flush, folder / name))
            for each in flushed:
                each.result()
        self.checkpoint.check()

    def _stored(self, entry: StoredTensor) -> StoredTensor:
        """As the new file has it, but for its place."""
        if self.dtype is None or STORED.get(entry.dtype) not in DTYPES:
            return entry
        return entry._replace(dtype=NAMES[self.dtype], size=math.prod(entry.shape) * self.dtype.itemsize)

    def _changed(
        self, file: TensorFile, tensors: Mapping[str, StoredTensor], name: str, source: BufferedReader
    ) -> Iterable[Tensor] | None:
        """The new values of a tensor, piece after piece; None if it stays as it is."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, len(self.checkpoint.tensors))
        change, entry, new = self.changes.get(name), file.tensors[name], tensors[name]
        if change is None:
            self.report.copied.append(name)
            flat = BlockMerge("o i -> o i", (math.prod(entry.shape), 1), (), self.between)
            return None if new == entry else self._written(name, flat, entry, STORED[new.dtype], source)
        if change.replacement is None:
            self.report.merged.append(name)
            merge = BlockMerge(change.layout, entry.shape, change.summands(entry.shape), self.between)
            return self._written(name, merge, entry, STORED[new.dtype], source)
        self.report.replaced.append(name)
        values = change.replacement.to(STORED[new.dtype]).contiguous()
        if values.dtype in DTYPES and not is_finite(values):
            raise ValueError(f"{name!r} is not finite in {values.dtype}; {self.nothing}")
        return [values]

    def _written(
        self, name: str, merge: BlockMerge, entry: StoredTensor, dtype: torch.dtype, source: BufferedReader
    ) -> Iterator[Tensor]:
        """A tensor with its adapters, if it has any, in its new dtype, stretch after stretch of its file."""
        for start, shape, blocks in stretches(merge.shape, merge.blocks(_CPU)):
            old, new = self.old.tensor(shape, STORED[entry.dtype], _CPU), self.new.tensor(shape, dtype, _CPU)
            fill(old, source, entry.start + start * old.element_size())
            for index, rows in blocks:
                merge.write(new[index], old[index], rows)
            if not merge.is_finite(new, old):
                what = ": the merged weight" if merge.summands else ""
                raise ValueError(f"{name!r}{what} is not finite in {dtype}; {self.nothing}")
            yield new
        if merge.summands and (lost := merge.lost()) is not None:
            self.report.lost[name] = lost

    def _write_others(self, folder: Path, size: int) -> list[Path]:
        """Write the index and copy what holds no weights; gives the new files."""
        index, index_name = self.checkpoint.index, self.checkpoint.index_name
        found, others = side_files(self.checkpoint.folder)
        self.report.left_out.extend(name for name in others if name not in {index_name, *self.checkpoint.files})
        names = [name for name in found if name != index_name]
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.checkpoint.folder / name, folder / name)
        if index:
            text, metadata = self.checkpoint.index_text, index.get("metadata")
            if self.dtype is not None and isinstance(metadata, dict) and "total_size" in metadata:
                text = json.dumps({**index, "metadata": {**metadata, "total_size": size}}, indent=2) + "\n"
            (folder / index_name).write_text(text, encoding="utf-8", newline="")
            names.append(index_name)
        return [folder / name for name in names]


_CPU = torch.device("cpu")

"""The formats of adapters: one entry each, which the file that knows the format makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lora_plus.errors import Problems

from .saved_adapter import SavedAdapter
from .target import Target


class Contents(NamedTuple):
    """The tensors and the metadata of a safetensors file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


Files = dict[str, Any]
"""What is in the files of an adapter, by their names in its folder; of a single file the name is empty.

That of a safetensors file is a `Contents`, that of a JSON file what the document says.
"""


@dataclass(frozen=True)
class Format:
    """A file format of adapters: how it is recognised, read and written."""

    title: str
    """What sentences call it, such as ``"PEFT's format"``."""
    about: str
    """What it is, for the documentation."""
    read: Callable[[Files, Target, list[str]], SavedAdapter]
    """The adapter that files describe, which is read for a target; what is wrong is added to the list.

    Its tensors are unread where what they mean does not depend on their values.
    """
    write: Callable[[SavedAdapter, Target, list[str]], Files]
    """The files of an adapter of a target; what the format cannot express exactly is added to the list."""
    recognises: Callable[[Contents], bool] = lambda contents: False
    """Whether a single file is in this format, from the names of its tensors and its metadata: none is read."""
    metadata: tuple[str, ...] | None = ()
    """The texts of the user that it has room for, by their keys; None for any."""
    folder: tuple[str, ...] = ()
    """The files of a folder, the last of which is the one without which the others mean nothing; empty for one file."""

    def without_room(self, metadata: Iterable[str]) -> list[str]:
        """Those of these texts of the user, by their keys, that it has no room for."""
        return [] if self.metadata is None else sorted(set(metadata) - set(self.metadata))


FORMATS: dict[str, Format] = {}
"""What `save_adapter` calls a format -> the format. A single file is in the first one that recognises it."""


class Inexpressible(Problems):
    """Why a format cannot hold an adapter exactly."""


def usual_format(path: str) -> str:
    """The name of the format of a path for which the user names none."""
    single = path.endswith(".safetensors")
    return next(name for name, format in FORMATS.items() if single == (not format.folder))

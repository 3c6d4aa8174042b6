"""What a file leaves to what its adapter is loaded into."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from torch import Tensor

from lora_plus.layers.base import BaseLayer

from .peft.names import Outline
from .rename import Renaming


class Target(Protocol):
    """A model or a checkpoint, as the readers of formats see it."""

    rename: Renaming
    """The user's map from the names in the file to those here."""

    def names(self) -> Collection[str] | None:
        """The full names of the modules; None if there is neither a model nor a checkpoint."""
        ...

    def base(self, name: str) -> BaseLayer | None:
        """The base layer of this name; None if it cannot be adapted."""
        ...

    def repeats(self, name: str, tensor: Tensor) -> bool | None:
        """Whether a file's tensor equals the base's own of this name in the file; None if that cannot be told."""
        ...

    def peft(
        self, tensors: Mapping[str, Tensor], config: Any, problems: list[str]
    ) -> tuple[Mapping[str, BaseLayer | None], Outline]:
        """What `formats.peft.read` needs besides a folder's tensors and config, in the names of the file."""
        ...

"""What a checkpoint answers to the readers of file formats."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lora_plus.files.peft.names import Outline
from lora_plus.files.rename import Renaming
from lora_plus.files.streaming import DTYPES as STORED
from lora_plus.files.unread_tensors import equal_in_dtype
from lora_plus.layers.base import BaseLayer
from lora_plus.layers.kinds import DTYPES

from .folder import Checkpoint
from .shapes import Shape, surroundings, usual_base


class CheckpointTarget:
    """A checkpoint that an adapter is merged into, as `formats.target.Target` has it.

    Args:
        checkpoint: the checkpoint.
        rename: the user's map from the names in the file to those in the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, rename: Renaming) -> None:
        self.rename, self.checkpoint = rename, checkpoint
        self.shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
        self.modules = {name.removesuffix(".weight"): None for name in self.shapes if name.endswith(".weight")}

    def names(self) -> Collection[str]:
        """The names of all modules that have a weight."""
        return self.modules.keys()

    def base(self, name: str) -> BaseLayer | None:
        """The base layer of this name, which is the usual one of the weight's shape; None if there is none."""
        return usual_base(self.shapes[f"{name}.weight"])

    def repeats(self, name: str, tensor: Tensor) -> bool | None:
        """Whether a tensor equals the checkpoint's own of this name in the file, in the dtype that it has there.

        None if the checkpoint has none, which may be because it is tied to another one, or a quantized one.
        """
        new = self.rename(name)
        if new not in self.shapes or STORED.get(self.checkpoint.tensors[new].dtype) not in DTYPES:
            return None
        return equal_in_dtype(tensor, self.checkpoint.read(new))

    def peft(
        self, tensors: Mapping[str, Tensor], config: Any, problems: list[str]
    ) -> tuple[Mapping[str, BaseLayer | None], Outline]:
        """The base layers of a folder's adapters, and the modules that it names."""
        return surroundings(tensors, config, self._shape_of, problems)

    def _shape_of(self, name: str) -> Shape | None:
        new = self.rename(name)
        return None if new is None else self.shapes.get(new)

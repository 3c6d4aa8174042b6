"""What a checkpoint answers to the readers of file formats."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from lora_plus.files.peft.shapes import usual_base
from lora_plus.files.rename import Renaming
from lora_plus.files.target import Target
from lora_plus.files.tensor_file import DTYPES as STORED
from lora_plus.files.tensor_file import equal_in_dtype
from lora_plus.layers.base import BaseLayer
from lora_plus.layers.kinds import DTYPES

from .folder import Checkpoint


class CheckpointTarget(Target):
    """A checkpoint that an adapter is merged into.

    Args:
        checkpoint: the checkpoint.
        rename: the user's map from the names in the file to those in the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, rename: Renaming) -> None:
        super().__init__(rename)
        self.checkpoint = checkpoint
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

    def shape(self, name: str) -> tuple[int, ...] | None:
        new = self.rename(name)
        return None if new is None else self.shapes.get(new)

"""Lightning: modules whose checkpoints hold what a run changes, and not the frozen base."""

from __future__ import annotations

from typing import Any

from lora_plus.errors import Problems
from lora_plus.packages import needed

from .run_file import name_problems, run_tensors

with needed(__name__, "lightning"):
    import lightning as L


class LoraPlusModule(L.LightningModule):
    """A ``LightningModule`` for models with adapters.

    The ``state_dict`` in a checkpoint contains the tensors of all adapters, other trained parameters, and buffers. Load
    it into a model with the same base and the same adapters, of any values. If you override ``on_save_checkpoint`` or
    ``on_load_checkpoint``, call ``super()``'s.
    """

    strict_loading = False  # what is missing in a checkpoint is looked after here

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen base, and note the names of the rest."""
        own = run_tensors(self)
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in own}
        checkpoint[_NAMES] = sorted(own)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise `Problems` with every name that only the checkpoint or the module has."""
        problems = name_problems(set(checkpoint.get(_NAMES, ())), "checkpoint", run_tensors(self), "module")
        if problems:
            raise Problems("the checkpoint does not fit the module; inject the adapters of its run", sorted(problems))


_NAMES = "lora_plus"
"""The entry of a checkpoint that lists what a run changes: sharded checkpoints do not show their ``state_dict``."""

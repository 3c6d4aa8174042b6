"""Lightning: modules whose checkpoints hold what a run changes, and not the frozen base."""

from __future__ import annotations

from typing import Any

import lightning as L

from lora_plus.errors import Problems

from .trained_state import run_tensors


class LoraPlusModule(L.LightningModule):
    """A ``LightningModule`` for models with adapters.

    A checkpoint's ``state_dict`` holds the tensors of all adapters, what is trained besides, and buffers. It is loaded
    into a model that holds the same base and the same adapters; the values of these do not matter. A module that
    overrides ``on_save_checkpoint`` or ``on_load_checkpoint`` calls ``super()``'s.
    """

    strict_loading = False  # what is missing in a checkpoint is looked after here

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen base, and note the names of the rest."""
        own = run_tensors(self)
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in own}
        checkpoint[_NAMES] = sorted(own)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise if the checkpoint is of other adapters than the module's.

        Raises:
            Problems: a ValueError with every name that only one of them has.
        """
        saved, own = set(checkpoint.get(_NAMES, ())), run_tensors(self).keys()
        problems = [f"{name!r} is in the checkpoint, and not in the module" for name in saved - own]
        problems += [f"{name!r} is in the module, and not in the checkpoint" for name in own - saved]
        if problems:
            raise Problems("the checkpoint does not fit the module; inject the adapters of its run", sorted(problems))


_NAMES = "lora_plus"
"""The entry of a checkpoint that lists what a run changes: sharded checkpoints do not show their ``state_dict``."""

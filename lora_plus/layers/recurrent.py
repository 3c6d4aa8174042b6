"""``nn.LSTM`` and torch's other recurrent layers, whose weights have adapters as parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .parameter_owner import OWNERS, READING, LoRAOwner, parameter_holders


class LoRARecurrentOwner(LoRAOwner):
    """An ``nn.LSTM`` or another one of torch's recurrent layers.

    In a forward torch writes the weights that it finds into a list on the layer, and computes with that list. Weights
    that are computed belong to one call, so that there the list does, too.
    """

    _flat_weights_names: list[str]
    flatten_parameters: Callable[[], None]

    @property
    def _flat_weights(self) -> list[Tensor]:
        if not self._lora_computes():
            return self.__dict__["_flat_weights"]  # type: ignore[no-any-return]
        noted = READING.noted(self)
        if noted is not None and "_flat_weights" in noted:
            return noted["_flat_weights"]  # type: ignore[no-any-return]
        found = [getattr(self, name) for name in self._flat_weights_names]
        if noted is not None:
            # for cuDNN torch moves all of them into one memory; what other threads use must stay where it is
            found = [w.clone() if w.is_cuda and isinstance(w, nn.Parameter) else w for w in found]
            noted["_flat_weights"] = found
            self.flatten_parameters()
        return found

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor]) -> None:
        self.__dict__["_flat_weights"] = weights

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__.get("_flat_weights_names", ()) or not self._lora_computes():
            super().__setattr__(name, value)
            return
        # torch would write it into the list and so compute all weights, while fully_shard still gathers them
        (READING.noted(self) or {}).pop("_flat_weights", None)
        nn.Module.__setattr__(self, name, value)

    def _update_flat_weights(self) -> None:
        if not self._lora_computes():
            super()._update_flat_weights()  # type: ignore[misc]

    def _lora_computes(self) -> bool:
        return any(holder.computes() for holder in parameter_holders(self).values())


OWNERS[nn.RNNBase] = LoRARecurrentOwner

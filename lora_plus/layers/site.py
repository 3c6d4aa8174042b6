"""The adapters of one matrix: a whole weight, or a block of its rows, such as the q of a fused q, k, v."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lora_plus.tensors.variant import AdapterSpec

from .adapter import Adapter, AdapterTensors

if TYPE_CHECKING:
    from typing_extensions import Self


class AdapterSite(nn.Module):
    """The adapters of one matrix, a whole weight or some rows of one, by the name of the adapter."""

    roles: ClassVar[dict[str, str]] = {}
    """By container, what its tensors are to the optimizer, where that is not what their variant states."""

    lora_label: str = ""
    """The name of the matrix inside the module that it belongs to; empty where it is that module's one weight."""
    lora_A: AdapterTensors
    lora_B: AdapterTensors
    lora_adapters: dict[str, Adapter]
    """The adapters, by name, in the order in which they were added."""

    def add_adapter(self, name: str, spec: AdapterSpec, tensors: dict[str, Tensor], *, trainable: bool = True) -> None:
        """Take in an adapter with these tensors."""
        assert name not in self.lora_adapters
        adapter = self.lora_adapters[name] = Adapter(name, spec, self._modules, self.roles)
        for container, tensor in tensors.items():
            held = self._modules.get(container)
            if held is None:
                held = self._modules[container] = AdapterTensors()
            if tensor.is_inference():  # made in torch.inference_mode: it could have no gradient
                with torch.inference_mode(False):
                    tensor = tensor.clone()
            held._parameters[name] = nn.Parameter(tensor, trainable and adapter.is_trained(container))

    def tensor_containers(self) -> dict[str, AdapterTensors]:
        """The containers of the adapters' tensors, by their names."""
        return {name: child for name, child in self._modules.items() if isinstance(child, AdapterTensors)}

    def freeze_adapters(self) -> None:
        """Take the tensors of all adapters out of training."""
        for container in self.tensor_containers().values():
            container.requires_grad_(False)

    def extra_repr(self) -> str:
        adapters = (f"{name}: r={each.spec.r}, alpha={each.spec.alpha:g}" for name, each in self.lora_adapters.items())
        base = super().extra_repr()
        return f"{base}{', ' if base else ''}lora=({', '.join(adapters)})"


class RowBlock(AdapterSite):
    """The adapters of some rows of a weight's matrix view: of one of several projections in it."""

    def __init__(self, label: str, rows: tuple[int, int], total: int) -> None:
        super().__init__()
        # the projection's name; its first row, and the one after its last; the number of rows of the whole weight
        self.lora_label, self.rows, self.total = label, rows, total
        self.lora_adapters = {}

    def extra_repr(self) -> str:
        return f"rows={self.rows[0]}:{self.rows[1]}, {super().extra_repr()}"


class Holders(nn.Module):
    """Holds, inside of a module of the model, what has adapters of blocks of rows or of parameters."""


class BaseParameters(nn.Module):
    """A module's adapted parameters, by their names there: it saves and loads them, a `LoRAParameter` moves them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass

"""Linear layers with adapters: ``nn.Linear``, and those that store their weight the other way round."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_plus.tensors.fused_linear import can_fuse, fused_linear
from lora_plus.tensors.matrix import rank_first_update

from .kinds import adapts, numbers_like
from .layer import LoRALayer

_LINEAR_FORWARD = nn.Linear.forward


class _LoRALinearMap(LoRALayer):
    """What the linear layers share, however their weight is stored."""

    linear_low_rank = True

    def trial_input(self) -> Tensor:
        return numbers_like(self.weight, 2, self.matrix_of(self, values=False).shape[1])

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float, y: Tensor) -> Tensor:
        if dropout:
            x = F.dropout(x, dropout)
        if torch.compiler.is_compiling() and type(x) is Tensor:
            return rank_first_update(x, A, B, scale)
        return F.linear(F.linear(x, A) * scale, B)  # scaled where that is cheapest: (..., in) -> (..., r) -> (..., out)


@adapts(nn.Linear)
class LoRALinear(_LoRALinearMap, nn.Linear):
    """``y = W x + b + s B A x`` (Hu et al. 2021, arXiv:2106.09685): ``(..., in_features) -> (..., out_features)``."""

    layout = "o i -> o i"

    @classmethod
    def unfit(cls, layer: nn.Module) -> str | None:
        if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            what = "the output projection of an nn.MultiheadAttention"
            return f"{what}, which never calls it; inject into the attention itself"
        return None

    def adapted_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs and (adapters := self._summed(args[0])):
            x, weight, bias = args[0], self._parameters["weight"], self._parameters["bias"]
            if weight is not None and can_fuse(x, weight, bias):
                updates = []
                for adapter in adapters:
                    u = F.dropout(x, adapter.spec.dropout) if adapter.spec.drops and self.training else None
                    updates.append((u, *adapter.factors(), adapter.scale))
                return fused_linear(x, weight, bias, updates)
        return super().adapted_forward(*args, **kwargs)

    def _summed(self, x: Tensor) -> tuple[Any, ...]:
        """The adapters of all samples, where the layer computes ``W x + b`` and they add to that; none otherwise."""
        if self.lora_disabled or self.lora_base_forward is not None or self.base_class.forward is not _LINEAR_FORWARD:
            return ()
        adapters = self.lora_active if self.lora_override is None else self.lora_override.shared(x)
        for adapter in adapters:
            if not adapter.spec.only_adds:
                return ()
        held = self._parameters
        return adapters if "weight" in held and "bias" in held else ()


PLAIN_CONV1D = [("transformers.pytorch_utils", "Conv1D")]
"""Module and name of the classes that store a linear layer as ``(in, out)`` and compute nothing else."""


@adapts(nn.Module)
class LoRATransposedLinear(_LoRALinearMap):
    """A linear layer that stores its weight as ``(in, out)``, as GPT-2's ``Conv1D`` does: ``y = x W + b + s B A x``."""

    layout = "i o -> o i"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        width, weight = getattr(module, "nf", None), getattr(module, "weight", None)
        return isinstance(width, int) and isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == width

    @classmethod
    def plain_classes(cls) -> tuple[Any, ...]:
        found = []
        for module, name in PLAIN_CONV1D:
            if (layer_class := getattr(sys.modules.get(module), name, None)) is not None:
                found.append(layer_class)
        return tuple(found)

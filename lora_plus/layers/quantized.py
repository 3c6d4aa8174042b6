"""Linear layers whose weight another package stores quantized: how to tell them, and their weight in plain numbers.

No such package is imported: a layer of one is there only if the package is loaded already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_plus.tensors.distributed import is_dtensor

from .kinds import FORMS, adapts, weight_of
from .linear import LoRALinear


@dataclass(frozen=True)
class Store:
    """A way of storing weights."""

    holds: Callable[[Any], bool]
    """Whether this weight is so stored."""
    dense: Callable[[Any], Tensor]
    """The weight ``(out, in)`` of a layer as numbers, by the package's own rule."""
    leftovers: tuple[str, ...]
    """Attributes of the layer that a plain linear layer does not have."""
    dtype: Callable[[Any, Tensor], torch.dtype] = lambda layer, dense: dense.dtype
    """The dtype that the layer and its dense weight say a plain layer should have."""
    is_ready: Callable[[Any], bool] = lambda layer: True
    """Whether the layer's weight has been quantized yet."""


def _four_bit(layer: Any) -> Any:
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()  # which brings a weight that was repacked for the CPU back to the usual order
    return sys.modules["bitsandbytes"].functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _eight_bit_scales(layer: Any) -> Any:
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB


def _eight_bit(layer: Any) -> Any:
    dequantize = sys.modules["bitsandbytes"].functional.int8_vectorwise_dequant
    return dequantize(layer.weight.data, _eight_bit_scales(layer))


def _tensor_subclass(layer: Any) -> Any:
    weight = layer.weight
    return weight.get_original_weight() if hasattr(weight, "get_original_weight") else weight.dequantize()


STORES: dict[str, Store] = {
    "bitsandbytes 4 bit": Store(
        lambda weight: hasattr(weight, "quant_state"),
        _four_bit,
        ("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu"),
        is_ready=lambda layer: layer.weight.quant_state is not None,
    ),
    "bitsandbytes 8 bit": Store(
        lambda weight: hasattr(weight, "SCB"),
        _eight_bit,
        ("state", "index"),
        # the layer does not say what it was made from; its bias does
        dtype=lambda layer, dense: dense.dtype if layer.bias is None else layer.bias.dtype,
        is_ready=lambda layer: _eight_bit_scales(layer) is not None,
    ),
    "torchao": Store(
        # a sharded weight is such a subclass too, and can be gathered
        lambda weight: hasattr(weight, "__tensor_flatten__") and not is_dtensor(weight),
        _tensor_subclass,
        ("extra_repr",),
    ),
}


def _name_of(weight: object) -> str | None:
    """The name in `STORES` of the way in which a weight is stored; None for plain numbers, and what is no weight."""
    if type(weight) is nn.Parameter or not isinstance(weight, Tensor):
        return None
    return next((name for name, store in STORES.items() if store.holds(weight)), None)


def _store_of(layer: Any) -> Store:
    return next(store for store in STORES.values() if store.holds(layer.weight))


FORMS.append(lambda weight: None if (name := _name_of(weight)) is None else f"quantized ({name})")


@adapts(nn.Linear)
class LoRAQuantizedLinear(LoRALinear):
    """A linear layer of another package whose weight is quantized; it is merged only into a plain layer."""

    stored_quantized = True

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return _name_of(weight_of(module)) is not None

    @classmethod
    def unfit(cls, layer: nn.Module) -> str | None:
        if not _store_of(layer).is_ready(layer):
            return f"{type(layer).__name__} whose weight is not quantized yet; move the model to its device first"
        return super().unfit(layer)

    @classmethod
    def matrix_of(cls, layer: Any, *, values: bool = True) -> Tensor:
        if values:
            return _dense_weight(layer)
        return torch.empty(1, device=layer.weight.device).expand(cls.stored_shape(layer))

    @classmethod
    def stored_shape(cls, layer: Any) -> tuple[int, ...]:
        return layer.out_features, layer.in_features

    def trial_input(self) -> None:  # type: ignore[override]
        """None: the packages' forwards are known."""

    def dense_weight(self) -> tuple[Tensor, torch.dtype]:
        dense = _dense_weight(self)
        return dense, _store_of(self).dtype(self, dense)

    def base_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = super().base_forward(*args, **kwargs)
        x = self.input_of(args, kwargs)
        if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
            # kernels that quantize activations drop the gradient without a word
            y = _StraightThrough.apply(x, y, self)
        return y

    def restore(self) -> nn.Module:
        """As for other layers; with a merged weight, which is plain numbers, it becomes an ``nn.Linear``."""
        merged = self.lora_merge is not None and bool(self.lora_merge.adapters)
        store = _name_of(self.own_weight()) if merged else None
        plain = super().restore()
        if store is not None:
            _make_dense(cast(nn.Linear, plain), store)
        return plain


def _dense_weight(layer: nn.Module) -> Tensor:
    """The weight ``(out, in)`` that a quantized linear layer computes with, detached."""
    with torch.no_grad():
        return _store_of(layer).dense(layer).detach()


def _make_dense(layer: nn.Linear, store: str) -> None:
    """Turn a linear layer of another package, whose weight is plain numbers by now, into an ``nn.Linear`` in place."""
    for name in STORES[store].leftovers:
        layer.__dict__.pop(name, None)
    package = store.partition(" ")[0]
    for key, hook in list(layer._load_state_dict_pre_hooks.items()):
        if getattr(hook, "__module__", "").startswith(package):
            del layer._load_state_dict_pre_hooks[key]
    layer.__class__ = nn.Linear
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(layer.weight.dtype)  # which a forward in another dtype has changed


class _StraightThrough(torch.autograd.Function):
    """The output of a kernel that has no gradient, with the gradient of the linear map ``x W^T`` that it stands for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = gradients[0]
        return (gradient @ _dense_weight(ctx.layer).to(gradient.dtype)).to(ctx.dtype), None, None

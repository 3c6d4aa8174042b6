"""The kinds of LoRA layer, one short class each, and the table that finds the kind of a plain layer."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_plus.tensors import matrix as functional
from lora_plus.tensors.fused import Update, can_fuse, fused_linear
from lora_plus.tensors.variant import only_adds

from .calls import Calls
from .layer import LoRALayer, argument_names
from .quantized import STORES, StraightThrough, dense_dtype, dense_weight, store_of

KINDS: dict[type[nn.Module], type[LoRALayer]] = {}
"""Base layer class -> its LoRA class. A subclass of a base layer is served by the nearest entry."""

LOOKALIKES: list[type[LoRALayer]] = []
"""Kinds known by what a layer has, not by its class, because that class is in a package we do not import."""

NARROWER: dict[type[LoRALayer], list[type[LoRALayer]]] = {}
"""Kind -> kinds that serve some of its layers, known by what the layer has."""

Kind = TypeVar("Kind", bound=type[LoRALayer])


def adapts(base_class: type[nn.Module]) -> Callable[[Kind], Kind]:
    """Class decorator: enter a LoRA class in the table as the kind for ``base_class`` and its subclasses."""

    def enter(kind: Kind) -> Kind:
        kind.base_class, kind.lora_arguments = base_class, argument_names(base_class)
        KINDS[base_class] = kind
        return kind

    return enter


def lora_class(module: nn.Module) -> type[LoRALayer] | None:
    """The kind that can adapt this layer, or None."""
    if isinstance(module, LoRALayer):
        return type(module)
    by_class = next((KINDS[parent] for parent in type(module).__mro__ if parent in KINDS), None)
    if by_class is None:
        return next((kind for kind in LOOKALIKES if kind.fits(module)), None)
    return next((kind for kind in NARROWER.get(by_class, ()) if kind.fits(module)), by_class)


def why_unsupported(module: nn.Module) -> str | None:
    """Why this layer cannot be adapted; None if it can."""
    kind, store = lora_class(module), store_of(module)
    if kind is None:
        return type(module).__name__
    if store is not None and not kind.stored_quantized:
        return f"{type(module).__name__} whose weight is quantized ({store})"
    if store is not None and not STORES[store].is_ready(module):
        return f"{type(module).__name__} whose weight is not quantized yet; move the model to its device first"
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.UninitializedParameter):
        return f"{type(module).__name__} whose weight is not initialised; run a forward pass first"
    if not isinstance(weight, Tensor):
        return f"{type(module).__name__} without a weight tensor"
    if not kind.stored_quantized and weight.dtype not in DTYPES:
        return f"{type(module).__name__} whose weight is {weight.dtype}, expected one of {DTYPES}"
    if not weight.numel():
        return f"{type(module).__name__} whose weight is empty"
    if not isinstance(module, LoRALayer) and (unfit := kind.unfit(module)) is not None:
        return unfit
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return (
            "the output projection of an nn.MultiheadAttention, which never calls it; inject into the attention itself"
        )
    if not isinstance(module, LoRALayer) and (clash := _clash(type(module)) | _own_names(module)):  # type: ignore[arg-type]
        return f"{type(module).__name__} that has attributes of a LoRA layer already: {sorted(clash)}"
    return None


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Of the weights that can be adapted."""

_OWN_NAMES = (set(dir(LoRALayer)) | set(LoRALayer.__annotations__)) - set(dir(nn.Module)) - {"weight"}


def _own_names(module: nn.Module) -> set[str]:
    held: tuple[Mapping[str, Any], ...] = (module.__dict__, module._parameters, module._buffers, module._modules)
    return {name for names in held for name in names if name in _OWN_NAMES}


_CLASHES: WeakKeyDictionary[type[Any], set[str]] = WeakKeyDictionary()
"""What `_clash` has found, for `dir` is slow."""


def _clash(layer_class: type[Any]) -> set[str]:
    if layer_class not in _CLASHES:
        _CLASHES[layer_class] = _OWN_NAMES & set(dir(layer_class))
    return _CLASHES[layer_class]


def _trial(weight: Tensor, *shape: int) -> Tensor:
    """Numbers between -1 and 1 without a pattern, like the weight in dtype and device."""
    count = torch.arange(1, 1 + math.prod(shape), device=weight.device, dtype=torch.float32)
    return torch.sin(count * count).reshape(shape).to(weight.dtype)


_LINEAR_FORWARD = nn.Linear.forward


@adapts(nn.Linear)
class LoRALinear(LoRALayer, nn.Linear):
    """``y = W x + b + s B A x`` (Hu et al. 2021, arXiv:2106.09685): ``(..., in_features) -> (..., out_features)``."""

    layout = "o i -> o i"
    linear_low_rank = True

    def adapted_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs and self._only_sums():
            x, weight, bias = args[0], self._parameters["weight"], self._parameters["bias"]
            if weight is not None and can_fuse(x, weight, bias):
                return fused_linear(x, weight, bias, list(self._updates(x)))
        return super().adapted_forward(*args, **kwargs)

    def _only_sums(self) -> bool:
        """Whether the layer computes ``W x + b`` with parameters that it holds, and active adapters add to that."""
        if self.lora_base_forward is not None or self.base_class.forward is not _LINEAR_FORWARD:
            return False
        adapters = self.in_force()
        if not adapters or not {"weight", "bias"} <= self._parameters.keys():
            return False
        return all(only_adds(self.lora_spec(name).variant) for name in adapters)

    def _updates(self, x: Tensor) -> Iterator[Update]:
        for name in self.lora_active:
            dropout = self.dropout_of(self.lora_spec(name))
            yield Update(F.dropout(x, dropout) if dropout else None, *self.lora_factors(name))

    def trial_input(self) -> Tensor:
        return _trial(self.weight, 2, self.weight.shape[1])

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float, y: Tensor) -> Tensor:
        return functional.linear_update(x, A, B, scale, dropout)


class LoRAQuantizedLinear(LoRALinear):
    """A linear layer of another package whose weight is quantized; it is merged only into a plain layer."""

    base_class = nn.Linear
    stored_quantized = True

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and store_of(module) is not None

    @classmethod
    def matrix_of(cls, layer: nn.Module, *, values: bool = True) -> Tensor:
        if values:
            return dense_weight(layer)
        assert isinstance(layer.weight, Tensor)
        return torch.empty(1, device=layer.weight.device).expand(cls.stored_shape(layer))

    @classmethod
    def stored_shape(cls, layer: nn.Module) -> tuple[int, ...]:
        assert isinstance(layer, nn.Linear)
        return layer.out_features, layer.in_features

    def trial_input(self) -> None:  # type: ignore[override]
        """None: the packages' forwards are known."""

    def dense_weight(self) -> tuple[Tensor, torch.dtype]:
        dense = dense_weight(self)
        return dense, dense_dtype(self, dense)

    def base_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = super().base_forward(*args, **kwargs)
        x = self.input_of(args, kwargs)
        if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
            # kernels that quantize activations drop the gradient without a word
            y = StraightThrough.apply(x, y, self)
        return y


NARROWER[LoRALinear] = [LoRAQuantizedLinear]


class LoRATransposedLinear(LoRALayer):
    """A linear layer that stores its weight as ``(in, out)``, as GPT-2's ``Conv1D`` does: ``y = x W + b + s B A x``."""

    base_class = nn.Module
    layout = "i o -> o i"
    linear_low_rank = True

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        width, weight = getattr(module, "nf", None), getattr(module, "weight", None)
        return isinstance(width, int) and isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == width

    @classmethod
    def known_forward(cls) -> Any:
        conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
        return getattr(conv1d, "forward", None)

    def trial_input(self) -> Tensor:
        return _trial(self.weight, 2, self.weight.shape[0])

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float, y: Tensor) -> Tensor:
        return functional.linear_update(x, A, B, scale, dropout)


LOOKALIKES.append(LoRATransposedLinear)


_UNBOUNDED = Calls()
"""The embeddings that compute their base in this thread, where the norm is that of the adapted row."""


@adapts(nn.Embedding)
class LoRAEmbedding(LoRALayer, nn.Embedding):
    """``y = (W + s B A) onehot(index)``; integers ``(...)`` to ``(..., embedding_dim)``.

    The row at ``padding_idx`` gets no update: A's column there starts at zero and gets no gradient. With ``max_norm``
    the effective row is what is kept within the norm, and unlike ``nn.Embedding`` the stored weight is left alone.
    """

    layout = "n d -> d n"
    roles = {"lora_A": "embedding_A", "lora_B": "embedding_B"}

    padding_idx: int | None

    @property
    def max_norm(self) -> float | None:  # type: ignore[override]
        """The norm that no row exceeds; None while the base computes, for torch rescales stored rows in place."""
        return self.__dict__["max_norm"] if _UNBOUNDED.noted(self) is None else None

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        self.__dict__["max_norm"] = value

    @classmethod
    def unfit(cls, layer: nn.Module) -> str | None:
        if layer.max_norm is None or type(layer).forward is nn.Embedding.forward:
            return None
        return f"{type(layer).__name__} with max_norm and a forward of its own, which would see rows of any norm"

    @classmethod
    def no_update(cls, layer: nn.Module) -> int | None:
        return layer.padding_idx if isinstance(layer.padding_idx, int) else None

    @classmethod
    def base_facts(cls, module: nn.Module) -> dict[str, Any]:
        return {} if module.max_norm is None else {"max_norm": module.max_norm}

    def trial_input(self) -> Tensor:
        return torch.arange(min(4, len(self.weight)), device=self.weight.device)

    def adapted(self, x: Tensor, y: Tensor, adapters: tuple[str, ...]) -> Tensor:
        y = super().adapted(x, y, adapters)
        return y if self.max_norm is None else functional.clip_norm(y, self.max_norm, self.norm_type)

    def base_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.max_norm is None:
            return super().base_forward(*args, **kwargs)
        outer = _UNBOUNDED.begin(self)
        try:
            y = super().base_forward(*args, **kwargs)
        finally:
            _UNBOUNDED.end(outer)
        merged = self.lora_merge is not None and not self.lora_disabled  # then nothing is added any more
        return functional.clip_norm(y, self.max_norm, self.norm_type) if merged else y

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float, y: Tensor) -> Tensor:
        return functional.embedding_update(x, A, B, scale, dropout, self.padding_idx, self.scale_grad_by_freq)


class _LoRAConv(LoRALayer):
    """What the convolutions share: an update is a convolution like the layer's to r channels, and a 1x1 convolution."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def base_facts(cls, module: nn.Module) -> dict[str, Any]:
        return {} if module.groups == 1 else {"groups": module.groups}

    def trial_input(self) -> Tensor:
        sizes = (step * (width - 1) + 3 for step, width in zip(self.dilation, self.kernel_size, strict=True))
        return _trial(self.weight, 1, self.in_channels, *sizes)  # type: ignore[arg-type]

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float, y: Tensor) -> Tensor:
        # A is (r, in_channels / groups * prod(kernel_size)), shared by the groups; B is (out_channels, r)
        down = A.reshape(A.shape[0], -1, *self.kernel_size).repeat(self.groups, *[1] * (1 + len(self.kernel_size)))
        conv: Any = self

        def convolve(x: Tensor) -> Tensor:
            return conv._conv_forward(x, down, None)  # type: ignore[no-any-return]

        return functional.conv_update(x, B, scale, dropout, self.groups, convolve, len(self.kernel_size))

    @classmethod
    def overrides(cls) -> bool:
        kind = cls._derived_from
        classes = (cls.base_class, cls.base_class if kind is None else kind.base_class)
        own, known = (getattr(each, "_conv_forward", None) for each in classes)
        return super().overrides() or own is not known

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        conv: Any = self
        product: Tensor = conv._conv_forward(x.to(y), self.weight.to(y), None)
        return product


@adapts(nn.Conv1d)
class LoRAConv1d(_LoRAConv, nn.Conv1d):
    """``nn.Conv1d`` with adapters."""

    layout = "o i k -> o (i k)"
    channel = -2


@adapts(nn.Conv2d)
class LoRAConv2d(_LoRAConv, nn.Conv2d):
    """``nn.Conv2d`` with adapters."""

    layout = "o i h w -> o (i h w)"
    channel = -3


@adapts(nn.Conv3d)
class LoRAConv3d(_LoRAConv, nn.Conv3d):
    """``nn.Conv3d`` with adapters."""

    layout = "o i d h w -> o (i d h w)"
    channel = -4


class _LoRAConvTranspose(_LoRAConv):
    """Transposed convolutions; here B is ``(out_channels / groups, r)`` and shared by the groups."""

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float, y: Tensor) -> Tensor:
        down = A.reshape(A.shape[0], -1, *self.kernel_size).transpose(0, 1)  # (in_channels, r, *kernel)
        spatial, padding = len(self.kernel_size), cast(tuple[int, ...], self.padding)
        settings = zip(x.shape[-spatial:], self.stride, padding, self.dilation, self.kernel_size, strict=True)
        least = [(n - 1) * step - 2 * pad + width * (k - 1) + 1 for n, step, pad, width, k in settings]
        # the caller can ask for an output size, which shows in the base's output only
        extra = [size - smallest for size, smallest in zip(y.shape[-spatial:], least, strict=True)]
        convolve = functools.partial(
            _TRANSPOSED[spatial], weight=down, stride=self.stride, padding=padding, output_padding=extra,
            groups=self.groups, dilation=self.dilation,
        )  # fmt: skip
        up = B.repeat(self.groups, 1)
        return functional.conv_update(x, up, scale, dropout, self.groups, convolve, spatial)

    product = LoRALayer.product

    def per_channel(self, values: Tensor) -> Tensor:
        return super().per_channel(values if len(values) == self.out_channels else values.repeat(self.groups))


_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


@adapts(nn.ConvTranspose1d)
class LoRAConvTranspose1d(_LoRAConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with adapters."""

    layout = "i o k -> o (i k)"
    channel = -2


@adapts(nn.ConvTranspose2d)
class LoRAConvTranspose2d(_LoRAConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with adapters."""

    layout = "i o h w -> o (i h w)"
    channel = -3


@adapts(nn.ConvTranspose3d)
class LoRAConvTranspose3d(_LoRAConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with adapters."""

    layout = "i o d h w -> o (i d h w)"
    channel = -4

"""Convolutions with adapters: one kind, entered for torch's six classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .kinds import adapts, numbers_like
from .layer import LoRALayer


class _LoRAConv(LoRALayer):
    """What the convolutions share: an update is a convolution like the layer's to r channels, and a 1x1 convolution.

    A is ``(r, in_channels / groups * prod(kernel_size))``, shared by the groups; B is ``(out_channels, r)``.
    """

    stored = "o i"
    computed_by = ("forward", "_conv_forward")

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def base_facts(cls, module: nn.Module) -> dict[str, Any]:
        return {} if module.groups == 1 else {"groups": module.groups}

    def trial_input(self) -> Tensor:
        sizes = (step * (width - 1) + 3 for step, width in zip(self.dilation, self.kernel_size, strict=True))
        return numbers_like(self.weight, 1, self.in_channels, *sizes)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float, y: Tensor) -> Tensor:
        spatial = len(self.kernel_size)
        if dropout:
            x = F.dropout(x, dropout)
        h = self.to_rank(x, A.reshape(A.shape[0], -1, *self.kernel_size), y) * scale  # (..., groups * r, ...)
        return _POINTWISE[spatial](h, B.reshape(*B.shape, *[1] * spatial), groups=self.groups)

    def to_rank(self, x: Tensor, A: Tensor, y: Tensor) -> Tensor:
        """The convolution with A ``(r, in_channels / groups, *kernel_size)`` in each group."""
        return self.convolve(x, A.repeat(self.groups, *[1] * (A.ndim - 1)))

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return self.convolve(x.to(y), self.weight.to(y))

    def convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        """With torch's own stride, padding, dilation and groups of the layer."""
        conv: Any = self
        return conv._conv_forward(x, kernel, None)  # type: ignore[no-any-return]


class _LoRAConvTranspose(_LoRAConv):
    """Transposed convolutions; here B is ``(out_channels / groups, r)`` and shared by the groups, too."""

    stored = "i o"
    product = LoRALayer.product

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float, y: Tensor) -> Tensor:
        return super().low_rank(x, A, B.repeat(self.groups, 1), scale, dropout, y)

    def to_rank(self, x: Tensor, A: Tensor, y: Tensor) -> Tensor:
        spatial = len(self.kernel_size)
        settings = zip(x.shape[-spatial:], self.stride, self.padding, self.dilation, self.kernel_size, strict=True)
        least = [(n - 1) * step - 2 * pad + width * (k - 1) + 1 for n, step, pad, width, k in settings]
        # the caller can ask for an output size, which shows in the base's output only
        extra = [size - smallest for size, smallest in zip(y.shape[-spatial:], least, strict=True)]
        kernel = A.transpose(0, 1)  # (in_channels, r, *kernel_size)
        return _TRANSPOSED[spatial](x, kernel, None, self.stride, self.padding, extra, self.groups, self.dilation)

    def per_channel(self, values: Tensor) -> Tensor:
        return super().per_channel(values if values.shape[0] == self.out_channels else values.repeat(self.groups))


_POINTWISE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _entered(shared: type[_LoRAConv], base_class: type[nn.Module], axes: str) -> type[LoRALayer]:
    """The kind for one of torch's classes, whose kernel has these axes."""
    body = {
        "__doc__": f"``nn.{base_class.__name__}`` with adapters.",
        "__module__": __name__,
        "layout": f"{shared.stored} {axes} -> o (i {axes})",
        "channel": -1 - len(axes.split()),
    }
    return adapts(base_class)(type(f"LoRA{base_class.__name__}", (shared, base_class), body))


LoRAConv1d = _entered(_LoRAConv, nn.Conv1d, "k")
"""``nn.Conv1d`` with adapters."""
LoRAConv2d = _entered(_LoRAConv, nn.Conv2d, "h w")
"""``nn.Conv2d`` with adapters."""
LoRAConv3d = _entered(_LoRAConv, nn.Conv3d, "d h w")
"""``nn.Conv3d`` with adapters."""
LoRAConvTranspose1d = _entered(_LoRAConvTranspose, nn.ConvTranspose1d, "k")
"""``nn.ConvTranspose1d`` with adapters."""
LoRAConvTranspose2d = _entered(_LoRAConvTranspose, nn.ConvTranspose2d, "h w")
"""``nn.ConvTranspose2d`` with adapters."""
LoRAConvTranspose3d = _entered(_LoRAConvTranspose, nn.ConvTranspose3d, "d h w")
"""``nn.ConvTranspose3d`` with adapters."""

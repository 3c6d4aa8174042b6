"""A linear layer and the updates of its adapters, computed together: one autograd function instead of many.

What LoRA costs over the frozen layer is memory traffic, not arithmetic. So the updates are added into the layer's
output and into its input gradient where these lie, and each product with a factor is taken the way round in which the
rank is the leading dimension of the result, which matrix libraries are up to several times faster at
(``benchmarks/results/2026-11-22.md``). For backward only the input and the rank-r activations are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from .matrix import autocast_is_on

Update = tuple[Tensor | None, Tensor, Tensor, float]
"""One adapter's part in a layer, ``scale * B A u``, as (u, A, B, scale).

u ``(..., in)`` is None where that is the layer's own input, as it is without dropout; A is ``(r, in)``, B ``(out, r)``.
"""

_PLAIN = (Tensor, nn.Parameter)
_LEAST_WORK = 2**17
"""Elements of input and output together. For less, an autograd function in Python costs more time than it saves, and
the rank as the leading dimension does not pay; on one CPU the turning point was between 2**16 and 2**18."""


def can_fuse(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `fused_linear` can take these: plain tensors that are differentiated backwards, if at all.

    Tensor subclasses (sharded, quantized) have their own rules for each operation. ``torch.compile`` fails on an
    autograd function that is given a scale it holds for variable (torch 2.13, two layers, ``dynamic=True``). Tracing,
    function transforms and forward-mode differentiation cannot look into one.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    for tensor in (x, weight, bias):
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_nested or tensor.is_mkldnn):
            return False
    return x.shape[-1:] == weight.shape[1:] and x.device == weight.device  # else torch's own error tells more


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]) -> Tensor:
    """``W x + b + sum_i scale_i * B_i A_i u_i``: ``(..., in) -> (..., out)``, in the dtype of ``F.linear(x, W, b)``.

    The factors are cast to the dtype of the arithmetic, which is that of ``x (..., in)``, ``weight (out, in)`` and
    ``bias (out,)`` unless autocast says otherwise. Every input can have a gradient, and such gradients have theirs.
    """
    if autocast_is_on(x.device):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
        updates = [(u if u is None else _autocast(u, dtype), A, B, scale) for u, A, B, scale in updates]
    if x.shape[:-1].numel() * sum(weight.shape) < _LEAST_WORK:
        return _recorded(x, weight, bias, updates)
    scales, parts = [], []
    for u, A, B, scale in updates:
        scales.append(scale)
        parts += [u, A, B]
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return _compute(x, weight, bias, scales, parts)[0]
    y: Tensor = _FusedLinear.apply(x, weight, bias, scales, *parts)[0]
    return y


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.to(dtype)  # as torch's own autocast does


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def _recorded(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]) -> Tensor:
    """The output by operations that autograd records, if it is on."""
    y = F.linear(x, weight, bias)  # of x as it is: torch adds the bias in a product, or after it, by x's strides
    for u, A, B, scale in updates:
        h = F.linear(x if u is None else u, A.to(y.dtype))
        if y.ndim == 2:
            y.addmm_(h, B.to(y.dtype).t(), alpha=scale)
        else:  # a view of y that was changed in place would cost more
            y = torch.add(y, F.linear(h, B.to(y.dtype)), alpha=scale)
    return y


def _compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Sequence[float], parts: Sequence[Any]
) -> tuple[Tensor, list[Tensor]]:
    """The output, and ``A u`` of each update as ``(r, rows)``; ``parts`` are u, A and B of one after the other."""
    # products with the factors come before those with the weight: what they read is then still in the cache
    hidden = []
    for n in range(0, len(parts), 3):
        u, A = parts[n], parts[n + 1]
        u = x if u is None else u
        hidden.append(torch.mm(A.to(u.dtype), _rows(u).t()))
    y = F.linear(x, weight, bias).contiguous()
    rows = y.view(-1, y.shape[-1])
    for h, B, scale in zip(hidden, parts[2::3], scales, strict=True):
        rows.addmm_(h.t(), B.to(h.dtype).t(), alpha=scale)
    return y.detach(), hidden  # not a view any more: the output of an autograd function could not be changed in place


class _FusedLinear(torch.autograd.Function):
    """The output, and each ``A u`` that is kept for the gradient of a B: an output can be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scales: list[float], *parts: Any
    ) -> tuple[Tensor, ...]:
        y, hidden = _compute(x, weight, bias, scales, parts)
        _, of_weight, _, _, *needed = ctx.needs_input_grad
        kept: list[Tensor | None] = [weight, x if of_weight else None]
        outputs, on_x = [y], []
        for n, h in enumerate(hidden):
            u, A, B = parts[3 * n : 3 * n + 3]
            _, of_A, of_B = needed[3 * n : 3 * n + 3]
            kept += [A, B, (x if u is None else u) if of_A else None, h if of_B else None]
            on_x.append(u is None)
            if of_B:
                outputs.append(h)
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        ctx.scales, ctx.on_x, ctx.shape = scales, on_x, x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *of_hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, x, *kept = ctx.saved_tensors
        of_x, of_weight, of_bias, _, *needed = ctx.needs_input_grad
        d = None if dy is None else _rows(dy)
        further = iter(of_hidden)  # gradients of what was kept, where gradients are differentiated
        grads: list[Tensor | None] = []
        into_dx = []
        for n, (scale, on_x) in enumerate(zip(ctx.scales, ctx.on_x, strict=True)):
            A, B, u, h = kept[4 * n : 4 * n + 4]
            of_u, of_A, of_B = needed[3 * n : 3 * n + 3]
            dh = next(further) if of_B else None
            du = dA = dB = None
            if of_B and d is not None:
                dB = torch.mm(h, d).mul_(scale).t().to(B.dtype)
            if d is not None and (of_u or of_A or (of_x and on_x)):
                of_y = torch.mm(B.to(d.dtype).t(), d.t()).mul_(scale)  # (r, rows)
                dh = of_y if dh is None else of_y + dh
            if dh is not None:
                dA = torch.mm(dh, _rows(u)).to(A.dtype) if of_A else None
                into_u = (dh.t(), A.to(dh.dtype))
                du = torch.mm(*into_u).view(*ctx.shape) if of_u else None
                into_dx += [into_u] if on_x else []
            grads += [du, dA, dB]
        dx = None
        products = into_dx if d is None else [(d, weight), *into_dx]
        if of_x and products:
            dx = torch.mm(*products[0])
            for product in products[1:]:
                dx.addmm_(*product)
            dx = dx.view(ctx.shape)
        dweight = torch.mm(d.t(), _rows(x)) if of_weight and d is not None else None
        dbias = d.sum(0) if of_bias and d is not None else None
        return dx, dweight, dbias, None, *grads

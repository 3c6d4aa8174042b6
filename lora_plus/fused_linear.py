"""A linear layer and the updates of its adapters, computed together: one autograd function instead of many.

What LoRA costs over the frozen layer is memory traffic, not arithmetic. So the updates are added into the layer's
output and into its input gradient where these lie, and each product with a factor is taken the way round in which the
rank is the leading dimension of the result, which matrix libraries are up to several times faster at
(``benchmarks/products.py``). For backward only the input and the rank-r activations are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad


class Update(NamedTuple):
    """One adapter's part in a layer: ``scale * B A u``."""

    u: Tensor | None
    """What it acts on, ``(..., in)``, where that is not the layer's own input (under dropout)."""
    A: Tensor
    """``(r, in)``."""
    B: Tensor
    """``(out, r)``."""
    scale: float


def can_fuse(*tensors: Tensor | None) -> bool:
    """Whether `fused_linear` can take these: plain tensors, computed with eagerly and differentiated backwards.

    Tensor subclasses (sharded, quantized) have their own rules for each operation, compilers fuse operations
    themselves, and function transforms and forward-mode differentiation cannot look into an autograd function.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if torch.is_inference_mode_enabled() and torch.is_grad_enabled():
        return False  # where torch's operations keep nothing for backward, an autograd function still tries to
    return all(t is None or (type(t) in (Tensor, nn.Parameter) and not t.is_nested) for t in tensors)


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]) -> Tensor:
    """``W x + b + sum_i scale_i * B_i A_i u_i``: ``(..., in) -> (..., out)``, in the dtype of ``F.linear(x, W, b)``.

    The factors are cast to the dtype of the arithmetic, here and again in the backward. Every input can have a
    gradient, and gradients of gradients are right.

    Args:
        x: ``(..., in)``, of the weight's dtype unless autocast says otherwise.
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.
        updates: the adapters' parts.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
        updates = [update._replace(u=None if update.u is None else _autocast(update.u, dtype)) for update in updates]
    scales = [update.scale for update in updates]
    y: Tensor = _FusedLinear.apply(x, weight, bias, scales, *[part for update in updates for part in update[:3]])
    return y


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.to(dtype)  # as torch's own autocast does


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _hidden(A: Tensor, u: Tensor) -> Tensor:
    """``A u`` as ``(r, rows)``."""
    return A.to(u.dtype) @ _rows(u).t()


class _FusedLinear(torch.autograd.Function):
    """Products with the factors come before those with the weight: what they read is then still in the cache."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scales: list[float], *parts: Tensor | None
    ) -> Tensor:
        of_weight, _, _, *needed = ctx.needs_input_grad[1:]
        kept: list[Tensor | None] = [weight, x if of_weight else None]
        summands = []
        for n, scale in enumerate(scales):
            given, A, B = parts[3 * n : 3 * n + 3]
            _, of_A, of_B = needed[3 * n : 3 * n + 3]
            assert A is not None and B is not None
            u = x if given is None else given
            h = _hidden(A, u)
            summands.append((h.t(), B.to(h.dtype).t(), scale))
            kept += [A, B, u if of_A else None, h if of_B else None]
        y = F.linear(x, weight, bias)
        rows = _rows(y)
        for h, B, scale in summands:
            rows.addmm_(h, B, alpha=scale)
        ctx.save_for_backward(*kept)
        ctx.scales, ctx.on_x = scales, [given is None for given in parts[::3]]
        return rows.view(y.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, *kept = ctx.saved_tensors
        of_x, of_weight, of_bias, _, *needed = ctx.needs_input_grad
        d = _rows(dy)
        grads: list[Tensor | None] = []
        into_dx = []
        for n, (scale, on_x) in enumerate(zip(ctx.scales, ctx.on_x, strict=True)):
            A, B, u, h = kept[4 * n : 4 * n + 4]
            of_u, of_A, of_B = needed[3 * n : 3 * n + 3]
            du = dA = dB = None
            if of_B:
                dB = (_differentiable(h, A, u) @ d).mul_(scale).t().to(B.dtype)
            if of_u or of_A or (of_x and on_x):
                dh = (B.to(d.dtype).t() @ d.t()).mul_(scale)  # (r, rows)
                dA = (dh @ _rows(u)).to(A.dtype) if of_A else None
                du = (dh.t() @ A.to(d.dtype)).view(*dy.shape[:-1], A.shape[1]) if of_u else None
                into_dx += [(dh.t(), A.to(d.dtype))] if on_x else []
            grads += [du, dA, dB]
        dx = None
        if of_x:
            dx = d @ weight
            for dh, A in into_dx:
                dx.addmm_(dh, A)
            dx = dx.view(*dy.shape[:-1], weight.shape[1])
        dweight = d.t() @ _rows(x) if of_weight else None
        dbias = d.sum(0) if of_bias else None
        return dx, dweight, dbias, None, *grads


def _differentiable(h: Tensor, A: Tensor, u: Tensor | None) -> Tensor:
    """The kept ``A u``, or, where gradients of gradients are asked for, one that depends on A and u."""
    if not torch.is_grad_enabled():
        return h
    if u is None:
        raise RuntimeError(
            "gradients of gradients need the layer's input, which is not kept while A is frozen and B is trained; "
            "train A too, or compute the second gradient with torch.func"
        )
    return _hidden(A, u)

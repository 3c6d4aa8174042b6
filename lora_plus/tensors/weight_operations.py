"""Operations on a weight that stands for ``W + s B A`` which need no sum: indices, transpositions, casts, products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused_linear import Update, can_fuse, fused_linear
from .weight_sum import OPERATIONS, Term, WeightSum, functions

_PLAIN = (Tensor, nn.Parameter)


def _index(func: Any, args: Any, kwargs: Any) -> Any:
    weight, index = args
    index = index if isinstance(index, tuple) else (index,)
    at = next((place for place, each in enumerate(index) if each is Ellipsis), len(index))
    given = (*index[:at], *index[at + 1 :])
    index = (*given[:at], *[slice(None)] * (weight.ndim - len(given)), *given[at:])
    *stack, rows, columns = index if len(index) == weight.ndim else [None, None]
    if not (isinstance(rows, slice) and isinstance(columns, slice) and all(map(_picks_matrices, stack))):
        return NotImplemented
    of_left, of_right = (*stack, rows), (*stack, slice(None), columns)
    terms = [Term(left[of_left], right[of_right], scale) for left, right, scale in weight.terms]
    view = None if any(isinstance(each, Tensor) for each in stack) else (weight, lambda whole: whole[index])
    return WeightSum.of(weight.base[index], terms, weight.source, view)


def _picks_matrices(index: Any) -> bool:
    """Whether indexing a stack with it gives one of its matrices, or a stack of them."""
    if isinstance(index, Tensor):
        masks = index.dtype in (torch.bool, torch.uint8)
        return type(index) is Tensor and (index.ndim == 1 or (index.ndim == 0 and not masks))
    return isinstance(index, slice) or type(index) is int


def _swap_last(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].swapped()


def _reverse(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].swapped() if args[0].ndim == 2 else NotImplemented


def _transpose(func: Any, args: Any, kwargs: Any) -> Any:
    weight, *dims = args
    swaps = {dim % weight.ndim for dim in dims} == {weight.ndim - 2, weight.ndim - 1}
    return weight.swapped() if swaps and not kwargs else NotImplemented


def _permute(func: Any, args: Any, kwargs: Any) -> Any:
    weight, *dims = args
    dims = dims[0] if len(dims) == 1 else dims
    last = weight.ndim - 1
    swaps = [dim % weight.ndim for dim in dims] == [*range(last - 1), last, last - 1]
    return weight.swapped() if swaps and not kwargs else NotImplemented


def _cut(func: Any, args: Any, kwargs: Any) -> Any:
    if not 2 <= len(args) <= 3 or kwargs.keys() - {"dim"}:
        return NotImplemented
    weight, size, *dims = args
    bases = func(weight.base, size, *dims, **kwargs)
    axis = (*dims, kwargs.get("dim", 0))[0] % weight.ndim - weight.ndim
    cuts = []
    for left, right, scale in weight.terms:
        lefts = [left] * len(bases) if axis == -1 else func(left, size, axis)
        rights = [right] * len(bases) if axis == -2 else func(right, size, axis)
        cuts.append([Term(*each, scale) for each in zip(lefts, rights, strict=True)])
    views = [(weight, lambda whole, n=n: func(whole, size, *dims, **kwargs)[n]) for n in range(len(bases))]
    parts = zip(bases, views, *cuts, strict=True)
    return tuple(WeightSum.of(base, terms, weight.source, view) for base, view, *terms in parts)


def _convert(func: Any, args: Any, kwargs: Any) -> Any:
    weight, *rest = args
    base = func(weight.base, *rest, **kwargs)
    if base is weight.base:
        return weight
    if not base.is_floating_point():  # the sum is what is rounded to whole numbers
        return NotImplemented
    terms = [Term(a.to(base.device), b.to(base.device), s) for a, b, s in weight.terms]
    return WeightSum.of(base, terms, weight.source)


def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) < 2 or kwargs.keys() - {"bias"} or type(args[1]) is not WeightSum:
        return NotImplemented
    x, weight, *bias = args
    return _fused(x, weight, *bias, **kwargs)


def _fused(x: Any, weight: WeightSum, bias: Any = None) -> Any:
    """``x W^T + bias`` for one matrix W ``(out, in)``."""
    if weight.ndim != 2 or type(bias) is WeightSum or not can_fuse(x, weight.base, bias):
        return NotImplemented
    updates: list[Update] = [(None, right, left, scale) for left, right, scale in weight.terms]
    return fused_linear(x, weight.base, bias, updates)


def _product(func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    return _add_product(lambda x, weight: func(x, weight), *args, fuses=True)


def _reversed_product(func: Any, args: Any, kwargs: Any) -> Any:
    return _product(torch.matmul, args[::-1], kwargs)


def _sum_of_product(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) != 3 or kwargs.keys() - {"beta", "alpha"} or type(args[0]) is WeightSum:
        return NotImplemented
    return _add_product(lambda x, weight: func(args[0], x, weight, **kwargs), *args[1:], alpha=kwargs.get("alpha", 1))


def _add_product(
    product: Callable[[Any, Any], Tensor], first: Any, second: Any, *, alpha: float = 1, fuses: bool = False
) -> Any:
    """A product of two, of which one is a sum: with its base, and the updates added to that."""
    other, weight = (first, second) if type(second) is WeightSum else (second, first)
    if type(other) not in _PLAIN or (other.ndim == 1 and weight.ndim == 3):
        return NotImplemented
    if fuses and weight is second and (y := _fused(other, weight.swapped())) is not NotImplemented:
        return y
    y = product(other, weight.base) if weight is second else product(weight.base, other)
    for left, right, scale in weight.terms:
        left, right = left.to(other.dtype), right.to(other.dtype)
        if weight is second:
            update = torch.matmul(torch.matmul(other, left) * (scale * alpha), right)
        else:
            update = torch.matmul(left, torch.matmul(right, other) * (scale * alpha))
        y = y + update
    return y


def _grouped(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) == 3 and not kwargs:
        args, kwargs = args[:2], {"offs": args[2]}
    options = {name: value for name, value in kwargs.items() if value is not None}
    if len(args) != 2 or options.keys() != {"offs"} or type(args[1]) is not WeightSum:
        return NotImplemented
    x, weight = args
    if type(x) not in _PLAIN or x.ndim != 2 or weight.ndim != 3:
        return NotImplemented
    y = func(x, weight.base, **options)
    for left, right, scale in weight.terms:
        # the kernels want rows of whole 16 bytes
        more = -left.shape[-1] % (16 // x.element_size())
        left, right = F.pad(left.to(x.dtype), (0, more)), F.pad(right.to(x.dtype), (0, 0, 0, more))
        y = y + func(func(x, left, **options) * scale, right, **options)
    return y


_OF_TORCH: dict[Any, Callable[[Any, Any, Any], Any]] = {
    **dict.fromkeys(functions("__getitem__"), _index),
    **dict.fromkeys(functions("mT"), _swap_last),
    **dict.fromkeys(functions("T", "t"), _reverse),
    **dict.fromkeys(functions("transpose"), _transpose),
    **dict.fromkeys(functions("permute"), _permute),
    **dict.fromkeys(functions("chunk", "split"), _cut),
    **dict.fromkeys(functions("to", "float", "double", "half", "bfloat16", "contiguous"), _convert),
    **dict.fromkeys(functions("linear"), _linear),
    **dict.fromkeys(functions("matmul", "__matmul__", "mm", "bmm"), _product),
    **dict.fromkeys(functions("__rmatmul__"), _reversed_product),
    **dict.fromkeys(functions("addmm", "baddbmm"), _sum_of_product),
    **dict.fromkeys(functions("grouped_mm", "_grouped_mm"), _grouped),
    "transformers::grouped_mm_fallback": _grouped,
}
OPERATIONS.update(_OF_TORCH)

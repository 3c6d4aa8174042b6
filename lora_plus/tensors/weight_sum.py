"""A tensor that stands for ``W + s B A``: products with it are computed the low-rank way, anything else makes the sum.

Code that reads a weight mostly slices, transposes and multiplies it. That needs no sum: ``x (W + s B A)^T`` is
``x W^T + s (x A^T) B^T``, without a matrix of the weight's size that is made in each step and kept for backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import resolve_name
from torch.utils._pytree import tree_map

from .fused_linear import Update, can_fuse, fused_linear
from .matrix import accumulation_dtype, add_delta

_PLAIN = (Tensor, nn.Parameter)


class Term(NamedTuple):
    """One update ``scale * left @ right`` of a matrix ``(..., rows, columns)``."""

    left: Tensor
    """``(..., rows, r)``."""
    right: Tensor
    """``(..., r, columns)``."""
    scale: float


class WeightSum(Tensor):
    """``base + sum_i scale_i * left_i @ right_i``, a matrix or a stack of them ``(..., rows, columns)``.

    It has the shape, strides, dtype and device of ``base``, and no memory. `OPERATIONS` has what is computed from base
    and terms. All else, also what C++ code does with it, gets the sum, which is made once and is used for everything
    from then on.
    """

    base: Tensor
    terms: tuple[Term, ...]
    source: object
    """What was read: `noting_sums` tells it."""
    made: dict[bool, Tensor]
    """The sum, if it was made: by whether it has its graph."""

    @staticmethod
    def of(base: Tensor, terms: Sequence[Term], source: object) -> WeightSum:
        """The sum of a matrix, or a stack of them, and terms of the same shape; the source is what was read."""
        factors = [factor for term in terms for factor in (term.left, term.right)]
        made = _Standing.apply([term.scale for term in terms], base, *factors)
        made.base, made.terms, made.source, made.made = base, tuple(terms), source, {}
        return made  # type: ignore[no-any-return]

    def swapped(self) -> WeightSum:
        """The sum with its last two dimensions swapped."""
        return WeightSum.of(self.base.mT, [Term(b.mT, a.mT, s) for a, b, s in self.terms], self.source)

    def dense(self, operation: Callable[..., Any], *, recorded: bool = True) -> Tensor:
        """The sum as a plain tensor: computed in float32 or better, rounded to the base's dtype.

        It has its graph, also where none is recorded now, so that one tensor serves all, and is what is changed in
        place; not so ``recorded``, where autograd is passed by.
        """
        if torch.compiler.is_compiling():
            return self._summed_up()
        made = self.made.get(True, self.made.get(recorded))
        if made is None:
            if (found := _FOUND.get()) is not None:
                found.append((self.source, resolve_name(operation) or str(operation)))
            with torch.inference_mode(False), torch.set_grad_enabled(recorded):
                made = self.made[recorded] = self._summed_up()
        return made

    def _summed_up(self) -> Tensor:
        total = self.base
        for left, right, scale in self.terms:
            total = add_delta(total, right, left, scale)
        return total.to(self.base.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            return super().__torch_function__(func, types, args, kwargs)
        compute = OPERATIONS.get(getattr(func, "_qualified_op_name", func)) if _runs_as_written() else None
        given = [arg for arg in args if type(arg) is cls]
        if compute is not None and given and not any(True in each.made for each in given):
            result = compute(func, args, kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = _plain(func, args, kwargs)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # from C++ code, which knows nothing of the above; autograd has recorded the operation on this tensor
        with torch.no_grad():
            args, kwargs = _plain(func, args, kwargs or {}, recorded=False)
        return func(*args, **kwargs)


def can_stand(base: Tensor) -> bool:
    """Whether a sum with this base can be given as a `WeightSum`.

    Compilers and function transforms get the plain sum: they follow it, and a compiler can join it to what reads it.
    Subclasses of tensors (sharded, quantized) have rules of their own for each operation.
    """
    plain = type(base) in _PLAIN and base.layout is torch.strided and not base.is_nested
    return plain and base.ndim in (2, 3) and _runs_as_written()


def _runs_as_written() -> bool:
    """Whether operations are neither traced nor transformed, and differentiated backwards, if at all."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


_FOUND: ContextVar[list[tuple[object, str]] | None] = ContextVar("found", default=None)


@contextmanager
def noting_sums() -> Iterator[list[tuple[object, str]]]:
    """Inside, each sum that is made is noted: what was read, and the operation that needed it."""
    found: list[tuple[object, str]] = []
    token = _FOUND.set(found)
    try:
        yield found
    finally:
        _FOUND.reset(token)


def _plain(func: Any, args: Any, kwargs: Any, *, recorded: bool = True) -> Any:
    """The arguments with sums in the place of what stands for them."""

    def plain(leaf: Any) -> Any:
        return leaf.dense(func, recorded=recorded) if type(leaf) is WeightSum else leaf

    return tree_map(plain, (args, kwargs))


class _Standing(torch.autograd.Function):
    """A `WeightSum` in the graph: C++ code that reads it gets the sum and has the sum's gradient, which ends here."""

    @staticmethod
    def forward(ctx: Any, scales: list[float], base: Tensor, *factors: Tensor) -> Tensor:
        ctx.scales = scales
        ctx.save_for_backward(*factors)
        settings: dict[str, Any] = {"strides": base.stride(), "dtype": base.dtype, "device": base.device}
        standing: Tensor = Tensor._make_wrapper_subclass(WeightSum, base.size(), **settings)  # type: ignore[attr-defined]
        return standing

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None, grad]
        factors = ctx.saved_tensors
        for left, right, scale in zip(factors[::2], factors[1::2], ctx.scales, strict=True):
            wide = grad.to(accumulation_dtype(grad.dtype, left.dtype)) * scale
            grads += [(wide @ right.mT.to(wide.dtype)).to(left.dtype), (left.mT.to(wide.dtype) @ wide).to(right.dtype)]
        return tuple(grads)


# ---- what is known ---------------------------------------------------------------------------------------------------


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
    return WeightSum.of(weight.base[index], terms, weight.source)


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
    return tuple(WeightSum.of(base, terms, weight.source) for base, *terms in zip(bases, *cuts, strict=True))


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


def _functions(*names: str) -> list[Callable[..., Any]]:
    """What torch calls so, as a function, as a method and as a property; a version of torch need not have all."""
    found = [(place, getattr(place, name)) for place in (Tensor, torch, F) for name in names if hasattr(place, name)]
    functions: list[Callable[..., Any]] = [each for _, each in found if inspect.isroutine(each)]
    return functions + [each.__get__ for place, each in found if place is Tensor and inspect.isgetsetdescriptor(each)]


OPERATIONS: dict[Any, Callable[[Any, Any, Any], Any]] = {
    **dict.fromkeys(_functions("__getitem__"), _index),
    **dict.fromkeys(_functions("mT"), _swap_last),
    **dict.fromkeys(_functions("T", "t"), _reverse),
    **dict.fromkeys(_functions("transpose"), _transpose),
    **dict.fromkeys(_functions("permute"), _permute),
    **dict.fromkeys(_functions("chunk", "split"), _cut),
    **dict.fromkeys(_functions("to", "float", "double", "half", "bfloat16", "contiguous"), _convert),
    **dict.fromkeys(_functions("linear"), _linear),
    **dict.fromkeys(_functions("matmul", "__matmul__", "mm", "bmm"), _product),
    **dict.fromkeys(_functions("__rmatmul__"), _reversed_product),
    **dict.fromkeys(_functions("addmm", "baddbmm"), _sum_of_product),
    **dict.fromkeys(_functions("grouped_mm", "_grouped_mm"), _grouped),
    "transformers::grouped_mm_fallback": _grouped,
}
"""Function of torch, or name of an operator -> how it is computed from base and terms.

An entry takes the function, its positional and its keyword arguments, among which is a `WeightSum`; it returns
``NotImplemented`` where it does not know this use of the function.
"""

_QUESTIONS = frozenset(
    _functions(
        *("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "requires_grad", "grad_fn", "is_leaf"),
        *("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_xpu", "is_mps"),
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_contiguous", "get_device"),
        *("is_floating_point", "is_complex", "is_inference", "__len__", "__hash__", "storage_offset"),
    )
)
"""What is asked of a weight without its values."""

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
from torch.utils._pytree import tree_leaves, tree_map

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
    and terms. All else, also what C++ code does with it, gets the sum, which is made once. Where somebody may have
    changed that, it is used for everything from then on.
    """

    base: Tensor
    terms: tuple[Term, ...]
    source: object
    """What was read: `noting_sums` tells it."""
    made: dict[bool, Tensor]
    """The sum, if it was made: by whether it has its graph."""
    given: bool
    """Whether somebody has the sum itself, or a view of it, and may change it."""
    viewed: tuple[WeightSum, Callable[[Tensor], Tensor]] | None
    """What it is a view of, and how."""

    @staticmethod
    def of(base: Tensor, terms: Sequence[Term], source: object, viewed: Any = None) -> WeightSum:
        """The sum of a matrix, or a stack of them, and terms of the same shape; the source is what was read."""
        factors = [factor for term in terms for factor in (term.left, term.right)]
        made = _Standing.apply([term.scale for term in terms], base, *factors)
        made.base, made.terms, made.source, made.made = base, tuple(terms), source, {}
        made.given, made.viewed = False, viewed
        return made  # type: ignore[no-any-return]

    def swapped(self) -> WeightSum:
        """The sum with its last two dimensions swapped."""
        terms = [Term(b.mT, a.mT, s) for a, b, s in self.terms]
        return WeightSum.of(self.base.mT, terms, self.source, (self, lambda whole: whole.mT))

    def is_given(self) -> bool:
        """Whether somebody may have changed the sum, or that of which it is a view."""
        return self.given or (self.viewed is not None and self.viewed[0].is_given())

    def dense(self, operation: Callable[..., Any], *, recorded: bool = True, changed: bool = False) -> Tensor:
        """The sum as a plain tensor: computed in float32 or better, rounded to the base's dtype.

        It has its graph, also where none is recorded now, so that one tensor serves all; not so ``recorded``, where
        autograd is passed by. One that is to be changed in place is a view of the sum of which it stands for a view.
        """
        if torch.compiler.is_compiling():
            return self._summed_up()
        if self.viewed is not None and (changed or self.viewed[0].is_given()):
            whole, take = self.viewed
            whole.given = True
            return take(whole.dense(operation, recorded=recorded, changed=changed))
        made = self.made.get(True, self.made.get(recorded))
        if made is None:
            if (found := _FOUND.get()) is not None:
                found.append((self.source, resolve_name(operation) or str(operation)))
            with torch.inference_mode(False), torch.set_grad_enabled(recorded), _kept_here():
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
        if compute is not None and given and not any(each.is_given() for each in given):
            result = compute(func, args, kwargs)
            if result is not NotImplemented:
                return result
        if torch.compiler.is_compiling():
            args, kwargs = tree_map(lambda leaf: leaf.dense(func) if type(leaf) is cls else leaf, (args, kwargs))
            return func(*args, **kwargs)
        sums: list[tuple[WeightSum, Tensor]] = []
        args, kwargs = _plain(func, args, kwargs, sums)
        result = func(*args, **kwargs)
        for standing, dense in sums:
            standing.given = standing.given or not _is_apart(result, dense)
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # from C++ code, which knows nothing of the above; autograd has recorded the operation on this tensor
        with torch.no_grad():
            args, kwargs = _plain(func, args, kwargs or {}, [], recorded=False)
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


def _plain(func: Any, args: Any, kwargs: Any, sums: list[Any], *, recorded: bool = True) -> Any:
    """The arguments with sums in the place of what stands for them; both are added to ``sums``."""
    name = getattr(func, "__name__", "")
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
    changed = args[0] if in_place and args else kwargs.get("out")

    def plain(leaf: Any) -> Any:
        if type(leaf) is not WeightSum:
            return leaf
        sums.append((leaf, leaf.dense(func, recorded=recorded, changed=leaf is changed)))
        return sums[-1][1]

    return tree_map(plain, (args, kwargs))


_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")} | {"__setitem__"}


def _is_apart(result: Any, dense: Tensor) -> bool:
    """Whether all that an operation gave are tensors in memory of their own, through which none writes to the sum."""
    leaves = tree_leaves(result)
    if not (_runs_as_written() and all(type(leaf) in _PLAIN and leaf.layout is torch.strided for leaf in leaves)):
        return False
    return dense.untyped_storage().data_ptr() not in {leaf.untyped_storage().data_ptr() for leaf in leaves}


@contextmanager
def _kept_here() -> Iterator[None]:
    """Inside, autograd keeps tensors for backward itself.

    A checkpoint around would count them, and count others when it computes again and finds the sum made.
    """
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor, tensor._version), _unchanged):
        yield


def _unchanged(kept: tuple[Tensor, int]) -> Tensor:
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError(
            f"a factor {tuple(tensor.shape)} of an adapter was modified in place after its weight was read; run the "
            "forward pass again before backward"
        )
    return tensor


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


def functions(*names: str) -> list[Callable[..., Any]]:
    """What torch calls so, as a function, as a method and as a property; a version of torch need not have all."""
    found = [(place, getattr(place, name)) for place in (Tensor, torch, F) for name in names if hasattr(place, name)]
    functions: list[Callable[..., Any]] = [each for _, each in found if inspect.isroutine(each)]
    return functions + [each.__get__ for place, each in found if place is Tensor and inspect.isgetsetdescriptor(each)]


OPERATIONS: dict[Any, Callable[[Any, Any, Any], Any]] = {}
"""Function of torch, or name of an operator -> how it is computed from base and terms.

An entry takes the function, its positional and its keyword arguments, among which is a `WeightSum`; it returns
``NotImplemented`` where it does not know this use of the function. `weight_operations` makes those of torch.
"""

_QUESTIONS = frozenset(
    functions(
        *("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "requires_grad", "grad_fn", "is_leaf"),
        *("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_xpu", "is_mps"),
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_contiguous", "get_device"),
        *("is_floating_point", "is_complex", "is_inference", "__len__", "__hash__", "storage_offset"),
    )
)
"""What is asked of a weight without its values."""

"""A tensor that stands for W + s B A: every operation gives what the dense sum gives, and products do without it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lora_plus.tensors import weight_sum
from lora_plus.tensors.weight_sum import Term, WeightSum, can_stand, noting_sums

ROWS, COLUMNS, STACK = 6, 5, 3
Operation = Callable[[Tensor, Any], Any]
"""What is computed of a weight ``(6, 5)`` or ``(3, 6, 5)``, and of tensors of given shapes."""

MATRIX: dict[str, Operation] = {
    "linear": lambda w, x: F.linear(x(4, 5), w),
    "linear-bias": lambda w, x: F.linear(x(2, 4, 5), w, x(6)),
    "linear-bias-by-name": lambda w, x: F.linear(x(5), w, bias=x(6)),
    "T": lambda w, x: x(4, 6) @ w.T.T,
    "mT": lambda w, x: x(4, 5) @ w.mT,
    "t": lambda w, x: torch.mm(x(4, 5), w.t()),
    "transpose": lambda w, x: torch.matmul(x(2, 4, 5), w.transpose(1, 0)),
    "torch.transpose": lambda w, x: x(4, 5).matmul(torch.transpose(w, -1, -2)),
    "permute": lambda w, x: x(5) @ w.permute(1, 0),
    "permute-tuple": lambda w, x: x(4, 5).mm(torch.permute(w, (1, 0))),
    "left": lambda w, x: w @ x(5, 4),
    "left-vector": lambda w, x: w @ x(5),
    "left-batch": lambda w, x: torch.matmul(w, x(2, 5, 4)),
    "addmm": lambda w, x: torch.addmm(x(6), x(4, 5), w.T, beta=0.5, alpha=2.0),
    "addmm-method": lambda w, x: x(6, 4).addmm(w, x(5, 4)),
    "rows": lambda w, x: F.linear(x(4, 5), w[1:4]),
    "columns": lambda w, x: F.linear(x(4, 2), w[:, 1:3]),
    "ellipsis": lambda w, x: F.linear(x(4, 3), w[..., 2:]),
    "rows-ellipsis": lambda w, x: F.linear(x(4, 5), w[1:, ...]),
    "chunk": lambda w, x: [F.linear(x(4, 5), part) for part in w.chunk(4)],
    "torch.chunk": lambda w, x: [F.linear(x(4, 3), part) for part in torch.chunk(w, 2, dim=1)[:1]],
    "split": lambda w, x: [F.linear(x(4, 5), part) for part in w.split(4)],
    "split-sizes": lambda w, x: [F.linear(x(4, 5), part) for part in torch.split(w, [1, 5], -2)],
    "to": lambda w, x: F.linear(x(4, 5), w.to("cpu").to(w.dtype).contiguous()),
}
STACKED: dict[str, Operation] = {
    "bmm": lambda w, x: torch.bmm(x(3, 4, 5), w.mT),
    "bmm-left": lambda w, x: torch.bmm(w, x(3, 5, 1)),
    "matmul": lambda w, x: x(4, 5) @ w.transpose(-2, -1),
    "matmul-left": lambda w, x: w @ x(5, 4),
    "baddbmm": lambda w, x: torch.baddbmm(x(3, 4, 6), x(3, 4, 5), w.permute(0, 2, 1), beta=2.0, alpha=0.5),
    "baddbmm-left": lambda w, x: x(3, 6, 4).baddbmm(w, x(3, 5, 4)),
    "one": lambda w, x: F.linear(x(4, 5), w[1]),
    "one-by-tensor": lambda w, x: x(4, 6) @ w[torch.tensor(1)],
    "one-rows": lambda w, x: F.linear(x(4, 5), w[-1, 1:3]),
    "some": lambda w, x: w[1:] @ x(5, 4),
    "some-by-tensor": lambda w, x: torch.bmm(w[torch.tensor([0, 2, 2, 1])], x(4, 5, 1)),
    "some-by-mask": lambda w, x: torch.bmm(w[torch.tensor([True, False, True])], x(2, 5, 1)),
    "columns": lambda w, x: w[..., 1:4] @ x(3, 2),
    "chunk": lambda w, x: [part @ x(5, 4) for part in w.chunk(2)],
    "chunk-rows": lambda w, x: [part @ x(5, 4) for part in w.chunk(2, 1)],
    "split-columns": lambda w, x: [part @ x(2, 4) for part in w.split([2, 2, 1], -1)[:2]],
}
DENSE: dict[str, Operation] = {
    "einsum": lambda w, x: torch.einsum("...oi,...i->...o", w, x(5)),
    "add": lambda w, x: w + 1,
    "sum": lambda w, x: w.sum(),
    "row": lambda w, x: w[..., 0, :],
    "new-axis": lambda w, x: w[None],
    "mask": lambda w, x: w[torch.ones(w.shape[:2], dtype=torch.bool)],
    "reshape": lambda w, x: w.reshape(-1),
    "cat": lambda w, x: torch.cat([w, w[..., :2]], dim=-1),
    "square": lambda w, x: w.mT @ w,
    "other-axes": lambda w, x: w.movedim(0, -1),
    "chunk-by-name": lambda w, x: w.chunk(chunks=2),
    "torch.chunk-by-name": lambda w, x: torch.chunk(input=w, chunks=2, dim=-1),
    "torch.transpose-by-name": lambda w, x: torch.transpose(input=w, dim0=-2, dim1=-1),
    "in-place": lambda w, x: w.mul_(2) + w,
    "in-place-first": lambda w, x: [w.mul_(2), w @ x(5, 2)],
}
VECTORS: dict[str, Operation] = {
    "vector-left": lambda w, x: w @ x(w.shape[-1]),
    "vector-right": lambda w, x: x(w.shape[-2]) @ w,
}
NAMED = [
    pytest.param(operation, shape, cheap, id=f"{name}-{len(shape)}d")
    for operations, shapes, cheap in (
        (MATRIX, [(ROWS, COLUMNS)], True),
        (STACKED, [(STACK, ROWS, COLUMNS)], True),
        (VECTORS, [(STACK, ROWS, COLUMNS)], False),
        (DENSE, [(ROWS, COLUMNS), (STACK, ROWS, COLUMNS)], False),
    )
    for name, operation in operations.items()
    for shape in shapes
]
over_operations = pytest.mark.parametrize(("operation", "shape", "cheap"), NAMED)


class Tensors:
    """A base, two terms, and others of the shapes asked for, the same in the same order."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(1)
        *stack, rows, columns = shape
        self.base = self.draw(*shape).detach()
        self.factors = [self.draw(*stack, *part) for r in (2, 3) for part in ((rows, r), (r, columns))]
        self.state = self.generator.get_state()
        self.others: list[Tensor] = []

    def draw(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(self.dtype).requires_grad_()

    def other(self, *shape: int) -> Tensor:
        self.others.append(self.draw(*shape))
        return self.others[-1]

    def begin(self) -> None:
        self.others = []
        self.generator.set_state(self.state)

    def standing(self, *factors: Tensor) -> WeightSum:
        self.begin()
        one, two, three, four = factors or self.factors
        return WeightSum.of(self.base, [Term(one, two, 0.5), Term(three, four, -1.5)], "the weight")

    def dense(self) -> Tensor:
        self.begin()
        one, two, three, four = self.factors
        return self.base + 0.5 * one @ two - 1.5 * three @ four


def flat(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def results(operation: Operation, weight: Tensor, tensors: Tensors) -> list[Tensor]:
    """The output, and the gradients of the factors and of all others."""
    output = flat(operation(weight, tensors.other))
    assert not any(isinstance(each, WeightSum) for each in output)
    total = torch.stack([each.square().sum() for each in output]).sum()
    return output + list(torch.autograd.grad(total, [*tensors.factors, *tensors.others]))


@over_operations
def test_it_gives_what_the_sum_gives(operation: Operation, shape: tuple[int, ...], cheap: bool) -> None:
    tensors = Tensors(shape)
    wanted = results(operation, tensors.dense(), tensors)
    with noting_sums() as found:
        torch.testing.assert_close(results(operation, tensors.standing(), tensors), wanted, rtol=1e-12, atol=1e-12)
    assert (not found) == cheap
    assert {source for source, _ in found} <= {"the weight"}


@over_operations
def test_the_other_way_round(operation: Operation, shape: tuple[int, ...], cheap: bool) -> None:
    tensors = Tensors((*shape[:-2], shape[-1], shape[-2]))
    wanted = results(operation, tensors.dense().mT, tensors)
    with noting_sums() as found:
        torch.testing.assert_close(results(operation, tensors.standing().mT, tensors), wanted, rtol=1e-12, atol=1e-12)
    assert (not found) == cheap


@over_operations
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any, operation: Operation, shape: tuple[int, ...], cheap: bool) -> None:
    tensors = Tensors(shape)
    with mode():
        wanted = flat(operation(tensors.dense(), tensors.other))
        torch.testing.assert_close(flat(operation(tensors.standing(), tensors.other)), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("operation", "shape", "cheap"), [each for each in NAMED if each.values[2]])
def test_gradients_are_the_derivatives(operation: Operation, shape: tuple[int, ...], cheap: bool) -> None:
    tensors = Tensors(shape)

    def output(*factors: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(operation(tensors.standing(*factors), tensors.other)))

    assert torch.autograd.gradcheck(output, tensors.factors)
    assert torch.autograd.gradgradcheck(output, tensors.factors) if "linear" in str(operation) else True


@over_operations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtypes_that_the_sum_gives(
    dtype: torch.dtype, operation: Operation, shape: tuple[int, ...], cheap: bool
) -> None:
    tensors = Tensors(shape, torch.float32)
    exact = flat(operation(tensors.dense().double(), lambda *size: tensors.other(*size).double()))
    with torch.autocast("cpu", dtype=dtype):
        try:
            wanted = flat(operation(tensors.dense(), tensors.other))
        except RuntimeError as error:  # as oneDNN does where the processor lacks the instructions
            assert "could not create a primitive descriptor" in str(error)
            pytest.skip("torch does not compute this under autocast on this machine")
        output = flat(operation(tensors.standing(), tensors.other))
    assert [each.dtype for each in output] == [each.dtype for each in wanted]
    for one, other in zip(output, exact, strict=True):
        bound = 8 * torch.finfo(dtype).eps * max(1.0, other.abs().max().item())
        assert (one.double() - other).abs().max().item() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("name", ["grouped_mm", "_grouped_mm"])
def test_grouped_products(name: str, r: int, dtype: torch.dtype) -> None:
    grouped = getattr(F, name, None) or getattr(torch, name, None)
    if grouped is None:
        pytest.skip(f"this torch has no {name}")
    torch.manual_seed(0)
    base, x = torch.randn(3, 16, 8, dtype=dtype), torch.randn(10, 8, dtype=dtype)
    factors = [torch.randn(3, 16, r).requires_grad_(), torch.randn(3, r, 8).requires_grad_()]
    offsets = torch.tensor([4, 4, 10], dtype=torch.int32)
    with noting_sums() as found:
        output = grouped(x, WeightSum.of(base, [Term(*factors, 0.5)], None).mT, offs=offsets)
        gradients = torch.autograd.grad(output.float().square().sum(), factors)
    assert not found and output.dtype == dtype
    wide = (base.double() + 0.5 * factors[0].double() @ factors[1].double()).mT
    wanted = torch.cat([x[:4].double() @ wide[0], x[4:].double() @ wide[2]])
    eps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), wanted, rtol=eps, atol=eps * wanted.abs().max().item())
    for one, other in zip(gradients, torch.autograd.grad(wanted.square().sum(), factors), strict=True):
        torch.testing.assert_close(one, other, rtol=eps, atol=eps * other.abs().max().item())


# ---- who does not ask ------------------------------------------------------------------------------------------------


class Product(torch.autograd.Function):
    """A linear layer as kernels of other packages are wrapped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        with torch._C.DisableTorchFunctionSubclass():  # as C++ code
            return torch.einsum("bi,oi->bo", x, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.T @ x


def _unasked(function: Operation) -> Operation:
    def run(w: Tensor, x: Callable[..., Tensor]) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return function(w, x)

    return run


UNASKED: dict[str, Operation] = {
    "function": lambda w, x: Product.apply(x(4, 5), w),
    "operator": lambda w, x: torch.ops.aten.linear(x(4, 5), w),
    "C++": _unasked(lambda w, x: F.linear(x(4, 5), w)),
    "C++-view": _unasked(lambda w, x: w.t()[1:].reshape(-1) * 2),
    "C++-lstm-like": _unasked(lambda w, x: torch.cat([w, w]).tanh() @ x(5)),
}


@pytest.mark.parametrize("name", UNASKED)
def test_code_that_knows_nothing_of_it_gets_the_sum_and_its_gradient(name: str) -> None:
    tensors = Tensors((ROWS, COLUMNS))
    wanted = results(UNASKED[name], tensors.dense(), tensors)
    with noting_sums() as found:
        torch.testing.assert_close(results(UNASKED[name], tensors.standing(), tensors), wanted, rtol=1e-12, atol=1e-12)
    assert len(found) == 1


def test_the_base_has_its_gradient() -> None:
    tensors = Tensors((ROWS, COLUMNS))
    tensors.base.requires_grad_()
    for operation in (MATRIX["linear"], DENSE["einsum"], UNASKED["C++"]):
        gradients = [
            torch.autograd.grad(operation(make(), tensors.other).square().sum(), tensors.base)
            for make in (tensors.dense, tensors.standing)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_a_pointer_is_that_of_the_sum() -> None:
    weight = Tensors((ROWS, COLUMNS)).standing()
    assert weight.data_ptr() == weight.made[True].data_ptr() != weight.base.data_ptr()


def test_questions_are_answered_without_a_sum() -> None:
    tensors = Tensors((STACK, ROWS, COLUMNS))
    weight = tensors.standing().mT
    with noting_sums() as found:
        assert weight.shape == (STACK, COLUMNS, ROWS) and weight.size(1) == COLUMNS and len(weight) == STACK
        assert weight.stride() == tensors.base.mT.stride() and not weight.is_contiguous() and weight.numel() == 90
        assert weight.dtype is torch.float64 and weight.device.type == "cpu" and weight.ndim == weight.dim() == 3
        assert weight.requires_grad and not weight.is_leaf and not weight.is_cuda and weight.is_floating_point()
        assert isinstance(weight, Tensor) and {weight: 1}[weight]
    assert not found
    assert repr(weight) == repr(weight.made[True]) and str(found) == "[]"


@pytest.mark.parametrize("name", ["to", "float", "double", "half", "bfloat16"])
def test_another_dtype_rounds_the_base_and_not_the_update(name: str) -> None:
    dtype = getattr(torch, "float32" if name == "to" else name)
    tensors = Tensors((ROWS, COLUMNS))
    with noting_sums() as found:
        weight = tensors.standing()
        weight = weight.to(dtype) if name == "to" else getattr(weight, name)()
        assert weight.dtype == dtype and weight.base.dtype == dtype
        output = F.linear(tensors.other(4, COLUMNS).to(dtype), weight)
    wanted = tensors.dense() @ tensors.other(4, COLUMNS).mT
    eps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), wanted.mT, rtol=eps, atol=eps * wanted.abs().max().item())
    assert not found and output.dtype == dtype


def test_what_was_summed_up_once_is_not_summed_up_again() -> None:
    weight = Tensors((ROWS, COLUMNS)).standing()
    with noting_sums() as found:
        one = weight + 1
        weight.mul_(3)
        torch.testing.assert_close(weight @ torch.eye(COLUMNS, dtype=torch.float64), 3 * (one - 1))
    assert [name for _, name in found] == ["torch.Tensor.add"]


def test_a_sum_made_without_gradients_is_not_used_where_they_are_recorded() -> None:
    weight = Tensors((ROWS, COLUMNS)).standing()
    with torch.no_grad():
        assert not (weight + 1).requires_grad
    assert (weight + 1).requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_changes_it_in_place_is_seen_in_every_mode(mode: Any) -> None:
    tensors = Tensors((ROWS, COLUMNS))

    def results(weight: Tensor, first: Any, then: Any) -> list[Tensor]:
        with first():
            weight.mul_(2)
        with then():
            output = F.linear(tensors.other(4, COLUMNS), weight)
        return [output, *(torch.autograd.grad(output.sum(), tensors.factors) if then is nullcontext else ())]

    for order in ((mode, nullcontext), (nullcontext, mode)):
        outputs = [results(make(), *order) for make in (tensors.standing, tensors.dense)]
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


def test_whole_numbers_are_those_of_the_sum() -> None:
    tensors = Tensors((ROWS, COLUMNS))
    assert torch.equal(tensors.standing().to(torch.int64), tensors.dense().to(torch.int64))


def test_a_dimension_that_is_not_there_is_refused() -> None:
    with pytest.raises(IndexError, match="out of range"):
        Tensors((ROWS, COLUMNS)).standing().chunk(2, 5)


def test_a_sum_that_code_without_questions_got_is_not_used_where_gradients_are_recorded() -> None:
    tensors = Tensors((ROWS, COLUMNS))
    weight = tensors.standing()
    UNASKED["C++"](weight, tensors.other)
    assert all(each.any() for each in torch.autograd.grad((weight + 1).square().sum(), tensors.factors))


def test_checkpointing_computes_it_again() -> None:
    tensors = Tensors((ROWS, COLUMNS))
    x = tensors.other(4, COLUMNS)
    for context in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            run = lambda x: F.linear(x, tensors.standing()).sin()  # noqa: E731
            plain = torch.autograd.grad(run(x).double().sum(), tensors.factors)
            again = torch.autograd.grad(checkpoint(run, x, use_reentrant=False).double().sum(), tensors.factors)
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


AROUND: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "made inside": lambda inside, w, x: inside(lambda x: F.linear(x, w * 1.0).sin(), x),
    "made inside, used outside": lambda inside, w, x: inside(lambda x: F.linear(x, w.tanh()).sin(), x) + (w + 1).sum(),
    "made outside": lambda inside, w, x: (w + 1).sum() + inside(lambda x: F.linear(x, w.tanh()).sin(), x),
    "made outside after": lambda inside, w, x: inside(lambda x: F.linear(x, w).sin(), x) + (w + 1).sum(),
    "twice": lambda inside, w, x: inside(lambda x: F.linear(x, w.tanh()), x) + inside(lambda x: F.linear(x, w + 1), x),
    "a part": lambda inside, w, x: inside(lambda x: F.linear(x, w.tanh()), x) + inside(lambda x: x @ w.mT.tanh(), x),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_checkpoint_inside_of_which_the_sum_is_made(name: str) -> None:
    tensors = Tensors((ROWS, COLUMNS))
    x = tensors.other(4, COLUMNS).requires_grad_()

    def gradients(inside: Any, weight: Tensor) -> Any:
        return torch.autograd.grad(AROUND[name](inside, weight, x).sum(), [*tensors.factors, x])

    again = gradients(lambda run, x: checkpoint(run, x, use_reentrant=False), tensors.standing())
    torch.testing.assert_close(again, gradients(lambda run, x: run(x), tensors.dense()), rtol=1e-12, atol=1e-12)


def test_a_factor_that_changes_before_backward_is_an_error() -> None:
    tensors = Tensors((ROWS, COLUMNS))
    output = (tensors.standing() + 1).sum()
    with torch.no_grad():
        tensors.factors[0].mul_(2)
    with pytest.raises(RuntimeError, match=r"a factor \(6, 2\) of an adapter was modified in place"):
        output.backward()


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": lambda w: w[1], "rows": lambda w: w[1:], "of a view": lambda w: w[1:].mT[0], "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(-1, 1), "permute": lambda w: w.permute(0, 2, 1),
    "chunk": lambda w: w.chunk(2)[0], "split": lambda w: w.split([2, 3], -1)[0],
    "same dtype": lambda w: w[1].to(w.dtype).contiguous(),
}  # fmt: skip
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda v: v.mul_(2), "zero_": torch.zero_, "setitem": lambda v: v.__setitem__(0, 3.0),
    "imul": lambda v: v.__imul__(2), "copy_": lambda v: v.copy_(torch.ones_like(v.detach())),
    "inplace": lambda v: F.relu(v, inplace=True), "init": torch.nn.init.ones_,
}  # fmt: skip


@pytest.mark.parametrize(("view", "change"), [*((v, "mul_") for v in VIEWS), *(("of a view", c) for c in CHANGES)])
def test_what_changes_a_view_in_place_changes_the_weight_and_its_other_views(view: str, change: str) -> None:
    tensors = Tensors((STACK, ROWS, COLUMNS))

    def results(weight: Tensor) -> list[Tensor]:
        with torch.no_grad():
            before, part, others = weight[1] + 1, VIEWS[view](weight), [each(weight) for each in VIEWS.values()]
            CHANGES[change](part)
            after = [each + 0 for each in (weight, part, *others)]
            return [before, *after, weight[1] @ torch.ones(COLUMNS).double(), *(each @ each.mT for each in others)]

    torch.testing.assert_close(results(tensors.standing()), results(tensors.dense().detach()), rtol=1e-12, atol=1e-12)


def test_the_gradient_of_what_was_changed_through_a_view() -> None:
    tensors = Tensors((STACK, ROWS, COLUMNS))

    def gradients(weight: Tensor) -> Any:
        weight[1].mul_(3)
        return torch.autograd.grad((weight[0] @ weight[1].mT).square().sum(), tensors.factors)

    torch.testing.assert_close(gradients(tensors.standing()), gradients(tensors.dense()), rtol=1e-12, atol=1e-12)


def test_an_out_that_is_a_view_changes_the_weight() -> None:
    for weight in (Tensors((STACK, ROWS, COLUMNS)).standing(), Tensors((STACK, ROWS, COLUMNS)).dense()):
        with torch.no_grad():
            torch.mul(torch.ones(ROWS, COLUMNS).double(), 2, out=weight[1])
        assert (weight[1] + 0).eq(2).all()


def test_what_somebody_may_have_changed_is_computed_from_the_sum() -> None:
    weight = Tensors((ROWS, COLUMNS)).standing()
    _ = weight + 1
    assert isinstance(weight.mT, WeightSum)
    weight.data.zero_()
    assert not F.linear(torch.ones(COLUMNS).double(), weight).any() and not (weight.mT + 0).any()


def test_transforms_and_compilers_get_the_plain_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn(2, 2)
    assert can_stand(base)
    seen = []
    torch.func.grad(lambda w: [seen.append(can_stand(base)), w.sum()][1])(base)
    with forward_ad.dual_level():
        seen.append(can_stand(base))
    with pytest.warns(DeprecationWarning, match="trace"):
        torch.jit.trace(lambda w: [seen.append(can_stand(base)), w.sum()][1], (base,), check_trace=False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not any([*seen, can_stand(base)]) and len(seen) == 3


READERS: dict[str, Operation] = {
    "one graph": lambda w, x: F.linear(x, w).sin() + torch.chunk(w, 3)[1].sum() + torch.einsum("oi,bi->bo", w, x),
    "several": lambda w, x: F.linear(x, w[1:4]),  # dynamo does not subscript subclasses of tensors
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by dynamo, at graph breaks
@pytest.mark.parametrize("name", READERS)
def test_a_compiled_function_takes_it(name: str) -> None:
    x = torch.randn(2, COLUMNS, dtype=torch.float64)
    tensors = Tensors((ROWS, COLUMNS))
    wanted = READERS[name](tensors.dense(), x)
    torch._dynamo.reset()
    output = torch.compile(READERS[name], backend="aot_eager", fullgraph=name == "one graph")(tensors.standing(), x)
    for one, other in zip(
        torch.autograd.grad(output.sum(), tensors.factors),
        torch.autograd.grad(wanted.sum(), tensors.factors),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_transformed_function_reads_it() -> None:
    tensors = Tensors((ROWS, COLUMNS))
    x = torch.randn(4, COLUMNS, dtype=torch.float64)
    read = lambda weight: lambda x: F.linear(x, weight[1:3]).sin().sum()  # noqa: E731
    wanted = torch.func.vmap(torch.func.grad(read(tensors.dense())))(x)
    output = torch.func.vmap(torch.func.grad(read(tensors.standing())))(x)
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-12)


def test_every_entry_is_tested() -> None:
    """Each function in the table is reached by an operation above, or by the grouped products."""
    reached = set()

    def noted(function: Any, compute: Any) -> Any:
        def run(func: Any, args: Any, kwargs: Any) -> Any:
            reached.add(function)
            return compute(func, args, kwargs)

        return run

    own = dict(weight_sum.OPERATIONS)
    try:
        weight_sum.OPERATIONS.update({function: noted(function, compute) for function, compute in own.items()})
        for parameter in NAMED:
            operation, shape, _ = parameter.values
            tensors = Tensors(shape)
            operation(tensors.standing(), tensors.other)
    finally:
        weight_sum.OPERATIONS.update(own)
    reached_by = {compute.__name__ for function, compute in own.items() if function in reached}
    assert {compute.__name__ for compute in own.values()} - reached_by == {"_grouped", "_reversed_product"}

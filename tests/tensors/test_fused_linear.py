"""The autograd function of linear layers: exact derivatives of every order, what it keeps, and when it steps aside."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randomise
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora_plus
from lora_plus import inject_lora
from lora_plus.tensors import fused_linear as fused
from lora_plus.tensors.fused_linear import fused_linear

IN, OUT, R = 6, 5, 2


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(*, adapters: int = 1, dtype: torch.dtype = torch.float64, bias: bool = True, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias).to(dtype)
    for n in range(adapters):
        inject_lora(linear, "all-linear", r=R + n, alpha=3, adapter=f"a{n}", **settings)
    lora_plus.set_adapter(linear, [f"a{n}" for n in range(adapters)])
    linear.requires_grad_(True)
    return randomise(linear)


def explicit(module: nn.Module, x: Tensor) -> Tensor:
    """What the layer computes, by the definition."""
    weight = module.weight
    for adapter in module.lora_active:
        (A, B), scale = adapter.factors(), adapter.scale
        weight = weight + scale * (B.to(weight.dtype) @ A.to(weight.dtype))
    return F.linear(x, weight, module.bias)


class Used(Exception):
    """Raised in place of the autograd function."""


@pytest.fixture(params=[0, 2**30], ids=["large", "small"])
def any_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny layers are computed as large ones, in one function, and as small ones, by operations that torch records."""
    monkeypatch.setattr(fused, "_LEAST_WORK", request.param)


@contextmanager
def forbidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*args: Any) -> None:
        raise Used

    with monkeypatch.context() as patch:
        patch.setattr(fused._FusedLinear, "apply", fail)
        yield


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN), (IN,), (0, IN), (2, 1, 3, IN)], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["on x", "on another input"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("updates", [1, 2])
def test_first_and_second_derivatives_of_every_input(
    shape: tuple[int, ...], own: bool, bias: bool, updates: int
) -> None:
    x, weight = draw(*shape), draw(OUT, IN, seed=1)
    parts = [part for n in range(updates) for part in (draw(*shape, seed=2 + n), draw(R + n, IN), draw(OUT, R + n))]
    inputs = [x, weight, draw(OUT, seed=9), *parts]

    def function(x: Tensor, weight: Tensor, b: Tensor, *parts: Tensor) -> Tensor:
        triples = [parts[3 * n : 3 * n + 3] for n in range(updates)]
        made = [(u if own else None, A, B, 0.5 + n) for n, (u, A, B) in enumerate(triples)]
        return fused_linear(x, weight, b if bias else None, made)

    for tensor in inputs:
        tensor.requires_grad_(True)
    assert torch.autograd.gradcheck(function, inputs)
    if x.numel():
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("frozen", [(), ("A",), ("B",), ("x",), ("A", "B"), ("x", "A")], ids=str)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_right_one(frozen: tuple[str, ...]) -> None:
    tensors = {"x": draw(3, IN), "A": draw(R, IN, seed=1), "B": draw(OUT, R, seed=2)}
    weight = draw(OUT, IN, seed=3)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name not in frozen)
    free = [tensor for name, tensor in tensors.items() if name not in frozen]
    x, A, B = tensors.values()
    got = torch.autograd.grad(fused_linear(x, weight, None, [(None, A, B, 2.0)]).square().sum(), free)
    wanted = torch.autograd.grad(F.linear(x, weight + 2 * B @ A).square().sum(), free)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("own", [False, True], ids=["on x", "on another input"])
@pytest.mark.parametrize("frozen", [("A",), ("B",), ("x",), ("u",), ("A", "x"), ("weight", "A"), ("A", "u")], ids=str)
def test_second_derivatives_with_something_frozen(frozen: tuple[str, ...], own: bool) -> None:
    tensors = {"x": draw(3, IN), "weight": draw(OUT, IN, seed=1), "u": draw(3, IN, seed=2)}
    tensors |= {"A": draw(R, IN, seed=3), "B": draw(OUT, R, seed=4)}

    def function(*free: Tensor) -> Tensor:
        given = tensors | dict(zip(names, free, strict=True))
        x, weight, u, A, B = given.values()
        return fused_linear(x, weight, None, [(u if own else None, A, B, 0.5), (None, A, 2 * B, 3.0)])

    names = [name for name in tensors if name not in frozen]
    assert torch.autograd.gradgradcheck(function, [tensors[name].requires_grad_() for name in names])


@pytest.mark.usefixtures("any_size")
def test_a_gradient_penalty_with_a_frozen_A() -> None:
    torch.manual_seed(0)
    module = randomise(inject_lora(nn.Linear(IN, OUT).double(), "all-linear", r=R, variant="lora_fa"))
    B, x = module.lora_B["default"], draw(3, IN).requires_grad_()

    def penalty(y: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
        (of_B,) = torch.autograd.grad(y.pow(3).sum(), [B], create_graph=True)
        return gradient.square().sum() + of_B.square().sum()

    got = torch.autograd.grad(penalty(module(x)), [x, B])
    torch.testing.assert_close(got, torch.autograd.grad(penalty(explicit(module, x)), [x, B]), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("change", [Tensor.t, lambda g: g[:1].expand(3, -1), lambda g: g[:, ::2]], ids=str)
def test_gradients_of_any_strides(change: Callable[[Tensor], Tensor]) -> None:
    module = layer()
    x = draw(3, IN).requires_grad_()
    wanted = torch.autograd.grad(change(explicit(module, x)).sum(), [x, *module.parameters()])
    got = torch.autograd.grad(change(module(x)).sum(), [x, *module.parameters()])
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for parameter in module.parameters():
        parameter.grad = None
    change(module(x.t().contiguous().t())).sum().backward()
    for gradient, parameter in zip(wanted[1:], module.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)
        assert parameter.grad.is_contiguous()


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN), (IN,), (0, IN), (2, 1, 3, IN)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_can_be_changed_in_place(shape: tuple[int, ...], bias: bool) -> None:
    module, x = layer(bias=bias), draw(*shape).requires_grad_()
    y = module(x)
    assert y.is_contiguous() and not y._is_view()
    y += 1
    gradients = torch.autograd.grad(y.relu_().sum(), [x, *module.parameters()])
    wanted = torch.autograd.grad((explicit(module, x) + 1).relu().sum(), [x, *module.parameters()])
    torch.testing.assert_close(gradients, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(33, IN), (2, 3, IN), (IN,)], ids=str)
@pytest.mark.parametrize("gradients", [True, False])
def test_at_the_start_the_output_is_that_of_the_base(
    dtype: torch.dtype, shape: tuple[int, ...], gradients: bool
) -> None:
    module, x = layer(dtype=dtype, adapters=2), draw(*shape, dtype=dtype)
    with torch.no_grad():
        for B in module.lora_B.parameters():
            B.zero_()
    with torch.set_grad_enabled(gradients):
        assert torch.equal(module(x), F.linear(x, module.weight, module.bias))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "swapped": lambda x: x.transpose(0, 1),
    "repeated": lambda x: x[:, :1].expand_as(x),
    "sliced": lambda x: x[:, ::2],
    "turned": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("change", STRIDES)
def test_at_the_start_the_output_is_that_of_the_base_for_any_strides(change: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for features in (5, 16, 33):
        base = nn.Linear(features, features, dtype=dtype).requires_grad_(False)
        module = inject_lora(copy.deepcopy(base), "all-linear")
        x = STRIDES[change](torch.randn(4, 5, features, dtype=dtype))
        assert torch.equal(module(x), base(x))


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN), (IN,)], ids=str)
def test_an_output_without_gradients_can_be_changed_in_place_where_they_are_recorded(shape: tuple[int, ...]) -> None:
    module, added = layer(bias=False), draw(OUT).requires_grad_()
    with torch.no_grad():
        y = module(draw(*shape))
    y += added
    assert y.requires_grad


@pytest.mark.usefixtures("any_size")
def test_batched_gradients() -> None:
    module, x = layer(), draw(3, IN).requires_grad_()
    directions = torch.eye(3 * OUT, dtype=torch.float64).view(-1, 3, OUT)
    sources = [x, *module.parameters()]
    got = torch.autograd.grad(module(x), sources, directions, is_grads_batched=True)
    wanted = torch.autograd.grad(explicit(module, x), sources, directions, is_grads_batched=True)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


# ---- it steps aside --------------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": lambda f: torch.func.grad(lambda p, x: f(p, x).sum()),
    "per-sample gradients": lambda f: torch.func.vmap(torch.func.grad(lambda p, x: f(p, x).sum()), (None, 0)),
    "jacrev": lambda f: torch.func.jacrev(f),
    "jacfwd": lambda f: torch.func.jacfwd(f, argnums=1),
    "hessian": lambda f: torch.func.hessian(lambda p, x: f(p, x).square().sum(), argnums=1),
    "vmap": lambda f: torch.func.vmap(f, (None, 0)),
    "jvp": lambda f: lambda p, x: torch.func.jvp(lambda x: f(p, x), (x,), (torch.ones_like(x),)),
}


@pytest.mark.usefixtures("any_size")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms(transform: str) -> None:
    module, x = layer(adapters=2), draw(3, IN)
    parameters = dict(module.named_parameters())

    def ours(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, x)

    def reference(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        weight = parameters["weight"]
        for n in range(2):
            scale = 3 / (R + n)
            weight = weight + scale * parameters[f"lora_B.a{n}"] @ parameters[f"lora_A.a{n}"]
        return F.linear(x, weight, parameters["bias"])

    apply = TRANSFORMS[transform]
    torch.testing.assert_close(apply(ours)(parameters, x), apply(reference)(parameters, x), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("any_size")
def test_forward_mode_differentiation() -> None:
    module, x = layer(), draw(3, IN)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        got = forward_ad.unpack_dual(module(dual)).tangent
        wanted = forward_ad.unpack_dual(explicit(module, dual)).tangent
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("any_size")
@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated", "ignore:.torch.jit.* is not supported")
def test_tracing() -> None:
    module, x = layer(adapters=2), draw(3, IN)
    traced = torch.jit.trace(module, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(2 * x), module(2 * x), rtol=1e-12, atol=1e-12)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_it_serves_torchs_own_forward_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(2, IN, dtype=torch.float32)
    plain, own, offloaded = nn.Linear(IN, OUT), Doubled(IN, OUT), nn.Linear(IN, OUT)
    offloaded.forward = lambda x: F.linear(x, offloaded.weight, offloaded.bias)
    dora = inject_lora(nn.Linear(IN, OUT), "all-linear", variant="dora")
    modules = [inject_lora(module, "all-linear") for module in (plain, own, offloaded)]
    with forbidden(monkeypatch):
        with pytest.raises(Used):
            modules[0](x)
        for module in (*modules[1:], dora):
            module(x)
        with lora_plus.disabled(plain):
            plain(x)
        with lora_plus.merged(plain.eval()):
            plain(x)
        torch.compile(plain, backend="eager", fullgraph=True)(x)


class Counted(nn.Module):
    """A parametrization that changes nothing, as one with a state would."""

    calls = 0

    def forward(self, value: Tensor) -> Tensor:
        self.calls += 1
        return value * 1


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_computed_weight_or_bias_is_computed_once_a_call(name: str) -> None:
    module, x, counted = layer(), draw(3, IN), Counted()
    wanted = module(x)
    nn.utils.parametrize.register_parametrization(module, name, counted)
    counted.calls = 0
    torch.testing.assert_close(module(x), wanted, rtol=1e-12, atol=1e-12)
    assert counted.calls == 1


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_small_layers_are_left_to_torch_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch, adapters: int, dropout: float
) -> None:
    module, x = layer(adapters=adapters, dropout=dropout), draw(8, IN)
    results = []
    for least in (8 * (IN + OUT), 8 * (IN + OUT) + 1):
        monkeypatch.setattr(fused, "_LEAST_WORK", least)
        torch.manual_seed(0)
        y = module(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
        with torch.no_grad():
            results[-1].append(module.eval()(x))
        module.train()
    assert "FusedLinear" not in str(results[1][0].grad_fn) and "FusedLinear" in str(results[0][0].grad_fn)
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_a_forward_of_torch_that_was_replaced_stays_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer(), draw(2, IN)
    wanted = module(x) + 1
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) + 1)
    torch.testing.assert_close(module(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize(
    "wrong", [draw(2, IN + 1), draw(2, IN, dtype=torch.float32), draw(2, IN).to("meta"), torch.tensor(1.0)], ids=str
)
def test_a_wrong_input_gives_torchs_own_error(wrong: Tensor) -> None:
    with pytest.raises(RuntimeError) as theirs:
        nn.Linear(IN, OUT).double()(wrong)
    with pytest.raises(RuntimeError) as ours:
        layer()(wrong)
    assert str(ours.value).partition("\n")[0] == str(theirs.value).partition("\n")[0]


def test_a_wrong_call_fails_as_it_did() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        layer()(draw(2, IN), draw(2, IN))
    torch.testing.assert_close(layer()(input=draw(2, IN)), layer()(draw(2, IN)), rtol=1e-12, atol=1e-12)


# ---- what it keeps, and what it runs ---------------------------------------------------------------------------------


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes kept for backward besides parameters, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x).sum()
    return sum(kept.values())


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("adapters", [1, 2])
def test_only_the_input_and_the_rank_r_activations_are_kept(dtype: torch.dtype, adapters: int) -> None:
    module = layer(adapters=adapters, dtype=dtype)
    module.weight.requires_grad_(False)
    x = draw(16, IN, dtype=dtype).requires_grad_()
    ranks = sum(R + n for n in range(adapters))
    # operations that torch records keep the factors in the dtype that they were cast to
    cast = ranks * (IN + OUT) if fused._LEAST_WORK and dtype is torch.bfloat16 else 0
    assert kept_bytes(module, x) == (x.numel() + 16 * ranks + cast) * dtype.itemsize


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize(("trained", "features"), [((), 0), (("lora_A",), IN), (("lora_B",), R)], ids=str)
def test_nothing_is_kept_for_what_is_frozen(trained: tuple[str, ...], features: int) -> None:
    module = layer().requires_grad_(False)
    for name in trained:
        getattr(module, name).requires_grad_(True)
    x = draw(16, IN).requires_grad_()
    assert kept_bytes(module, x) == 16 * features * 8


class Operations(TorchDispatchMode):
    """Counts the operations that compute or move something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not function.is_view:
            self.counts[function.overloadpacket.__name__] += 1
        return result


def test_a_step_is_six_skinny_products_and_no_pass_over_an_output_besides() -> None:
    module = layer(bias=False)
    module.weight.requires_grad_(False)
    x, dy = draw(16, IN).requires_grad_(), draw(16, OUT)
    with Operations() as forward:
        y = module(x)
    assert forward.counts == {"mm": 2, "addmm_": 1}  # W x, A x; + B h
    with Operations() as backward:
        torch.autograd.grad(y, [x, *module.lora_A.parameters(), *module.lora_B.parameters()], dy)
    # dy W, B^T dy, dA, dB; + dh A; the scale goes onto dh and dB, which have r rows
    assert backward.counts == {"mm": 4, "addmm_": 1, "mul_": 2}


# ---- with other parts of torch ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_autocast_is_followed(dtype: torch.dtype, dropout: float) -> None:
    module, x = layer(dtype=torch.float32, dropout=dropout), draw(16, IN, dtype=torch.float32)
    base = nn.Linear(IN, OUT)
    base.load_state_dict({name: module.state_dict()[name] for name in ("weight", "bias")})
    with torch.autocast("cpu", dtype=dtype):
        with torch.no_grad():
            module.lora_B["a0"].zero_()
        assert torch.equal(module(x), base(x)) and module(x).dtype == dtype
        randomise(module)
        torch.manual_seed(0)
        y = module(x)
        torch.manual_seed(0)
        u = F.dropout(x, dropout)
        adapter = module.lora_adapters["a0"]
        (A, B), scale = adapter.factors(), adapter.scale
        h = F.linear(u.to(dtype).double(), A.to(dtype).double())
        wanted = F.linear(x.to(dtype).double(), module.weight.to(dtype).double(), module.bias.to(dtype).double())
        wanted = wanted + scale * F.linear(h, B.to(dtype).double())
    torch.testing.assert_close(y.double(), wanted, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    gradients = torch.autograd.grad(y.float().sum(), list(module.parameters()))
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 4


@pytest.mark.usefixtures("any_size")
def test_autocast_leaves_float64_alone() -> None:
    module, x = layer(), draw(3, IN)
    wanted = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x), wanted)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(dropout: float, reentrant: bool) -> None:
    module, x = layer(dropout=dropout), draw(16, IN).requires_grad_()
    gradients = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=reentrant)):
        torch.manual_seed(0)
        for parameter in module.parameters():
            parameter.grad = None
        run(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.usefixtures("any_size")
def test_half_precision_gradients_against_float64() -> None:
    module, x = layer(dtype=torch.bfloat16, adapters=2), draw(64, IN, dtype=torch.bfloat16).requires_grad_()
    exact = layer(adapters=2)
    with torch.no_grad():
        for parameter, source in zip(exact.parameters(), module.parameters(), strict=True):
            parameter.copy_(source)
    double = x.detach().double().requires_grad_()
    got = torch.autograd.grad(module(x).float().sum(), [x, *module.parameters()])
    wanted = torch.autograd.grad(explicit(exact, double).sum(), [double, *exact.parameters()])
    for one, other in zip(got, wanted, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < 4 * torch.finfo(torch.bfloat16).eps, error


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A device mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_tensors_are_left_to_torch(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer(adapters=2), draw(8, IN)
    wanted = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            placed = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            owner._parameters[name] = nn.Parameter(placed)
    with forbidden(monkeypatch):
        y = module(distribute_tensor(x, mesh, [Replicate()]))
    got = torch.autograd.grad(y.square().sum(), list(module.parameters()))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.full_tensor(), other, rtol=1e-12, atol=1e-12)


def test_a_fully_sharded_layer_is_computed_in_one_function(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer(adapters=2), draw(8, IN)
    y = module(x)
    y.square().sum().backward()
    wanted = [y, *(parameter.grad for parameter in module.parameters())]
    for parameter in module.parameters():
        parameter.grad = None
    fully_shard(module, mesh=mesh)
    with forbidden(monkeypatch), pytest.raises(Used):
        module(x)
    y = module(x)
    y.square().sum().backward()
    got = [y, *(parameter.grad.full_tensor() for parameter in module.parameters())]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("gradients", [True, False])
def test_inputs_of_one_dnn_are_taken_as_by_the_plain_layer(gradients: bool) -> None:
    module, x = layer(dtype=torch.float32), draw(3, IN, dtype=torch.float32)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(module(x.to_mkldnn()).to_dense(), module(x))


def test_a_graph_is_let_go_with_its_output() -> None:
    module, x = layer(), draw(3, IN)
    module(x).sum().backward()
    gc.collect()
    gc.disable()
    try:
        graph = weakref.ref(module(x).grad_fn)
        assert graph() is None
    finally:
        gc.enable()

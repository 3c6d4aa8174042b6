"""The laws of weights that are adapted as parameters or as blocks of rows: values, gradients, precision, compilers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from parameter_cases import (
    PARAMETER_CASES,
    Around,
    Inputs,
    ParameterCase,
    assert_close,
    distance,
    double,
    loss,
    same_bits,
    tensors,
)
from sites import adapter_sites
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import lora_plus
from lora_plus.files import adapter_state_dict
from lora_plus.layers.parameter_owner import parameter_holders
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.model import dense_reads, parameter_places
from lora_plus.tensors.weight_sum import WeightSum

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self.part._flat_weights:UserWarning"),  # in an export
]

HALVES = (torch.float16, torch.bfloat16)
SOME = {"attention-type", "lstm-one-matrix", "bag-sum", "experts-one-dora", "bare", "fused-linear"}
"""One of each kind, for what takes long."""


@pytest.fixture(params=PARAMETER_CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> ParameterCase:
    return request.param


some_in_default_runs = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.name in SOME else pytest.mark.slow, id=case.name) for case in PARAMETER_CASES],
)


def ways(*models: nn.Module) -> Iterator[str]:
    """The models in training, in evaluation, and in evaluation without gradients."""
    for mode in (True, False):
        for model in models:
            model.train(mode)
        yield "train" if mode else "eval"
    with torch.no_grad():
        yield "no_grad"
    with torch.inference_mode():
        yield "inference_mode"


def asking(inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
    """The inputs, of which those in floating point ask for a gradient."""
    leaves: dict[int, Tensor] = {}

    def ask(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaves.setdefault(id(leaf), leaf.detach().clone().requires_grad_())

    return pytree.tree_map(ask, inputs), list(leaves.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_the_output_is_the_base_s_bit_for_bit_while_B_is_zero(case: ParameterCase, dtype: torch.dtype) -> None:
    base, trained = (case.model(dtype).requires_grad_(False) for _ in range(2))
    for (
        at
    ) in case.places.values():  # torch takes other kernels for a weight that asks for a gradient, as W + s B A does
        trained.get_parameter(at.key).requires_grad_()
    model, inputs = case.inject(case.model(dtype)), case.input(dtype)
    for way in ways(base, trained, model):
        output = case.run(model, inputs)
        assert same_bits(output, case.run(trained if torch.is_grad_enabled() else base, inputs)), way
        assert distance(output, case.run(base, inputs)) <= 2 * torch.finfo(dtype).eps, way


def test_forward_is_merged_is_the_weight_written_by_hand(case: ParameterCase) -> None:
    model = case.adapted()
    wanted = case.run(case.explicit(model))
    assert distance(wanted, case.run(case.model())) > 1e-3, "the adapter is inert"
    for _ in ways(model):
        assert_close(case.run(model), wanted)
    lora_plus.merge_lora(model)
    for way in ways(model):
        if way != "train":
            assert_close(case.run(model), wanted)
    lora_plus.unmerge_lora(model)
    plain = lora_plus.merge_and_unload(model)
    assert not any(isinstance(module, AdaptedWeight) for module in plain.modules())
    assert type(plain.part) is type(case.model().part)
    assert_close(case.run(plain), wanted)


def test_each_place_has_an_effect_of_its_own(case: ParameterCase) -> None:
    base = case.run(case.model())
    for place in case.places:
        model = case.inject(case.model())
        for path, site in adapter_sites(model):
            if path == place:
                randomise(site)
        assert distance(case.run(model), base) > 1e-4, place
        assert_close(case.run(model), case.run(case.explicit(model)))


def test_gradients_are_those_of_the_weight_written_by_hand(case: ParameterCase) -> None:
    model, plain = case.adapted(), case.model()
    inputs, asked = asking(case.input())
    loss(case.run(model, inputs)).backward()
    factors = {name: value.clone().requires_grad_() for name, value in adapter_state_dict(model).items()}
    (args, kwargs), asked_by_hand = asking(case.input())
    weights = case.explicit_weights(plain.state_dict(), factors)
    loss(tensors(torch.func.functional_call(plain, weights, args, kwargs))).backward()
    gradients = {
        f"{place}.{container}": parameter.grad
        for place, site in adapter_sites(model)
        for container, parameter in site.lora_adapters["default"].tensors().items()
    }
    for name, factor in factors.items():
        assert torch.count_nonzero(factor.grad), name
        torch.testing.assert_close(gradients[name], factor.grad, rtol=1e-10, atol=1e-12)
    for one, other in zip(asked, asked_by_hand, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in PARAMETER_CASES if not case.dora], ids=lambda case: case.name)
def test_gradients_are_the_derivatives(case: ParameterCase) -> None:
    model, (args, kwargs) = case.adapted(), case.input()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    values = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def output(*given: Tensor) -> tuple[Tensor, ...]:
        replaced = dict(zip(names, given, strict=True))
        return tuple(tensors(torch.func.functional_call(model, replaced, args, kwargs)))

    assert torch.autograd.gradcheck(output, values)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_low_precision_stays_close_to_float64(case: ParameterCase, dtype: torch.dtype) -> None:
    model, inputs = case.adapted(dtype), case.input(dtype)
    wanted = case.run(case.explicit(model, dtype), double(inputs))
    bound = 4 * torch.finfo(dtype).eps * max(1.0, *(leaf.abs().max().item() for leaf in wanted))
    for _ in ways(model):
        output = case.run(model, inputs)
        assert {leaf.dtype for leaf in output} == {dtype}
        assert distance(output, wanted) <= bound
    assert distance(case.run(lora_plus.merge_and_unload(model), inputs), wanted) <= bound


@pytest.mark.parametrize("dtype", HALVES)
def test_under_autocast_the_update_is_not_lost(case: ParameterCase, dtype: torch.dtype) -> None:
    model, inputs = case.adapted(torch.float32), case.input(torch.float32)
    wanted = case.run(case.explicit(model, torch.float32), double(inputs))
    bound = 4 * torch.finfo(dtype).eps * max(1.0, *(leaf.abs().max().item() for leaf in wanted))
    with torch.autocast("cpu", dtype=dtype):
        try:
            plain = case.run(case.model(torch.float32), inputs)
        except RuntimeError as error:  # as oneDNN does where the processor lacks the instructions
            assert "could not create a primitive descriptor" in str(error)
            pytest.skip("torch does not compute the plain module under autocast on this machine")
        output = case.run(model, inputs)
    assert [leaf.dtype for leaf in output] == [leaf.dtype for leaf in plain]
    assert distance(output, wanted) <= bound
    loss(output).backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)


@some_in_default_runs
def test_it_compiles_in_one_graph_where_the_plain_module_does(case: ParameterCase) -> None:
    args, kwargs = case.input()
    try:
        torch._dynamo.reset()
        torch.compile(case.model(), backend="aot_eager", fullgraph=True)(*args, **kwargs)
    except torch._dynamo.exc.Unsupported:
        pytest.skip("the plain module does not compile in one graph")
    torch._dynamo.reset()
    model = case.adapted()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = tensors(compiled(*args, **kwargs))
    assert_close(output, case.run(model))
    loss(output).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss(case.run(model)).backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-10, atol=1e-12)
    randomise(model, seed=3)
    assert_close(tensors(compiled(*args, **kwargs)), case.run(model))


@some_in_default_runs
def test_it_exports_where_the_plain_module_does(case: ParameterCase) -> None:
    args, kwargs = case.input()
    try:
        torch.export.export(case.model().eval(), args, kwargs)
    except (torch._dynamo.exc.Unsupported, RuntimeError) as error:
        pytest.skip(f"the plain module does not export: {type(error).__name__}")
    model = case.adapted().eval()
    exported = torch.export.export(model, args, kwargs)
    assert_close(tensors(exported.module()(*args, **kwargs)), case.run(model))


def test_self_attention_reads_nested_tensors_with_its_adapters() -> None:
    torch.manual_seed(0)
    model = Around(nn.MultiheadAttention(4, 2, batch_first=True)).eval()
    parts = [torch.randn(length, 4) for length in (3, 5)]
    randomise(lora_plus.inject_lora(model, ["part"], r=2))
    with torch.no_grad(), pytest.warns(UserWarning, match="nested tensors"):
        x = torch.nested.nested_tensor(parts)
        output = model(x, x, x, need_weights=False)[0].unbind()
        lora_plus.merge_lora(model)
        merged = model(x, x, x, need_weights=False)[0].unbind()
    lora_plus.unmerge_lora(model)
    for part, got, got_merged in zip(parts, output, merged, strict=True):
        wanted = model(part[None], part[None], part[None])[0][0]
        torch.testing.assert_close(got, wanted)
        assert torch.equal(got_merged, got)


def test_a_padding_row_of_a_bag_gets_no_gradient() -> None:
    model = Around(nn.EmbeddingBag(6, 4, mode="sum", padding_idx=2))
    randomise(lora_plus.inject_lora(model, ["part"], r=2))
    model(torch.tensor([[2, 3], [1, 2]])).square().sum().backward()
    columns = next(site for _, site in adapter_sites(model)).lora_A["default"].grad.abs().sum(0)
    assert (columns > 0).tolist() == [False, True, False, True, False, False]


def test_a_forward_that_is_called_without_hooks_has_the_adapters(case: ParameterCase) -> None:
    model, (args, kwargs) = case.adapted().eval(), case.input()
    assert same_bits(tensors(model.part.forward(*args, **kwargs)), case.run(model))


def test_a_user_s_own_module_that_reads_its_weight_is_one_entry(tmp_path: Path) -> None:
    class Mixer(nn.Module):
        """Reads one weight for two projections."""

        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Parameter(torch.randn(8, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.both).chunk(2, -1)[0]

    parameter_places.PARTS[Mixer] = lambda module: [
        parameter_places.Part("both", name, rows=rows, linear=True)
        for name, rows in (("left", (0, 4)), ("right", (4, 8)))
    ]
    try:
        model, x = nn.Sequential(Mixer()), torch.randn(5, 3, dtype=torch.float64)
        fresh = copy.deepcopy(model)
        randomise(lora_plus.inject_lora(model, "all-linear", exclude=["0.right"], r=2))
        assert [row.name for row in lora_plus.lora_summary(model).rows] == ["0.left"]
        y = model(x)
        assert not torch.equal(y, fresh(x))
        lora_plus.save_adapter(model, tmp_path / "own.safetensors")
        assert torch.equal(lora_plus.load_adapter(fresh, tmp_path / "own.safetensors")(x), y)
        torch.testing.assert_close(lora_plus.merge_and_unload(model)(x), y, rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match=r"the weights of MultiheadAttention, .*, Mixer, and parameters"):
            lora_plus.inject_lora(nn.Sequential(nn.ReLU()), ["0"])
    finally:
        del parameter_places.PARTS[Mixer]


# ---- what reading gives ----------------------------------------------------------------------------------------------


def test_only_a_plain_sum_that_python_code_reads_is_left_to_its_reader(case: ParameterCase) -> None:
    model = case.adapted()
    for owner in list(model.modules()):
        for name, weight in parameter_holders(owner).items():
            stands = weight.of is None and not case.dora
            assert isinstance(getattr(owner, name), WeightSum) == stands
            hook = weight.register_forward_pre_hook(lambda module, args: None)
            assert not isinstance(getattr(owner, name), WeightSum)
            hook.remove()
            with lora_plus.disabled(model):
                assert getattr(owner, name) is weight.weight
            lora_plus.merge_lora(model.eval())
            assert getattr(owner, name) is weight.weight
            lora_plus.unmerge_lora(model)


def test_two_adapters_and_those_of_blocks_are_terms_of_one_sum() -> None:
    model = Around(nn.Linear(6, 6)).double()
    lora_plus.inject_lora(model, ["part.weight"], r=2)
    lora_plus.inject_lora(model, ["part.weight"], r=3, adapter="other", init="pissa")
    lora_plus.set_adapter(randomise(model), {"default": 2.0, "other": 0.5})
    x = torch.randn(4, 6, dtype=torch.float64)
    assert len(model.part.weight.terms) == 2 and dense_reads(model, x) == {}
    output = model(x)
    assert_close([output], [lora_plus.merge_and_unload(model)(x)])


def test_dense_reads_names_the_operations() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 6, 4))
            self.down = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ti,eoi->to", x, self.up) @ self.down + self.up.sum()

    model, x = randomise(lora_plus.inject_lora(Around(Mixed()), ["up", "down"], r=2)), torch.randn(3, 4)
    assert dense_reads(model, x) == {"part.up": ["torch.functional.einsum"]}
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    with lora_plus.disabled(model), pytest.raises(ValueError, match="looking for dense weights needs enabled adapters"):
        dense_reads(model, x)


def test_the_check_sees_what_reads_a_weight_without_asking_it() -> None:
    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            with torch._C.DisableTorchFunctionSubclass():  # as C++ code
                return x @ weight

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return grad @ weight.T, x.T @ grad

    class Fast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return Kernel.apply(x, self.matrix)

    model = lora_plus.inject_lora(Around(Fast()), ["matrix"], r=2)
    assert lora_plus.check_adapters(model, torch.randn(5, 4)) == ["part.matrix"]

"""The laws of an adapted layer, each on every case of the table."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import DORA_CASES, LORA_CASES, Case, ScaledLinear, explicit, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_plus
from lora_plus.layers import (
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAConvTranspose1d,
    LoRAConvTranspose2d,
    LoRAConvTranspose3d,
    LoRAEmbedding,
)
from lora_plus.layers.layer import LoRALayer
from lora_plus.model.tree import adapted_weights
from lora_plus.tensors.variant import VARIANTS

HALVES = (torch.float16, torch.bfloat16)


def train(model: nn.Module, x: torch.Tensor, steps: int) -> None:
    optimizer = lora_plus.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_the_output_is_the_base_s_bit_for_bit_while_B_is_zero(case: Case, dtype: torch.dtype) -> None:
    base, x = case.model(dtype), case.input(dtype)
    expected = copy.deepcopy(base)(x)
    model = lora_plus.inject_lora(base, ["layer"], **case.settings)
    for mode in (True, False):
        assert torch.equal(model.train(mode)(x), expected)


def test_forward_is_merged_is_the_explicit_weight(case: Case) -> None:
    model, x = case.adapted(), case.input()
    wanted = explicit(model)(x)
    assert not torch.allclose(wanted, lora_plus.remove_lora(copy.deepcopy(model))(x), atol=1e-3), "the adapter is inert"
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), wanted, rtol=1e-12, atol=1e-12)
    with lora_plus.merged(model):
        torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    plain = lora_plus.merge_and_unload(model)
    assert not any(isinstance(module, LoRALayer) for module in plain.modules())
    torch.testing.assert_close(plain(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_low_precision_stays_close_to_float64(case: Case, dtype: torch.dtype) -> None:
    model, x = case.adapted(dtype), case.input(dtype)
    wanted = explicit(model)(x if not x.is_floating_point() else x.double())
    eps = torch.finfo(dtype).eps
    for state in (model, lora_plus.merge_and_unload(copy.deepcopy(model))):
        y = state(x)
        assert y.dtype == dtype
        assert (y.double() - wanted).abs().max() <= 8 * eps * wanted.abs().max()


@pytest.mark.parametrize("case", LORA_CASES, ids=lambda case: case.name)
def test_gradients_are_the_derivatives(case: Case) -> None:
    model, x = case.adapted(), case.input()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    values = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    if isinstance(model.layer, nn.Embedding) and model.layer.padding_idx is not None:
        with torch.no_grad():  # no gradient goes to the padding's column of A, which a derivative would have
            x = x.where(x != model.layer.padding_idx, 0)

    def output(*tensors: torch.Tensor) -> torch.Tensor:
        given = tensors[len(names) :]
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=False)), given or (x,))

    assert torch.autograd.gradcheck(output, (*values, *inputs))


@pytest.mark.parametrize("case", DORA_CASES, ids=lambda case: case.name)
def test_dora_gradients_treat_the_norm_as_constant(case: Case) -> None:
    model, x = case.adapted(), case.input()
    model(x).square().sum().backward()
    layer = model.layer
    tensors = {k: v.detach().clone().requires_grad_() for k, v in layer.lora_adapters["default"].tensors().items()}
    weight = lora_plus.tensors.matrix.to_matrix(layer.weight.detach(), layer.layout)
    moved = weight + layer.lora_adapters["default"].spec.scale * tensors["lora_B"] @ tensors["lora_A"]
    ratio = tensors["lora_magnitude"] / moved.detach().norm(dim=1)
    matrix = ratio[:, None] * moved
    stored = lora_plus.tensors.matrix.from_matrix(matrix, layer.layout, layer.weight.shape)
    plain = case.model()
    torch.func.functional_call(plain, {"layer.weight": stored}, (x,)).square().sum().backward()
    for name, tensor in tensors.items():
        torch.testing.assert_close(
            layer.lora_adapters["default"].tensors()[name].grad, tensor.grad, rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_training_leaves_the_base_alone_and_moves_the_adapter(case: Case, dtype: torch.dtype) -> None:
    model, x = case.model(dtype), case.input(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    same = dict(model.named_parameters())
    lora_plus.inject_lora(model, ["layer"], **case.settings)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, x, 100)
    state = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor) and model.get_parameter(name) is same[name]
    moved = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {f"layer.{name}.default" for name in VARIANTS[case.settings.get("variant", "lora")].frozen}
    assert moved == set(state) - set(before) - frozen
    assert all(not torch.equal(state[name], start[name]) for name in moved)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_hundred_cycles_of_merging_give_back_the_bits(case: Case, dtype: torch.dtype) -> None:
    model = case.adapted(dtype)
    weight, bits = model.layer.weight, model.layer.weight.detach().clone()
    for _ in range(100):
        lora_plus.merge_lora(model)
        assert not torch.equal(model.layer.weight, bits)
        lora_plus.unmerge_lora(model)
    assert model.layer.weight is weight and torch.equal(weight, bits)


def test_keys_types_and_repr_come_back(case: Case) -> None:
    model = case.model()
    names, text, types = list(model.state_dict()), repr(model), [type(module) for module in model.modules()]
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    lora_plus.inject_lora(model, ["layer"], **case.settings)
    assert isinstance(model.layer, types[1])
    added = set(model.state_dict()) - set(names)
    wanted = {"layer.lora_A.default", "layer.lora_B.default"}
    assert added == wanted | ({"layer.lora_magnitude.default"} if case.options.get("variant") == "dora" else set())
    assert [name for name in model.state_dict() if name in names] == names
    randomise(model)
    with lora_plus.disabled(model):
        pass
    lora_plus.remove_lora(model)
    assert list(model.state_dict()) == names and repr(model) == text
    assert [type(module) for module in model.modules()] == types
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in bits.items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert not [key for module in model.modules() for key in module.__dict__ if "lora" in key]


def test_a_base_checkpoint_loads_after_injection(case: Case) -> None:
    other = case.layer(seed=5)
    model = case.adapted()
    result = model.load_state_dict({f"layer.{k}": v for k, v in other.state_dict().items()}, strict=False)
    assert set(result.missing_keys) == {f"layer.{k}.default" for k in model.layer.lora_adapters["default"].tensors()}
    assert not result.unexpected_keys
    assert torch.equal(model.layer.weight, other.weight)


def test_the_merged_state_dict_loads_strictly_into_the_plain_model(case: Case) -> None:
    model, x = case.adapted().eval(), case.input()
    lora_plus.merge_lora(model)
    plain = case.model()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain(x), model(x))


def test_disabled_gives_the_base_and_restores_the_state(case: Case) -> None:
    model, x = case.adapted().eval(), case.input()
    base, adapted = case.model()(x), model(x)
    for merge in (False, True):
        if merge:
            lora_plus.merge_lora(model)
        before = model(x)
        with lora_plus.disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), before)
    lora_plus.unmerge_lora(model)
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_independent(case: Case, way: str) -> None:
    model, x = case.adapted().eval(), case.input()

    def through_file(model: nn.Module) -> nn.Module:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    ways = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": through_file}
    for merge in (False, True):
        if merge:
            lora_plus.merge_lora(model)
        twin = ways[way](model)
        assert type(twin.layer) is type(model.layer) and torch.equal(twin(x), model(x))
    lora_plus.unmerge_lora(twin)
    lora_plus.unmerge_lora(model)
    assert torch.equal(twin(x), model(x))
    before = model(x)
    randomise(twin, seed=3)
    assert torch.equal(model(x), before) and not torch.equal(twin(x), before)


def test_compile_in_one_graph(case: Case) -> None:
    model, x = case.adapted(), case.input()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
    compiled(x).square().sum().backward()
    through_compile = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, gradient in through_compile.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-10, atol=1e-12)


def test_export(case: Case) -> None:
    model, x = case.adapted().eval(), case.input()
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(case: Case, use_reentrant: bool) -> None:
    model, x = case.adapted(), case.input()
    model(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    # reentrant checkpointing needs an input with a gradient, as its documentation says
    dummy = torch.ones(1, requires_grad=True)
    y = checkpoint(lambda x, _: model(x), x, dummy, use_reentrant=use_reentrant)
    y.square().sum().backward()
    for name, gradient in wanted.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)


def test_functional_call_uses_the_tensors_it_is_given(case: Case) -> None:
    model, x = case.adapted(), case.input()
    other = randomise(case.adapted(), seed=11)
    own = other.state_dict().keys() - case.model().state_dict().keys()
    tensors = {name: other.get_parameter(name).detach() for name in own}
    assert torch.equal(torch.func.functional_call(model, tensors, (x,)), other(x))


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(case: Case, dtype: torch.dtype) -> None:
    for base_dtype in (torch.float32, dtype):
        model, x = case.adapted(base_dtype), case.input(torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            y = model(x)
            plain = lora_plus.remove_lora(copy.deepcopy(model))(x)
        assert y.dtype == plain.dtype
        wanted = explicit(model)(x.double() if x.is_floating_point() else x)
        assert (y.double() - wanted).abs().max() <= 16 * torch.finfo(dtype).eps * wanted.abs().max()
        y.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("case", LORA_CASES, ids=lambda case: case.name)
def test_adapters_on_a_meta_base_have_values_and_keep_them(case: Case) -> None:
    x = case.input()
    real = case.model()
    with torch.device("meta"):
        model = case.model()
    lora_plus.inject_lora(model, ["layer"], generator=torch.Generator().manual_seed(3), **case.settings)
    randomise(model)
    values = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(not value.is_meta for value in values.values())
    model.inner = nn.ModuleList([model.layer])  # torch goes to it once for each module that has it
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict(), strict=False)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in values.items())
    torch.testing.assert_close(model(x), explicit(model)(x), rtol=1e-12, atol=1e-12)


def test_a_constructed_layer_is_a_converted_layer(case: Case) -> None:
    plain = case.layer()
    converted = lora_plus.inject_lora(plain, "", r=2, generator=torch.Generator().manual_seed(0))
    assert converted is plain and not converted.weight.requires_grad
    assert [name for name, p in converted.named_parameters() if p.requires_grad] == ["lora_A.default", "lora_B.default"]
    A, B = converted.lora_A["default"], converted.lora_B["default"]
    zero, bound = (A, torch.inf) if isinstance(plain, nn.Embedding) else (B, A.shape[1] ** -0.5)
    assert not torch.count_nonzero(zero) and A.abs().max() <= bound


def test_inputs_may_be_given_by_name() -> None:
    layer = lora_plus.LoRALinear(4, 3, r=2)
    randomise(layer)
    x = torch.randn(2, 4)
    assert torch.equal(layer(input=x), layer(x))
    own = Case("own", lambda: ScaledLinear(4, 3), lambda g, d: x)
    model = own.adapted(torch.float32)
    assert torch.equal(model.layer(x=x, shift=3.0), model.layer(x, 3.0))
    assert not torch.equal(model.layer(x, 3.0), model.layer(x))


def test_arguments_given_by_name_may_come_in_any_order() -> None:
    x = torch.randn(2, 4, 5)
    model = Case("own", lambda: ScaledLinear(5, 3), lambda g, d: x).adapted(torch.float32)
    assert torch.equal(model.layer(shift=3.0, x=x), model.layer(x, 3.0))
    layer = randomise(LoRAConvTranspose1d(4, 6, 3, stride=2, r=2))
    assert torch.equal(layer(output_size=[12], input=x), layer(x, [12]))


def test_direct_construction_takes_the_base_layer_s_arguments() -> None:
    made = [
        lora_plus.LoRALinear(4, 3, bias=False, dtype=torch.bfloat16, r=2, alpha=4),
        LoRAEmbedding(5, 4, padding_idx=1, r=2),
        LoRAConv1d(4, 6, 3, padding=1, r=2),
        LoRAConv2d(4, 6, (3, 1), groups=2, r=2),
        LoRAConv3d(4, 6, 1, r=2),
        LoRAConvTranspose1d(4, 6, 3, stride=2, r=2),
        LoRAConvTranspose2d(4, 6, (3, 1), groups=2, r=2),
        LoRAConvTranspose3d(4, 6, 1, r=2),
    ]
    for layer in made:
        assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A.default", "lora_B.default"]
        assert layer.lora_A["default"].dtype == torch.float32
    assert made[0].weight.dtype == torch.bfloat16 and made[0].bias is None
    assert made[0].lora_adapters["default"].spec.scale == 2


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_dropout_acts_on_the_adapter_s_input_in_training_only(case: Case, p: float) -> None:
    model, x = case.adapted(dropout=p), case.input()
    assert torch.equal(model.eval()(x), model(x))
    torch.testing.assert_close(model(x), explicit(model)(x), rtol=1e-12, atol=1e-12)
    model.train()
    outputs = torch.stack([model(x) for _ in range(400)])
    assert bool((outputs.std(0) > 0).any()) is bool(p)
    if case.options.get("variant") != "dora" and not (isinstance(model.layer, nn.Embedding) and model.layer.max_norm):
        error = (outputs.mean(0) - explicit(model)(x)).abs() / (outputs.std(0) / 20 + 1e-12)
        assert error.max() < 5.5 or not p, "dropout must keep the mean"


def test_lora_layers_names_each_layer_once() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(2, 2)})
    lora_plus.inject_lora(model, "all-linear", r=1)
    assert [name for name, _ in adapted_weights(model)] == ["a", "c"]


class Upscaled(nn.Module):
    """A transposed convolution whose output size the caller asks for."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose2d(4, 6, 3, stride=3, padding=1, groups=groups)

    def forward(self, x: torch.Tensor, size: list[int]) -> torch.Tensor:
        return self.layer(x, output_size=size)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [[7, 4], [8, 6], [9, 5]])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_transposed_convolution_may_be_asked_for_an_output_size(groups: int, size: list[int], variant: str) -> None:
    model = Upscaled(groups).double()
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    base = model(x, size)
    assert torch.equal(lora_plus.inject_lora(model, ["layer"], r=2, variant=variant)(x, size), base)
    wanted = explicit(randomise(model))(x, size)
    assert list(wanted.shape[2:]) == size and not torch.allclose(wanted, base, atol=1e-3)
    torch.testing.assert_close(model(x, size), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x=x, size=size), wanted, rtol=1e-12, atol=1e-12)
    with lora_plus.merged(model.eval()):
        torch.testing.assert_close(model(x, size), wanted, rtol=1e-12, atol=1e-12)


def test_the_padding_row_gets_no_update_in_training_and_merging() -> None:
    base = nn.Embedding(6, 4, padding_idx=2)
    with torch.no_grad():
        base.weight[2] = 3.0
    model = lora_plus.inject_lora(nn.Sequential(copy.deepcopy(base)), ["0"], r=2)
    x = torch.arange(6)
    train(model, x, 20)
    assert torch.equal(model(x)[2], base.weight[2])
    assert not torch.equal(model(x)[3], base.weight[3])
    assert torch.equal(lora_plus.merge_and_unload(model)(x)[2], base.weight[2])


def test_shapes_can_be_inferred_on_the_meta_device(case: Case) -> None:
    model = case.adapted().to("meta")
    base = case.model().to("meta")
    x = case.input().to("meta")
    assert model(x).shape == base(x).shape

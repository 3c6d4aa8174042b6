"""Adapters on layers whose weight is stored in few bits: bitsandbytes and torchao, on the CPU."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import Holder, randomise
from torch import Tensor, nn

import lora_plus
from lora_plus.layers import quantized

pytestmark = [
    pytest.mark.peers,
    # torch's own, from its compiler, which bitsandbytes imports
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

# torchao's NF4 needs in * out to be a multiple of 64 * 256
IN, OUT = 128, 256
RANK, ALPHA = 4, 8
SCALE = ALPHA / RANK


def bitsandbytes(kind: str, **options: object) -> Callable[[nn.Linear], nn.Linear]:
    """A layer of bitsandbytes, which is quantized when it is moved to a device."""

    def quantize(dense: nn.Linear) -> nn.Linear:
        layer = getattr(pytest.importorskip("bitsandbytes").nn, kind)(IN, OUT, dense.bias is not None, **options)
        layer.to(dense.weight.dtype).load_state_dict(dense.state_dict())
        return layer.to("cpu")

    return quantize


def torchao(config: str, **options: object) -> Callable[[nn.Linear], nn.Linear]:
    """An nn.Linear whose weight is one of torchao's tensors."""

    def quantize(dense: nn.Linear) -> nn.Linear:
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(dense, getattr(quantization, config)(**options))
        return dense

    return quantize


def torchao_nf4(dense: nn.Linear) -> nn.Linear:
    """An nn.Linear whose weight is torchao's NF4Tensor."""
    quantization = pytest.importorskip("torchao.quantization")
    dense.weight = nn.Parameter(quantization.to_nf4(dense.weight.detach()), requires_grad=False)
    return dense


def dequantized(layer: nn.Module) -> Tensor:
    """The dense weight ``(out, in)`` of a quantized layer, as its own package computes it."""
    weight = layer.weight
    functional = sys.modules.get("bitsandbytes.functional")
    if hasattr(weight, "quant_state"):
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):  # which the first forward moves
        return functional.int8_vectorwise_dequant(weight.data, layer.state.SCB if weight.SCB is None else weight.SCB)
    return weight.get_original_weight() if hasattr(weight, "get_original_weight") else weight.dequantize()


@dataclass(frozen=True)
class Base:
    """One kind of quantized linear layer in one setting."""

    name: str
    quantize: Callable[[nn.Linear], nn.Linear]
    dtype: torch.dtype = torch.float32
    """Of the layer before it was quantized, of the bias and of the input."""
    bias: bool = True
    rounding: float = 1e-6
    """Relative error of the dtype that the layer computes in."""

    def layer(self) -> nn.Linear:
        torch.manual_seed(3)
        return self.quantize(nn.Linear(IN, OUT, bias=self.bias, dtype=self.dtype))

    def input(self, *batch: int) -> Tensor:
        return torch.randn(*batch, IN, generator=torch.Generator().manual_seed(4)).to(self.dtype)

    def injected(self, **settings: object) -> nn.Module:
        return lora_plus.inject_lora(Holder(self.layer()), ["layer"], r=RANK, alpha=ALPHA, **settings)

    def adapted(self) -> nn.Module:
        """A model with an adapter whose B is not zero, of about the size of the base."""
        return randomise(self.injected(), size=0.1)


FOUR_BIT = functools.partial(bitsandbytes, "Linear4bit", quant_type="nf4", compute_dtype=torch.float32)
EIGHT_BIT = functools.partial(bitsandbytes, "Linear8bitLt", has_fp16_weights=False)
TORCHAO_INT8 = torchao("Int8WeightOnlyConfig", set_inductor_config=False)
BF16, LOW = torch.bfloat16, 1e-2
BASES = [
    Base("nf4", FOUR_BIT()),
    Base("nf4-plain-statistics-no-bias", FOUR_BIT(compress_statistics=False), bias=False),
    Base("nf4-bfloat16", FOUR_BIT(compute_dtype=BF16), BF16, rounding=LOW),
    Base("nf4-bfloat16-compute", FOUR_BIT(compute_dtype=BF16), rounding=LOW),
    Base("nf4-bfloat16-storage", FOUR_BIT(compute_dtype=BF16, quant_storage=BF16), BF16, rounding=LOW),
    Base("nf4-compute-as-first-input", FOUR_BIT(compute_dtype=None)),
    Base("fp4", FOUR_BIT(quant_type="fp4")),
    Base("int8", EIGHT_BIT(threshold=0.0)),
    Base("int8-threshold-no-bias", EIGHT_BIT(threshold=6.0), bias=False),
    Base("int8-bfloat16", EIGHT_BIT(threshold=6.0), BF16, rounding=LOW),
    Base("torchao-int8", TORCHAO_INT8),
    Base("torchao-int8-bfloat16", TORCHAO_INT8, BF16, rounding=LOW),
    Base(
        "torchao-int8-dynamic",
        torchao("Int8DynamicActivationInt8WeightConfig", set_inductor_config=False),
        rounding=LOW,
    ),
    Base("torchao-int4", torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4)),
    Base("torchao-nf4", torchao_nf4),
    Base("torchao-nf4-bfloat16-no-bias", torchao_nf4, BF16, bias=False, rounding=LOW),
]


@pytest.fixture(params=BASES, ids=lambda base: base.name)
def base(request: pytest.FixtureRequest) -> Base:
    return request.param


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The bytes of all tensors of the base, those inside quantized weights too; packed codes can read as NaN."""
    tensors = {}
    for name, value in model.state_dict().items():
        if "lora_" not in name:
            parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
            tensors |= {f"{name}.{part}": getattr(value, part) for part in parts} or {name: value}
    return {f"{name} {tensor.dtype}": tensor.reshape(-1).view(torch.uint8).clone() for name, tensor in tensors.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_near(actual: Tensor, expected: Tensor, rounding: float) -> None:
    """Equal but for a relative error of the whole."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < rounding, f"relative error {error:.1e}, expected below {rounding:.0e}"


def update(layer: nn.Module) -> Tensor:
    return SCALE * layer.lora_B["default"].detach().double() @ layer.lora_A["default"].detach().double()


@pytest.mark.parametrize("training", [True, False])
def test_the_output_is_the_quantized_base_s_bit_for_bit_while_B_is_zero(base: Base, training: bool) -> None:
    for x in (base.input(5), base.input(2, 3)):
        expected = base.layer().train(training)(x)
        model = base.injected().train(training)
        assert torch.equal(model(x), expected)
        with lora_plus.disabled(randomise(model)):
            assert torch.equal(model(x), expected)
        assert not torch.equal(model(x), expected)


def test_forward_and_gradients_are_those_of_the_dequantized_weight(base: Base) -> None:
    plain, model, x = base.layer(), base.adapted(), base.input(5).requires_grad_()
    A, B = (getattr(model.layer, name)["default"] for name in ("lora_A", "lora_B"))
    W, a, b, i = dequantized(plain).double(), A.detach().double(), B.detach().double(), x.detach().double()
    y = model(x)
    expected = i @ (W + SCALE * b @ a).T + (plain.bias.detach().double() if base.bias else 0)
    assert y.dtype == base.dtype
    assert_near(y.detach(), expected, base.rounding)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    y.backward(g)
    g = g.double()
    assert_near(A.grad, SCALE * b.T @ g.T @ i, base.rounding)
    assert_near(B.grad, SCALE * g.T @ (i @ a.T), base.rounding)
    assert_near(x.grad, g @ (W + SCALE * b @ a), base.rounding)


def test_the_base_stays_as_it_was_over_20_steps(base: Base) -> None:
    layer, x, target = base.layer(), base.input(8), torch.randn(8, OUT)
    layer(x)  # bitsandbytes casts the bias to the dtype that it computes in, once, at its first forward
    weight, before = layer.weight, stored(layer)
    model = lora_plus.inject_lora(Holder(layer), ["layer"], r=RANK, alpha=ALPHA)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"layer.lora_A.default", "layer.lora_B.default"}
    optimizer = lora_plus.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append((model(x).float() - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert layer.weight is weight and same(stored(layer), before)


def test_the_sizes_of_the_factors_are_those_of_the_layer(base: Base) -> None:
    layer = base.injected().layer
    assert layer.lora_A["default"].shape == (RANK, IN) and layer.lora_B["default"].shape == (OUT, RANK)
    assert layer.lora_A["default"].dtype == layer.lora_B["default"].dtype == torch.float32


def test_merging_is_refused_and_says_what_to_do_instead(base: Base) -> None:
    parts = OrderedDict(first=nn.Linear(IN, IN, dtype=base.dtype), layer=base.layer())
    model = randomise(lora_plus.inject_lora(nn.Sequential(parts), "all-linear", r=RANK, alpha=ALPHA), size=0.1)
    x = base.input(5)
    expected, before, types = model(x), stored(model), [type(part) for part in model]
    weights = [part.weight for part in model]
    for merge in (lora_plus.merge_lora, lora_plus.merge_and_unload, lambda model: lora_plus.merged(model).__enter__()):
        with pytest.raises(ValueError, match=r"(?s)'layer'.*merge_and_unload\(model, dequantize=True\)"):
            merge(model)
        assert [type(part) for part in model] == types and same(stored(model), before)
        assert all(part.weight is weight for part, weight in zip(model, weights, strict=True))
        assert torch.equal(model(x), expected)


def test_unloading_gives_a_plain_linear_layer_with_the_merged_weight(base: Base) -> None:
    model = base.adapted()
    layer, expected = model.layer, dequantized(base.layer()).double() + update(model.layer)
    assert lora_plus.merge_and_unload(model, dequantize=True) is model and model.layer is layer
    assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
    assert layer.weight.shape == (OUT, IN) and {p.dtype for p in layer.parameters()} == {base.dtype}
    # computed in float32 and rounded once
    size, eps = float(expected.abs().max()), torch.finfo(base.dtype).eps
    torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=0.51 * eps, atol=1e-6 * size)
    assert set(vars(layer)) == set(vars(nn.Linear(1, 1))) and not layer._load_state_dict_pre_hooks
    assert repr(layer) == repr(nn.Linear(IN, OUT, bias=base.bias))
    pickled = pickle.dumps(model.layer)
    assert b"bitsandbytes" not in pickled and b"torchao" not in pickled and b"lora" not in pickled


def test_the_unloaded_layer_computes_what_the_adapted_one_did(base: Base) -> None:
    model, x = base.adapted(), base.input(2, 3)
    expected = model(x).detach()
    y = lora_plus.merge_and_unload(model, dequantize=True)(x)
    assert y.dtype == expected.dtype
    assert_near(y.detach(), expected, base.rounding)


def test_dequantize_leaves_layers_that_are_not_quantized_to_the_exact_merge() -> None:
    model = randomise(lora_plus.inject_lora(Holder(nn.Linear(IN, OUT)), ["layer"], r=RANK, alpha=ALPHA))
    expected = lora_plus.merge_and_unload(copy.deepcopy(model)).layer.weight
    assert torch.equal(lora_plus.merge_and_unload(model, dequantize=True).layer.weight, expected)


@pytest.mark.parametrize("file", ["adapter.safetensors", "peft-folder"])
def test_save_and_load_into_a_freshly_quantized_copy_and_a_dense_layer(base: Base, tmp_path: Path, file: str) -> None:
    model, x = base.adapted(), base.input(5)
    lora_plus.save_adapter(model, tmp_path / file)
    fresh = lora_plus.load_adapter(Holder(base.layer()), tmp_path / file)
    assert torch.equal(fresh(x), model(x))
    dense = lora_plus.load_adapter(Holder(nn.Linear(IN, OUT)), tmp_path / file)
    assert torch.equal(update(dense.layer), update(model.layer))


def test_a_deep_copy_computes_the_same_and_is_on_its_own(base: Base) -> None:
    model, x = base.adapted(), base.input(5)
    expected, twin = model(x), copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    randomise(twin, seed=9)
    assert not torch.equal(twin(x), expected) and torch.equal(model(x), expected)


def test_remove_lora_restores_class_attributes_and_output(base: Base) -> None:
    layer, x = base.layer(), base.input(5)
    expected, kind, before, attributes = layer(x), type(layer), stored(layer), set(vars(layer))
    grads = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    model = randomise(lora_plus.inject_lora(Holder(layer), ["layer"], r=RANK, alpha=ALPHA))
    assert isinstance(layer, kind) and not torch.equal(model(x), expected)
    lora_plus.remove_lora(model)
    assert model.layer is layer and type(layer) is kind and set(vars(layer)) == attributes
    assert {name: parameter.requires_grad for name, parameter in layer.named_parameters()} == grads
    assert same(stored(layer), before) and torch.equal(layer(x), expected)


def test_dora_is_refused(base: Base) -> None:
    model = Holder(base.layer())
    kind, keys = type(model.layer), list(model.state_dict())
    with pytest.raises(ValueError, match="quantized"):
        lora_plus.inject_lora(model, ["layer"], r=RANK, variant="dora")
    assert type(model.layer) is kind and list(model.state_dict()) == keys


def test_an_nf4_model_learns_with_lora_plus() -> None:
    linear = functools.partial(pytest.importorskip("bitsandbytes").nn.LinearNF4, compute_dtype=torch.float32)
    model = nn.Sequential(linear(64, 64), nn.Tanh(), linear(64, 32)).to("cpu")
    x = torch.randn(256, 64)
    target = model(x).detach() + torch.sin(x @ torch.randn(64, 2) / 8) @ torch.randn(2, 32)
    lora_plus.inject_lora(model, "all-linear", r=8, alpha=16)
    assert all(hasattr(model[index], "lora_A") for index in (0, 2))
    optimizer = lora_plus.create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-3, lr_ratio=4)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append((model(x) - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 5


def test_a_quantized_layer_is_not_trained_in_full() -> None:
    model = nn.Sequential(BASES[0].layer(), nn.Linear(OUT, 2))
    with pytest.raises(ValueError, match="train_also: '0' has a quantized weight, which cannot be trained"):
        lora_plus.inject_lora(model, ["1"], train_also=["0"])


def test_a_package_s_own_form_is_one_entry() -> None:
    class Tenths(nn.Parameter):
        """Integers that count tenths."""

    class TenthsLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.detach().as_subclass(Tensor) / 10, self.bias)

    def layer() -> nn.Sequential:
        plain = TenthsLinear(4, 3).requires_grad_(False)
        plain.weight = Tenths((plain.weight * 10).round().to(torch.int8), requires_grad=False)
        return nn.Sequential(plain)

    quantized.STORES["tenths"] = quantized.Store(
        lambda weight: isinstance(weight, Tenths), lambda layer: layer.weight.as_subclass(Tensor) / 10, ()
    )
    try:
        model, x = randomise(lora_plus.inject_lora(layer(), ["0"], r=2)), torch.randn(5, 4)
        y = model(x)
        with pytest.raises(ValueError, match="its weight is quantized"):
            lora_plus.merge_lora(model)
        with pytest.raises(ValueError, match=r"parameter 'weight' that is quantized \(tenths\)"):
            lora_plus.inject_lora(layer(), ["0.weight"])
        torch.testing.assert_close(lora_plus.merge_and_unload(model, dequantize=True)(x), y)
        assert type(model[0]) is nn.Linear
    finally:
        del quantized.STORES["tenths"]

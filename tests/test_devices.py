"""The laws on the devices that there are, in float32 and bfloat16, against float64 on the CPU.

``benchmarks/gpu.sh`` runs this file by its path where there is CUDA. The CPU's part shows that the tests are right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LORA_CASES, Case, Holder, explicit, randomise
from parameter_cases import PARAMETER_CASES, ParameterCase, double, loss
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lora_plus

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative error of a tensor that is allowed."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=ROUNDING, ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU cuDNN computes convolutions and recurrent layers in float32 with the precision of TF32, unless told."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


parameter_cases = pytest.mark.parametrize("case", PARAMETER_CASES, ids=lambda case: case.name)


def wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def assert_near(actual: Tensor, expected: Tensor, rounding: float) -> None:
    """Equal but for a relative error of the whole."""
    assert actual.shape == expected.shape
    error = (actual.detach().cpu().double() - expected).norm() / expected.norm()
    assert error < rounding, f"relative error {error:.1e}, expected below {rounding:.0e}"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}  # type: ignore[misc]


def test_the_output_is_the_base_s_bit_for_bit_while_B_is_zero(case: Case, device: str, dtype: torch.dtype) -> None:
    base, x = case.model(dtype).to(device), case.input(dtype).to(device)
    expected = copy.deepcopy(base)(x)
    model = lora_plus.inject_lora(base, ["layer"], **case.settings)
    for mode in (True, False):
        assert torch.equal(model.train(mode)(x), expected)


def test_outputs_and_gradients_are_those_of_float64(case: Case, device: str, dtype: torch.dtype) -> None:
    model, x = case.adapted(dtype), case.input(dtype)
    exact = copy.deepcopy(model).double()
    wanted = exact(wide(x))
    assert_near(explicit(model)(wide(x)), wanted.detach(), 1e-9)
    dy = torch.randn_like(wanted).to(dtype)
    wanted.backward(dy.double())
    y = model.to(device)(x.to(device))
    y.backward(dy.to(device))
    assert_near(y, wanted.detach(), ROUNDING[dtype])
    for name, gradient in gradients(model).items():
        assert_near(gradient, exact.get_parameter(name).grad, 2 * ROUNDING[dtype])


def test_merging_keeps_the_output_and_unmerging_gives_back_the_bits(
    case: Case, device: str, dtype: torch.dtype
) -> None:
    model, x = case.adapted(dtype).to(device).eval(), case.input(dtype)
    wanted, bits = explicit(copy.deepcopy(model).cpu())(wide(x)), model.layer.weight.detach().clone()
    lora_plus.merge_lora(model)
    assert_near(model(x.to(device)), wanted.detach(), ROUNDING[dtype])
    lora_plus.unmerge_lora(model)
    assert torch.equal(model.layer.weight, bits)


@pytest.mark.parametrize("case", LORA_CASES, ids=lambda case: case.name)
def test_autocast(case: Case, device: str) -> None:
    model, x = case.adapted(torch.float32), case.input(torch.float32)
    wanted = explicit(model)(wide(x))
    with torch.autocast(device, dtype=torch.bfloat16):
        y = model.to(device)(x.to(device))
    assert_near(y, wanted.detach(), ROUNDING[torch.bfloat16])
    y.float().square().sum().backward()
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())


@parameter_cases
def test_adapted_parameters_give_the_outputs_and_gradients_of_float64(case: ParameterCase, device: str) -> None:
    model, inputs = case.adapted(torch.float32), case.input(torch.float32)
    exact = copy.deepcopy(model).double()
    wanted = case.run(exact, double(inputs))
    loss(wanted).backward()
    there: Any = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
    outputs = case.run(model.to(device), there)
    loss(outputs).backward()
    for output, expected in zip(outputs, wanted, strict=True):
        assert_near(output, expected.detach(), 1e-5)
    for name, gradient in gradients(model).items():
        assert_near(gradient, exact.get_parameter(name).grad, 1e-4)
    for output, expected in zip(case.run(model.eval(), there), case.run(exact.eval(), double(inputs)), strict=True):
        assert_near(output, expected.detach(), 1e-5)


def test_adapters_are_live_and_the_check_leaves_no_trace(case: Case, device: str, dtype: torch.dtype) -> None:
    model, x = case.adapted(dtype).to(device), case.input(dtype).to(device)
    before = torch.rand(1, device=device)  # so that the device's generator is there
    states = torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else before
    assert lora_plus.check_adapters(model, x) == ["layer"]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert device != "cuda" or torch.equal(torch.cuda.get_rng_state(), states[1])


@parameter_cases
def test_adapted_parameters_are_live(case: ParameterCase, device: str) -> None:
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), case.input(torch.float32))
    model = case.adapted(torch.float32).to(device)
    assert set(lora_plus.check_adapters(model, *args, **kwargs)) == set(case.places)


@pytest.mark.parametrize("case", LORA_CASES[:1], ids=lambda case: case.name)
def test_a_saved_adapter_loads_where_the_model_is(case: Case, device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = case.adapted(dtype).to(device).eval(), case.input(dtype).to(device)
    lora_plus.save_adapter(model, tmp_path / "adapter.safetensors")
    other = lora_plus.load_adapter(case.model(dtype).to(device), tmp_path / "adapter.safetensors").eval()
    assert torch.equal(other(x), model(x))


def four_bit(device: str, dtype: torch.dtype) -> nn.Module:
    nn4 = pytest.importorskip("bitsandbytes").nn
    return nn4.Linear4bit(128, 256, quant_type="nf4", compute_dtype=dtype).to(dtype).to(device)


def eight_bit(device: str, dtype: torch.dtype) -> nn.Module:
    return pytest.importorskip("bitsandbytes").nn.Linear8bitLt(128, 256, has_fp16_weights=False).to(dtype).to(device)


def torchao_int8(device: str, dtype: torch.dtype) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(128, 256).to(device, dtype)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    return layer


@pytest.mark.peers
@pytest.mark.parametrize("quantized", [four_bit, eight_bit, torchao_int8], ids=lambda make: make.__name__)
def test_a_quantized_layer_adds_the_update_to_its_own_output(
    quantized: Callable[[str, torch.dtype], nn.Module], device: str
) -> None:
    dtype = torch.bfloat16
    base = Holder(quantized(device, dtype))
    x = torch.randn(16, 128).to(device, dtype)
    with torch.no_grad():
        plain = base(x).cpu().double()
    model = randomise(lora_plus.inject_lora(base, ["layer"], r=4, alpha=8), size=0.1)
    A, B = (tensor.detach().cpu().double() for tensor in model.layer.lora_adapters["default"].tensors().values())
    y = model(x)
    assert_near(y, plain + 2 * x.cpu().double() @ A.T @ B.T, ROUNDING[dtype])
    dy = torch.randn(16, 256).to(dtype)
    y.backward(dy.to(device))
    wanted = 2 * dy.double().T @ (x.cpu().double() @ A.T)
    assert_near(gradients(model)["layer.lora_B.default"], wanted, ROUNDING[dtype])
    assert lora_plus.check_adapters(model, x) == ["layer"]


@pytest.mark.skipif("cuda" not in DEVICES, reason="there is no CUDA device")
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_can_be_captured_and_replayed(device: str, dropout: float, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(device, dtype)
    randomise(lora_plus.inject_lora(model, "all-linear", r=4, dropout=dropout))
    x = torch.randn(32, 64, device=device, dtype=dtype)

    def step() -> None:
        model.zero_grad()
        model(x).square().sum().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    eager = {name: gradient.cpu().double() for name, gradient in gradients(model).items()}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    for name, gradient in gradients(model).items():
        assert gradient.isfinite().all() and gradient.any()
        if not dropout:
            assert_near(gradient, eager[name], ROUNDING[dtype])

"""What leaves the training: traced, scripted, exported and ONNX programs compute what the adapted model computes."""

from __future__ import annotations

import copy
import io
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, randomise
from parameter_cases import PARAMETER_CASES, ParameterCase, tensors
from torch import Tensor, nn

from lora_plus import inject_lora, merge_and_unload, merge_lora, unmerge_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.* is (deprecated|not supported)"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights"),  # of any recurrent layer of torch's
]


def close(got: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")  # as torch's own layers do
def test_a_trace_computes_the_same_for_other_values(case: Case) -> None:
    model, x = case.adapted().eval(), case.input()
    traced = torch.jit.trace(model, x, check_trace=False)
    other = case.input(seed=2)
    close(traced(other), model(other))


SCRIPTED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(4, 4), {"targets": ["0"]}),
    "DoRA": (lambda: nn.Linear(4, 4), {"targets": ["0"], "variant": "dora"}),
    "embedding": (lambda: nn.Embedding(4, 4), {"targets": ["0"]}),
    "deeper": (lambda: nn.Sequential(nn.Linear(4, 4)), {"targets": ["0.0"]}),
    "weight read by others": (lambda: nn.Linear(4, 4), {"targets": ["0.weight"]}),
    "rows": (lambda: nn.Linear(4, 4), {"targets": ["0.q"], "fused": {"0": ["q", "k"]}}),
    "attention": (lambda: nn.MultiheadAttention(4, 2), {"targets": ["0.q", "0.out_proj"]}),
    "lstm": (lambda: nn.LSTM(4, 4), {"targets": ["0"]}),
}


@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
@pytest.mark.parametrize(("make", "settings"), SCRIPTED.values(), ids=SCRIPTED)
def test_scripting_is_refused_with_the_next_step(make: Callable[[], nn.Module], settings: Any, merged: bool) -> None:
    model = randomise(inject_lora(nn.Sequential(make(), nn.ReLU()), r=2, **settings)).eval()
    if merged:
        merge_lora(model)
    before = [(id(module), type(module), set(module.__dict__)) for module in model.modules()]
    with pytest.raises(
        ValueError, match=r"^torch\.jit\.script cannot read a LoRA\w+; call merge_and_unload\(model\) first$"
    ) as error:
        torch.jit.script(model)
    assert len(str(error.value)) <= 160
    assert [(id(module), type(module), set(module.__dict__)) for module in model.modules()] == before
    if merged:
        unmerge_lora(model)
    torch.jit.script(merge_and_unload(model)[0])


@pytest.mark.parametrize("name", ["linear", "linear-dora", "embedding", "conv2d-groups", "conv-transpose1d"])
def test_an_unloaded_model_is_scripted_as_what_the_adapted_one_computed(name: str) -> None:
    (case,) = (each for each in CASES if each.name == name)
    model, x = case.adapted().eval(), case.input()
    y = model(x)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(merge_and_unload(model)), file)
    file.seek(0)
    close(torch.jit.load(file)(x), y)


@pytest.mark.slow
def test_a_merged_layer_is_exported_as_the_plain_one(case: Case) -> None:
    model, x = case.adapted().eval(), case.input()
    wanted = model(x)
    merge_lora(model)
    exported = torch.export.export(model, (x,))
    close(exported.module()(x), wanted)
    if case.name != "embedding-max-norm":  # torch's own changes the weight in its forward
        assert operations(exported) == operations(torch.export.export(case.model().eval(), (x,)))


def operations(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.slow
def test_values_of_another_adapter_go_into_a_program(case: Case) -> None:
    model, x = case.adapted().eval(), case.input()
    wanted, file = model(x), io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    served = torch.export.load(file).module()
    other = randomise(copy.deepcopy(model), seed=11)
    assert served.load_state_dict(values_of(other), strict=False).unexpected_keys == []
    close(served(x), other(x))
    assert torch.equal(model(x), wanted) and not torch.equal(other(x), wanted)


@pytest.mark.slow
def test_a_program_that_was_not_saved_shares_its_tensors_with_the_model() -> None:
    (case,) = (each for each in CASES if each.name == "linear")
    model, x = case.adapted().eval(), case.input()
    other = randomise(copy.deepcopy(model), seed=11)
    torch.export.export(model, (x,)).module().load_state_dict(values_of(other), strict=False)
    assert torch.equal(model(x), other(x))


def test_a_stack_of_adapters_computes_what_each_does(case: Case) -> None:
    model, x = case.adapted().eval(), case.input()
    others = [randomise(copy.deepcopy(model), seed=seed) for seed in (11, 12)]
    states = [values_of(each) for each in (model, *others)]
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    outputs = torch.func.vmap(lambda values: torch.func.functional_call(model, values, (x,)))(stacked)
    for output, each in zip(outputs, (model, *others), strict=True):
        close(output, each(x))


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's values, as the page on deploying takes them."""
    return {key: tensor for key, tensor in model.state_dict().items() if "lora_" in key}


def in_onnx_runtime(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What ONNX Runtime computes of the exported model."""
    onnxruntime = pytest.importorskip("onnxruntime")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names each package that has operators and is not there
    program = torch.onnx.export(model, args, kwargs=kwargs, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    given = [leaf.numpy() for leaf in tensors((args, kwargs))]
    return [
        torch.from_numpy(each)
        for each in session.run(None, {put.name: leaf for put, leaf in zip(session.get_inputs(), given, strict=True)})
    ]


NOT_IN_ONNX_RUNTIME = {
    "conv-transpose2d-depthwise": "output_padding .* too large for stride",
    "lstm": "All inputs to Concat must have same rank",
}
"""Cases whose plain module ONNX Runtime refuses, with what it says."""


@pytest.mark.slow
@pytest.mark.parametrize("each", [*CASES, *PARAMETER_CASES], ids=lambda each: each.name)
def test_onnx_runtime_computes_what_the_adapted_model_computes(each: Case | ParameterCase) -> None:
    model = each.adapted(torch.float32).eval()
    inputs = each.input(torch.float32)
    args, kwargs = ((inputs,), {}) if isinstance(inputs, Tensor) else inputs
    if each.name not in NOT_IN_ONNX_RUNTIME:
        close(in_onnx_runtime(model, args, kwargs), tensors(model(*args, **kwargs)), 1e-4)
        return
    for refused in each.model(torch.float32).eval(), model:
        with pytest.raises(Exception, match=NOT_IN_ONNX_RUNTIME[each.name]):
            in_onnx_runtime(refused, args, kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear-dora", "embedding", "conv2d-groups", "attention", "gru", "experts"])
def test_onnx_runtime_computes_merged_weights(name: str) -> None:
    (each,) = (each for each in [*CASES, *PARAMETER_CASES] if each.name == name)
    model = each.adapted(torch.float32).eval()
    inputs = each.input(torch.float32)
    args, kwargs = ((inputs,), {}) if isinstance(inputs, Tensor) else inputs
    wanted = tensors(model(*args, **kwargs))
    merge_lora(model)
    close(in_onnx_runtime(model, args, kwargs), wanted, 1e-4)


@pytest.mark.slow
def test_a_compiled_library_takes_another_adapter(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    (case,) = (each for each in CASES if each.name == "linear")
    model, x = case.adapted(torch.float32).eval(), case.input(torch.float32)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (x,), dynamic_shapes=(batch,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
    served = torch._inductor.aoti_load_package(path)
    more = torch.cat([x, x + 1])
    close(served(more), model(more), 1e-5)
    other = randomise(copy.deepcopy(model), seed=11)
    served.load_constants(values_of(other), check_full_update=False)
    close(served(more), other(more), 1e-5)


@pytest.mark.slow
def test_a_language_model_is_exported(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, use_cache=False, **sizes)
    model = randomise(inject_lora(transformers.LlamaForCausalLM(config), "all-linear", r=4)).eval()
    ids = torch.randint(64, (2, 7))
    wanted = model(ids).logits
    close(torch.export.export(model, (ids,)).module()(ids).logits, wanted, 1e-4)
    (logits,) = in_onnx_runtime(model, (ids,), {})
    close(logits, wanted, 1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Enum subclass", "ignore:.torch.jit.script_method")
def test_quantizing_a_model_with_adapters_leaves_these_as_they_are() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = randomise(inject_lora(nn.Sequential(nn.Linear(32, 16)), ["0"], r=4)).eval()
    plain, x = nn.Sequential(nn.Linear(32, 16)), torch.randn(3, 32)
    plain.load_state_dict({key: tensor for key, tensor in model.state_dict().items() if "lora_" not in key})
    A, B = (tensor["default"].detach() for tensor in (model[0].lora_A, model[0].lora_B))
    for each in plain, model:
        quantization.quantize_(each, quantization.Int8WeightOnlyConfig())
    close(model(x), plain(x) + 4 * x @ A.T @ B.T, 1e-5)
    assert (type(model[0].lora_A["default"]), type(model[0].weight)) == (nn.Parameter, type(plain[0].weight))

"""An exported adapter computes what the adapter does, at one rank and one scale for all layers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, randomise
from files_support import contents
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_plus
from lora_plus import export_adapter, inject_lora, load_adapter, save_adapter
from lora_plus.files import to_peft
from lora_plus.model.tree import adapted_weights, adapters_of

PREFIX = "base_model.model."


def refusal(call: Callable[[], Any]) -> list[str] | None:
    """The lines of the error without its head; None if there was none."""
    try:
        call()
    except ValueError as error:
        return str(error).splitlines()[1:]
    return None


# ---- the same updates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_peft_gets_what_saving_gives_and_refuses_the_same(case: Case, scaling: str, tmp_path: Path) -> None:
    model = case.adapted(alpha=-3, dropout=0.25, scaling=scaling).eval()
    problems = refusal(lambda: save_adapter(model, tmp_path / "saved"))
    assert refusal(lambda: export_adapter(model, tmp_path / "exported")) == problems
    assert (tmp_path / "exported").exists() == (problems is None)
    if problems is None:
        loaded = load_adapter(case.model(), tmp_path / "exported").eval()
        x = case.input()
        assert (model(x) - case.model().eval()(x)).abs().max() > 1e-2, "the adapter is inert"
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-12, atol=1e-12)
        specs = [adapter.spec for _, adapter, _ in adapters_of(loaded)]
        assert [(spec.scale, spec.dropout) for spec in specs] == [(1.0, 0.0)]


class Grouped(nn.Module):
    """Convolutions of several group counts, whose rank in PEFT is that of all groups."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv1d(6, 6, 3, groups=2, padding=1)
        self.three = nn.Conv1d(6, 6, 1, groups=3)
        self.proj = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.three(self.two(x)).mT)


def test_the_one_rank_is_a_multiple_of_all_groups(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return Grouped().double()

    model = randomise(inject_lora(base(), ["two", "three", "proj"], r=2, alpha=3, rank_pattern={"proj": 7}))
    report = export_adapter(model, tmp_path)
    assert (report.r, report.options) == (12, "")  # 7 is the largest, and 12 the next multiple of 2 and 3
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "two.lora_A.weight": (12, 6, 3),
        "two.lora_B.weight": (6, 6, 1),
        "three.lora_A.weight": (12, 6, 1),
        "three.lora_B.weight": (6, 4, 1),
        "proj.lora_A.weight": (12, 6),
        "proj.lora_B.weight": (5, 12),
    }
    x = torch.randn(2, 6, 9, dtype=torch.float64)
    torch.testing.assert_close(load_adapter(base(), tmp_path)(x), model(x), rtol=1e-12, atol=1e-12)


# ---- dtypes ----------------------------------------------------------------------------------------------------------


def linear(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_narrow_dtype_rounds_after_the_scale(dtype: torch.dtype, variant: str, tmp_path: Path) -> None:
    model = randomise(inject_lora(linear(), ["0", "1"], r=3, alpha=5, variant=variant, rank_pattern={"1": 2}))
    export_adapter(model, tmp_path, dtype=dtype)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    for name, layer in adapted_weights(model):
        A, B = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
        r = len(A)
        assert torch.equal(tensors[f"{PREFIX}{name}.lora_A.weight"][:r], A.to(dtype))
        assert torch.equal(tensors[f"{PREFIX}{name}.lora_B.weight"][:, :r], (B * (5 / r)).to(dtype))
        for part, rest in (("A", slice(r, None)), ("B", (slice(None), slice(r, None)))):
            assert not tensors[f"{PREFIX}{name}.lora_{part}.weight"][rest].any()


@pytest.mark.parametrize("settings", [{"variant": "lora_fa"}, {"init": "pissa"}], ids=["lora_fa", "pissa"])
def test_how_an_adapter_was_trained_makes_no_difference(settings: dict[str, str], tmp_path: Path) -> None:
    model = randomise(inject_lora(linear(), ["0", "1"], r=2, **settings))
    export_adapter(model, tmp_path, for_="vllm")
    fresh = load_adapter(linear(), tmp_path)
    for (_, one), (_, other) in zip(adapted_weights(model), adapted_weights(fresh), strict=True):
        torch.testing.assert_close(one.effective_weight(one.lora_active), other.effective_weight(other.lora_active))


def test_half_precision_adapters_keep_their_bits_at_a_scale_of_two(tmp_path: Path) -> None:
    model = randomise(inject_lora(linear(torch.bfloat16), ["0"], r=2, alpha=4, dtype=torch.bfloat16))
    export_adapter(model, tmp_path / "wide")
    export_adapter(model, tmp_path / "narrow", dtype=torch.bfloat16)
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("wide", "narrow")]
    B = model[0].lora_B["default"].detach()
    for found, dtype in zip(tensors, (torch.float32, torch.bfloat16), strict=True):
        assert {tensor.dtype for tensor in found.values()} == {dtype}
        assert torch.equal(found[f"{PREFIX}0.lora_B.weight"], 2 * B.to(dtype))


def test_modules_trained_in_full_keep_their_dtype(tmp_path: Path) -> None:
    model = randomise(inject_lora(linear(), ["0"], r=2, alpha=3, train_also=["1"]))
    export_adapter(model, tmp_path, dtype=torch.float16)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(tensors[f"{PREFIX}1.weight"], model[1].weight)
    assert tensors[f"{PREFIX}0.lora_A.weight"].dtype == torch.float16


# ---- refusals --------------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """One of each that some reader does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attn = nn.MultiheadAttention(4, 2)
        self.conv = nn.Conv1d(4, 4, 1)
        self.proj = nn.Linear(4, 4)
        self.wide = nn.Linear(4, 4)
        self.norm = nn.Embedding(7, 4, max_norm=1.0)
        self.tied = nn.Linear(4, 7)
        self.tied.weight = self.embed.weight


NAMED = {"base_model": "base"}
BASE = "llama.cpp looks up the config of the base model; give its name or folder as base_model"
REFUSALS: dict[str, tuple[str, list[str], dict[str, Any], dict[str, Any], list[str]]] = {
    "vllm: layers": (
        "vllm", ["attn.q", "attn.v", "conv"], {}, {},
        ["'conv': vLLM takes adapters of Linear, TransposedLinear, Embedding, not of Conv1d",
         "'attn.in_proj_weight': vLLM takes adapters of Linear, TransposedLinear, Embedding, not of Parameter"],
    ),
    "vllm: dora and a head": (
        "vllm", ["proj"], {"variant": "dora", "train_also": ["wide"]}, {},
        ["vLLM has no dora, which layers of the adapter are",
         "train_also 'wide': vLLM takes no modules trained in full"],
    ),
    "vllm: rank": (
        "vllm", ["proj", "wide"], {"rank_pattern": {"wide": 513}}, {},
        ["its rank is 513, and vLLM takes 512 at most; see resize_adapter"],
    ),
    "llama.cpp: layers": (
        "llama.cpp", ["conv", "proj"], {}, NAMED,
        ["'conv': llama.cpp takes adapters of Linear, Embedding, not of Conv1d"],
    ),
    "llama.cpp: dora, no base": (
        "llama.cpp", ["proj"], {"variant": "dora"}, {},
        ["llama.cpp has no dora, which layers of the adapter are", BASE],
    ),
    "llama.cpp: head": (
        "llama.cpp", ["proj"], {"train_also": ["wide"]}, NAMED,
        ["train_also 'wide': llama.cpp takes no modules trained in full"],
    ),
    "llama.cpp: tied": (
        "llama.cpp", ["embed", "proj"], {}, NAMED,
        ["'embed': its weight is also 'tied.weight', and llama.cpp has one tensor for both"],
    ),
    "llama.cpp: tied rows": (
        "llama.cpp", ["tied.a"], {"fused": {"tied": {"a": 3, "b": 4}}}, NAMED,
        ["'tied.weight': its weight is also 'embed.weight', and llama.cpp has one tensor for both"],
    ),
    "what PEFT's format cannot express, too": (
        "vllm", ["norm", "conv"], {}, {},
        ["'conv': vLLM takes adapters of Linear, TransposedLinear, Embedding, not of Conv1d",
         "'norm': PEFT adds the update of an embedding after applying max_norm, this library before"],
    ),
}  # fmt: skip
"""For each: the reader, targets, options of `inject_lora`, options of the export, and the lines of the error."""

HEAD = "adapter 'default' was not exported for {}; merge_and_unload gives a plain model instead:"


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_reader_cannot_express_is_refused_at_once(name: str, tmp_path: Path) -> None:
    for_, targets, options, export, lines = REFUSALS[name]
    model = randomise(inject_lora(Parts(), targets, **{"r": 2, "alpha": 3, **options}))
    good = randomise(inject_lora(linear(), ["0"], r=2))
    export_adapter(good, tmp_path / "old")
    before = contents(tmp_path)
    for path in ("old", "new"):
        with pytest.raises(ValueError) as error:
            export_adapter(model, tmp_path / path, for_=for_, **export)
        called = {"vllm": "vLLM"}.get(for_, for_)
        assert str(error.value).splitlines() == [HEAD.format(called), *(f"  {line}" for line in lines)]
    assert contents(tmp_path) == before


def test_a_merged_weight_is_still_tied(tmp_path: Path) -> None:
    model = randomise(inject_lora(Parts(), ["embed"], r=2))
    with pytest.warns(UserWarning, match="is shared"):
        lora_plus.merge_lora(model)
    with pytest.raises(ValueError, match=re.escape("'embed': its weight is also 'tied.weight'")):
        export_adapter(model, tmp_path / "new", for_="llama.cpp", base_model="base")


def test_values_must_be_finite_before_and_after(tmp_path: Path) -> None:
    model = randomise(inject_lora(linear(), ["0", "1"], r=2, alpha=2000))
    with torch.no_grad():
        model[1].lora_B["default"][0, 0] = 70.0
    too_large = "'1.lora_B' has values that are not finite with its scale in B; choose a wider dtype"
    assert refusal(lambda: export_adapter(model, tmp_path / "a", dtype=torch.float16)) == [f"  {too_large}"]
    export_adapter(model, tmp_path / "wide", dtype=torch.bfloat16)
    with torch.no_grad():
        model[0].lora_A["default"][0, 0] = torch.nan
    problems = refusal(lambda: export_adapter(model, tmp_path / "a", dtype=torch.float16))
    assert problems == ["  '0.lora_A' has values that are not finite"]
    assert not (tmp_path / "a").exists()


def test_arguments_are_checked(tmp_path: Path) -> None:
    model = inject_lora(linear(), ["0"])
    with pytest.raises(ValueError) as error:
        export_adapter(model, tmp_path / "a", for_="gguf")
    assert str(error.value) == "unknown program 'gguf'; choose one of ['llama.cpp', 'peft', 'vllm']"
    with pytest.raises(ValueError, match=re.escape("dtype must be one of (torch.float32, ")):
        export_adapter(model, tmp_path / "a", dtype=torch.int8)
    with pytest.raises(KeyError, match="no adapter 'other'"):
        export_adapter(model, tmp_path / "a", adapter="other")
    assert not (tmp_path / "a").exists()


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_same_adapter_gives_the_same_bytes_and_the_model_stays(tmp_path: Path) -> None:
    model = randomise(inject_lora(linear(), ["0", "1"], r=2, alpha=3, rank_pattern={"1": 3}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("one", "two"):
        export_adapter(model, tmp_path / name, for_="llama.cpp", base_model="base")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_report_says_what_the_reader_needs(tmp_path: Path) -> None:
    for r, largest in ((1, 1), (2, 8), (8, 8), (9, 16), (300, 320), (512, 512)):
        model = inject_lora(nn.Sequential(nn.Linear(2, 2)), ["0"], r=r)
        report = export_adapter(model, tmp_path, for_="vllm")
        assert (report.r, report.options) == (r, f"--enable-lora --max-lora-rank {largest}")
    assert str(report) == "rank 512 and alpha 512 on all layers\nopen with --enable-lora --max-lora-rank 512"
    assert str(export_adapter(model, tmp_path)) == "rank 512 and alpha 512 on all layers"


# ---- in memory -------------------------------------------------------------------------------------------------------


def test_in_memory_it_is_what_saving_writes(case: Case, tmp_path: Path) -> None:
    model = case.adapted(alpha=-3, dropout=0.25)
    problems = refusal(lambda: save_adapter(model, tmp_path / "saved"))
    assert refusal(lambda: to_peft(model)) == problems
    if problems is None:
        config, tensors = to_peft(model)
        written = load_file(tmp_path / "saved" / "adapter_model.safetensors")
        assert json.loads(json.dumps(config)) == json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
        assert tensors.keys() == written.keys()
        assert all(torch.equal(tensors[name], written[name]) and not tensors[name].requires_grad for name in written)


@pytest.mark.parametrize("program", ["vllm", "llama.cpp"])
def test_in_memory_it_is_what_exporting_writes_for_a_program(program: Any, tmp_path: Path) -> None:
    model = nn.ModuleDict({"q": nn.Linear(6, 6), "v": nn.Linear(6, 6)})
    inject_lora(model, ["q", "v"], r=4, rank_pattern={"v": 2})
    randomise(model)
    export_adapter(model, tmp_path / "exported", for_=program, base_model="base", dtype=torch.bfloat16)
    config, tensors = to_peft(model, for_=program, base_model="base", dtype=torch.bfloat16)
    written = load_file(tmp_path / "exported" / "adapter_model.safetensors")
    assert config == json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert tensors.keys() == written.keys() and all(torch.equal(tensors[name], written[name]) for name in written)


def test_in_memory_the_tensors_are_the_adapters_own_and_what_is_wrong_is_told() -> None:
    model = nn.ModuleDict({"q": nn.Linear(6, 6)})
    inject_lora(model, ["q"], r=2, adapter="a")
    _, tensors = to_peft(model, "a")
    own = {
        tensor.data_ptr() for container in (model["q"].lora_A, model["q"].lora_B) for tensor in container.parameters()
    }
    assert {tensor.data_ptr() for tensor in tensors.values()} == own
    with torch.no_grad():
        model["q"].lora_B["a"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"adapter 'a' was not taken for PEFT:\n.*q.lora_B"):
        to_peft(model, "a")
    with pytest.raises(KeyError, match="no adapter 'default'"):
        to_peft(model)
    with pytest.raises(ValueError, match="dtype is for programs that get"):
        to_peft(model, "a", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="unknown program 'sglang'"):
        to_peft(model, "a", for_="sglang")  # type: ignore[arg-type]

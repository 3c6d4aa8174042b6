"""Saved adapters as files: what is written comes back, and the same adapter gives the same bytes."""

from __future__ import annotations

import copy
import json
import math
import struct
from pathlib import Path

import pytest
import torch
from cases import CASES, Case, randomise
from files_support import (
    PATHS,
    TOKENS,
    TRAINED,
    Net,
    Shared,
    adapted_net,
    assert_same_tensors,
    contents,
    finish,
    net,
    parts,
    refused,
    settings_of,
    start,
)
from torch import nn

import lora_plus
from lora_plus.files import adapter_state_dict
from lora_plus.model import adapter_names
from lora_plus.model.tree import adapted_weights

NOT_IN_PEFT = {
    "embedding-max-norm": "'layer': PEFT adds the update of an embedding after applying max_norm, this library before",
    "conv3d-groups-dora": (
        "'layer': PEFT's DoRA of a grouped convolution divides by the norm of another weight than W + s B A"
    ),
    **{
        case.name: f"'layer': PEFT has no adapter for {type(case.layer()).__name__}"
        for case in CASES
        if case.name.startswith("conv-transpose")
    },
}
"""Cases that PEFT's format cannot hold, with the reason that the writer gives."""


# ---- what is written comes back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", PATHS)
def test_round_trip_gives_back_every_bit(case: Case, dtype: torch.dtype, format: str, tmp_path: Path) -> None:
    saved, path = case.adapted(dtype, dropout=0.25), tmp_path / PATHS[format]
    if format == "peft" and case.name in NOT_IN_PEFT:
        with pytest.raises(ValueError) as error:
            lora_plus.save_adapter(saved, path)
        assert str(error.value) == f"the adapter cannot be written in PEFT's format:\n  {NOT_IN_PEFT[case.name]}"
        assert contents(tmp_path) == {}
        return
    lora_plus.save_adapter(saved, path)
    model = case.model(dtype)
    loaded = lora_plus.load_adapter(model, path)
    assert loaded is model
    assert_same_tensors(adapter_state_dict(loaded), adapter_state_dict(saved))
    given, wanted = settings_of(loaded)["layer"], settings_of(saved)["layer"]
    if format == "native":
        assert given == wanted
    else:  # a grouped convolution has another rank, and so another alpha, in PEFT's file, and LoRA-FA is LoRA there
        same = {name: pytest.approx(wanted[name]) for name in ("alpha", "scale")}
        assert given == {**wanted, **same, "variant": wanted["variant"].removesuffix("_fa")}
    x = case.input(dtype)
    exact = format == "native" or "groups" not in case.name
    tolerance = 0 if exact else 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(loaded.eval()(x), saved.eval()(x), rtol=tolerance, atol=tolerance)


def test_every_refusal_of_the_peft_writer_is_a_case() -> None:
    assert set(NOT_IN_PEFT) <= {case.name for case in CASES}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("format", PATHS)
def test_a_whole_model_comes_back_with_its_head_and_buffers(format: str, trainable: bool, tmp_path: Path) -> None:
    saved, path = adapted_net(), tmp_path / PATHS[format]
    lora_plus.save_adapter(saved, path)
    loaded = lora_plus.load_adapter(net(), path, adapter="other", trainable=trainable)
    assert adapter_names(loaded) == ["other"]
    state = adapter_state_dict(loaded, adapter="other")
    assert {"head.1.running_var", "head.1.num_batches_tracked", "proj.lora_B"} <= set(state)
    assert_same_tensors(state, adapter_state_dict(saved))
    assert {path: spec["r"] for path, spec in settings_of(loaded, "other").items()} == {
        "embed": 2,
        "conv": 2,
        "proj": 3,
    }
    torch.testing.assert_close(loaded(TOKENS), saved(TOKENS), rtol=1e-6, atol=1e-6)
    own = {f"{layer}.{part}.other" for layer in TRAINED for part in ("lora_A", "lora_B")}
    own |= {f"head.{part}" for part in ("0.weight", "0.bias", "1.weight", "1.bias")}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == (own if trainable else set())
    plain, base = lora_plus.remove_lora(loaded), net()
    assert_same_tensors(dict(plain.state_dict()), dict(base.state_dict()))
    assert {name: p.requires_grad for name, p in plain.named_parameters()} == dict.fromkeys(
        dict(base.named_parameters()), True
    )


@pytest.mark.parametrize("format", PATHS)
def test_two_adapters_of_one_model_are_two_files(format: str, tmp_path: Path) -> None:
    model = adapted_net(train_also=())
    lora_plus.inject_lora(model, ["proj"], r=1, alpha=-2.5, adapter="second")
    randomise(model, 3)
    for name in ("default", "second"):
        lora_plus.save_adapter(model, tmp_path / name / PATHS[format], adapter=name)
    both = net()
    for name in ("default", "second"):
        lora_plus.load_adapter(both, tmp_path / name / PATHS[format], adapter=name)
        assert_same_tensors(adapter_state_dict(both, adapter=name), adapter_state_dict(model, adapter=name))
    lora_plus.set_adapter(model, ["default", "second"])
    lora_plus.set_adapter(both, ["default", "second"])
    torch.testing.assert_close(both(TOKENS), model(TOKENS), rtol=1e-6, atol=1e-6)


def test_the_model_itself_as_the_adapted_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    saved = randomise(lora_plus.inject_lora(copy.deepcopy(base), [""], r=2))
    lora_plus.save_adapter(saved, tmp_path / "root.safetensors")
    loaded = lora_plus.load_adapter(base, tmp_path / "root.safetensors")
    assert list(adapter_state_dict(loaded)) == ["lora_A", "lora_B"]
    assert_same_tensors(adapter_state_dict(loaded), adapter_state_dict(saved))
    with pytest.raises(ValueError, match="the model itself is adapted, and PEFT names only modules inside a model"):
        lora_plus.save_adapter(saved, tmp_path / "root")


@pytest.mark.parametrize("format", PATHS)
def test_a_shared_layer_is_one_adapter_under_any_of_its_names(format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Shared("encoder", "decoder")
    saved, path = randomise(lora_plus.inject_lora(copy.deepcopy(base), ["decoder"], r=2)), tmp_path / PATHS[format]
    lora_plus.save_adapter(saved, path)
    x = torch.randn(3, 4)
    turned = Shared("decoder", "encoder")  # the same names, the other one first
    turned.load_state_dict(base.state_dict())
    wanted = saved(x)
    for model in (base, turned):
        torch.testing.assert_close(lora_plus.load_adapter(model, path)(x), wanted)
        assert len(list(adapted_weights(model))) == 1


@pytest.mark.parametrize("format", PATHS)
def test_a_merged_model_is_saved_as_the_unmerged_one(format: str, tmp_path: Path) -> None:
    model = adapted_net()
    lora_plus.save_adapter(model, tmp_path / "unmerged" / PATHS[format])
    with lora_plus.merged(model):
        lora_plus.save_adapter(model, tmp_path / "merged" / PATHS[format])
        with pytest.raises(ValueError, match="the model is merged"):
            lora_plus.load_adapter(model, tmp_path / "unmerged" / PATHS[format], adapter="other")
    assert contents(tmp_path / "merged") == contents(tmp_path / "unmerged")


def test_an_overlapping_train_also_is_saved_once_and_loads(tmp_path: Path) -> None:
    saved, path = adapted_net(train_also=["head", "head.0"]), tmp_path / "a.safetensors"
    lora_plus.save_adapter(saved, path)
    loaded = lora_plus.load_adapter(net(), path)
    torch.testing.assert_close(loaded(TOKENS), saved(TOKENS), rtol=0, atol=0)


@pytest.mark.parametrize("format", PATHS)
def test_a_base_without_values_gets_real_adapters(format: str, tmp_path: Path) -> None:
    saved, path = adapted_net(train_also=(), variant="dora" if format == "native" else "lora"), tmp_path / PATHS[format]
    lora_plus.save_adapter(saved, path)
    with torch.device("meta"):
        model = Net().eval()
    lora_plus.load_adapter(model, path)
    assert not any(tensor.is_meta for tensor in adapter_state_dict(model).values())
    model.to_empty(device="cpu")
    missing, unexpected = model.load_state_dict(net().state_dict(), strict=False)
    assert unexpected == []
    assert all(".lora_" in name for name in missing)
    assert_same_tensors(adapter_state_dict(model), adapter_state_dict(saved))
    torch.testing.assert_close(model(TOKENS), saved(TOKENS), rtol=1e-6, atol=1e-6)


def test_a_head_cannot_be_loaded_into_a_base_without_values(tmp_path: Path) -> None:
    lora_plus.save_adapter(adapted_net(), tmp_path / "a.safetensors")
    with torch.device("meta"):
        model = Net().eval()
    lines = refused(model, tmp_path / "a.safetensors")
    reason = "the model has no values for it yet (it is on the meta device); load the base model first"
    assert lines == [f"'head.{name}': {reason}" for name in sorted(model.head.state_dict())]


def test_a_half_precision_head_takes_the_file_s_values_rounded(tmp_path: Path) -> None:
    saved, path = adapted_net(), tmp_path / "a.safetensors"
    lora_plus.save_adapter(saved, path)
    loaded = lora_plus.load_adapter(net().to(torch.bfloat16), path)
    assert torch.equal(loaded.head[0].weight, saved.head[0].weight.to(torch.bfloat16))
    assert torch.equal(loaded.proj.lora_B["default"], saved.proj.lora_B["default"])


def test_user_metadata_is_kept(tmp_path: Path) -> None:
    model = adapted_net()
    lora_plus.save_adapter(model, tmp_path / "a.safetensors", metadata={"b": "ü", "a": "1"})
    assert parts(tmp_path / "a.safetensors").document["metadata"] == {"a": "1", "b": "ü"}
    lora_plus.save_adapter(model, tmp_path / "peft", metadata={"task_type": "CAUSAL_LM", "revision": "main"})
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["task_type"], config["revision"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "main", None)
    with pytest.raises(ValueError, match="metadata 'epoch': PEFT's format has no room for texts but base_model"):
        lora_plus.save_adapter(model, tmp_path / "other", metadata={"epoch": "3"})
    with pytest.raises(TypeError, match="metadata must map str to str, got 'epoch': 3"):
        lora_plus.save_adapter(model, tmp_path / "c.safetensors", metadata={"epoch": 3})  # type: ignore[dict-item]
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "c.safetensors").exists()


def test_the_format_can_be_named_and_must_be_known(tmp_path: Path) -> None:
    model = adapted_net()
    lora_plus.save_adapter(model, tmp_path / "deep" / "er" / "file.lora", format="native")
    lora_plus.save_adapter(model, tmp_path / "folder.safetensors", format="peft")
    for name in ("deep/er/file.lora", "folder.safetensors"):
        torch.testing.assert_close(lora_plus.load_adapter(net(), tmp_path / name)(TOKENS), model(TOKENS))
    with pytest.raises(ValueError) as error:
        lora_plus.save_adapter(model, tmp_path / "x", format="pickle")
    known = "['diffusers', 'kohya', 'native', 'peft']"
    assert str(error.value) == f"unknown format 'pickle'; choose one of {known}, or None to go by the path"
    with pytest.raises(KeyError, match="the model has no adapter 'nope': it has 'default'"):
        lora_plus.save_adapter(model, tmp_path / "x", adapter="nope")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("format", PATHS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_saved(format: str, value: float, tmp_path: Path) -> None:
    model, path = adapted_net(), tmp_path / PATHS[format]
    lora_plus.save_adapter(model, path)
    before = contents(tmp_path)
    with torch.no_grad():
        model.proj.lora_A["default"][1, 1] = value
        model.head[0].bias[0] = value
    with pytest.raises(ValueError) as error:
        lora_plus.save_adapter(model, path)
    assert str(error.value) == (
        "adapter 'default' was not saved:\n"
        "  'proj.lora_A' has values that are not finite\n"
        "  'head.0.bias' has values that are not finite"
    )
    assert contents(tmp_path) == before


def test_a_buffer_may_hold_infinities(tmp_path: Path) -> None:
    def masked() -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
        model["head"].register_buffer("mask", torch.zeros(3, 3))
        return model

    saved = randomise(lora_plus.inject_lora(masked(), ["layer"], r=1, train_also=["head"]))
    saved["head"].mask.fill_(-math.inf)
    lora_plus.save_adapter(saved, tmp_path / "a.safetensors")
    loaded = lora_plus.load_adapter(masked(), tmp_path / "a.safetensors")
    assert torch.equal(loaded["head"].mask, saved["head"].mask)


# ---- the bytes -------------------------------------------------------------------------------------------------------

GOLDEN_DOCUMENT = (
    '{"format_version":1,"library_version":"VERSION","r":1,"alpha":2,"scaling":"standard","variant":"lora","dropout":0.0,'
    '"layers":{"a":{"kind":"Linear","layout":"o i -> o i","shape":[1,2]},'
    '"b":{"kind":"Embedding","layout":"n d -> d n","shape":[3,1],"max_norm":2.0,"alpha":0.5}},'
    '"train_also":{"head":["bias"]},"metadata":{"note":"x"}}'
)


class Bias(nn.Module):
    """The smallest module to train."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def golden_model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {"b": nn.Embedding(3, 1, max_norm=2.0), "a": nn.Linear(2, 1, bias=False), "head": Bias()}
    )  # fmt: skip


def golden_bytes() -> bytes:
    document = GOLDEN_DOCUMENT.replace("VERSION", lora_plus.__version__)
    header = (
        '{"__metadata__":{"lora_plus":DOCUMENT},'
        '"head.bias":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},'
        '"a.lora_A":{"dtype":"F32","shape":[1,2],"data_offsets":[8,16]},'
        '"a.lora_B":{"dtype":"F32","shape":[1,1],"data_offsets":[16,20]},'
        '"b.lora_A":{"dtype":"F32","shape":[1,3],"data_offsets":[20,32]},'
        '"b.lora_B":{"dtype":"F32","shape":[1,1],"data_offsets":[32,36]}}'
    )
    text = header.replace("DOCUMENT", json.dumps(document)).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + struct.pack("<d7f", -1.5, 1, 2, 3, 4, 5, 6, -7)


def test_golden_file_read_and_written_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    path.write_bytes(golden_bytes())
    model = lora_plus.load_adapter(golden_model(), path)
    state = {name: tensor.tolist() for name, tensor in adapter_state_dict(model).items()}
    assert state == {
        "a.lora_A": [[1, 2]],
        "a.lora_B": [[3]],
        "b.lora_A": [[4, 5, 6]],
        "b.lora_B": [[-7]],
        "head.bias": [-1.5],
    }
    assert {name: spec["alpha"] for name, spec in settings_of(model).items()} == {"a": 2, "b": 0.5}
    lora_plus.save_adapter(model, tmp_path / "again.safetensors", metadata={"note": "x"})
    assert (tmp_path / "again.safetensors").read_bytes() == golden_bytes()


@pytest.mark.parametrize("format", PATHS)
def test_the_same_adapter_gives_the_same_bytes(format: str, tmp_path: Path) -> None:
    model = adapted_net()
    for name in ("one", "two"):
        lora_plus.save_adapter(model, tmp_path / name / PATHS[format])
    lora_plus.save_adapter(
        lora_plus.load_adapter(net(), tmp_path / "one" / PATHS[format]), tmp_path / "three" / PATHS[format]
    )
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


SAVE_BOTH = """
import sys, torch, lora_plus
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)), nn.BatchNorm1d(3))
targets = {str(i) for i in range(11)}
lora_plus.inject_lora(model, sorted(targets), rank_pattern={"3": 2, "5": 4}, alpha_pattern={"2": 3}, r=1,
                      train_also=["11", "12"])
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter)
wanted = lora_plus.files.adapter_state_dict(model)
for path in ("adapter.safetensors", "adapter"):
    lora_plus.save_adapter(model, sys.argv[1] + "/" + path, metadata={"task_type": "T", "revision": "r"})
    plain = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)), nn.BatchNorm1d(3))
    loaded = lora_plus.files.adapter_state_dict(lora_plus.load_adapter(plain, sys.argv[1] + "/" + path))
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[key], wanted[key]) for key in wanted)
"""
WITHOUT_NUMPY = """
import sys, warnings
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "numpy":
            raise ModuleNotFoundError("No module named 'numpy'", name=name)
sys.meta_path.insert(0, Block())
warnings.simplefilter("ignore")
"""


@pytest.mark.slow
def test_the_bytes_depend_on_no_hash_seed_and_need_no_numpy(tmp_path: Path) -> None:
    runs = {"1": SAVE_BOTH, "2": SAVE_BOTH, "3": WITHOUT_NUMPY + SAVE_BOTH}
    for seed in runs:
        (tmp_path / seed).mkdir()
    processes = [start(script, str(tmp_path / seed), PYTHONHASHSEED=seed) for seed, script in runs.items()]
    for process in processes:
        finish(process)
    first, *others = (contents(tmp_path / seed) for seed in runs)
    assert set(first) == {"adapter.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.ckpt"])
def test_a_path_named_as_a_pickle_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^'a\.\w+' is the name of a pickle, which is not written; end it in"):
        lora_plus.save_adapter(adapted_net(), tmp_path / name)
    assert contents(tmp_path) == {}

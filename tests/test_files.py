"""Saved adapters as files: what is written comes back, whole or not at all, and what is wrong is refused untouched."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES, Case, randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_plus
from lora_plus import io
from lora_plus.lora_layer import lora_layers

PATHS = {"native": "adapter.safetensors", "peft": "adapter"}
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.int32: "I32", torch.int64: "I64"}

NOT_IN_PEFT = {
    "embedding-max-norm": "'layer': PEFT adds the update of an embedding after applying max_norm, this library before",
    "conv3d-groups-dora": "'layer': PEFT has no DoRA for grouped convolutions",
}
"""Cases that PEFT's format cannot hold, with the reason that the writer gives."""


class Net(nn.Module):
    """Every kind of layer with a fact of its own, and a head with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 6, 3, groups=2, padding=1)
        self.proj = nn.Linear(6, 5)
        self.head = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.conv(self.embed(tokens).transpose(1, 2)).mean(2)
        return self.head(self.proj(h))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


TOKENS = torch.arange(18).reshape(2, 9) % 9
TRAINED = ["embed", "conv", "proj"]


def adapted_net(seed: int = 7, **changes: Any) -> Net:
    """The net with an adapter on each layer, and a head whose parameters and buffers have moved."""
    options: dict[str, Any] = {"r": 2, "alpha": 3, "rank_pattern": {"proj": 3}, "train_also": ["head"], **changes}
    model = lora_plus.inject_lora(net(), TRAINED, **options)
    assert isinstance(model, Net)
    randomise(model, seed)
    if not options["train_also"]:
        return model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.head.state_dict(keep_vars=True).values():
            tensor += 3 if tensor.dtype == torch.int64 else torch.rand(tensor.shape, generator=generator)
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that loading may change: values, identities, classes, flags, hooks, and what the model prints."""
    return {
        "modules": [(name, type(module), id(module)) for name, module in model.named_modules()],
        "tensors": {
            name: (id(tensor), tensor.requires_grad, tensor.dtype, tensor.device, _bits(tensor))
            for name, tensor in model.state_dict(keep_vars=True).items()
        },
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "hooks": [list(module._forward_pre_hooks) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "repr": repr(model),
    }


def _bits(tensor: Tensor) -> bytes:
    return b"" if tensor.is_meta else bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


def settings_of(model: nn.Module, adapter: str = "default") -> dict[str, dict[str, Any]]:
    fields = ("r", "alpha", "scaling", "variant", "dropout", "scale")
    return {
        path: {name: getattr(layer.lora_specs[adapter], name) for name in fields}
        for path, layer in lora_layers(model)
        if adapter in layer.lora_specs
    }


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    assert_same_tensors(lora_plus.adapter_state_dict(loaded), lora_plus.adapter_state_dict(saved))
    given, wanted = settings_of(loaded)["layer"], settings_of(saved)["layer"]
    if format == "native":
        assert given == wanted
    else:  # a grouped convolution has another rank, and so another alpha, in PEFT's file
        assert given == {**wanted, "alpha": pytest.approx(wanted["alpha"]), "scale": pytest.approx(wanted["scale"])}
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
    assert lora_plus.adapter_names(loaded) == ["other"]
    state = lora_plus.adapter_state_dict(loaded, adapter="other")
    assert {"head.1.running_var", "head.1.num_batches_tracked", "proj.lora_B"} <= set(state)
    assert_same_tensors(state, lora_plus.adapter_state_dict(saved))
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
        assert_same_tensors(
            lora_plus.adapter_state_dict(both, adapter=name), lora_plus.adapter_state_dict(model, adapter=name)
        )
    lora_plus.set_adapter(model, ["default", "second"])
    lora_plus.set_adapter(both, ["default", "second"])
    torch.testing.assert_close(both(TOKENS), model(TOKENS), rtol=1e-6, atol=1e-6)


def test_the_model_itself_as_the_adapted_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    saved = randomise(lora_plus.inject_lora(copy.deepcopy(base), [""], r=2))
    lora_plus.save_adapter(saved, tmp_path / "root.safetensors")
    loaded = lora_plus.load_adapter(base, tmp_path / "root.safetensors")
    assert list(lora_plus.adapter_state_dict(loaded)) == ["lora_A", "lora_B"]
    assert_same_tensors(lora_plus.adapter_state_dict(loaded), lora_plus.adapter_state_dict(saved))
    with pytest.raises(ValueError, match="the model itself is adapted, and PEFT names only modules inside a model"):
        lora_plus.save_adapter(saved, tmp_path / "root")


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        layer = nn.Linear(4, 4)
        setattr(self, first, layer)
        setattr(self, second, layer)
        self.names = (first, second)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


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
        assert len(list(lora_layers(model))) == 1


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
    assert not any(tensor.is_meta for tensor in lora_plus.adapter_state_dict(model).values())
    model.to_empty(device="cpu")
    missing, unexpected = model.load_state_dict(net().state_dict(), strict=False)
    assert unexpected == []
    assert all(".lora_" in name for name in missing)
    assert_same_tensors(lora_plus.adapter_state_dict(model), lora_plus.adapter_state_dict(saved))
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
    with pytest.raises(ValueError, match="metadata 'epoch': PEFT's config has no such field"):
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
    assert str(error.value) == "unknown format 'pickle'; choose one of ['native', 'peft'], or None to go by the path"
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
    state = {name: tensor.tolist() for name, tensor in lora_plus.adapter_state_dict(model).items()}
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
wanted = lora_plus.adapter_state_dict(model)
for path in ("adapter.safetensors", "adapter"):
    lora_plus.save_adapter(model, sys.argv[1] + "/" + path, metadata={"task_type": "T", "revision": "r"})
    plain = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)), nn.BatchNorm1d(3))
    loaded = lora_plus.adapter_state_dict(lora_plus.load_adapter(plain, sys.argv[1] + "/" + path))
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


def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", script, *arguments]
    root = Path(lora_plus.__file__).parents[1]
    return subprocess.Popen(command, env=variables, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


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


# ---- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o027])
@pytest.mark.parametrize("format", PATHS)
def test_files_have_the_permissions_of_any_new_file(format: str, umask: int, tmp_path: Path) -> None:
    model, before = adapted_net(), os.umask(umask)
    try:
        for _ in range(2):
            lora_plus.save_adapter(model, tmp_path / PATHS[format])
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_saving_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    target, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    lora_plus.save_adapter(adapted_net(1), target)
    link.symlink_to(target)
    model = adapted_net(2)
    lora_plus.save_adapter(model, link)
    assert link.is_symlink()
    assert_same_tensors(
        lora_plus.adapter_state_dict(lora_plus.load_adapter(net(), target)), lora_plus.adapter_state_dict(model)
    )


class Interrupted(Exception):
    """What the tests raise in the middle of a save."""


def fail(*args: object, **kwargs: object) -> None:
    raise Interrupted


def half_written(tensors: object, path: str, metadata: object) -> None:
    Path(path).write_bytes(b"half a file")
    raise Interrupted


INTERRUPTIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "while writing tensors": lambda patch: patch.setattr(io, "serialize_file", half_written),
    "before the disk has it": lambda patch: patch.setattr(os, "fsync", fail),
    "at the renaming": lambda patch: patch.setattr(os, "replace", fail),
    "while writing texts": lambda patch: patch.setattr(Path, "write_text", fail),
}


@pytest.mark.parametrize("alpha", [3, 4])
@pytest.mark.parametrize("moment", INTERRUPTIONS)
@pytest.mark.parametrize("format", PATHS)
def test_an_interrupted_save_leaves_the_old_files_and_nothing_else(
    format: str, moment: str, alpha: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if format == "native" and moment == "while writing texts":
        pytest.skip("the native format is one file of tensors")
    path = tmp_path / PATHS[format]
    lora_plus.save_adapter(adapted_net(1), path)
    before = contents(tmp_path)
    other = adapted_net(2, alpha=alpha)
    INTERRUPTIONS[moment](monkeypatch)
    with pytest.raises(Interrupted):
        lora_plus.save_adapter(other, path)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    lora_plus.save_adapter(other, path)
    assert contents(tmp_path) != before
    assert len(contents(tmp_path)) == len(before)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_peft_folder_never_mixes_old_and_new(renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after any number of renames: the old adapter, the new one, or a folder that is refused."""
    old, new, path = adapted_net(1, alpha=3), adapted_net(2, alpha=4), tmp_path / "adapter"
    lora_plus.save_adapter(old, path)
    before = contents(path)
    left, rename = renames, os.replace

    def replace(source: Any, target: Any) -> None:
        nonlocal left
        if left == 0 and not (tmp_path / "killed").exists():
            shutil.copytree(path, tmp_path / "killed")
            raise Interrupted
        left -= 1  # the renames after that one put things back
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Interrupted):
        lora_plus.save_adapter(new, path)
    monkeypatch.undo()
    if (
        renames < 2
    ):  # no new file was in its place yet, and an error, unlike a kill, leaves time to put the old one back
        assert contents(path) == before
    for folder in (path, tmp_path / "killed"):
        model = net()
        try:
            lora_plus.load_adapter(model, folder)
        except ValueError as error:
            assert "the folder has no adapter_config.json" in str(error)
        else:
            wanted = old if settings_of(model)["proj"]["alpha"] == 3 else new
            torch.testing.assert_close(model(TOKENS), wanted(TOKENS))


@pytest.mark.parametrize("format", PATHS)
def test_a_folder_that_cannot_be_written_is_an_error_and_changes_nothing(format: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(OSError, match="file"):
        lora_plus.save_adapter(adapted_net(), tmp_path / "file" / PATHS[format])
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("format", PATHS)
def test_a_read_only_folder_is_an_error_and_keeps_the_old_file(format: str, tmp_path: Path) -> None:
    path = tmp_path / PATHS[format]
    lora_plus.save_adapter(adapted_net(1), path)
    before, folder = contents(tmp_path), tmp_path if format == "native" else path
    folder.chmod(0o500)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write anywhere")
        with pytest.raises(PermissionError):
            lora_plus.save_adapter(adapted_net(2), path)
    finally:
        folder.chmod(0o700)
    assert contents(tmp_path) == before


DISK_FULL = """
import resource, signal, sys, torch, lora_plus
from torch import nn
def save(seed, size):
    torch.manual_seed(seed)
    model = lora_plus.inject_lora(nn.Sequential(nn.Linear(size, size)), ["0"], r=4)
    torch.nn.init.normal_(model[0].lora_B["default"])
    for path in ("adapter.safetensors", "adapter"):
        try:
            lora_plus.save_adapter(model, sys.argv[1] + "/" + path)
        except Exception as error:
            print(path, type(error).__name__, error)
save(0, 64)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import pathlib
kept = {p: p.read_bytes() for p in pathlib.Path(sys.argv[1]).rglob("*") if p.is_file()}
save(1, 64)
assert kept == {p: p.read_bytes() for p in pathlib.Path(sys.argv[1]).rglob("*") if p.is_file()}
"""


@pytest.mark.skipif(os.name != "posix", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_is_an_error_and_keeps_the_old_files(tmp_path: Path) -> None:
    errors = finish(start(DISK_FULL, str(tmp_path))).splitlines()
    assert [line.split()[0] for line in errors] == ["adapter.safetensors", "adapter"]
    assert all("File too large" in line for line in errors)


SAVE_FOREVER = """
import itertools, sys, torch, lora_plus
from torch import nn
model = lora_plus.inject_lora(nn.Sequential(nn.Linear(512, 512)), ["0"], r=64)
for step in itertools.count(1):
    for parameter in (model[0].lora_A["default"], model[0].lora_B["default"]):
        nn.init.constant_(parameter, step)
    for path in ("adapter.safetensors", "adapter"):
        lora_plus.save_adapter(model, sys.argv[1] + "/" + path)
    if step == 1:
        print("ready", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
def test_a_killed_save_leaves_files_that_load(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        process = start(SAVE_FOREVER, str(tmp_path))
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(float(torch.rand((), generator=generator)) / 2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path in ("adapter.safetensors", "adapter"):
            model = lora_plus.load_adapter(nn.Sequential(nn.Linear(512, 512)), tmp_path / path)
            values = {
                float(value) for tensor in lora_plus.adapter_state_dict(model).values() for value in tensor.unique()
            }
            assert len(values) == 1
            assert values.pop() >= 1


# ---- what is wrong is refused, and the model is untouched ------------------------------------------------------------


@dataclass
class Parts:
    """A file taken apart, to be changed and put together by means other than the library's."""

    tensors: dict[str, tuple[str, list[int], bytes]]
    document: Any
    others: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, tensor: Tensor) -> None:
        data = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
        self.tensors[name] = (DTYPES[tensor.dtype], list(tensor.shape), data)

    def bytes(self) -> bytes:
        text = self.document if isinstance(self.document, str) else json.dumps(self.document)
        return assemble(self.tensors, {**self.others, "lora_plus": text})


def assemble(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parts(path: Path) -> Parts:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__")
    tensors = {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in header.items()
    }
    document = json.loads(metadata.pop("lora_plus")) if "lora_plus" in metadata else None
    return Parts(tensors, document, metadata)


def refused(model: nn.Module, path: Path) -> list[str]:
    """The problems that loading reports, after checking that it left the model bit for bit as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        lora_plus.load_adapter(model, path)
    assert snapshot(model) == before
    head, *lines = str(error.value).split("\n")
    assert head == f"adapter {str(path)!r} cannot be loaded; the model is unchanged:"
    return [line.removeprefix("  ") for line in lines]


@pytest.fixture(scope="module")
def native_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("native") / "adapter.safetensors"
    lora_plus.save_adapter(adapted_net(), path)
    return path.read_bytes()


@pytest.fixture
def native_parts(native_bytes: bytes, tmp_path: Path) -> Parts:
    path = tmp_path / "original.safetensors"
    path.write_bytes(native_bytes)
    return parts(path)


Edit = Callable[[Parts], object]


def put(name: str, tensor: Tensor) -> Edit:
    return lambda file: file.put(name, tensor)


def drop(name: str) -> Edit:
    return lambda file: file.tensors.pop(name)


def rename(old: str, new: str) -> Edit:
    return lambda file: file.tensors.update({new: file.tensors.pop(old)})


def write(*keys_and_value: Any) -> Edit:
    """Set an entry of the document: the keys that lead to it, and its value."""
    *keys, last, value = keys_and_value

    def edit(file: Parts) -> None:
        entry = file.document
        for key in keys:
            entry = entry[key]
        entry[last] = value

    return edit


def erase(*keys: Any) -> Edit:
    def edit(file: Parts) -> None:
        entry = file.document
        for key in keys[:-1]:
            entry = entry[key]
        del entry[keys[-1]]

    return edit


def replace_document(value: Any) -> Edit:
    return lambda file: setattr(file, "document", value)


def both(*edits: Edit) -> Edit:
    return lambda file: [edit(file) for edit in edits]


def shifted(old: str, new: str) -> Edit:
    """Rename a layer, its tensors and all."""

    def edit(file: Parts) -> None:
        file.document["layers"][new] = file.document["layers"].pop(old)
        for part in ("lora_A", "lora_B"):
            file.tensors[f"{new}.{part}"] = file.tensors.pop(f"{old}.{part}")

    return edit


FLOATS = "(torch.float32, torch.float16, torch.bfloat16, torch.float64)"
CORRUPTIONS: dict[str, tuple[Edit, list[str]]] = {
    "unknown tensor": (
        put("proj.lora_C", torch.ones(2)), ["tensor 'proj.lora_C' belongs to no layer that the file describes"]
    ),
    "base weight": (
        put("proj.weight", torch.ones(5, 6)), ["tensor 'proj.weight' belongs to no layer that the file describes"]
    ),
    "base weight as trained": (
        both(put("proj.weight", torch.ones(5, 6)), put("proj.bias", torch.ones(5)),
             write("train_also", "proj", ["weight", "bias"])),
        ["'proj' is trained in full, but 'proj' in it has an adapter"],
    ),
    "whole model as trained": (
        write("train_also", "", []), ["'' is trained in full, but 'embed' in it has an adapter"]
    ),
    "missing tensor": (drop("proj.lora_B"), ["tensor 'proj.lora_B' is missing"]),
    "missing head tensor": (drop("head.0.bias"), ["tensor 'head.0.bias' is missing"]),
    "head tensor not listed": (
        write("train_also", "head", ["0.bias"]),
        [f"tensor 'head.{name}' belongs to no layer that the file describes" for name in
         ("0.weight", "1.bias", "1.num_batches_tracked", "1.running_mean", "1.running_var", "1.weight")]
        + [f"'head.{name}' is missing" for name in
           ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked")],
    ),
    "head tensor twice": (
        write("train_also", "head", ["0.bias", "0.bias"]),
        ["train_also 'head': expected a list of different tensor names, got ['0.bias', '0.bias']"],
    ),
    "head unknown": (
        both(write("train_also", "haed", ["w"]), put("haed.w", torch.ones(1))),
        ["'haed': the model has no such module (did you mean 'head'?)"],
    ),
    "head tensor unknown": (
        both(lambda file: file.document["train_also"]["head"].append("2.w"), put("head.2.w", torch.ones(1))),
        ["'head.2.w': 'head' has no such tensor"],
    ),
    "head shape": (put("head.0.bias", torch.ones(6)), ["'head.0.bias': shape (6,) in the file, (5,) in the model"]),
    "head dtype": (
        put("head.0.bias", torch.ones(5, dtype=torch.int32)),
        ["'head.0.bias': torch.int32 in the file, torch.float32 in the model"],
    ),
    "counter dtype": (
        put("head.1.num_batches_tracked", torch.tensor(1.5)),
        ["'head.1.num_batches_tracked': torch.float32 in the file, torch.int64 in the model"],
    ),
    "head not finite": (put("head.0.bias", torch.full((5,), math.nan)), ["'head.0.bias': values that are not finite"]),
    "wrong shape of A": (put("proj.lora_A", torch.ones(3, 7)), ["'proj': lora_A has shape (3, 7), expected (3, 6)"]),
    "wrong shape of B": (put("proj.lora_B", torch.ones(3, 5)), ["'proj': lora_B has shape (3, 5), expected (5, 3)"]),
    "one dimension": (put("proj.lora_B", torch.ones(15)), ["'proj': lora_B has shape (15,), expected (5, 3)"]),
    "wrong rank": (
        write("layers", "proj", "r", 4),
        ["'proj': lora_A has shape (3, 6), expected (4, 6)", "'proj': lora_B has shape (5, 3), expected (5, 4)"],
    ),
    "integers": (
        put("proj.lora_A", torch.ones(3, 6, dtype=torch.int32)),
        [f"'proj.lora_A' is torch.int32, expected one of {FLOATS}"],
    ),
    "float8": (
        lambda file: file.tensors.update({"proj.lora_A": ("F8_E4M3", [3, 6], bytes(18))}),
        [f"'proj.lora_A' is torch.float8_e4m3fn, expected one of {FLOATS}"],
    ),
    "float8 head": (
        lambda file: file.tensors.update({"head.0.bias": ("F8_E4M3", [5], bytes(5))}),
        ["'head.0.bias': torch.float8_e4m3fn in the file, torch.float32 in the model"],
    ),
    "NaN": (put("proj.lora_A", torch.full((3, 6), math.nan)), ["'proj.lora_A' has values that are not finite"]),
    "infinity": (put("proj.lora_B", torch.full((5, 3), -math.inf)), ["'proj.lora_B' has values that are not finite"]),
    "unknown layer": (shifted("proj", "porj"), ["'porj': the model has no such module (did you mean 'proj'?)"]),
    "layer of a kind without adapters": (shifted("proj", "head.1"), [
        "'head.1' cannot be adapted: it is BatchNorm1d", "'head' is trained in full, but 'head.1' in it has an adapter",
    ]),
    "wrong kind": (
        write("layers", "proj", "kind", "Embedding"), ["'proj': kind 'Embedding' in the file, 'Linear' in the model"]
    ),
    "wrong layout": (
        write("layers", "proj", "layout", "i o -> o i"),
        ["'proj': layout 'i o -> o i' in the file, 'o i -> o i' in the model"],
    ),
    "wrong base shape": (
        write("layers", "proj", "shape", [6, 5]), ["'proj': shape (6, 5) in the file, (5, 6) in the model"]
    ),
    "wrong groups": (
        write("layers", "conv", "groups", 4), ["'conv': facts {'groups': 4} in the file, {'groups': 2} in the model"]
    ),
    "no groups": (erase("layers", "conv", "groups"), ["'conv': facts {} in the file, {'groups': 2} in the model"]),
    "max_norm": (
        write("layers", "embed", "max_norm", 1.0), ["'embed': facts {'max_norm': 1.0} in the file, {} in the model"]
    ),
    "not JSON": (
        replace_document("{"),
        ["metadata 'lora_plus' is not valid JSON: Expecting property name enclosed in double quotes: "
         "line 1 column 2 (char 1)"],
    ),
    "a list": (replace_document([]), ["metadata 'lora_plus' must be a JSON object, got list"]),
    "a number": (replace_document(3), ["metadata 'lora_plus' must be a JSON object, got int"]),
    "newer version": (write("format_version", 2), ["format_version is 2, this library reads 1"]),
    "no version": (erase("format_version"), ["format_version is None, this library reads 1"]),
    "version of another type": (write("format_version", True), ["format_version is True, this library reads 1"]),
    "unknown entry": (write("extra", 1), ["unknown entry 'extra'"]),
    "unknown layer entry": (write("layers", "proj", "bias", True), ["layer 'proj': unknown entry 'bias'"]),
    "no alpha": (
        erase("alpha"),
        ["entry 'alpha' is missing"]
        + [f"layer {name!r}: alpha must be a number, got None" for name in sorted(TRAINED)],
    ),
    "layers a list": (write("layers", []), ["entry 'layers' must be an object, got []"]),
    "layer a number": (write("layers", "proj", 1), ["layer 'proj': expected an object, got 1"]),
    "metadata a list": (write("metadata", []), ["entry 'metadata' must be an object, got []"]),
    "metadata of numbers": (write("metadata", {"a": 1}), ["metadata 'a' must be a text, got 1"]),
    "train_also a list": (write("train_also", ["head"]), ["entry 'train_also' must be an object, got ['head']"]),
    "train_also of texts": (
        write("train_also", "head", "bias"),
        ["train_also 'head': expected a list of different tensor names, got 'bias'"],
    ),
    "no kind": (
        erase("layers", "proj", "kind"),
        ["layer 'proj': kind, layout and shape must be there, got None, 'o i -> o i', [5, 6]"],
    ),
    "rank a text": (write("layers", "proj", "r", "8"), ["layer 'proj': r must be an int, got '8'"]),
    "rank zero": (write("layers", "proj", "r", 0), ["layer 'proj': r must be positive, got 0"]),
    "alpha zero": (
        write("layers", "proj", "alpha", 0),
        ["layer 'proj': alpha must be finite and not zero (zero would switch the adapter off), got 0"],
    ),
    "alpha not a number": (
        write("layers", "proj", "alpha", math.nan),
        ["layer 'proj': alpha must be finite and not zero (zero would switch the adapter off), got nan"],
    ),
    "alpha beyond all floats": (
        write("layers", "proj", "alpha", 10**400), ["layer 'proj': int too large to convert to float"]
    ),
    "dropout one": (write("layers", "proj", "dropout", 1), ["layer 'proj': dropout must be in [0, 1), got 1"]),
    "unknown scaling": (
        write("layers", "proj", "scaling", "x"),
        ["layer 'proj': unknown scaling 'x'; choose one of ['rslora', 'standard']"],
    ),
    "unknown variant": (
        write("layers", "proj", "variant", "x"), ["layer 'proj': unknown variant 'x'; choose one of ['dora', 'lora']"]
    ),
    "DoRA without magnitude": (write("layers", "proj", "variant", "dora"), ["tensor 'proj.lora_magnitude' is missing"]),
    "nothing adapted": (
        both(replace_document({"format_version": 1, "library_version": "", "r": 1, "alpha": 1, "scaling": "standard",
                               "variant": "lora", "dropout": 0, "layers": {}}),
             lambda file: file.tensors.clear()),
        ["it has no adapted layer"],
    ),
    "several at once": (
        both(put("proj.lora_A", torch.ones(3, 7)), put("conv.lora_B", torch.full((6, 2), math.inf)),
             put("head.0.bias", torch.ones(1)), shifted("embed", "embedding")),
        ["'conv.lora_B' has values that are not finite", "'proj': lora_A has shape (3, 7), expected (3, 6)",
         "'embedding': the model has no such module (did you mean 'embed'?)",
         "'head.0.bias': shape (1,) in the file, (5,) in the model"],
    ),
}  # fmt: skip
"""How a native file can be wrong, and all that the error then says, in full."""


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_wrong_native_file_is_refused_with_the_reason(corruption: str, native_parts: Parts, tmp_path: Path) -> None:
    edit, lines = CORRUPTIONS[corruption]
    edit(native_parts)
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(native_parts.bytes())
    assert refused(net(), path) == lines


def test_the_file_that_is_corrupted_is_right_before(native_parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(native_parts.bytes())
    model = lora_plus.load_adapter(net(), tmp_path / "a.safetensors")
    assert_same_tensors(lora_plus.adapter_state_dict(model), lora_plus.adapter_state_dict(adapted_net()))


def test_many_problems_are_counted(native_parts: Parts, tmp_path: Path) -> None:
    for number in range(100):
        native_parts.put(f"x{number:03}", torch.ones(1))
    (tmp_path / "a.safetensors").write_bytes(native_parts.bytes())
    lines = refused(net(), tmp_path / "a.safetensors")
    assert lines[0] == "tensor 'x000' belongs to no layer that the file describes"
    assert (len(lines), lines[-1]) == (31, "and 70 more")


def test_deeply_nested_json_is_refused(native_parts: Parts, tmp_path: Path) -> None:
    native_parts.document = "[" * 100_000
    (tmp_path / "a.safetensors").write_bytes(native_parts.bytes())
    (line,) = refused(net(), tmp_path / "a.safetensors")
    assert line.startswith("metadata 'lora_plus' is not valid JSON: ")


def test_every_truncation_is_refused(native_bytes: bytes, tmp_path: Path) -> None:
    path, model = tmp_path / "short.safetensors", net()
    near_ends = {*range(12), len(native_bytes) - 1, *range(0, len(native_bytes), 37)}
    for length in sorted(near_ends):
        path.write_bytes(native_bytes[:length])
        (line,) = refused(model, path)
        assert line.startswith("short.safetensors is not a whole safetensors file: "), length
    path.write_bytes(native_bytes + b"\0")
    assert len(refused(model, path)) == 1


@pytest.mark.parametrize("garbage", [b"", b"\0" * 8, b"garbage" * 100, b"\xff" * 64, b"\x80\x02}q\0.", b"PK\3\4" * 9])
def test_garbage_is_refused(garbage: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(garbage)
    (line,) = refused(net(), tmp_path / "a.safetensors")
    assert line.startswith("a.safetensors is not a whole safetensors file: ")


def test_a_file_of_something_else_is_refused(native_parts: Parts, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for metadata in ({}, {"format": "pt"}):
        path.write_bytes(assemble(native_parts.tensors, metadata))
        lines = refused(net(), path)
        assert lines == ["it is a safetensors file, but its header does not describe an adapter"]
    lora_plus.save_adapter(adapted_net(), tmp_path / "peft")
    (line,) = refused(net(), tmp_path / "peft" / "adapter_model.safetensors")
    assert line == (
        "it is a safetensors file, but its header does not describe an adapter; "
        f"give the folder {str(tmp_path / 'peft')!r}"
    )


def test_no_file_at_all(tmp_path: Path) -> None:
    model, before = net(), snapshot(net())
    with pytest.raises(FileNotFoundError) as error:
        lora_plus.load_adapter(model, tmp_path / "nowhere")
    assert str(error.value) == f"there is no adapter at {str(tmp_path / 'nowhere')!r}"
    assert snapshot(model)["repr"] == before["repr"]


def test_one_layer_under_two_names_in_the_file(tmp_path: Path) -> None:
    """A file made for two layers does not fit a model in which they are one."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    lora_plus.save_adapter(randomise(lora_plus.inject_lora(model, ["a", "b"])), tmp_path / "a.safetensors")
    assert refused(Shared("a", "b"), tmp_path / "a.safetensors") == ["'b' and 'a' are one module in this model"]
    heads = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "q": nn.Linear(4, 4)})
    lora_plus.inject_lora(heads, ["q"], train_also=["a", "b"])
    lora_plus.save_adapter(randomise(heads), tmp_path / "b.safetensors")
    tied = nn.ModuleDict({**Shared("a", "b")._modules, "q": nn.Linear(4, 4)})
    assert refused(tied, tmp_path / "b.safetensors") == ["'b' and 'a' are one module in this model"]


def test_a_model_that_cannot_take_the_adapter_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora_plus.save_adapter(adapted_net(), path)
    model = adapted_net()
    before = snapshot(model)
    for name, message in {
        "default": "the model has an adapter 'default' already (on 'embed'); give the new one another name, "
        "or call remove_lora(model) first",
        "other": "'head' is already trained in full with the adapter 'default'",
        "a.b": "an adapter's name must not be empty or contain a dot, got 'a.b'",
    }.items():
        with pytest.raises(ValueError) as error:
            lora_plus.load_adapter(model, path, adapter=name)
        assert str(error.value) == message
        assert snapshot(model) == before


# ---- the same for a PEFT folder --------------------------------------------------------------------------------------


@dataclass
class PeftParts:
    """A PEFT folder as plain data."""

    config: Any
    weights: Parts

    def write(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        text = self.config if isinstance(self.config, str) else json.dumps(self.config)
        (folder / "adapter_config.json").write_text(text)
        (folder / "adapter_model.safetensors").write_bytes(assemble(self.weights.tensors, {"format": "pt"}))
        return folder


def plain_net(seed: int = 0) -> nn.Module:
    """The net with an ungrouped convolution, whose PEFT file has the shapes of PEFT's own."""
    torch.manual_seed(seed)
    model = net()
    model.conv = nn.Conv1d(4, 6, 3, padding=1)
    return model


@pytest.fixture
def peft_parts(tmp_path: Path) -> PeftParts:
    model = plain_net()
    lora_plus.inject_lora(model, TRAINED, r=2, alpha=3, rank_pattern={"proj": 3}, train_also=["head"])
    lora_plus.save_adapter(randomise(model), tmp_path / "right")
    config = json.loads((tmp_path / "right" / "adapter_config.json").read_text())
    return PeftParts(config, parts(tmp_path / "right" / "adapter_model.safetensors"))


PeftEdit = Callable[[PeftParts], object]


def set_config(**values: Any) -> PeftEdit:
    return lambda folder: folder.config.update(values)


def unset_config(name: str) -> PeftEdit:
    return lambda folder: folder.config.pop(name)


def config_is(value: Any) -> PeftEdit:
    return lambda folder: setattr(folder, "config", value)


def weights(edit: Edit) -> PeftEdit:
    return lambda folder: edit(folder.weights)


BASE = "base_model.model."
NOT_PLAIN = "which plain LoRA and DoRA do not have"
PEFT_CORRUPTIONS: dict[str, tuple[PeftEdit, list[str]]] = {
    "r=0": (set_config(r=0), ["adapter_config.json: r must be a positive integer, got 0"]),
    "r=-1": (set_config(r=-1), ["adapter_config.json: r must be a positive integer, got -1"]),
    "r=4.0": (set_config(r=4.0), ["adapter_config.json: r must be a positive integer, got 4.0"]),
    "r='8'": (set_config(r="8"), ["adapter_config.json: r must be a positive integer, got '8'"]),
    "r=four": (set_config(r="four"), ["adapter_config.json: r must be a positive integer, got 'four'"]),
    "r=null": (set_config(r=None), ["adapter_config.json: r must be a positive integer, got None"]),
    "r=true": (set_config(r=True), ["adapter_config.json: r must be a positive integer, got True"]),
    "r other than the file's": (
        set_config(r=1000),
        ["'conv': rank 2 in the file, 1000 in the config", "'embed': rank 2 in the file, 1000 in the config"],
    ),
    "alpha=0": (set_config(lora_alpha=0), ["adapter_config.json: lora_alpha must be a finite number and not 0, got 0"]),
    "alpha=nan": (
        set_config(lora_alpha=math.nan), ["adapter_config.json: lora_alpha must be a finite number and not 0, got nan"]
    ),
    "alpha beyond all floats": (
        set_config(lora_alpha=10**400),
        [f"adapter_config.json: lora_alpha must be a finite number and not 0, got {10**400}"],
    ),
    "alpha of one layer zero": (
        set_config(alpha_pattern={"proj": 0}),
        ["'proj': alpha must be finite and not zero (zero would switch the adapter off), got 0"],
    ),
    "dropout=-0.5": (
        set_config(lora_dropout=-0.5), ["adapter_config.json: lora_dropout must be a number in [0, 1), got -0.5"]
    ),
    "dropout=1.5": (
        set_config(lora_dropout=1.5), ["adapter_config.json: lora_dropout must be a number in [0, 1), got 1.5"]
    ),
    "bias": (
        set_config(bias="foo"),
        ["adapter_config.json: bias is 'foo', and trained biases cannot be read; expected 'none'"],
    ),
    "use_dora a text": (set_config(use_dora="no"), ["adapter_config.json: use_dora must be true or false, got 'no'"]),
    "use_rslora a number": (set_config(use_rslora=1), ["adapter_config.json: use_rslora must be true or false, got 1"]),
    "rank_pattern a list": (
        set_config(rank_pattern=["q"]), ["adapter_config.json: rank_pattern must be an object of numbers, got ['q']"]
    ),
    "alpha_pattern of texts": (
        set_config(alpha_pattern={"q": "1"}),
        ["adapter_config.json: alpha_pattern must be an object of numbers, got {'q': '1'}"],
    ),
    "alpha_pattern not a regular expression": (
        set_config(alpha_pattern={"q(": 1}),
        ["adapter_config.json: alpha_pattern: 'q(' is not a regular expression"],
    ),
    "modules_to_save a text": (
        set_config(modules_to_save="head"), ["adapter_config.json: modules_to_save must be a list of names, got 'head'"]
    ),
    "modules_to_save matches nothing": (
        set_config(modules_to_save=["head", "nope"]), ["modules_to_save 'nope' has no tensors in the file"]
    ),
    "config a list": (config_is([]), ["adapter_config.json must be a JSON object, got list"]),
    "config empty": (
        config_is(""), ["adapter_config.json is not valid JSON: Expecting value: line 1 column 1 (char 0)"]
    ),
    "config malformed": (
        config_is("{"),
        ["adapter_config.json is not valid JSON: Expecting property name enclosed in double quotes: "
         "line 1 column 2 (char 1)"],
    ),
    "no peft_type": (unset_config("peft_type"), ["adapter_config.json: peft_type is None, expected 'LORA'"]),
    "unknown peft_type": (
        set_config(peft_type="FOO"), ["adapter_config.json: peft_type is 'FOO', expected 'LORA'"]
    ),
    "unknown field": (set_config(my_field=1), [f"adapter_config.json: my_field is 1, {NOT_PLAIN}"]),
    **{
        name: (set_config(**{name: value}), [f"adapter_config.json: {name} is {value!r}, {NOT_PLAIN}"])
        for name, value in {
            "use_qalora": True, "use_bdlora": {"a": 1}, "kasa_config": {"a": 1}, "arrow_config": {"a": 1},
            "alora_invocation_tokens": [1], "layer_replication": [[0, 2]], "lora_bias": True,
            "target_parameters": ["experts.w"], "trainable_token_indices": [1], "megatron_config": {"a": 1},
            "monteclora_config": {"a": 1},
        }.items()
    },
    "wrong shape": (
        weights(put(f"{BASE}proj.lora_A.weight", torch.ones(3, 7))),
        ["'proj': lora_A has shape (3, 7), expected (3, 6)"],
    ),
    "wrong rank of one layer": (
        weights(put(f"{BASE}proj.lora_A.weight", torch.ones(2, 6))), ["'proj': rank 2 in the file, 3 in the config"]
    ),
    "wrong shape of a convolution": (
        weights(put(f"{BASE}conv.lora_B.weight", torch.ones(6, 2))),
        ["'conv': lora_B.weight has shape (6, 2), expected (6, 2, 1)"],
    ),
    "no dimensions": (
        weights(put(f"{BASE}proj.lora_A.weight", torch.tensor(1.0))),
        ["'proj': lora_A.weight has shape (), expected two dimensions or more"],
    ),
    "missing key": (weights(drop(f"{BASE}proj.lora_B.weight")), ["'proj': lora_B.weight is missing"]),
    "empty file": (
        weights(lambda file: file.tensors.clear()),
        ["modules_to_save 'head' has no tensors in the file"],
    ),
    "extra key": (
        weights(put(f"{BASE}proj.extra", torch.ones(1))),
        ["tensor 'base_model.model.proj.extra' is neither part of an adapter nor of modules_to_save ['head']"],
    ),
    "base key": (
        weights(put(f"{BASE}proj.weight", torch.ones(5, 6))),
        ["tensor 'base_model.model.proj.weight' is neither part of an adapter nor of modules_to_save ['head']"],
    ),
    "base layer key": (
        weights(put(f"{BASE}proj.base_layer.weight", torch.ones(5, 6))),
        ["tensor 'base_model.model.proj.base_layer.weight': adapters of attention modules, parameters and biases "
         "cannot be read"],
    ),
    "wrong prefix": (
        weights(rename(f"{BASE}head.0.bias", "head.0.bias")),
        ["tensor 'head.0.bias': expected a name that starts with 'base_model.model.'", "'head.0.bias' is missing"],
    ),
    "unknown layer": (
        weights(both(rename(f"{BASE}embed.lora_embedding_A", f"{BASE}embde.lora_embedding_A"),
                     rename(f"{BASE}embed.lora_embedding_B", f"{BASE}embde.lora_embedding_B"))),
        ["'embde': the model has no such module (did you mean 'embed'?)"],
    ),
    "layer and head at once": (
        weights(both(put(f"{BASE}head.0.lora_A.weight", torch.ones(2, 5)),
                     put(f"{BASE}head.0.lora_B.weight", torch.ones(5, 2)))),
        ["'head' is trained in full, but 'head.0' in it has an adapter"],
    ),
    "NaN": (
        weights(put(f"{BASE}proj.lora_A.weight", torch.full((3, 6), math.nan))),
        ["'proj.lora_A' has values that are not finite"],
    ),
    "infinity": (
        weights(put(f"{BASE}proj.lora_B.weight", torch.full((5, 3), math.inf))),
        ["'proj.lora_B' has values that are not finite"],
    ),
    "integers": (
        weights(put(f"{BASE}proj.lora_A.weight", torch.ones(3, 6, dtype=torch.int32))),
        [f"'proj.lora_A' is torch.int32, expected one of {FLOATS}"],
    ),
    "a magnitude without use_dora": (
        weights(put(f"{BASE}proj.lora_magnitude_vector", torch.ones(5))),
        ["'proj': lora_magnitude_vector is there, but use_dora is not set"],
    ),
    "use_dora without magnitudes": (
        set_config(use_dora=True),
        [f"{name!r}: lora_magnitude_vector is missing" for name in ("conv", "embed", "proj")],
    ),
    "several at once": (
        both(set_config(r=0, bias="all", use_bdlora={"a": 1})),
        ["adapter_config.json: r must be a positive integer, got 0",
         "adapter_config.json: bias is 'all', and trained biases cannot be read; expected 'none'",
         f"adapter_config.json: use_bdlora is {{'a': 1}}, {NOT_PLAIN}"],
    ),
}  # fmt: skip
"""How a PEFT folder can be wrong, and all that the error then says, in full."""


@pytest.mark.parametrize("corruption", PEFT_CORRUPTIONS)
def test_a_wrong_peft_folder_is_refused_with_the_reason(corruption: str, peft_parts: PeftParts, tmp_path: Path) -> None:
    edit, lines = PEFT_CORRUPTIONS[corruption]
    edit(peft_parts)
    problems = refused(plain_net(), peft_parts.write(tmp_path / "wrong"))
    if corruption == "r other than the file's":
        problems = [line for line in problems if "rank" in line]
    assert problems == lines


def test_the_folder_that_is_corrupted_is_right_before(peft_parts: PeftParts, tmp_path: Path) -> None:
    one = lora_plus.load_adapter(plain_net(), tmp_path / "right")
    other = lora_plus.load_adapter(plain_net(), peft_parts.write(tmp_path / "same"))
    assert settings_of(other)["proj"]["r"] == 3
    assert_same_tensors(lora_plus.adapter_state_dict(other), lora_plus.adapter_state_dict(one))


def test_an_incomplete_peft_folder_names_what_is_missing(peft_parts: PeftParts, tmp_path: Path) -> None:
    model = plain_net()
    (tmp_path / "empty").mkdir()
    no_config, no_weights = (
        f"the folder has no {name}" for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert sorted(refused(model, tmp_path / "empty")) == [no_config, no_weights]
    folder = peft_parts.write(tmp_path / "folder")
    (folder / "adapter_config.json").unlink()
    assert refused(model, folder) == [no_config]
    folder = peft_parts.write(tmp_path / "folder")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    pickle = "; there is a .bin file, which is a pickle and is not read: convert it to safetensors"
    assert refused(model, folder) == [no_weights + pickle]
    (folder / "adapter_model.safetensors").write_bytes(b"\0\0\0\0")
    (line,) = refused(model, folder)
    assert line.startswith("adapter_model.safetensors is not a whole safetensors file: ")
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe")
    problems = refused(model, folder)
    assert problems[0].startswith("adapter_config.json is not valid JSON: ")
    assert len(problems) == 2
    (folder / "adapter_config.json").write_text("[" * 100_000)
    assert refused(model, folder)[0].startswith("adapter_config.json is not valid JSON: ")


def test_a_flat_magnitude_of_a_convolution_is_refused(tmp_path: Path) -> None:
    model = lora_plus.inject_lora(plain_net(), ["conv"], r=2, variant="dora")
    lora_plus.save_adapter(randomise(model), tmp_path / "right")
    config = json.loads((tmp_path / "right" / "adapter_config.json").read_text())
    folder = PeftParts(config, parts(tmp_path / "right" / "adapter_model.safetensors"))
    folder.weights.put(f"{BASE}conv.lora_magnitude_vector", torch.ones(6))
    assert refused(plain_net(), folder.write(tmp_path / "wrong")) == [
        "'conv': lora_magnitude_vector has shape (6,), expected (1, 6, 1)"
    ]


# ---- whatever a file says, it loads right or is a ValueError ---------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.sampled_from([10**400, -(2**70), 0.5, 1e308, -0.0, math.nan, math.inf])
    | st.sampled_from(["", "lora", "dora", "rslora", "proj", "head", "embed", "lora_A", "0.bias", "q(", ".*", "\0"])
    | st.text(max_size=4)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every ``(container, key)`` in a JSON value."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def mutate(value: Any, data: st.DataObject) -> Any:
    """A copy with one to three entries replaced, removed, added or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 3))):
        spots = list(places(value))
        if not spots:
            return value
        container, key = data.draw(st.sampled_from(spots))
        action = data.draw(st.sampled_from(["replace", "remove", "add", "swap"]))
        if action == "replace":
            container[key] = data.draw(VALUES)
        elif action == "remove":
            del container[key]
        elif action == "add" and isinstance(container, dict):
            container[data.draw(st.sampled_from(["r", "alpha", "groups", "proj", "head", "x"]))] = data.draw(VALUES)
        elif action == "swap":
            other, place = data.draw(st.sampled_from(spots))
            container[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(container[key])
    return value


FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def loads_right_or_is_refused(model: nn.Module, path: Path) -> bool:
    """Whether it loaded; asserts that a refusal is a ValueError and leaves the model bit for bit as it was."""
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            lora_plus.load_adapter(model, path)
        except ValueError as error:
            assert snapshot(model) == before
            assert f"adapter {str(path)!r} cannot be loaded; the model is unchanged:" in str(error)
            return False
    return True


@FUZZ
@given(data=st.data())
def test_any_native_document_loads_right_or_is_refused(data: st.DataObject, native_bytes: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(native_bytes)
        file = parts(path)
        file.document = mutate(file.document, data)
        path.write_bytes(file.bytes())
        model = net()
        if not loads_right_or_is_refused(model, path):
            return
    state = lora_plus.adapter_state_dict(model)
    assert {name: _bits(tensor) for name, tensor in state.items()} == {
        name: raw for name, (_, _, raw) in file.tensors.items()
    }
    for name, spec in settings_of(model).items():
        del spec["scale"]
        assert spec == {key: file.document["layers"][name].get(key, file.document.get(key)) for key in spec}


@FUZZ
@given(data=st.data())
def test_any_header_bytes_load_right_or_are_refused(data: st.DataObject, native_bytes: bytes) -> None:
    raw = bytearray(native_bytes)
    (length,) = struct.unpack("<Q", raw[:8])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(raw)
        loads_right_or_is_refused(net(), path)


@pytest.fixture(scope="module")
def peft_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A model and its PEFT folder, which nobody changes."""
    model, folder = plain_net(), tmp_path_factory.mktemp("peft")
    lora_plus.inject_lora(
        model, TRAINED, r=2, alpha=3, rank_pattern={"proj": 3}, alpha_pattern={"conv": 5}, train_also=["head"]
    )
    lora_plus.save_adapter(randomise(model), folder)
    return model, folder


@FUZZ
@given(data=st.data())
def test_any_peft_config_loads_right_or_is_refused(data: st.DataObject, peft_model: tuple[nn.Module, Path]) -> None:
    saved, original = peft_model
    config = json.loads((original / "adapter_config.json").read_text())
    mutated = mutate(config, data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(original, Path(name) / "adapter"))
        (folder / "adapter_config.json").write_text(json.dumps(mutated))
        loaded = plain_net()
        if not loads_right_or_is_refused(loaded, folder):
            return
    assert_same_tensors(lora_plus.adapter_state_dict(loaded), lora_plus.adapter_state_dict(saved))
    deciding = ("lora_alpha", "alpha_pattern", "use_rslora")
    if all(mutated.get(key, "none") == config[key] for key in deciding):
        scales = {name: spec["scale"] for name, spec in settings_of(saved).items()}
        assert {name: spec["scale"] for name, spec in settings_of(loaded).items()} == scales


@FUZZ
@given(data=st.data())
def test_any_peft_tensors_load_right_or_are_refused(data: st.DataObject, peft_model: tuple[nn.Module, Path]) -> None:
    _, original = peft_model
    file = parts(original / "adapter_model.safetensors")
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(sorted(file.tensors)))
        shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
        file.put(key, torch.ones(shape, dtype=data.draw(st.sampled_from(list(DTYPES)))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(original, Path(name) / "adapter"))
        (folder / "adapter_model.safetensors").write_bytes(assemble(file.tensors, {"format": "pt"}))
        loads_right_or_is_refused(plain_net(), folder)

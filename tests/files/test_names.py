"""Adapters whose file has other names than the model, and folders that hold folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from files_support import refused, settings_of, snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_plus
from lora_plus.files import adapter_state_dict

FORMATS = {"native": "a.safetensors", "peft": "folder"}
ADAPTED = ["q", "xq", "conv", "embed", "attn.q", "attn.v", "attn.out_proj", "experts.w"]


class Experts(nn.Module):
    """A stack of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bi->beo", self.w, x)


def layer() -> nn.Module:
    return nn.ModuleDict({
        "q": nn.Linear(4, 4), "xq": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 3), "embed": nn.Embedding(5, 4),
        "attn": nn.MultiheadAttention(4, 2), "experts": Experts(),
    })  # fmt: skip


def theirs() -> nn.Module:
    """The model that a file is of."""
    torch.manual_seed(0)
    layers = nn.ModuleList([layer(), layer()])
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": layers}), "head": nn.Sequential(nn.Linear(4, 3))}).eval()


def ours() -> nn.Module:
    """The same model under other names, with a layer that the other does not have."""
    torch.manual_seed(0)
    layers = nn.ModuleList([layer(), layer()])
    own = {"body": nn.ModuleDict({"blocks": layers}), "score": nn.Sequential(nn.Linear(4, 3)), "q": nn.Linear(4, 4)}
    return nn.ModuleDict(own).eval()


NAMES = {"model.layers": "body.blocks", "head": "score"}


def renamed(name: str) -> str:
    return name.replace("model.layers", "body.blocks").replace("head", "score").replace("model", "body")


def adapted(**options: Any) -> nn.Module:
    options = {"rank_pattern": {"model.layers.0.q": 3}, "alpha_pattern": {"model.layers.1.xq": 7},
               "train_also": ["head"], **options}  # fmt: skip
    model = lora_plus.inject_lora(theirs(), ADAPTED, r=2, alpha=3, **options)
    with torch.no_grad():
        model["head"][0].weight.add_(1)
    return randomise(model)


@pytest.fixture(params=FORMATS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / FORMATS[request.param]
    lora_plus.save_adapter(adapted(), path)
    return path


def moved(model: nn.Module) -> dict[str, Tensor]:
    return {renamed(name): tensor for name, tensor in adapter_state_dict(model).items()}


pytestmark = pytest.mark.filterwarnings("ignore:the file says W")  # of what peft does with out_proj


LONGEST = {"model": "x", "model.layers.": "body.blocks.", "model.layers.1": "body.blocks.1", "head": "score"}


@pytest.mark.parametrize("names", [NAMES, LONGEST, renamed], ids=["prefixes", "the longest counts", "function"])
def test_every_kind_of_layer_moves_with_its_settings(names: Any, file: Path) -> None:
    if names is LONGEST and file.is_file():
        names = {old: new for old, new in names.items() if old != "model"}  # no name in it needs that one
    expected = lora_plus.load_adapter(theirs(), file)
    loaded = lora_plus.load_adapter(ours(), file, names=names)
    given, wanted = adapter_state_dict(loaded), moved(expected)
    assert given.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in given.items())
    assert settings_of(loaded) == {renamed(name): value for name, value in settings_of(expected).items()}


def test_a_prefix_may_be_all_or_nothing(file: Path) -> None:
    expected = lora_plus.load_adapter(theirs(), file)
    inside = nn.ModuleDict({"deep": nn.ModuleDict({"er": theirs()})})
    loaded = lora_plus.load_adapter(inside, file, names={"": "deep.er"})
    given = adapter_state_dict(loaded)
    wanted = {f"deep.er.{name}": tensor for name, tensor in adapter_state_dict(expected).items()}
    assert given.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in given.items())


def test_a_prefix_may_go(file: Path) -> None:
    torch.manual_seed(0)
    body = nn.ModuleDict({"layers": nn.ModuleList([layer(), layer()]), "head": nn.Sequential(nn.Linear(4, 3))})
    loaded = lora_plus.load_adapter(body, file, names={"model": ""})
    assert {name.split(".")[0] for name in adapter_state_dict(loaded)} == {"layers", "head"}


def test_what_is_left_out_is_left_alone(file: Path) -> None:
    model = ours()
    head = model["score"][0].weight.detach().clone()
    lora_plus.load_adapter(model, file, names={"model.layers.0": "body.blocks.0", "model.layers.1": None, "head": None})
    assert {name.split(".")[2] for name in settings_of(model)} == {"0"}
    assert torch.equal(model["score"][0].weight, head)
    assert refused_with(ours(), file, {"model": None, "head": None}) == ["it has no adapted layer"]


def refused_with(model: nn.Module, path: Path, names: Any) -> list[str]:
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        lora_plus.load_adapter(model, path, names=names)
    assert snapshot(model) == before
    return [line.removeprefix("  ") for line in str(error.value).split("\n")[1:]]


def small(*names: str) -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in names})


WRONG: dict[str, tuple[Any, list[str]]] = {
    "not in the model": ({"a": "alpha", "b": "bta"}, ["'bta': the model has no such module (did you mean 'beta'?)"]),
    "not in the file": (
        {"a": "alpha", "b": "beta", "c": "gamma"},
        ["names: no name in the file is or starts with 'c'"],
    ),
    "a typo in the file's name": (
        {"a": "alpha", "bb": "beta"},
        ["names: no name in the file is or starts with 'bb'",
         "'b': the model has no such module"],
    ),
    "two on one": (
        {"a": "alpha", "b": "alpha"}, ["'a' and 'b' of the file are both called 'alpha' by names"]
    ),
    "function on one": (
        lambda name: "alpha", ["'a' and 'b' of the file are both called 'alpha' by names"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("format", FORMATS)
def test_a_wrong_map_is_refused_with_the_reason(format: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / FORMATS[format]
    lora_plus.save_adapter(randomise(lora_plus.inject_lora(small("a", "b"), ["a", "b"], r=1)), path)
    names, lines = WRONG[fault]
    assert refused_with(small("alpha", "beta"), path, names) == lines


@pytest.mark.parametrize("names", [{"a": 3}, lambda name: 3])
def test_a_name_must_be_a_text(names: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora_plus.save_adapter(randomise(lora_plus.inject_lora(small("a"), ["a"], r=1)), path)
    with pytest.raises(TypeError, match="names gives 3 for 'a', expected a name, or None to leave it out"):
        lora_plus.load_adapter(small("a"), path, names=names)


@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_is_told_the_same(format: str, tmp_path: Path) -> None:
    path, base, out = tmp_path / FORMATS[format], tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    model = small("a", "b").double()
    lora_plus.inject_lora(model, ["a", "b"], r=1, train_also=[], dtype=torch.float64)
    lora_plus.save_adapter(randomise(model), path)
    adapter = model["a"].adapter_named("default")
    (A, B), scale = adapter.factors(), adapter.scale
    tensors = {"alpha.weight": torch.eye(4, dtype=torch.float64)}
    save_file(tensors, base)
    lora_plus.merge_checkpoint(base, path, out, names={"a": "alpha", "b": None})
    wanted = tensors["alpha.weight"] + scale * (B @ A).detach()
    torch.testing.assert_close(load_file(out)["alpha.weight"], wanted, rtol=0, atol=1e-12)
    for given, line in (
        ({"a": "alpha", "b": None, "c": None}, "names: no name in the file is or starts with 'c'"),
        ({"a": None, "b": None}, "it has no adapted layer"),
    ):
        with pytest.raises(ValueError) as error:
            lora_plus.merge_checkpoint(base, path, tmp_path / "no.safetensors", names=given)
        assert str(error.value) == f"adapter {str(path)!r} was not merged into {str(base)!r}:\n  {line}"


# ---- folders and pickles ---------------------------------------------------------------------------------------------


@pytest.mark.peers
def test_a_folder_of_several_adapters_says_which_there_are(tmp_path: Path) -> None:
    """What PEFT saves for adapters that are not called "default"."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small("a", "b"), peft.LoraConfig(r=1, target_modules=["a"]), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["b"]))
    model.save_pretrained(tmp_path / "all")
    (tmp_path / "all" / "README.md").unlink(missing_ok=True)
    assert refused(small("a", "b"), tmp_path / "all") == [
        "the folder has no adapter_config.json, but folders that have one: 'one', 'two'; give one of them, such as "
        f"{str(tmp_path / 'all' / 'one')!r}"
    ]
    loaded = lora_plus.load_adapter(small("a", "b"), tmp_path / "all" / "two")
    assert {name: settings["r"] for name, settings in settings_of(loaded).items()} == {"b": 2}


def test_a_folder_with_the_least_config(tmp_path: Path) -> None:
    """torchtune's: PEFT's tensors, and a config with only what it must have."""
    (tmp_path / "out").mkdir()
    config = {"r": 2, "lora_alpha": 8, "target_modules": ["a"], "peft_type": "LORA"}
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        "base_model.model.a.lora_A.weight": torch.randn(2, 4),
        "base_model.model.a.lora_B.weight": torch.ones(4, 2),
    }
    save_file(tensors, tmp_path / "out" / "adapter_model.safetensors")
    loaded = lora_plus.load_adapter(small("a"), tmp_path / "out")
    assert settings_of(loaded)["a"]["scale"] == 4


@pytest.mark.parametrize(
    "save", [torch.save, lambda file, path: torch.save(file, path, _use_new_zipfile_serialization=False)]
)
def test_a_pickle_is_refused_with_the_next_step(save: Callable[[Any, Path], None], tmp_path: Path) -> None:
    """litgpt's lit_model.pth.lora and other files of torch.save."""
    save({"a.lora_A": torch.ones(1)}, tmp_path / "lit_model.pth.lora")
    wanted = (
        "lit_model.pth.lora is not a whole safetensors file: it is a pickle, as torch.save writes them, which is not "
        "read: convert it to safetensors"
    )
    assert refused(small("a"), tmp_path / "lit_model.pth.lora") == [wanted]
    with pytest.raises(ValueError, match=re.escape(wanted)):
        lora_plus.merge_checkpoint(tmp_path / "lit_model.pth.lora", tmp_path, tmp_path / "out.safetensors")


def test_what_is_no_adapter_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    assert refused(small("a"), tmp_path / "a.safetensors") == [
        "a.safetensors is not a whole safetensors file: it is empty"
    ]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert refused(small("a"), tmp_path / "adapter_config.json") == [
        "adapter_config.json is not a whole safetensors file: it is a text, which begins as JSON does"
    ]
    (tmp_path / "adapter_config.json").unlink()
    none = "the folder has no adapter_config.json and no adapter_model.safetensors"
    (tmp_path / "b.safetensors").touch()
    given = "; it has 'a.safetensors', 'b.safetensors': give a .safetensors file itself, convert others"
    assert refused(small("a"), tmp_path) == [none + given]
    (tmp_path / "empty").mkdir()
    assert refused(small("a"), tmp_path / "empty") == [none]

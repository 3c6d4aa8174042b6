"""What comes back from a file has the rank that it had: fused rows, attention and starts from the weight."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_plus as lp
from lora_plus.files import adapter_state_dict, read_adapter, to_peft
from lora_plus.files.save import describe
from lora_plus.model.state import State
from lora_plus.surgery import combine_saved, resize_saved

# PEFT adds the update of out_proj twice, which saving and loading say
pytestmark = pytest.mark.filterwarnings("ignore:the file says W")

WEIGHTS, KEY = "adapter_model.safetensors", "lora_plus_parts"
F64 = torch.float64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.attn, self.last = (
            nn.Linear(6, 18),
            nn.MultiheadAttention(6, 2, batch_first=True),
            nn.Linear(6, 6),
        )
        self.conv = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        y = self.attn(q, k, v, need_weights=False)[0] + self.conv(x.mT).mT
        return self.last(y)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().to(F64).eval()


def x() -> Tensor:
    return torch.randn(2, 3, 6, dtype=F64, generator=torch.Generator().manual_seed(1))


FUSED = {"fused": {"qkv": ["q", "k", "v"]}}
CASES: dict[str, dict[str, Any]] = {
    "rows": FUSED | {
        "targets": ["qkv.q", "qkv.v", "last"], "rank_pattern": {"qkv.v": 3}, "alpha_pattern": {"qkv.v": 6}
    },
    "rows of all": {"targets": ["qkv"], **FUSED},
    "attention": {"targets": ["attn"], "rank_pattern": {"attn.k": 4}, "alpha_pattern": {"attn.k": 8}},
    "attention at two scales": {"targets": ["attn"], "rank_pattern": {"attn.k": 3}},
    "some of attention": {
        "targets": ["attn.q", "attn.out_proj", "last"], "alpha": 2,
        "rank_pattern": {"attn.out_proj": 1}, "alpha_pattern": {"attn.out_proj": 1},
    },
    "pissa": {"targets": ["last", "conv"], "init": "pissa", "alpha": 5, "rank_pattern": {"last": 3}},
    "pissa of rows and attention": {"targets": ["qkv.q", "qkv.k", "attn"], "init": "pissa", **FUSED},
    "milora, dora": {"targets": ["last"], "init": "milora", "variant": "dora", "scaling": "rslora", "alpha": 3},
    "olora": {"targets": ["last", "attn"], "init": "olora"},
}  # fmt: skip


def adapted(case: str, *, trained: bool = True) -> nn.Module:
    model = lp.inject_lora(net(), **{"r": 2, "alpha": 4, **CASES[case]})
    return randomise(model).eval() if trained else model


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def assert_alike(one: nn.Module, other: nn.Module, *, bits: bool = True) -> None:
    """The same adapters: places, ranks and, where that is asked, every bit."""
    settings = [{row.name: (row.r, row.scale) for row in lp.lora_summary(model).rows} for model in (one, other)]
    assert settings[0].keys() == settings[1].keys()
    assert {name: r for name, (r, _) in settings[0].items()} == {name: r for name, (r, _) in settings[1].items()}
    tensors, others = adapter_state_dict(one), adapter_state_dict(other)
    assert tensors.keys() == others.keys()
    assert not bits or all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("path", ["a.safetensors", "a"])
@pytest.mark.parametrize("case", CASES)
def test_it_comes_back_with_its_ranks_and_every_bit(case: str, path: str, tmp_path: Path) -> None:
    for trained in (True, False):
        model = adapted(case, trained=trained)
        lp.save_adapter(model, tmp_path / path)
        loaded = lp.load_adapter(net(), tmp_path / path, trainable=True)
        assert_alike(loaded, model, bits=case != "attention at two scales")
        close(loaded(x()), model.eval()(x()))
        flags = {name: parameter.requires_grad for name, parameter in loaded.named_parameters()}
        assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("path", ["a.safetensors", "a", "memory"])
@pytest.mark.parametrize("case", CASES)
def test_values_replace_those_of_their_own_kind(case: str, path: str, tmp_path: Path) -> None:
    source = adapted(case)
    model = copy.deepcopy(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A." in name or "lora_B." in name:
                parameter.mul_(0.5)
    held = dict(model.named_parameters())
    if path != "memory":
        lp.save_adapter(source, tmp_path / path)
    lp.load_adapter(model, to_peft(source) if path == "memory" else tmp_path / path, replace=True)
    close(model.eval()(x()), source(x()))
    assert all(parameter is held[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("case", ["rows", "pissa of rows and attention"])
def test_values_in_memory_replace_those_before_training_too(case: str) -> None:
    source, model = adapted(case, trained=False).eval(), adapted(case)
    own = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A0." in name or "lora_B0." in name:
                parameter.copy_(own[name])
    lp.load_adapter(model, to_peft(source), replace=True)
    close(model(x()), source(x()))


def test_another_adapter_of_all_attention_stays_whole_beside_one_of_a_part(tmp_path: Path) -> None:
    lp.save_adapter(lp.inject_lora(net(), ["attn"], r=2), tmp_path / "a")  # without an update
    save_file(load_file(tmp_path / "a" / WEIGHTS), tmp_path / "a" / WEIGHTS, {"format": "pt"})
    model = lp.inject_lora(net(), ["attn.q"], r=2)
    lp.load_adapter(model, tmp_path / "a", adapter="more")
    parts = {f"attn.{part}" for part in ("q", "k", "v", "out_proj")}
    assert {row.name for row in lp.lora_summary(model).rows if row.adapter == "more"} == parts


def test_a_plain_adapter_takes_one_that_started_from_the_weight(tmp_path: Path) -> None:
    source = adapted("pissa")
    lp.save_adapter(source, tmp_path / "a.safetensors")
    model = lp.inject_lora(net(), ["last", "conv"], r=8)
    lp.load_adapter(model, tmp_path / "a.safetensors", replace=True)
    close(model.eval()(x()), source(x()))
    lp.load_adapter(model, tmp_path / "a.safetensors", adapter="more")
    close(model(x()), source(x()))
    assert {row.r for row in lp.lora_summary(model).rows if row.adapter == "more"} == {6, 4}


def test_a_folder_without_the_note_is_read_as_what_peft_has(tmp_path: Path) -> None:
    for case in CASES:
        model = adapted(case)
        lp.save_adapter(model, tmp_path / "a")
        with safe_open(tmp_path / "a" / WEIGHTS, "pt") as file:
            assert (KEY in file.metadata()) and file.metadata()["format"] == "pt"
        save_file(load_file(tmp_path / "a" / WEIGHTS), tmp_path / "a" / WEIGHTS, {"format": "pt"})
        close(lp.load_adapter(net(), tmp_path / "a")(x()), model(x()))


def test_a_folder_that_needs_no_note_has_none(tmp_path: Path) -> None:
    lp.save_adapter(lp.inject_lora(net(), ["last", "conv"], r=2), tmp_path / "a")
    with safe_open(tmp_path / "a" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


Edit = Callable[[dict[str, Tensor], dict[str, Any]], Any]
PREFIX = "base_model.model."
CHANGED: dict[str, tuple[str, Edit]] = {
    "a value beside the block": ("rows", lambda tensors, told: tensors[f"{PREFIX}qkv.lora_B.weight"][0].add_(1)),
    "a value in rows of none": ("rows", lambda tensors, told: tensors[f"{PREFIX}qkv.lora_B.weight"][7].add_(1)),
    "a value in attention": ("attention", lambda tensors, told: tensors[f"{PREFIX}attn.lora_B.weight"].add_(1)),
    "a part that was none": (
        "some of attention", lambda tensors, told: tensors[f"{PREFIX}attn.lora_B.weight"][8].add_(1)
    ),
    "all values": ("pissa", lambda tensors, told: [tensor.add_(1) for tensor in tensors.values()]),
    "another rank": ("pissa", lambda tensors, told: told["last"]["start"].update(r=1)),
    "another alpha": ("pissa", lambda tensors, told: told["last"]["start"].update(alpha=1)),
    "no alpha": ("pissa", lambda tensors, told: told["last"]["start"].update(alpha=None)),
    "a start of another kind": ("pissa", lambda tensors, told: told["last"].update(start=[3])),
    "ranks beyond": ("attention", lambda tensors, told: told["attn.q"].update(r=99)),
    "rows beyond": ("rows", lambda tensors, told: told["qkv.q"].update(rows=[0, 99])),
    "another column": ("rows", lambda tensors, told: told["qkv.q"].update(at=1)),
    "no such layer": ("rows", lambda tensors, told: told["qkv.q"].update(of="nothing")),
    "another name": ("rows", lambda tensors, told: told.update(last=told.pop("qkv.q"))),
    "fewer parts": ("attention", lambda tensors, told: told.pop("attn.q")),
}  # fmt: skip


@pytest.mark.parametrize(("case", "edit"), CHANGED.values(), ids=CHANGED)
def test_a_changed_folder_is_read_as_what_its_tensors_say(case: str, edit: Edit, tmp_path: Path) -> None:
    lp.save_adapter(adapted(case), tmp_path / "a")
    tensors, note = load_file(tmp_path / "a" / WEIGHTS), tmp_path / "a" / WEIGHTS
    with safe_open(note, "pt") as file:
        told = json.loads(file.metadata()[KEY])
    edit(tensors, told)
    save_file(tensors, note, {"format": "pt"})
    wanted = lp.load_adapter(net(), tmp_path / "a")(x())
    save_file(tensors, note, {"format": "pt", KEY: json.dumps(told)})
    close(lp.load_adapter(net(), tmp_path / "a")(x()), wanted)


@pytest.mark.parametrize(
    "note", ["{", "[]", '{"last": 3}', '{"last": {"of": "last"}}', '{"last": {"of": "last", "r": 0, "at": 0}}',
             '{"last": {"of": "last", "r": 1, "at": 0, "rows": [3, 1]}}']
)  # fmt: skip
def test_a_note_that_is_none_is_refused(note: str, tmp_path: Path) -> None:
    lp.save_adapter(adapted("pissa"), tmp_path / "a")
    save_file(load_file(tmp_path / "a" / WEIGHTS), tmp_path / "a" / WEIGHTS, {"format": "pt", KEY: note})
    with pytest.raises(ValueError, match=f"metadata '{KEY}'"):
        lp.load_adapter(net(), tmp_path / "a")


def test_other_factors_have_no_start(tmp_path: Path) -> None:
    model = adapted("pissa")
    lp.save_adapter(model, tmp_path / "a.safetensors")
    saved = read_adapter(tmp_path / "a.safetensors")
    assert saved.layers["last"].base.facts == {"start": {"r": 3, "alpha": 5}} and saved.layers["last"].spec.r == 6
    small, _ = resize_saved(saved, r=5)
    twice, _ = combine_saved({"a": saved, "b": saved}, weights=[0.5, 0.5], method="svd", r=6)
    for other in (small, twice):
        assert all("start" not in layer.base.facts for layer in other.layers.values())
        assert "last.lora_A0.default" not in dict(lp.load_adapter(net(), other).named_parameters())


def test_a_checkpoint_gets_the_whole_update(tmp_path: Path) -> None:
    model = adapted("pissa")
    lp.save_adapter(model, tmp_path / "a.safetensors")
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    lp.merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    lp.merge_and_unload(model)
    for name, tensor in model.state_dict().items():
        close(found[name], tensor)


def test_training_goes_on_where_it_was(tmp_path: Path) -> None:
    def trained(model: nn.Module, steps: int) -> nn.Module:
        optimizer = lp.create_loraplus_optimizer(model.train(), torch.optim.SGD, lr=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            model(x()).square().sum().backward()
            optimizer.step()
        return model

    start = lp.inject_lora(net(), ["last", "attn"], r=2, init="pissa")
    whole = trained(copy.deepcopy(start), 4)
    lp.save_adapter(trained(start, 2), tmp_path / "a.safetensors")
    assert_alike(trained(lp.load_adapter(net(), tmp_path / "a.safetensors", trainable=True), 2), whole)


def test_plain_data_that_fits_nothing_is_refused_beside_a_start() -> None:
    model = adapted("pissa")
    saved = describe(State(model), "default")
    for change in ({"lora_A": torch.ones(6, 5)}, {"lora_B": torch.ones(6, 7)}):
        broken = copy.deepcopy(saved)
        broken.layers["last"].tensors.update(change)
        for target in (net(), model):
            with pytest.raises(ValueError, match=r"'last': lora_[AB] has shape"):
                lp.load_adapter(target, broken, replace=True)
    del saved.layers["last"].tensors["lora_B"]
    with pytest.raises(ValueError, match="'last': lora_B has shape None"):
        lp.load_adapter(model, saved, replace=True)


def test_a_plain_adapter_of_twice_the_rank_is_no_start_of_the_models() -> None:
    """Rank 2 r alone says nothing: the second half has to be the start that the model holds, bit for bit."""
    model = lp.inject_lora(net(), ["last"], r=2, init="pissa")
    plain = randomise(lp.inject_lora(net(), ["last"], r=4, alpha=2 * model.last.lora_adapters["default"].spec.alpha))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="last"):
        lp.load_adapter(model, describe(State(plain), "default"), replace=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

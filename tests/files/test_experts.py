"""Adapters of single experts fit models with stacked experts, and the other way."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vllm_support import read_by_vllm, served_in_stacks, served_one_by_one

import lora_plus as lp
from lora_plus.files import SavedAdapter, adapter_state_dict, read_adapter
from lora_plus.files.save import describe
from lora_plus.model.state import State

COUNT, WIDTH, INNER = 3, 4, 6
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Single(nn.Module):
    """An expert as transformers 4 has it: three linear layers, by the names of gate, up and down."""

    def __init__(self, names: tuple[str, str, str]) -> None:
        super().__init__()
        for name, (outputs, inputs) in zip(names, [(INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)], strict=True):
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(F.silu(gate(x)) * up(x))


class SingleBlock(nn.Module):
    """The block of transformers 4: the router is a linear layer."""

    def __init__(self, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, COUNT, bias=False)
        self.experts = nn.ModuleList([Single(names) for _ in range(COUNT)])

    def forward(self, x: Tensor) -> Tensor:
        mix = torch.softmax(self.gate(x), -1)
        return sum(mix[..., e, None] * expert(x) for e, expert in enumerate(self.experts))  # type: ignore[return-value]


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(COUNT, 2 * INNER, WIDTH))
        self.down_proj = nn.Parameter(torch.empty(COUNT, WIDTH, INNER))

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(COUNT):
            gate, up = F.linear(x, self.gate_up_proj[e]).chunk(2, -1)
            out = out + mix[..., e, None] * F.linear(F.silu(gate) * up, self.down_proj[e])
        return out


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(COUNT, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(F.linear(x, self.weight), -1)


class StackedBlock(nn.Module):
    """The block of transformers 5: the router is a module with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Router()
        self.experts = Stacked()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.gate(x))


class Net(nn.Module):
    """Two layers of an attention-like projection and a block under its name."""

    def __init__(self, name: str, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(WIDTH, WIDTH, bias=False), name: block()}) for _ in range(2)
        )
        self.block = name

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer[self.block](torch.tanh(layer["q_proj"](x)))  # type: ignore[index]
        return x


MIXTRAL, QWEN = ("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")
OLD: dict[str, tuple[str, tuple[str, str, str]]] = {
    "mixtral": ("block_sparse_moe", MIXTRAL),
    "qwen": ("mlp", QWEN),
    "dots": ("mlp", ("fc1", "fc3", "fc2")),
}


def old(family: str) -> nn.Module:
    """A model of single experts, with seeded weights."""
    block, names = OLD[family]
    torch.manual_seed(0)
    return Net(block, lambda: SingleBlock(names)).double()


def new(family: str) -> nn.Module:
    """The same model with stacked experts."""
    block, (gate, up, down) = OLD[family]
    state, model = old(family).state_dict(), Net("mlp", StackedBlock).double()
    weights = {name.replace(f".{block}.", ".mlp."): tensor for name, tensor in state.items() if ".experts." not in name}
    for layer in range(2):
        at = f"layers.{layer}.{block}.experts"
        one = {name: torch.stack([state[f"{at}.{e}.{name}.weight"] for e in range(COUNT)]) for name in (gate, up, down)}
        weights[f"layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([one[gate], one[up]], 1)
        weights[f"layers.{layer}.mlp.experts.down_proj"] = one[down]
    model.load_state_dict(weights)
    return model


def same(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.eval()(X), other.eval()(X), rtol=0, atol=1e-12)


def adapted(model: nn.Module, targets: list[str], **settings: Any) -> nn.Module:
    return randomise(lp.inject_lora(model, targets, **{"r": 2, **settings}))


def single_targets(family: str) -> list[str]:
    return ["q_proj", "gate", *OLD[family][1]]


STACKED = ["q_proj", "gate.weight", "experts.gate_up_proj", "experts.down_proj"]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"scaling": "rslora", "alpha": 3},
    "ranks and alphas": {
        "rank_pattern": {"*.experts.1.*": 4, "layers.0.*.experts.0.*": 1},
        "alpha_pattern": {"*.experts.2.*": 7, "layers.1.*.experts.0.*": -1},
    },
    "dora": {"variant": "dora"},
}
CASES = [*itertools.product(["mixtral"], SETTINGS, ["a.safetensors", "folder"])]
CASES += [*itertools.product(["qwen", "dots"], ["plain"], ["a.safetensors", "folder"])]


@pytest.mark.parametrize(("family", "settings", "path"), CASES)
def test_single_experts_become_stacks_and_single_again(family: str, settings: str, path: str, tmp_path: Path) -> None:
    model = adapted(old(family), single_targets(family), **SETTINGS[settings])
    same(new(family), old(family))
    lp.save_adapter(model, tmp_path / path)
    loaded = lp.load_adapter(new(family), tmp_path / path)
    assert (loaded(X) - new(family)(X)).abs().max() > 1e-3
    same(loaded, model)
    back = tmp_path / ("b.safetensors" if settings == "dora" else f"b{path}")  # PEFT has no DoRA of parameters
    lp.save_adapter(loaded, back)
    again = lp.load_adapter(old(family), back)
    same(again, model)
    if settings == "plain":
        state, wanted = adapter_state_dict(again), adapter_state_dict(model)
        assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("family", "path", "variant"),
    [("mixtral", "folder", "lora"), *(("qwen", "a.safetensors", v) for v in ("lora", "dora"))],
)
def test_stacks_become_single_experts_and_stacks_again(family: str, path: str, variant: str, tmp_path: Path) -> None:
    model = adapted(new(family), STACKED, rank_pattern={"layers.0.mlp.experts.*": 3}, variant=variant)
    lp.save_adapter(model, tmp_path / path)
    loaded = lp.load_adapter(old(family), tmp_path / path, trainable=True)
    assert (loaded(X) - new(family)(X)).abs().max() > 1e-3
    same(loaded, model)
    memory = [tensor.untyped_storage().data_ptr() for tensor in adapter_state_dict(loaded).values()]
    assert len(set(memory)) == len(memory)  # w1 and w3 start from one A, and are trained apart
    lp.save_adapter(loaded, tmp_path / f"b{path}")
    state = adapter_state_dict(lp.load_adapter(new(family), tmp_path / f"b{path}"))
    wanted = adapter_state_dict(model)
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)


PARTS = {
    "one expert": (["experts.1.w1", "experts.1.w3", "experts.1.w2"], 8),
    "the gates alone": (["w1"], 8),
    "one up": (["layers.1.*.experts.0.w3"], 8),
    "another of each": (["experts.0.w1", "experts.2.w3", "layers.0.*.experts.1.w2"], 8),
}


@pytest.mark.parametrize("part", PARTS)
def test_experts_without_an_adapter_stay_as_they_are(part: str, tmp_path: Path) -> None:
    targets, alpha = PARTS[part]
    model = adapted(old("mixtral"), targets, alpha=alpha)
    lp.save_adapter(model, tmp_path / "folder")
    loaded = lp.load_adapter(new("mixtral"), tmp_path / "folder")
    assert (loaded(X) - new("mixtral")(X)).abs().max() > 1e-4
    same(loaded, model)


def test_values_go_into_an_adapter_that_is_there(tmp_path: Path) -> None:
    model = adapted(old("qwen"), list(QWEN), alpha=3)
    there = adapted(new("qwen"), STACKED[2:], r=5, alpha=7)
    held = {name: id(tensor) for name, tensor in there.named_parameters()}
    lp.load_adapter(there, lp.files.to_peft(model), replace=True)
    same(there, model)
    assert {name: id(tensor) for name, tensor in there.named_parameters()} == held


@pytest.mark.parametrize("family", ["mixtral", "qwen"])
def test_stacks_are_merged_into_a_checkpoint_of_single_experts(family: str, tmp_path: Path) -> None:
    save_file(old(family).state_dict(), tmp_path / "base.safetensors")
    model = adapted(new(family), STACKED)
    lp.save_adapter(model, tmp_path / "a.safetensors")
    lp.merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    merged = old(family)
    merged.load_state_dict(load_file(tmp_path / "out.safetensors"))
    same(merged, model)


def test_the_names_of_a_file_and_those_of_experts(tmp_path: Path) -> None:
    model = adapted(old("mixtral"), single_targets("mixtral"))
    lp.save_adapter(model, tmp_path / "folder")
    outer = nn.ModuleDict({"body": new("mixtral")})
    lp.load_adapter(outer, tmp_path / "folder", names={"": "body"})
    same(outer["body"], model)
    stacked = adapted(new("mixtral"), STACKED)
    lp.save_adapter(stacked, tmp_path / "stacked")
    outer = nn.ModuleDict({"body": old("mixtral")})
    lp.load_adapter(outer, tmp_path / "stacked", names={"": "body"})
    same(outer["body"], stacked)


def test_dropout_that_a_parameter_cannot_have_is_left_out_with_a_warning(tmp_path: Path) -> None:
    model = adapted(old("qwen"), ["q_proj", *QWEN], dropout=0.1)
    lp.save_adapter(model, tmp_path / "folder")
    with pytest.warns(
        UserWarning, match=r"there is no dropout, so that of 'layers\.0\.mlp\.experts\.down_proj', .* is left out"
    ):
        loaded = lp.load_adapter(new("qwen"), tmp_path / "folder")
    same(loaded, model.eval())
    drops = {name: layer.spec.dropout for name, layer in described(loaded).items()}
    assert drops["layers.0.q_proj"] == 0.1 and drops["layers.0.mlp.experts.down_proj"] == 0.0


def described(model: nn.Module) -> dict[str, Any]:
    return describe(State(model), "default").layers


# ---- refused -----------------------------------------------------------------------------------------------------


def fewer(model: nn.Module) -> nn.Module:
    for layer in model.layers:  # type: ignore[union-attr]
        del layer.mlp.experts[2:]  # type: ignore[union-attr]
    return model


def turned(model: nn.Module) -> nn.Module:
    for layer in model.layers:  # type: ignore[union-attr]
        layer.mlp.experts.is_transposed = True  # type: ignore[union-attr]
    return model


def narrower(model: nn.Module) -> nn.Module:
    for layer in model.layers:  # type: ignore[union-attr]
        layer.mlp.experts.down_proj = nn.Parameter(torch.zeros(COUNT, WIDTH, INNER - 1))  # type: ignore[union-attr]
    return model


AT = "'layers.0.mlp.experts"
REFUSED: dict[str, tuple[Callable[[], nn.Module], list[str], dict[str, Any], Callable[[], nn.Module], str]] = {
    "fewer experts": (
        lambda: new("qwen"), STACKED[2:], {}, lambda: fewer(old("qwen")),
        f"{AT}.gate_up_proj' has shape (3, 12, 4), and the layers {AT}.0.gate_proj' and so on do not have its rows",
    ),
    "more experts": (
        lambda: old("qwen"), ["experts.2.up_proj"], {}, lambda: two(new("qwen")),
        f"{AT}.gate_up_proj' has 2 experts, and there is an adapter of 2",
    ),
    "rows of gate and up in turns": (
        lambda: old("qwen"), ["up_proj"], {}, lambda: turned(new("qwen")),
        f"{AT}.0.up_proj': the model has no such module",
    ),
    "other shapes": (
        lambda: old("qwen"), ["down_proj"], {}, lambda: narrower(new("qwen")),
        f"{AT}.0.down_proj': lora_A has shape (2, 6), expected (2, 5)",
    ),
    "a rank that would be filled up on all": (
        lambda: old("qwen"), ["experts.0.up_proj"], {"r": 5}, lambda: new("qwen"),
        f"{AT}.gate_up_proj': rank 5 of a few experts is above that of their matrices; resize it first",
    ),
    "dora of some": (
        lambda: old("qwen"), ["gate_proj"], {"variant": "dora"}, lambda: new("qwen"),
        f"{AT}.gate_up_proj': variant 'dora' needs an adapter on each of 3 experts to be stacked",
    ),
}  # fmt: skip


def two(model: nn.Module) -> nn.Module:
    for layer in model.layers:  # type: ignore[union-attr]
        for name, parameter in layer.mlp.experts.named_parameters():  # type: ignore[union-attr]
            setattr(layer.mlp.experts, name, nn.Parameter(parameter[:2].detach()))  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    make, targets, settings, into, line = REFUSED[case]
    lp.save_adapter(adapted(make(), targets, **settings), tmp_path / "a.safetensors")
    model = into()
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    with pytest.raises(ValueError, match=re.escape(line)):
        lp.load_adapter(model, tmp_path / "a.safetensors")
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before


def test_a_high_rank_of_all_experts_is_taken(tmp_path: Path) -> None:
    model = adapted(old("qwen"), ["down_proj", "up_proj"], r=9)
    lp.save_adapter(model, tmp_path / "a.safetensors")
    same(lp.load_adapter(new("qwen"), tmp_path / "a.safetensors"), model)


def test_values_that_are_not_finite_are_refused_by_their_own_names(tmp_path: Path) -> None:
    model = adapted(old("qwen"), ["up_proj"])
    lp.save_adapter(model, tmp_path / "a.safetensors")
    data = read_adapter(tmp_path / "a.safetensors")
    data.layers["layers.1.mlp.experts.2.up_proj"].tensors["lora_B"][0, 0] = torch.nan
    line = "'layers.1.mlp.experts.2.up_proj.lora_B' has values that are not finite"
    with pytest.raises(ValueError, match=re.escape(line)):
        lp.load_adapter(new("qwen"), data)


def test_variants_of_experts_that_differ_are_refused() -> None:
    one = described(adapted(old("qwen"), ["experts.0.up_proj"]))
    other = described(adapted(old("qwen"), ["experts.1.up_proj"], variant="lora_fa"))
    with pytest.raises(ValueError, match="its experts have different variants, and one adapter of all has one"):
        lp.load_adapter(new("qwen"), SavedAdapter({**one, **other}, {}))


# ---- vLLM ------------------------------------------------------------------------------------------------------------


def typed(model: nn.Module, kind: str) -> nn.Module:
    model.config = SimpleNamespace(model_type=kind)  # type: ignore[assignment]
    return model


ALONE = {"all": STACKED, "gate and up": [STACKED[2]], "down": [STACKED[3]], "one layer": ["layers.1.*.experts.*"]}


@pytest.mark.parametrize("targets", ALONE)
@pytest.mark.parametrize(("family", "kind"), [("mixtral", "mixtral"), ("qwen", "qwen3_moe")])
def test_vllm_gets_experts_one_by_one(family: str, kind: str, targets: str) -> None:
    model = typed(adapted(new(family), ALONE[targets], rank_pattern={ALONE[targets][0]: 3}), kind)
    config, tensors = lp.files.to_peft(model, for_="vllm")
    pairs = read_by_vllm(tensors, config)
    assert {len(A) for A, _ in pairs.values()} == {config["r"]} == {3}
    assert "target_parameters" not in config and (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    same(served_one_by_one(old(family), pairs, OLD[family][1]), model)


@pytest.mark.parametrize("targets", ["all", "gate and up", "down"])
@pytest.mark.parametrize("transposed", [False, True])
def test_vllm_gets_stacks_where_it_has_stacks(targets: str, transposed: bool, tmp_path: Path) -> None:
    def base() -> nn.Module:
        model = new("qwen")
        for layer in model.layers:  # type: ignore[union-attr]
            experts = layer.mlp.experts  # type: ignore[union-attr]
            experts.is_transposed = transposed
            for name, parameter in [*experts.named_parameters()] if transposed else ():
                setattr(experts, name, nn.Parameter(parameter.detach().mT.contiguous()))
            if transposed:
                experts.forward = functools.partial(transposed_forward, experts)
        return model

    def transposed_forward(experts: Any, x: Tensor, mix: Tensor) -> Tensor:
        plain = SimpleNamespace(gate_up_proj=experts.gate_up_proj.mT, down_proj=experts.down_proj.mT)
        return Stacked.forward(plain, x, mix)  # type: ignore[arg-type]

    model = typed(adapted(base(), ALONE[targets]), "gpt_oss")
    report = lp.export_adapter(model, tmp_path, for_="vllm")
    assert report.options == "--enable-lora --max-lora-rank 8"
    pairs = read_by_vllm(load_file(tmp_path / "adapter_model.safetensors"), {"lora_alpha": 1, "r": 1})
    same(served_in_stacks(base(), pairs), model)


def test_vllm_gets_the_experts_of_a_model_that_has_them_one_by_one() -> None:
    model = adapted(old("mixtral"), ["experts.1.w1", "layers.0.*.experts.0.w2", "gate"])
    config, tensors = lp.files.to_peft(model, for_="vllm")
    same(served_one_by_one(old("mixtral"), read_by_vllm(tensors, config), MIXTRAL), model)


def test_experts_whose_names_vllm_has_for_itself_are_refused() -> None:
    model = typed(adapted(new("qwen"), STACKED[1:3]), "mine")
    with pytest.raises(ValueError, match="vLLM's names for the experts of model type 'mine' are not known") as error:
        lp.files.to_peft(model, for_="vllm")
    assert "'layers.0.mlp.gate.weight': vLLM takes adapters of Linear" in str(error.value)

"""Adapters of rows, attention, parameters and experts go to PEFT and come from it with equal updates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from peft_support import (
    DOUBLED,
    Attention,
    Away,
    first,
    gpt2_linear,
    made_by_peft,
    opened_by_peft,
    peft,
    read_config,
    same,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_plus
from lora_plus.files import adapter_state_dict

pytestmark = pytest.mark.peers


class Experts(nn.Module):
    """Stacks whose names are not in the order in which the module has them, a matrix, and layers between them."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, 6, 4))
        self.down = nn.Parameter(torch.randn(count, 4, 6))
        self.mix = nn.Parameter(torch.randn(4, 5))
        self.gate = nn.Linear(4, 4)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x)[0]
        h = torch.einsum("nti,eoi->ento", self.gate(x), self.up).tanh()
        return torch.einsum("ento,eio->nti", h, self.down) @ self.mix


class TransposedExperts(nn.Module):
    """Stacks of (in, out), of which PEFT is told by an attribute."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nti,eio->nto", x, self.up)


class SilentExperts(TransposedExperts):
    """The same, without the attribute."""

    is_transposed = False


class Fused(nn.Module):
    """One layer that computes q, k and v."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.c_attn = layer

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).split([4, 2, 2], dim=-1)
        return torch.cat([q.tanh(), k.sin(), v], dim=-1)


ROWS = {"fused": {"part.c_attn": {"q": 4, "k": 2, "v": 2}}}
QV = ["part.c_attn.q", "part.c_attn.v"]
TOKENS = torch.tensor([[0, 1, 2], [4, 4, 6]])
AWAY: dict[str, Away] = {
    "rows": Away(lambda: Fused(nn.Linear(4, 8)), QV, ROWS),
    "rows of different rank": Away(lambda: Fused(nn.Linear(4, 8)), QV, {**ROWS, "rank_pattern": {QV[1]: 5}}),
    "rows of different scale, rslora": Away(
        lambda: Fused(nn.Linear(4, 8)), QV,
        {**ROWS, "rank_pattern": {QV[1]: 5}, "alpha_pattern": {QV[0]: -7}, "scaling": "rslora"},
    ),
    "rows of one scale, rslora": Away(lambda: Fused(nn.Linear(4, 8)), QV, {**ROWS, "scaling": "rslora"}),
    "rows of a transposed layer": Away(
        lambda: Fused(gpt2_linear(8, 4)), QV, {**ROWS, "rank_pattern": {QV[1]: 3}, "alpha_pattern": {QV[0]: 7}}
    ),
    "attention": Away(Attention, ["part.attn.q", "part.attn.k", "part.attn.v"]),
    "some of attention, and a layer": Away(
        Attention, ["part.attn.q", "part.attn.v", "part.mlp"],
        {"rank_pattern": {"part.attn.v": 3}, "alpha_pattern": {"part.attn.q": 7}},
    ),
    "some of attention, rslora": Away(Attention, ["part.attn.k", "part.mlp"], {"scaling": "rslora"}),
    "experts": Away(Experts, ["part.up"]),
    "several parameters of a module": Away(Experts, ["part.up", "part.down", "part.mix"]),
    "and what is inside it": Away(
        Experts, ["part.up", "part.down", "part.mix", "part.gate", "part.attn.q"], {"scaling": "rslora"}
    ),
    "one expert": Away(lambda: Experts(1), ["part.up"]),
    "transposed experts": Away(TransposedExperts, ["part.up"]),
    "experts of a stated layout": Away(SilentExperts, ["part.up"], {"layouts": {"part.up": "e i o -> e o i"}}),
    "experts of the other layout": Away(TransposedExperts, ["part.up"], {"layouts": {"part.up": "e o i -> e o i"}}),
    "a matrix of a stated layout": Away(Experts, ["part.mix"], {"layouts": {"part.mix": "i o -> o i"}}),
    "a linear layer's weight": Away(Attention, ["part.mlp.weight"]),
    "recurrent": Away(lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True), ["part"]),
    "one recurrent weight": Away(lambda: nn.GRU(4, 3), ["part.weight_hh_l0"], {"scaling": "rslora"}),
    "a cell": Away(lambda: nn.LSTMCell(4, 3), ["part"], inputs=((2, 4),)),
    "a bag": Away(lambda: nn.EmbeddingBag(7, 4), ["part"], inputs=(TOKENS,)),
}  # fmt: skip


@pytest.fixture(params=AWAY)
def away(request: pytest.FixtureRequest) -> Away:
    return AWAY[request.param]


# ---- to PEFT ---------------------------------------------------------------------------------------------------------


def test_peft_computes_the_same(away: Away, tmp_path: Path) -> None:
    model, arguments = away.adapted(), away.arguments()
    lora_plus.save_adapter(model, tmp_path)
    theirs, wanted = opened_by_peft(away.base(), tmp_path), first(model(*arguments))
    assert (wanted - first(away.base()(*arguments))).abs().max() > 1e-2, "the adapter is inert"
    same(first(theirs(*arguments)), wanted)
    same(first(theirs.merge_and_unload()(*arguments)), wanted)


def test_what_peft_saves_again_is_still_the_same(away: Away, tmp_path: Path) -> None:
    model, arguments = away.adapted(), away.arguments()
    lora_plus.save_adapter(model, tmp_path / "ours")
    opened_by_peft(away.base(), tmp_path / "ours").save_pretrained(str(tmp_path / "theirs"))
    loaded = lora_plus.load_adapter(away.base(), tmp_path / "theirs")
    same(first(loaded(*arguments)), first(model(*arguments)))
    # once what has one adapter there has one here, nothing changes any more
    lora_plus.save_adapter(loaded, tmp_path / "again")
    names = [tmp_path / folder / "adapter_model.safetensors" for folder in ("ours", "again")]
    one, other = map(load_file, names)
    assert {name: tensor.shape for name, tensor in one.items()} == {name: t.shape for name, t in other.items()}
    if "layouts" not in away.options:
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_experts_and_rows_have_peft_s_shapes(tmp_path: Path) -> None:
    lora_plus.save_adapter(AWAY["several parameters of a module"].adapted(), tmp_path / "a")
    key = "base_model.model.part"
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "a" / "adapter_model.safetensors").items()}
    assert shapes == {
        f"{key}.lora_A.weight": (2, 5),
        f"{key}.lora_B.weight": (4, 2),
        f"{key}.base_layer.lora_A.weight": (6, 6),
        f"{key}.base_layer.lora_B.weight": (4, 6),
        f"{key}.base_layer.base_layer.lora_A.weight": (6, 4),
        f"{key}.base_layer.base_layer.lora_B.weight": (6, 6),
    }
    config = read_config(tmp_path / "a")
    assert config["target_parameters"] == ["part.down", "part.mix", "part.up"]
    assert (config["target_modules"], config["rank_pattern"], config["r"]) == ([], {}, 2)
    lora_plus.save_adapter(AWAY["rows of different rank"].adapted(), tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    A, B = (tensors[f"{key}.c_attn.lora_{part}.weight"] for part in "AB")
    assert (tuple(A.shape), tuple(B.shape)) == ((7, 4), (8, 7))
    assert B[:4, :2].count_nonzero() == 8 and B[6:, 2:].count_nonzero() == 10 and B.count_nonzero() == 18
    assert read_config(tmp_path / "b")["r"] == 7


def test_rows_of_one_scale_keep_their_tensors(tmp_path: Path) -> None:
    model = AWAY["rows"].adapted()
    lora_plus.save_adapter(model, tmp_path)
    config, own = read_config(tmp_path), adapter_state_dict(model)
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    B = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.part.c_attn.lora_B.weight"]
    assert torch.equal(B[:4, :2], next(t for name, t in own.items() if "q" in name and "lora_B" in name))


def test_parameters_of_different_rank_or_alpha_get_patterns(tmp_path: Path) -> None:
    away = Away(Experts, ["part.up", "part.down", "part.gate"],
                {"rank_pattern": {"part.down": 3}, "alpha_pattern": {"part.up": 7}})  # fmt: skip
    model, arguments = away.adapted(), away.arguments()
    lora_plus.save_adapter(model, tmp_path)
    with pytest.warns(RuntimeWarning, match="keys did not match any targeted module and were ignored"):
        theirs = peft.PeftModel.from_pretrained(away.base(), str(tmp_path)).eval()  # who uses them nevertheless
    same(theirs(*arguments), model(*arguments))
    loaded = lora_plus.load_adapter(away.base(), tmp_path)
    same(loaded(*arguments), model(*arguments))


# ---- from PEFT -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Back:
    """A model, a PEFT config, and the parameters that it adapts, with the key and the form of each."""

    make: Callable[[], nn.Module]
    config: dict[str, Any]
    updates: dict[str, tuple[str, str]]
    inputs: tuple[Any, ...] = ((2, 3, 4),)

    def base(self) -> nn.Module:
        return Away(self.make, []).base()


WHOLE, STACK, TRANSPOSED = "or,ri->oi", "ore,eri->eoi", "ore,eri->eio"
BACK: dict[str, Back] = {
    "attention": Back(Attention, {"target_modules": ["attn"], "lora_dropout": 0.1}, {
        "part.attn.in_proj_weight": ("part.attn", WHOLE),
        "part.attn.out_proj.weight": ("part.attn.base_layer.out_proj", WHOLE),
    }),
    "attention, patterns": Back(
        Attention,
        {"target_modules": ["attn", "mlp"], "rank_pattern": {"attn": 3}, "alpha_pattern": {"attn": 1},
         "use_rslora": True},
        {
            "part.attn.in_proj_weight": ("part.attn", WHOLE),
            "part.attn.out_proj.weight": ("part.attn.base_layer.out_proj", WHOLE),
            "part.mlp.weight": ("part.mlp", WHOLE),
        },
    ),
    "experts": Back(
        Experts, {"target_modules": ["gate"], "target_parameters": ["mix", "down", "part.up"]},
        {
            "part.up": ("part.base_layer.base_layer", STACK),
            "part.down": ("part.base_layer", STACK),
            "part.mix": ("part", WHOLE),
            "part.gate.weight": ("part.base_layer.base_layer.base_layer.gate", WHOLE),
        },
    ),
    "experts, attention inside": Back(
        Experts, {"target_modules": ["part.attn"], "target_parameters": ["part.up"]},
        {
            "part.up": ("part", STACK),
            "part.attn.in_proj_weight": ("part.base_layer.attn", WHOLE),
            "part.attn.out_proj.weight": ("part.base_layer.attn.base_layer.out_proj", WHOLE),
        },
    ),
    "one expert": Back(
        lambda: Experts(1), {"target_modules": [], "target_parameters": ["up"]}, {"part.up": ("part", STACK)}
    ),
    "transposed experts": Back(
        TransposedExperts, {"target_modules": [], "target_parameters": ["up"]}, {"part.up": ("part", TRANSPOSED)}
    ),
    "recurrent": Back(
        lambda: nn.LSTM(4, 3), {"target_modules": [], "target_parameters": ["part.weight_ih_l0", "part.weight_hh_l0"]},
        {"part.weight_ih_l0": ("part.base_layer", WHOLE), "part.weight_hh_l0": ("part", WHOLE)},
    ),
    "a bag": Back(
        lambda: nn.EmbeddingBag(7, 4), {"target_modules": [], "target_parameters": ["part.weight"]},
        {"part.weight": ("part", WHOLE)}, (TOKENS,),
    ),
    "attention's own weight": Back(
        Attention, {"target_modules": [], "target_parameters": ["in_proj_weight"]},
        {"part.attn.in_proj_weight": ("part.attn", WHOLE)},
    ),
}  # fmt: skip


def explicit(
    base: nn.Module, folder: Path, updates: Mapping[str, tuple[str, str]], scale: Callable[[str], float]
) -> nn.Module:
    """The base with W + s B A, by the definition of PEFT's tensors."""
    tensors, model = load_file(folder / "adapter_model.safetensors"), copy.deepcopy(base)
    with torch.no_grad():
        for name, (path, form) in updates.items():
            A, B = (tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
            weight = model.get_parameter(name)
            if form != WHOLE:
                count = len(weight)
                A, B = A.reshape(count, -1, A.shape[1]), B.reshape(len(B), -1, count)
            weight += scale(path) * torch.einsum(form, B, A)
    assert len(tensors) == 2 * len(updates)
    return model


@pytest.mark.parametrize("name", BACK)
def test_what_peft_saved_is_w_plus_s_b_a(name: str, tmp_path: Path) -> None:
    back = BACK[name]
    theirs = made_by_peft(back.base(), r=2, **{"lora_alpha": 5, **back.config})
    theirs.save_pretrained(str(tmp_path))
    patterns = "use_rslora" in back.config  # which give attention rank 3 and alpha 1
    wanted = explicit(
        back.base(),
        tmp_path,
        back.updates,
        lambda path: 2.5 if not patterns else 3**-0.5 if "attn" in path else 5 * 2**-0.5,
    )
    doubled = any(path.endswith("base_layer.out_proj") for path, _ in back.updates.values())
    if doubled:
        with pytest.warns(UserWarning, match=DOUBLED):
            loaded = lora_plus.load_adapter(back.base(), tmp_path)
    else:
        loaded = lora_plus.load_adapter(back.base(), tmp_path)
    arguments = Away(back.make, [], inputs=back.inputs).arguments()
    same(first(loaded(*arguments)), first(wanted(*arguments)))
    assert (first(wanted(*arguments)) - first(back.base()(*arguments))).abs().max() > 1e-2
    if not doubled:
        same(first(theirs(*arguments)), first(wanted(*arguments)))
    merged = lora_plus.merge_and_unload(loaded).state_dict()
    for key, weight in wanted.state_dict().items():
        same(merged[key], weight)


def test_a_ratio_of_scales_does_not_cost_half_precision(tmp_path: Path) -> None:
    away = Away(lambda: Fused(nn.Linear(4, 8)), QV, {**ROWS, "alpha_pattern": {QV[0]: 7}})
    model = lora_plus.inject_lora(away.base().bfloat16(), away.targets, r=2, alpha=3, dtype=torch.bfloat16,
                                  fused=ROWS["fused"], alpha_pattern={QV[0]: 7})  # fmt: skip
    lora_plus.save_adapter(randomise(model), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.part.c_attn.lora_{part}.weight"].double() for part in "AB")
    config = read_config(tmp_path)
    merged = config["lora_alpha"] / config["r"] * B @ A
    q, v = model.part.c_attn.row_blocks()
    for site, rows in ((q, slice(0, 4)), (v, slice(6, 8))):
        update = (
            site.lora_B["default"].double() @ site.lora_A["default"].double() * site.lora_adapters["default"].spec.scale
        )
        torch.testing.assert_close(merged[rows], update, rtol=1e-5, atol=1e-6)

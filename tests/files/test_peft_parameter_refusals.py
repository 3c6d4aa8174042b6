"""What PEFT cannot hold of attention, parameters and rows is not written, and what is not its own is not read."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from peft_support import assert_refused, gpt2_linear, opened_by_peft
from safetensors.torch import save_file
from sites import adapter_sites
from torch import Tensor, nn

import lora_plus

pytestmark = pytest.mark.peers

# ---- writing ---------------------------------------------------------------------------------------------------------


class Owner(nn.Module):
    """A matrix and a layer."""

    def __init__(self, **others: nn.Module) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 4)
        for name, module in others.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ self.w)


def experts(count: int) -> nn.Module:
    owner = Owner()
    owner.w = nn.Parameter(torch.randn(count, 4, 4))
    owner.is_transposed = True
    return owner


def silent() -> nn.Module:
    module = nn.Module()
    module.w = nn.Parameter(torch.randn(4, 4))
    return module


def attention(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(4, 2, **options)


NEED_ONE_WEIGHT = "PEFT adapts attention only where q, k and v have one weight together"
NO_DORA = "PEFT has no DoRA for parameters, attention modules and blocks of rows"
UNWRITTEN: dict[str, tuple[Callable[[], dict[str, nn.Module]], list[Any], dict[str, Any], list[str]]] = {
    "a transposed convolution": (
        lambda: {"up": nn.ConvTranspose2d(4, 3, 2)}, ["up"], {}, ["'up': PEFT has no adapter for ConvTranspose2d"]
    ),
    "attention of several widths": (
        lambda: {"a": attention(kdim=3)}, ["a"], {},
        [f"'a.{part}': {NEED_ONE_WEIGHT}, in_proj_weight" for part in ("k", "out_proj", "q", "v")],
    ),
    "only the output of such attention": (
        lambda: {"a": attention(kdim=3)}, ["a.out"], {}, [f"'a.out_proj': {NEED_ONE_WEIGHT}, in_proj_weight"]
    ),
    "a bilinear layer": (
        lambda: {"b": nn.Bilinear(3, 4, 2)}, ["b"], {},
        ["'b.weight': PEFT takes the weight of shape (2, 3, 4) for a stack of matrices, and it is one"],
    ),
    "a single transposed expert": (
        lambda: {"e": experts(1)}, ["e.w"], {},
        ["'e.w': PEFT adds the update of a single expert the wrong way round where is_transposed is set"],
    ),
    "a container": (
        lambda: {"p": nn.ParameterDict({"w": torch.randn(4, 4)})}, ["p.w"], {},
        ["'p.w': PEFT adapts a parameter while its module is called, and 'p' has no forward"],
    ),
    "a module without forward": (
        lambda: {"p": silent()}, ["p.w"], {},
        ["'p.w': PEFT adapts a parameter while its module is called, and 'p' has no forward"],
    ),
    "a name that another one ends in": (
        lambda: {"o": Owner(), "x": nn.Sequential(OrderedDict(o=Owner()))}, [re.compile(r"o\.w")], {},
        ["'o.w': PEFT would adapt 'x.o.w' too, which ends in the same"],
    ),
    "a name that PEFT's own end in": (
        lambda: {"default": nn.Linear(4, 4), "q": nn.Linear(4, 4)}, ["default.weight", "q"], {},
        [f"'default.weight': PEFT would adapt 'q.lora_{part}.default.weight' too, which ends in the same"
         for part in "AB"],
    ),
    "a name of PEFT's": (
        lambda: {"o": Owner(base_layer=Owner())}, ["o.base_layer.w"], {},
        ["'o.base_layer.w': PEFT takes 'base_layer' in a name for its own"],
    ),
    "parameters inside each other": (
        lambda: {"o": Owner(i=Owner())}, ["o.w", "o.i.w"], {},
        ["'o.i.w': PEFT cannot adapt it together with parameters of 'o', which is around it"],
    ),
    "attention and its bias": (
        lambda: {"a": attention(add_bias_kv=True)}, ["a.q", "a.bias_k"], {},
        ["'a.bias_k': PEFT adapts either 'a' or its parameters"],
    ),
    "DoRA": (
        lambda: {"a": attention(), "o": Owner()}, ["a.out", "o.w"], {"variant": "dora"},
        [f"'a.out_proj': {NO_DORA}", f"'o.w': {NO_DORA}"],
    ),
    "attention behind a transposed layer": (
        lambda: {"c": gpt2_linear(4, 4), "a": attention()}, ["c", "a.q"], {},
        ["'a': PEFT would transpose its out_proj, because the linear layer before it is a transposed one"],
    ),
    "a parameter and a transposed layer": (
        lambda: {"o": Owner(), "c": gpt2_linear(4, 4)}, ["c", "o.w"], {},
        ["['o.w']: PEFT adapts no parameters of a model whose last adapted linear layer is a transposed one"],
    ),
    "a head inside": (
        lambda: {"o": Owner()}, ["o.w"], {"train_also": ["o.head"]},
        ["train_also 'o.head': PEFT does not find it inside 'o', whose parameters it adapts"],
    ),
}  # fmt: skip
"""What PEFT's format cannot hold: the model's parts, targets and options, and all that the writer says."""


@pytest.mark.parametrize("name", UNWRITTEN)
def test_what_peft_cannot_adapt_is_not_written(name: str, tmp_path: Path) -> None:
    make, targets, options, lines = UNWRITTEN[name]
    model = randomise(lora_plus.inject_lora(nn.ModuleDict(make()), targets, r=2, **options))
    with pytest.raises(ValueError) as error:
        lora_plus.save_adapter(model, tmp_path / "a")
    assert str(error.value).split("\n") == [
        "the adapter cannot be written in PEFT's format:",
        *(f"  {line}" for line in lines),
    ]
    assert not (tmp_path / "a").exists()
    lora_plus.save_adapter(model, tmp_path / "a.safetensors")


def test_the_model_s_own_parameters_are_not_written(tmp_path: Path) -> None:
    for model, target, line in (
        (Owner(), "w", "'w': PEFT adapts no parameter of the model itself, only of modules inside it"),
        (attention(), "q", "the model itself is adapted, and PEFT names only modules inside a model"),
    ):
        randomise(lora_plus.inject_lora(model, [target], r=2))
        with pytest.raises(ValueError, match=re.escape(f"cannot be written in PEFT's format:\n  {line}") + "$"):
            lora_plus.save_adapter(model, tmp_path / "a")


def test_layers_that_suit_each_other_are_written_whatever_their_order(tmp_path: Path) -> None:
    """What `fan_in_fan_out` is for a layer in PEFT depends on the layers before it."""

    def base(*names: str) -> nn.Module:
        torch.manual_seed(0)
        parts = {"c": gpt2_linear(4, 4), "l": nn.Linear(4, 4), "o": Owner(), "a": attention()}
        model = nn.ModuleDict({name: parts[name] for name in names})
        model.forward = lambda x: sum(model[n](x, x, x)[0] if n == "a" else model[n](x) for n in names)
        return model.double()

    x = torch.randn(3, 4, dtype=torch.float64)
    for names in ("acl", "cla", "lac", "aclo", "col"):
        model = lora_plus.inject_lora(base(*names), [{"a": "a.q", "o": "o.w"}.get(name, name) for name in names], r=2)
        lora_plus.save_adapter(randomise(model), tmp_path / names)
        theirs = opened_by_peft(base(*names), tmp_path / names)
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-12, atol=1e-12)
        loaded = lora_plus.load_adapter(base(*names), tmp_path / names)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-12, atol=1e-12)


# ---- reading ---------------------------------------------------------------------------------------------------------


class Others(nn.Module):
    """What PEFT adapts as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.attention = attention()
        self.owner = experts(3)
        self.bilinear = nn.Bilinear(3, 4, 2)
        self.up = nn.ConvTranspose1d(4, 4, 1)
        self.fc = gpt2_linear(4, 4)


ATTENTION, OWNER = "base_model.model.attention", "base_model.model.owner"
OUT = f"{ATTENTION}.base_layer.out_proj"
FACTORS = {f"{ATTENTION}.lora_A.weight": (2, 4), f"{ATTENTION}.lora_B.weight": (12, 2),
           f"{OUT}.lora_A.weight": (2, 4), f"{OUT}.lora_B.weight": (4, 2)}  # fmt: skip
STACKED = {f"{OWNER}.lora_A.weight": (6, 4), f"{OWNER}.lora_B.weight": (4, 6)}
UNREAD: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], list[str]]] = {
    "no out_proj": (
        dict(list(FACTORS.items())[:2]), {},
        [f"'attention': base_layer.out_proj.lora_{part}.weight is missing" for part in "AB"],
    ),
    "only out_proj": (
        dict(list(FACTORS.items())[2:]), {}, [f"'attention': lora_{part}.weight is missing" for part in "AB"]
    ),
    "attention of another width": (
        FACTORS | {f"{ATTENTION}.lora_B.weight": (4, 2), f"{OUT}.lora_A.weight": (2, 3)}, {},
        ["'attention': lora_B.weight has shape (4, 2), expected (12, 2)",
         "'attention': base_layer.out_proj.lora_A.weight has shape (2, 3), expected (2, 4)"],
    ),
    "attention of another rank": (
        FACTORS, {"r": 3},
        ["'attention': rank 2 in the file, 3 in the config", "'attention': rank 2 in the file, 3 in the config"],
    ),
    "attention behind a transposed layer": (
        FACTORS, {"fan_in_fan_out": True},
        ["'attention': PEFT transposes the update of its out_proj, because fan_in_fan_out is on for it"],
    ),
    "DoRA of attention": (
        FACTORS | {f"{ATTENTION}.lora_magnitude_vector": (12,), f"{OUT}.lora_magnitude_vector": (4,)},
        {"use_dora": True}, ["'attention': PEFT has no DoRA for parameters and attention modules"] * 2,
    ),
    "a stack without target_parameters": (STACKED, {}, ["'owner' cannot be adapted: it is Owner"]),
    "a stack of another rank": (
        STACKED, {"r": 6, "target_parameters": ["owner.w"]}, ["'owner.w': rank 2 in the file, 6 in the config"]
    ),
    "a stack of another size": (
        STACKED | {f"{OWNER}.lora_A.weight": (7, 4)}, {"target_parameters": ["owner.w"]},
        ["'owner.w': rank 2.33333 in the file, 2 in the config"],
    ),
    "a stack of another width": (
        STACKED | {f"{OWNER}.lora_A.weight": (6, 3)}, {"target_parameters": ["owner.w"]},
        ["'owner.w': lora_A.weight has shape (6, 3), expected (6, 4)"],
    ),
    "flat": (
        STACKED | {f"{OWNER}.lora_A.weight": (24,)}, {"target_parameters": ["owner.w"]},
        ["'owner.w': lora_A.weight has shape (24,), expected two dimensions or more"],
    ),
    "a wrapper too many": (
        {key.replace("owner.", "owner.base_layer."): shape for key, shape in STACKED.items()},
        {"target_parameters": ["owner.w"]},
        [f"tensor '{OWNER}.base_layer.lora_{part}.weight': 'owner.base_layer' is neither a module nor where PEFT "
         "adapts a parameter with target_parameters ['owner.w']" for part in "AB"]
        + [f"'owner.w': lora_{part}.weight is missing" for part in "AB"],
    ),
    "a bilinear layer": (
        {"base_model.model.bilinear.lora_A.weight": (4, 4), "base_model.model.bilinear.lora_B.weight": (3, 4)},
        {"target_parameters": ["bilinear.weight"]},
        ["'bilinear.weight': PEFT takes the weight of shape (2, 3, 4) for a stack of matrices, and it is one"],
    ),
    "a vector": (
        {"base_model.model.linear.lora_A.weight": (2, 4), "base_model.model.linear.lora_B.weight": (4, 2)},
        {"target_parameters": ["linear.bias"]},
        ["'linear.bias' cannot be adapted: it is parameter 'bias' of shape (4,), expected two or three dimensions, "
         "none of them 0"],
    ),
    "a transposed convolution": (
        {"base_model.model.up.lora_A.weight": (2, 4, 1), "base_model.model.up.lora_B.weight": (4, 2, 1)}, {},
        ["'up': PEFT has no adapter for ConvTranspose1d"],
    ),
    "base weights": (
        FACTORS | {f"{ATTENTION}.base_layer.in_proj_weight": (12, 4), f"{OUT}.base_layer.bias": (4,)}, {},
        [f"tensor '{key}' is one of the base model, which an adapter leaves alone, and differs from "
         "the model's; load that weight into the model first, or save the adapter again with "
         "save_embedding_layers=False" for key in (f"{ATTENTION}.base_layer.in_proj_weight", f"{OUT}.base_layer.bias")],
    ),
}  # fmt: skip
"""Shapes of the tensors in a folder, what its config says, and what is wrong with them."""


@pytest.mark.parametrize("name", UNREAD)
def test_a_wrong_file_of_attention_or_parameters_is_refused(name: str, tmp_path: Path) -> None:
    shapes, config, lines = UNREAD[name]
    write_folder(tmp_path, shapes, config)
    assert_refused(Others(), tmp_path, lines)


def test_the_shapes_that_are_wrong_there_are_right_here(tmp_path: Path) -> None:
    write_folder(tmp_path, FACTORS | STACKED, {"target_parameters": ["owner.w"]})
    loaded = lora_plus.load_adapter(Others(), tmp_path)
    parts = [f"attention.{part}" for part in ("q", "k", "v", "out_proj")]
    assert {name for name, _ in adapter_sites(loaded)} == {*parts, "owner.w"}


def write_folder(folder: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> None:
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "adapter_model.safetensors")
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(document))

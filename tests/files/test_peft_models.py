"""Whole models go to PEFT and come back, with patterns, heads and names that need care, and the other way round."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from peft_support import (
    DEEP_TOLERANCE,
    DTYPES,
    TOKENS,
    Net,
    V,
    count,
    made_by_peft,
    move,
    net,
    opened_by_peft,
    peft,
    read_config,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_plus
from lora_plus.files import adapter_state_dict
from lora_plus.model.tree import adapted_weights

pytestmark = pytest.mark.peers

# ---- to PEFT ---------------------------------------------------------------------------------------------------------

NETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "one setting": ([nn.Linear, nn.Conv1d], {"exclude": ["head"]}),
    "a name that others end in": ([re.compile("q")], {}),
    "a name inside, not on top": (["blocks.0.q"], {}),
    "names with regex characters": ([re.compile(re.escape(f"blocks.1.{V}"))], {}),
    "such a name beside others": (
        [re.compile("q"), re.compile(re.escape(f"blocks.0.{V}"))],
        {"rank_pattern": {re.compile(f".*{re.escape(V)}"): 3}}
    ),
    "mixed ranks": (
        ["q", "xq", "embed", "conv"], {"rank_pattern": {re.compile("q"): 3, "blocks.1.q": 5, "blocks.0.conv": 1}}
    ),
    "mixed alphas": (
        ["q", "xq", "embed", V],
        {"alpha_pattern": {re.compile("q"): 64, "blocks.1.q": 0.75, "embed": -2, f"blocks.0.{V}": 3}},
    ),
    "mixed ranks and alphas, rslora": (
        ["q", "xq", "embed", "fc", "conv"],
        {
            "scaling": "rslora",
            "rank_pattern": {re.compile("q"): 3, "blocks.1.q": 5, "fc": 3},
            "alpha_pattern": {re.compile("q"): 64, "blocks.0.q": 0.75, "xq": 1},
        },
    ),
    "dora": (["q", "xq", "embed", "fc", "conv"], {"variant": "dora", "rank_pattern": {"q": 3}}),
    "a head with buffers": (["q", "conv"], {"train_also": ["head"]}),
    "a part of a head": (["xq"], {"train_also": ["head.0"]}),
    "dropout": (["q"], {"dropout": 0.1}),
}  # fmt: skip
"""Targets and options of `inject_lora` on the net."""


def adapted_net(name: str, dtype: torch.dtype = torch.float64) -> Net:
    targets, options = NETS[name]
    if "exclude" in options:
        options = {**options, "exclude": [re.compile(r"head\..*")]}
    model = lora_plus.inject_lora(net(dtype), targets, **{"r": 2, "alpha": 4, **options})
    assert isinstance(model, Net)
    randomise(model)
    for head in options.get("train_also", ()):
        move(model.get_submodule(head))
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETS)
def test_a_whole_model_goes_to_peft_and_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted_net(name, dtype)
    lora_plus.save_adapter(model, tmp_path / "ours")
    theirs = opened_by_peft(net(dtype), tmp_path / "ours")
    wanted = model(TOKENS)
    tolerance = DEEP_TOLERANCE[dtype]
    assert (wanted - net(dtype)(TOKENS)).abs().max() > 1e-3
    torch.testing.assert_close(theirs(TOKENS), wanted, rtol=tolerance, atol=tolerance)
    # nothing else is adapted there
    adapted = {path.removesuffix(".lora_A").removesuffix(".lora_embedding_A").removeprefix("base_model.model.")
               for path, _ in theirs.named_modules() if path.endswith((".lora_A", ".lora_embedding_A"))
               if len(theirs.get_submodule(path))}  # fmt: skip
    adapted |= {path.removeprefix("base_model.model.") for path, module in theirs.named_modules()
                if getattr(module, "lora_embedding_A", None)}  # fmt: skip
    assert adapted == {path for path, _ in adapted_weights(model)}
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = lora_plus.load_adapter(net(dtype), tmp_path / "theirs")
    torch.testing.assert_close(again(TOKENS), wanted, rtol=tolerance, atol=tolerance)
    state, first = adapter_state_dict(again), adapter_state_dict(model)
    assert state.keys() == first.keys()
    assert all(torch.equal(state[key], first[key]) for key in first)


def test_layers_of_different_scaling_rules_get_the_right_scales(tmp_path: Path) -> None:
    model = net().requires_grad_(False)
    for layer, options in {
        model.q: {"r": 3, "alpha": 5, "scaling": "rslora"},
        model.xq: {"r": 3, "alpha": 5},
        model.blocks[0].q: {"r": 2, "alpha": 7, "scaling": "rslora"},
    }.items():
        lora_plus.inject_lora(layer, "", **options)
    randomise(model)
    lora_plus.save_adapter(model, tmp_path)
    assert read_config(tmp_path)["use_rslora"] is False
    for other in (opened_by_peft(net(), tmp_path), lora_plus.load_adapter(net(), tmp_path)):
        torch.testing.assert_close(other(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chosen", [20, 21, 27])
def test_many_names_stay_exact(chosen: int, tmp_path: Path) -> None:
    """From 20 names on, PEFT shortens a list to endings."""

    def deep() -> nn.Sequential:
        torch.manual_seed(0)
        blocks = [nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)}) for _ in range(28)]
        return nn.Sequential(*(Run(block) for block in blocks)).double()

    names = [f"{number}.block.q" for number in range(chosen)]
    model = randomise(lora_plus.inject_lora(deep(), names, r=1, rank_pattern={"1.block.q": 2}))
    lora_plus.save_adapter(model, tmp_path)
    theirs, x = opened_by_peft(deep(), tmp_path), torch.ones(1, 2, dtype=torch.float64)
    assert sum(path.endswith("lora_A.default") for path, _ in theirs.named_modules()) == chosen
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-12, atol=1e-12)


class Run(nn.Module):
    """A block of two layers."""

    def __init__(self, block: nn.ModuleDict) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block["k"](self.block["q"](x)).tanh()


@pytest.mark.parametrize(("first", "second"), [("lora_A", "lora_B"), ("lora_head", "default"), ("base_layer2", "lora")])
def test_module_names_that_look_like_adapters(first: str, second: str, tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        outer = nn.Module()
        outer.add_module(first, nn.Sequential(nn.Linear(3, 3)))
        outer.add_module(second, nn.Linear(3, 3))
        outer.forward = lambda x: getattr(outer, second)(getattr(outer, first)(x))
        return outer.double()

    model = randomise(lora_plus.inject_lora(base(), [f"{first}.0", second], r=2))
    lora_plus.save_adapter(model, tmp_path)
    x = torch.ones(2, 3, dtype=torch.float64)
    torch.testing.assert_close(lora_plus.load_adapter(base(), tmp_path)(x), model(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(opened_by_peft(base(), tmp_path)(x), model(x), rtol=1e-12, atol=1e-12)


# ---- from PEFT -------------------------------------------------------------------------------------------------------

PEFT_NETS: dict[str, dict[str, Any]] = {
    "suffix": {"target_modules": ["q"]},
    "regex": {"target_modules": r"blocks\.\d\.(q|conv)"},
    "all-linear": {"target_modules": "all-linear", "fan_in_fan_out": True},
    "layers_to_transform": {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    "excluded": {"target_modules": ["q"], "exclude_modules": ["blocks.0.q"]},
    "mixed": {
        "target_modules": ["q", "embed", "conv", V],
        "r": 4,
        "rank_pattern": {"^q": 3, r"blocks\.1\.q": 5},
        "alpha_pattern": {r"blocks\.0\.q": 0.5, "embed": 7, "conv": 2},
    },
    "mixed rslora": {"target_modules": ["q", "embed"], "use_rslora": True, "rank_pattern": {"embed": 5}},
    "dora": {"target_modules": ["q", "embed", "conv"], "use_dora": True},
    "heads": {"target_modules": ["xq"], "modules_to_save": ["head"]},
    "head's part": {"target_modules": ["xq"], "modules_to_save": ["head.0"]},
    "dropout": {"target_modules": ["q"], "lora_dropout": 0.25},
    "gaussian": {"target_modules": ["q"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["xq"], "r": 2, "init_lora_weights": "orthogonal"},
    "no init": {"target_modules": ["q", "embed"], "init_lora_weights": False},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PEFT_NETS)
def test_we_open_a_whole_peft_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = PEFT_NETS[name]
    theirs = made_by_peft(net(dtype), **config)
    theirs.save_pretrained(str(tmp_path))
    loaded = lora_plus.load_adapter(net(dtype), tmp_path)
    tolerance = DEEP_TOLERANCE[dtype]
    wanted = theirs(TOKENS)
    assert (wanted - net(dtype)(TOKENS)).abs().max() > 1e-3
    torch.testing.assert_close(loaded(TOKENS), wanted, rtol=tolerance, atol=tolerance)
    assert count(adapter_state_dict(loaded)) == count(load_file(tmp_path / "adapter_model.safetensors"))
    assert {layer.lora_adapters["default"].spec.dropout for _, layer in adapted_weights(loaded)} == {
        config.get("lora_dropout", 0)
    }
    lora_plus.save_adapter(loaded, tmp_path / "ours")
    torch.testing.assert_close(
        opened_by_peft(net(dtype), tmp_path / "ours")(TOKENS), wanted, rtol=tolerance, atol=tolerance
    )


def test_a_peft_model_is_refused_with_what_to_pass_instead(tmp_path: Path) -> None:
    lora_plus.save_adapter(lora_plus.inject_lora(net(), ["xq"]), tmp_path / "a.safetensors")
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["conv"]))
    before = {name: parameter.requires_grad for name, parameter in theirs.named_parameters()}
    says = r"needs the plain model: this one is a PeftModel; pass model.get_base_model\(\), or model.unload\(\) to drop"
    with pytest.raises(ValueError, match=says):
        lora_plus.load_adapter(theirs, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=says):
        lora_plus.inject_lora(nn.DataParallel(theirs), ["xq"])
    assert {name: parameter.requires_grad for name, parameter in theirs.named_parameters()} == before
    for plain in (theirs.get_base_model(), theirs.unload()):
        loaded = lora_plus.load_adapter(plain, tmp_path / "a.safetensors")
        assert {name for name, _ in adapted_weights(loaded)} == {"xq"}
        lora_plus.remove_lora(loaded)


def test_a_named_adapter_of_peft_opens_from_its_subfolder(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["q"]), adapter_name="mine")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    theirs.save_pretrained(str(tmp_path))
    loaded = lora_plus.load_adapter(net(), tmp_path / "mine", adapter="ours")
    torch.testing.assert_close(loaded(TOKENS), theirs.eval()(TOKENS), rtol=1e-12, atol=1e-12)


def test_two_adapters_of_one_peft_model_open_side_by_side(tmp_path: Path) -> None:
    """PEFT writes "default" into the folder itself and others into folders inside."""
    theirs = made_by_peft(net(), target_modules=["q"], r=2, lora_alpha=3)
    theirs.add_adapter("other", peft.LoraConfig(target_modules=["xq", "conv"], r=4, use_rslora=True))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".other" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    theirs.save_pretrained(str(tmp_path))
    model = lora_plus.load_adapter(net(), tmp_path)
    lora_plus.load_adapter(model, tmp_path / "other", adapter="other")
    for adapter in ("default", "other"):
        theirs.set_adapter(adapter)
        lora_plus.set_adapter(model, adapter)
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS), rtol=1e-11, atol=1e-11)
        lora_plus.save_adapter(model, tmp_path / "ours" / adapter, adapter=adapter)
        again = opened_by_peft(net(), tmp_path / "ours" / adapter)
        torch.testing.assert_close(again(TOKENS), theirs(TOKENS), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_changing_init_that_was_converted_on_save_opens(init: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["xq"], r=2, init_lora_weights=init)
    theirs = peft.get_peft_model(net(torch.float32), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(str(tmp_path / "start"))
    theirs.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    wanted = theirs.eval()(TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT loads the start as a second adapter, and advises against that
        theirs.save_pretrained(str(tmp_path / "end"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loaded = lora_plus.load_adapter(net(torch.float32), tmp_path / "end")
    assert loaded.xq.lora_adapters["default"].spec.r == 4
    torch.testing.assert_close(loaded(TOKENS), wanted, rtol=1e-5, atol=1e-5)


def test_an_init_that_starts_from_the_weight_but_leaves_it_alone_opens(tmp_path: Path) -> None:
    theirs = made_by_peft(net(torch.float32), target_modules=["xq"], r=2, init_lora_weights="mica")
    theirs.save_pretrained(str(tmp_path))
    loaded = lora_plus.load_adapter(net(torch.float32), tmp_path)
    torch.testing.assert_close(loaded(TOKENS), theirs(TOKENS), rtol=1e-4, atol=1e-4)


def test_overlapping_alpha_keys_that_peft_reordered_are_warned_of(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.ModuleDict({"q": nn.Linear(3, 3)}), nn.ModuleDict({"q": nn.Linear(3, 3)}))

    peft.get_peft_model(
        base(), peft.LoraConfig(target_modules=["q"], alpha_pattern={"q": 4, r"1\.q": 64})
    ).save_pretrained(str(tmp_path / "overlap"))
    with pytest.warns(UserWarning) as caught:
        model = lora_plus.load_adapter(base(), tmp_path / "overlap")
    assert [str(warning.message) for warning in caught] == [
        "alpha_pattern gives several values for '1.q'; the first key counts, but PEFT sorts the keys when it saves, so "
        "another may have been the first in training; check their scale"
    ]
    # the file's order, which PEFT goes by too
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path / "overlap"))
    scales = [theirs.base_model.model[place]["q"].scaling["default"] for place in (0, 1)]
    assert [layer.lora_adapters["default"].spec.scale for _, layer in adapted_weights(model)] == scales
    # keys that agree, or exclude each other, are no reason to warn
    for name, pattern in {"equal": {"q": 4, r"1\.q": 4}, "apart": {r"0\.q": 4, r"1\.q": 64}}.items():
        config = peft.LoraConfig(target_modules=["q"], alpha_pattern=pattern)
        peft.get_peft_model(base(), config).save_pretrained(str(tmp_path / name))
        lora_plus.load_adapter(base(), tmp_path / name)


def test_overlapping_rank_keys_that_peft_reordered_are_refused(tmp_path: Path) -> None:
    """PEFT cannot load its own file: the keys are sorted on the way, and the first that matches counts."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"q": nn.Linear(3, 3), "z": nn.ModuleDict({"q": nn.Linear(3, 3)})})

    config = peft.LoraConfig(target_modules=["q"], rank_pattern={"z.q": 2, "q": 3})
    peft.get_peft_model(base(), config).save_pretrained(str(tmp_path))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(base(), str(tmp_path))
    with pytest.raises(ValueError, match=r"'z.q': rank 2 in the file, 3 in the config"):
        lora_plus.load_adapter(base(), tmp_path)

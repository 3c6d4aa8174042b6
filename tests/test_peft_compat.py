"""PEFT opens what is written here, and the other way round, with equal outputs."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES, DORA, Case, Holder, randomise
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_plus
from lora_plus.layers import LoRALinear
from lora_plus.adapted_weight import adapted_weights

pytestmark = pytest.mark.peers
peft = pytest.importorskip("peft")
GPT2Linear = pytest.importorskip("transformers.pytorch_utils").Conv1D

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
DEEP_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}
"""For a whole model, through which errors grow."""
DTYPES = list(TOLERANCE)

PEFT_WARNS_OF_ITS_OWN_FILES = (
    # said whenever PEFT builds a LoRA layer on a grouped convolution, whoever wrote the file
    "LoRA adapter added to ConvNd layer with groups > 1. Merging is not supported.",
    # the setting is one for the whole file, and PEFT changes it on the way where a model has both nn.Linear and Conv1D
    "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. Setting fan_in_fan_out to False.",
    "fan_in_fan_out is set to False but the target module is `Conv1D`. Setting fan_in_fan_out to True.",
)

PEFT_DIFFERS = {
    "conv1d-gpt2": "PEFT knows transformers' class only; see GPT2",
    "conv1d-gpt2-dora": "PEFT knows transformers' class only; see GPT2",
    "embedding-max-norm": "the writer refuses it",
    "conv3d-groups-dora": "the writer refuses it",
    "conv1d-dilated-circular": "PEFT's A drops dilation and padding_mode",
    "conv2d-depthwise-reflect": "PEFT's A drops padding_mode",
    "conv2d-dora": "PEFT's A drops dilation",
    "conv2d-own": "PEFT makes A and B of the user's own class, with its own forward",
    "conv2d-unbatched-dora": "PEFT's DoRA takes the batch for the channels",
}
"""Cases that PEFT cannot express or computes in another way."""


def _floats(*shape: int) -> Callable[[torch.Generator, torch.dtype], Tensor]:
    return lambda generator, dtype: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


GPT2 = [
    Case("gpt2", lambda: _random_bias(GPT2Linear(5, 6)), _floats(2, 3, 6)),
    Case("gpt2-rslora", lambda: _random_bias(GPT2Linear(5, 6)), _floats(2, 3, 6), {"scaling": "rslora"}),
    Case("gpt2-dora", lambda: _random_bias(GPT2Linear(5, 6)), _floats(2, 3, 6), DORA),
]
PEER_CASES = [
    *(case for case in CASES if case.name not in PEFT_DIFFERS),
    *GPT2,
    Case("embedding-rslora", lambda: nn.Embedding(9, 4), CASES[[c.name for c in CASES].index("embedding")].make_input,
         {"scaling": "rslora"}),
    Case("conv1d-rslora", lambda: nn.Conv1d(4, 6, 3), _floats(2, 4, 9), {"scaling": "rslora"}),
    Case("conv1d-groups", lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1), _floats(2, 4, 9)),
    Case("conv2d-groups-rslora", lambda: nn.Conv2d(4, 6, 3, groups=2), _floats(2, 4, 7, 6), {"scaling": "rslora"}),
    Case("conv2d-depthwise", lambda: nn.Conv2d(4, 8, (3, 2), groups=4), _floats(2, 4, 5, 6)),
    Case("conv3d-groups", lambda: nn.Conv3d(2, 4, (1, 2, 1), groups=2), _floats(2, 2, 3, 4, 5)),
    Case("conv2d-plain-dora", lambda: nn.Conv2d(4, 6, (2, 3), padding=1), _floats(2, 4, 6, 7), DORA),
    Case("conv3d-dora", lambda: nn.Conv3d(2, 3, (1, 2, 3)), _floats(2, 2, 3, 4, 5), DORA),
]  # fmt: skip


def _random_bias(layer: nn.Module) -> nn.Module:
    nn.init.normal_(layer.bias)
    return layer


@pytest.fixture(params=PEER_CASES, ids=lambda case: case.name)
def peer_case(request: pytest.FixtureRequest) -> Case:
    return request.param


@contextmanager
def no_warnings() -> Iterator[None]:
    """Turn every warning into an error, but for those that PEFT gives for its own files too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in PEFT_WARNS_OF_ITS_OWN_FILES:
            warnings.filterwarnings("ignore", message=re.escape(message))
        yield


def opened_by_peft(base: nn.Module, path: Path) -> nn.Module:
    with no_warnings():
        return peft.PeftModel.from_pretrained(base, str(path)).eval()


def made_by_peft(base: nn.Module, seed: int = 5, **config: Any) -> nn.Module:
    """A PEFT model whose adapter tensors, and modules trained in full, are all random."""
    with no_warnings():
        model = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.3 * noise).to(parameter.dtype))
    return model


def peft_config(case: Case) -> dict[str, Any]:
    """The case's settings in PEFT's words; rank 4, because PEFT wants a multiple of the groups."""
    return {
        "target_modules": ["layer"],
        "r": 4,
        "lora_alpha": 5,
        "use_rslora": case.options.get("scaling") == "rslora",
        "use_dora": case.options.get("variant") == "dora",
        "fan_in_fan_out": case.name.startswith("gpt2"),
    }


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def numbers(tensors: dict[str, Tensor]) -> list[float]:
    """All values there are, sorted."""
    return sorted(value for tensor in tensors.values() for value in tensor.flatten().tolist())


def count(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


# ---- one layer, both ways --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_peft_opens_what_we_write(peer_case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = peer_case.adapted(dtype).eval(), peer_case.input(dtype)
    lora_plus.save_adapter(model, tmp_path)
    theirs = opened_by_peft(peer_case.model(dtype), tmp_path)
    base = peer_case.model(dtype).eval()
    assert (model(x) - base(x)).abs().max() > 1e-2, "the adapter is inert"
    torch.testing.assert_close(theirs(x), model(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_peft_saves_again_is_still_the_adapter(peer_case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = peer_case.adapted(dtype).eval(), peer_case.input(dtype)
    lora_plus.save_adapter(model, tmp_path / "ours")
    opened_by_peft(peer_case.model(dtype), tmp_path / "ours").save_pretrained(str(tmp_path / "theirs"))
    loaded = lora_plus.load_adapter(peer_case.model(dtype).eval(), tmp_path / "theirs")
    torch.testing.assert_close(loaded(x), model(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert loaded.layer.lora_specs["default"].r == peer_case.settings["r"]
    for name, tensor in lora_plus.adapter_state_dict(loaded).items():
        assert torch.equal(tensor, lora_plus.adapter_state_dict(model)[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_open_what_peft_writes(peer_case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs, x = made_by_peft(peer_case.model(dtype), **peft_config(peer_case)), peer_case.input(dtype)
    groups = getattr(peer_case.layer(), "groups", 1)
    if groups > 1:
        _unmix(theirs, groups)
    theirs.save_pretrained(str(tmp_path))
    base = peer_case.model(dtype).eval()
    plain = base(x)
    loaded = lora_plus.load_adapter(base, tmp_path)
    assert (theirs(x) - plain).abs().max() > 1e-2, "PEFT's adapter is inert"
    torch.testing.assert_close(loaded(x), theirs(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    if groups == 1:
        written = load_file(tmp_path / "adapter_model.safetensors")
        assert numbers(lora_plus.adapter_state_dict(loaded)) == numbers(written)


def _unmix(model: nn.Module, groups: int) -> None:
    """Cut a PEFT adapter of a grouped convolution down to what acts inside each group."""
    A = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    kept = torch.zeros_like(A).unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
    parts = A.detach().unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
    for group in range(groups):
        kept[group, :, group] = parts[group, :, group]
    with torch.no_grad():
        A.copy_(kept.flatten(2, 3).flatten(0, 1))


def test_an_adapter_that_mixes_the_channels_of_groups_is_refused(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return Holder(nn.Conv2d(4, 6, 3, groups=2))

    made_by_peft(base(), target_modules=["layer"], r=4).save_pretrained(str(tmp_path))
    assert_refused(
        base(), tmp_path, ["'layer': the adapter mixes the channels of groups, which a grouped weight cannot hold"]
    )


@pytest.mark.parametrize("name", sorted(PEFT_DIFFERS))
def test_each_exception_to_the_table_is_a_case(name: str) -> None:
    assert name in {case.name for case in CASES}


# ---- many layers -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Layers whose names need care in a regular expression."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.add_module("v+(x|y)[0]$", nn.Linear(4, 4))
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + getattr(self, "v+(x|y)[0]$")(self.q(x))
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class Net(nn.Module):
    """Names that end in each other's, an embedding, a GPT-2 layer, and a head with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.q = nn.Linear(4, 4)
        self.xq = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.fc = GPT2Linear(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.xq(self.q(self.embed(tokens)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.fc(x).mean(1))


V = "v+(x|y)[0]$"
TOKENS = torch.tensor([[0, 1, 2, 3], [4, 4, 5, 0], [6, 2, 6, 6]])


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # or the deeper layers forget what the first ones do
    return model.to(dtype)


def move(head: nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for tensor in head.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype))
            else:
                tensor.add_(5)


ALL = re.compile("(?!head).*")
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
    state, first = lora_plus.adapter_state_dict(again), lora_plus.adapter_state_dict(model)
    assert state.keys() == first.keys()
    assert all(torch.equal(state[key], first[key]) for key in first)


def test_layers_of_different_scaling_rules_get_the_right_scales(tmp_path: Path) -> None:
    model = net()
    for layer, options in {
        model.q: {"r": 3, "alpha": 5, "scaling": "rslora"},
        model.xq: {"r": 3, "alpha": 5},
        model.blocks[0].q: {"r": 2, "alpha": 7, "scaling": "rslora"},
    }.items():
        LoRALinear.from_layer(layer, **options)
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


def test_what_peft_would_misread_is_not_written(tmp_path: Path) -> None:
    model = adapted_net("one setting")
    lora_plus.LoRALinear.from_layer(model.head[0], r=2, dropout=0.5, variant="dora")
    with pytest.raises(ValueError) as error:
        lora_plus.save_adapter(model, tmp_path / "a")
    assert str(error.value) == (
        "the adapter cannot be written in PEFT's format:\n"
        "  some layers are DoRA and some are not, and PEFT has one setting for all\n"
        "  layers differ in dropout, and PEFT has one setting for all"
    )
    model = lora_plus.inject_lora(net(), ["blocks.0.q"], train_also=[re.compile("q")])
    with pytest.raises(ValueError) as error:
        lora_plus.save_adapter(model, tmp_path / "a")
    assert str(error.value) == "the adapter cannot be written in PEFT's format:\n" + "\n".join(
        f"  train_also 'q': PEFT would take {name!r} for it, which ends in the same"
        for name in ("xq", "blocks.0.q", "blocks.1.q")
    )
    assert not (tmp_path / "a").exists()


HEADS: dict[str, tuple[Callable[[], dict[str, nn.Module]], str, str]] = {
    "another name ends in it": (
        lambda: {"head": nn.Linear(3, 3), "xhead": nn.Linear(3, 3)},
        "head",
        "PEFT would take 'xhead' for it, which ends in the same",
    ),
    "its own part ends in it": (
        lambda: {"head": nn.Sequential(OrderedDict(head=nn.Linear(3, 3)))},
        "head",
        "PEFT would take 'head.head' for it, which ends in the same",
    ),
    "no regular expression": (
        lambda: {"h(": nn.Linear(3, 3)},
        "h(",
        "PEFT reads the name as a regular expression, and it is not a valid one",
    ),
    "a regular expression for a target": (
        lambda: {"p": nn.Sequential(OrderedDict(a=nn.Linear(3, 3))), "p+": nn.Linear(3, 3)},
        "p+",
        "PEFT reads the name as a regular expression, and 'p.a' matches it",
    ),
    "no forward": (
        lambda: {"head": nn.ModuleList([nn.Linear(3, 3)])},
        "head",
        "PEFT trains only modules with a forward of their own in full",
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_peft_would_misread_is_not_written(name: str, tmp_path: Path) -> None:
    make, head, reason = HEADS[name]

    def base() -> nn.Module:
        return nn.ModuleDict({"q": nn.Linear(3, 3), **make()})

    targets = ["q"] + (["p.a"] if "p" in make() else [])
    model = randomise(lora_plus.inject_lora(base(), targets, r=2, train_also=[re.compile(re.escape(head))]))
    with pytest.raises(ValueError) as error:
        lora_plus.save_adapter(model, tmp_path / "a")
    assert str(error.value) == f"the adapter cannot be written in PEFT's format:\n  train_also {head!r}: {reason}"
    assert not (tmp_path / "a").exists()
    lora_plus.save_adapter(model, tmp_path / "a.safetensors")
    loaded = lora_plus.adapter_state_dict(lora_plus.load_adapter(base(), tmp_path / "a.safetensors"))
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in lora_plus.adapter_state_dict(model).items())


# ---- many layers, from PEFT ------------------------------------------------------------------------------------------

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
    assert count(lora_plus.adapter_state_dict(loaded)) == count(load_file(tmp_path / "adapter_model.safetensors"))
    assert {layer.lora_specs["default"].dropout for _, layer in adapted_weights(loaded)} == {
        config.get("lora_dropout", 0)
    }
    lora_plus.save_adapter(loaded, tmp_path / "ours")
    torch.testing.assert_close(
        opened_by_peft(net(dtype), tmp_path / "ours")(TOKENS), wanted, rtol=tolerance, atol=tolerance
    )


def test_a_named_adapter_of_peft_opens_from_its_subfolder(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["q"]), adapter_name="mine")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    theirs.save_pretrained(str(tmp_path))
    loaded = lora_plus.load_adapter(net(), tmp_path / "mine", adapter="ours")
    torch.testing.assert_close(loaded(TOKENS), theirs.eval()(TOKENS), rtol=1e-12, atol=1e-12)


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
    assert loaded.xq.lora_specs["default"].r == 4
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
        "the order in this file may not be the one the adapter was trained with; check their scale"
    ]
    # the file's order, which PEFT goes by too
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path / "overlap"))
    scales = [theirs.base_model.model[place]["q"].scaling["default"] for place in (0, 1)]
    assert [layer.lora_specs["default"].scale for _, layer in adapted_weights(model)] == scales
    # keys that agree, or exclude each other, are no reason to warn
    for name, pattern in {"equal": {"q": 4, r"1\.q": 4}, "apart": {r"0\.q": 4, r"1\.q": 64}}.items():
        config = peft.LoraConfig(target_modules=["q"], alpha_pattern=pattern)
        peft.get_peft_model(base(), config).save_pretrained(str(tmp_path / name))
        lora_plus.load_adapter(base(), tmp_path / name)


# ---- what is refused -------------------------------------------------------------------------------------------------


def assert_refused(model: nn.Module, path: Path, lines: list[str]) -> None:
    """Loading reports just these problems, and leaves the model bit for bit as it was."""
    before, text = copy.deepcopy(model), repr(model)
    ids = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(ValueError) as error:
        lora_plus.load_adapter(model, path)
    head = f"adapter {str(path)!r} cannot be loaded; the model is unchanged:\n"
    assert str(error.value) == head + "\n".join(f"  {line}" for line in lines)
    assert repr(model) == text
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == ids
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]


class Other(nn.Module):
    """What PEFT can adapt and this library cannot load from PEFT's files."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.q = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.q(self.embed(tokens)))
        return self.attention(x, x, x)[0]


def converting(init: str) -> str:
    return (
        f"adapter_config.json: init_lora_weights is {init!r}: its tensors belong to a base weight that PEFT changes "
        "when it loads them; save them again with path_initial_model_for_weight_conversion"
    )


@dataclass(frozen=True)
class Refusal:
    """A PEFT adapter that is not plain LoRA, and what our reader says of it."""

    lines: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    kind: str = "LoraConfig"


NOT_PLAIN = "which plain LoRA and DoRA do not have"
NESTED = "adapters of attention modules, parameters and biases cannot be read"
BASE = "base_model.model."
BIAS = "and trained biases cannot be read; expected 'none'"
REFUSALS: dict[str, Refusal] = {
    "pissa": Refusal([converting("pissa")], {"init_lora_weights": "pissa"}),
    "pissa_niter": Refusal([converting("pissa_niter_4")], {"init_lora_weights": "pissa_niter_4"}),
    "olora": Refusal([converting("olora")], {"init_lora_weights": "olora"}),
    "bias all": Refusal([f"adapter_config.json: bias is 'all', {BIAS}"], {"bias": "all"}),
    "bias lora_only": Refusal([f"adapter_config.json: bias is 'lora_only', {BIAS}"], {"bias": "lora_only"}),
    "target_parameters": Refusal(
        [f"adapter_config.json: target_parameters is ['q.weight'], {NOT_PLAIN}"],
        {"target_modules": [], "target_parameters": ["q.weight"]},
    ),
    "attention": Refusal(
        [f"tensor '{BASE}attention.base_layer.out_proj.lora_{part}.weight': {NESTED}" for part in "AB"]
        + ["'attention' cannot be adapted: it is MultiheadAttention"],
        {"target_modules": ["attention"]},
    ),
    "trainable tokens": Refusal(
        [f"adapter_config.json: trainable_token_indices is {{'embed': [1, 2]}}, {NOT_PLAIN}"],
        {"trainable_token_indices": {"embed": [1, 2]}},
    ),
    "bdlora": Refusal(
        [
            "adapter_config.json: use_bdlora is {'match_strict': True, 'nblocks': 2, 'target_modules_bd_a': ['q'], "
            f"'target_modules_bd_b': None}}, {NOT_PLAIN}"
        ],
        {"use_bdlora": peft.BdLoraConfig(nblocks=2, target_modules_bd_a=["q"])},
    ),
    "kasa": Refusal(
        [f"adapter_config.json: kasa_config is {{'beta': 0.5, 'gamma': 0.25}}, {NOT_PLAIN}"],
        {"r": 2, "kasa_config": peft.KasaConfig(beta=0.5, gamma=0.25)},
    ),
    "alora": Refusal(
        [f"adapter_config.json: alora_invocation_tokens is [1], {NOT_PLAIN}"], {"alora_invocation_tokens": [1]}
    ),
    "qalora": Refusal([f"adapter_config.json: use_qalora is True, {NOT_PLAIN}"], {"use_qalora": True}),
    "lora_bias": Refusal([f"adapter_config.json: lora_bias is True, {NOT_PLAIN}"], {"lora_bias": True}),
    "LoHa": Refusal(["adapter_config.json: peft_type is 'LOHA', expected 'LORA'"], kind="LoHaConfig"),
    "IA3": Refusal(
        ["adapter_config.json: peft_type is 'IA3', expected 'LORA'"], {"feedforward_modules": []}, kind="IA3Config"
    ),
    "two reasons": Refusal(
        [f"adapter_config.json: bias is 'all', {BIAS}", f"adapter_config.json: lora_bias is True, {NOT_PLAIN}"],
        {"bias": "all", "lora_bias": True},
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_plain_lora_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    refusal = REFUSALS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT has something to say about several of these
        config = getattr(peft, refusal.kind)(**{"target_modules": ["q"], **refusal.config})
        model = peft.get_peft_model(Other(), config)
        model.save_pretrained(str(tmp_path))
    assert_refused(Other(), tmp_path, refusal.lines)


def test_every_field_that_peft_writes_is_understood(tmp_path: Path) -> None:
    """A config of plain LoRA has no field that our reader takes for something else, at any value PEFT gives it."""
    peft.get_peft_model(net(), peft.LoraConfig(target_modules=["q"])).save_pretrained(str(tmp_path))
    assert len(read_config(tmp_path)) > 40
    assert set(lora_plus.load_adapter(net(), tmp_path).q.lora_specs) == {"default"}

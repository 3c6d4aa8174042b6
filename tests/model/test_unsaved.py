"""What is trained and not saved: it is named wherever it shows, and what would make a file wrong is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from torch import Tensor, nn
from torch.optim import AdamW

import lora_plus as lp
from lora_plus.files import adapter_state_dict
from lora_plus.training import split_loraplus_groups


class Net(nn.Module):
    """An embedding tied to a head, a norm, two linear layers, and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 4)
        self.down = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.down(self.up(self.norm(self.embed(tokens))))
        return self.head(self.attention(x, x, x)[0])


def net(**settings: Any) -> Any:
    torch.manual_seed(0)
    return randomise(lp.inject_lora(Net().double(), ["up", "down"], r=2, **settings))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return lp.create_loraplus_optimizer(model, AdamW, lr=1e-3, lr_ratio=4)


SAVES: dict[str, Callable[[nn.Module, Path], object]] = {
    "a file": lambda model, path: lp.save_adapter(model, path / "a.safetensors"),
    "a folder": lambda model, path: lp.save_adapter(model, path / "peft"),
    "an export": lambda model, path: lp.export_adapter(model, path / "export"),
    "tensors": lambda model, path: adapter_state_dict(model),
}
SHOWS: dict[str, Callable[[nn.Module, Path], object]] = {
    **SAVES,
    "the check": lambda model, path: lp.check_optimizer(adamw(model), model, lr_ratio=4),
}
HOW = "; name the modules in inject_lora(..., train_also=[...]), freeze them, or save them yourself"


def told(show: Callable[[nn.Module, Path], object], model: nn.Module, path: Path) -> list[str]:
    """The warnings, all of which name the caller's line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        show(model, path)
    assert all(each.filename == __file__ and each.category is UserWarning for each in caught)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("show", SHOWS.values(), ids=SHOWS.keys())
def test_what_was_unfrozen_by_hand_is_named(show: Callable[[nn.Module, Path], object], tmp_path: Path) -> None:
    model = net()
    assert told(show, model, tmp_path) == []
    model.norm.requires_grad_(True)
    model.up.bias.requires_grad_(True)
    assert told(show, model, tmp_path) == [
        f"trained, but saved with no adapter: 'norm.weight', 'norm.bias', 'up.bias'{HOW}"
    ]
    model.embed.requires_grad_(True)  # and with it the head, which has the same weight
    assert told(show, model, tmp_path) == [
        f"trained, but saved with no adapter: 'embed.weight', 'norm.weight', 'norm.bias' and 1 more{HOW}"
    ]


def test_what_is_not_named_is_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(lp.inject_lora(Net().double(), ["up"], r=2, train_also=["norm"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    lp.save_adapter(model, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    loaded = lp.load_adapter(Net().double(), tmp_path / "a.safetensors", trainable=True)
    tokens = torch.arange(7)[None]
    assert torch.equal(loaded(tokens), model(tokens))
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_other_adapters_and_their_modules_are_not_named(tmp_path: Path) -> None:
    model = net(train_also=["norm"])
    trained = [p for p in model.parameters() if p.requires_grad]
    lp.inject_lora(model, ["down"], r=2, adapter="second")
    for parameter in trained:
        parameter.requires_grad_(True)
    for adapter in ("default", "second"):
        lp.save_adapter(model, tmp_path / "a.safetensors", adapter=adapter)
        adapter_state_dict(model, adapter=adapter)
    assert lp.lora_summary(model).unsaved == []


def test_a_model_without_adapters_has_nothing_to_lose() -> None:
    summary = lp.lora_summary(Net())
    assert summary.unsaved == [] and summary.trainable > 0


def test_the_summary_lists_it() -> None:
    model = net()
    assert "not saved" not in str(lp.lora_summary(model))
    model.norm.requires_grad_(True)
    model.head.requires_grad_(True)
    summary = lp.lora_summary(model)
    assert summary.unsaved == [("embed.weight", 28), ("norm.weight", 4), ("norm.bias", 4)]
    lines = [line.split() for line in str(summary).splitlines()]
    assert ["norm.weight", "trained,", "not", "saved", "4"] in lines
    assert ["embed.weight", "trained,", "not", "saved", "28"] in lines


@pytest.mark.parametrize(
    "wrap", [partial(torch.compile, backend="eager"), nn.DataParallel], ids=["compiled", "DataParallel"]
)
def test_names_are_the_plain_models(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = net()
    model.norm.requires_grad_(True)
    assert lp.lora_summary(wrap(model)).unsaved == [("norm.weight", 4), ("norm.bias", 4)]
    (text,) = told(SAVES["a file"], wrap(model), tmp_path)
    assert "'norm.weight', 'norm.bias';" in text


# ---- what would make a file wrong ------------------------------------------------------------------------------------


def all_of_it(model: Any) -> None:
    model.requires_grad_(True)


def base_weight(model: Any) -> None:
    model.up.weight.requires_grad_(True)


BASE = "{}: base weights under an adapter; call requires_grad_(False) on them"
FIXED = "{}: held fixed by the variant or the init of the adapter; call set_adapter(model, 'default', trainable=True)"
STARTS = "'up.lora_A0.default', 'up.lora_B0.default', 'down.lora_A0.default' and 1 more"
WRONG: dict[str, tuple[dict[str, Any], Callable[[Any], None], list[str]]] = {
    "the whole model": ({}, all_of_it, [BASE.format("'up.weight', 'down.weight'")]),
    "a base weight": ({}, base_weight, [BASE.format("'up.weight'")]),
    "LoRA-FA's A": (
        {"variant": "lora_fa"},
        lambda model: [layer.lora_A.requires_grad_(True) for layer in (model.up, model.down)],
        [FIXED.format("'up.lora_A.default', 'down.lora_A.default'")],
    ),
    "PiSSA's start": (
        {"init": "pissa"},
        all_of_it,
        [BASE.format("'up.weight', 'down.weight'"), FIXED.format(STARTS)],
    ),
}  # fmt: skip


def state(model: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    return {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize(("settings", "train", "lines"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES.keys())
def test_a_file_that_would_be_wrong_is_refused(
    save: Callable[[nn.Module, Path], object],
    settings: dict[str, Any],
    train: Callable[[Any], None],
    lines: list[str],
    tmp_path: Path,
) -> None:
    model = net(**settings)
    train(model)
    before = state(model)
    with pytest.raises(ValueError, match="adapter 'default' w") as caught:
        save(model, tmp_path)
    head, *found = str(caught.value).splitlines()
    assert head.endswith(": these are trainable and must be frozen:")
    assert found == [f"  {line}" for line in lines]
    assert list(tmp_path.iterdir()) == []
    after = state(model)
    assert all(torch.equal(after[name][0], value) and after[name][1] == flag for name, (value, flag) in before.items())


@pytest.mark.parametrize(("settings", "train", "lines"), WRONG.values(), ids=WRONG.keys())
def test_it_is_refused_before_it_is_trained(
    settings: dict[str, Any], train: Callable[[Any], None], lines: list[str]
) -> None:
    model = net(**settings)
    train(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="the groups were not made") as caught:
        adamw(model)
    assert all(line in str(caught.value) for line in lines)
    with pytest.raises(ValueError, match="the groups were not split"):
        split_loraplus_groups([{"params": trained, "lr": 1e-3}], model, lr_ratio=4)
    with pytest.raises(ValueError, match="training would not do") as caught:
        lp.check_optimizer(AdamW(trained), model)
    assert all(line in str(caught.value) for line in lines)


@pytest.mark.parametrize(("settings", "train", "lines"), WRONG.values(), ids=WRONG.keys())
def test_the_next_step_that_is_named_helps(
    settings: dict[str, Any], train: Callable[[Any], None], lines: list[str], tmp_path: Path
) -> None:
    model = net(**settings)
    train(model)
    lp.set_adapter(model, "default", trainable=True)
    for weight in (model.up.weight, model.down.weight):
        weight.requires_grad_(False)
    warned = told(SAVES["a file"], model, tmp_path)
    assert len(warned) == (train is all_of_it) and (tmp_path / "a.safetensors").is_file()


def test_an_adapted_parameter_is_a_base_weight_too(tmp_path: Path) -> None:
    model = lp.inject_lora(Net().double(), ["attention.q"], r=2)
    model.attention.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'attention.in_proj_weight': base weights under an adapter"):
        lp.save_adapter(model, tmp_path / "a.safetensors")


def test_the_fixed_tensors_of_an_inactive_adapter_are_not_looked_at(tmp_path: Path) -> None:
    model = net(variant="lora_fa")
    fixed = [layer.lora_A["default"] for layer in (model.up, model.down)]
    lp.inject_lora(model, ["up"], r=2, adapter="second")
    for parameter in fixed:
        parameter.requires_grad_(True)
    lp.save_adapter(model, tmp_path / "a.safetensors", adapter="second")
    assert lp.loraplus_param_groups(model, lr=1e-3)
    with pytest.raises(ValueError, match="held fixed by the variant"):
        lp.save_adapter(model, tmp_path / "a.safetensors", adapter="default")


def test_a_base_that_is_quantized_or_computed_passes(tmp_path: Path) -> None:
    model = Net().double()
    nn.utils.parametrizations.weight_norm(model.up)
    lp.inject_lora(model, ["up"], r=2)
    adapter_state_dict(model)
    model.up.parametrizations.weight.original0.requires_grad_(True)
    (text,) = told(SAVES["tensors"], model, tmp_path)
    assert text.startswith("trained, but saved with no adapter: 'up.parametrizations.weight.original0';")


def test_a_copy_is_looked_at_for_itself(tmp_path: Path) -> None:
    model = net()
    other = copy.deepcopy(model)
    model.requires_grad_(True)
    lp.save_adapter(other, tmp_path / "a.safetensors")

"""What cannot go to PEFT or come from it is refused with the reason."""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from peft_support import assert_refused, net, peft, read_config
from torch import Tensor, nn

import lora_plus
from lora_plus.files import adapter_state_dict
from lora_plus.files.peft import config as peft_config

pytestmark = pytest.mark.peers

# ---- writing ---------------------------------------------------------------------------------------------------------


def test_what_peft_would_misread_is_not_written(tmp_path: Path) -> None:
    model = lora_plus.inject_lora(net(), [nn.Linear, nn.Conv1d], exclude=[re.compile(r"head\..*")], r=2, alpha=4)
    lora_plus.inject_lora(model.head[0], "", r=2, dropout=0.5, variant="dora")
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
        "PEFT reads the name as a regular expression, and it is not a regular expression",
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
    loaded = adapter_state_dict(lora_plus.load_adapter(base(), tmp_path / "a.safetensors"))
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in adapter_state_dict(model).items())


# ---- reading ---------------------------------------------------------------------------------------------------------


class Other(nn.Module):
    """What PEFT can adapt and this library cannot load from PEFT's files."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.q = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.q(self.embed(tokens)))


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
    """What PEFT's config is made of; a class of PEFT's comes from a function."""
    kind: str = "LoraConfig"


NOT_PLAIN = "which plain LoRA and DoRA do not have"
REFUSALS: dict[str, Refusal] = {
    "pissa": Refusal([converting("pissa")], {"init_lora_weights": "pissa"}),
    "pissa_niter": Refusal([converting("pissa_niter_4")], {"init_lora_weights": "pissa_niter_4"}),
    "olora": Refusal([converting("olora")], {"init_lora_weights": "olora"}),
    "bdlora": Refusal(
        [
            "adapter_config.json: use_bdlora is {'match_strict': True, 'nblocks': 2, 'target_modules_bd_a': ['q'], "
            f"'target_modules_bd_b': None}}, {NOT_PLAIN}"
        ],
        {"use_bdlora": lambda: peft.BdLoraConfig(nblocks=2, target_modules_bd_a=["q"])},
    ),
    "kasa": Refusal(
        [f"adapter_config.json: kasa_config is {{'beta': 0.5, 'gamma': 0.25}}, {NOT_PLAIN}"],
        {"r": 2, "kasa_config": lambda: peft.KasaConfig(beta=0.5, gamma=0.25)},
    ),
    "alora": Refusal(
        [f"adapter_config.json: alora_invocation_tokens is [1], {NOT_PLAIN}"], {"alora_invocation_tokens": [1]}
    ),
    "qalora": Refusal([f"adapter_config.json: use_qalora is True, {NOT_PLAIN}"], {"use_qalora": True}),
    "LoHa": Refusal(["adapter_config.json: peft_type is 'LOHA', expected 'LORA'"], kind="LoHaConfig"),
    "IA3": Refusal(
        ["adapter_config.json: peft_type is 'IA3', expected 'LORA'"], {"feedforward_modules": []}, kind="IA3Config"
    ),
    "two reasons": Refusal(
        [converting("pissa"), f"adapter_config.json: use_qalora is True, {NOT_PLAIN}"],
        {"init_lora_weights": "pissa", "use_qalora": True},
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_plain_lora_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    refusal = REFUSALS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT has something to say about several of these
        given = {name: value() if callable(value) else value for name, value in refusal.config.items()}
        config = getattr(peft, refusal.kind)(**{"target_modules": ["q"], **given})
        model = peft.get_peft_model(Other(), config)
        model.save_pretrained(str(tmp_path))
    assert_refused(Other(), tmp_path, refusal.lines)


def test_every_field_that_peft_writes_is_understood(tmp_path: Path) -> None:
    """A config of plain LoRA has no field that our reader takes for something else, at any value PEFT gives it."""
    peft.get_peft_model(net(), peft.LoraConfig(target_modules=["q"])).save_pretrained(str(tmp_path))
    assert len(read_config(tmp_path)) > 40
    assert set(lora_plus.load_adapter(net(), tmp_path).q.lora_adapters) == {"default"}


def test_every_field_of_peft_s_config_is_known() -> None:
    fields = peft.LoraConfig().to_dict().keys()
    if tuple(map(int, importlib.metadata.version("peft").split(".")[:2])) <= peft_config._KNOWN:
        assert fields <= peft_config._HARMLESS | peft_config._OTHER_METHODS

"""Two adapters with a head each: PEFT's ``modules_to_save`` and our ``train_also``, exchanged both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import randomise
from peft_support import peft
from torch import Tensor, nn

import lora_plus as lp

pytestmark = pytest.mark.peers
RANKS = {"math": 2, "code": 3}
X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def base(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = {"q": nn.Linear(6, 6), "norm": nn.LayerNorm(6), "head": nn.Linear(6, 3)}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, layer in layers.items():
                self.add_module(name, layer)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.q(x).tanh()))

    return Net().to(dtype)


def two_of_peft(dtype: torch.dtype) -> nn.Module:
    model: nn.Module | None = None
    for name, r in RANKS.items():
        config = peft.LoraConfig(r=r, lora_alpha=16, target_modules=["q"], modules_to_save=["norm", "head"])
        if model is None:
            model = peft.get_peft_model(base(dtype), config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    assert model is not None
    return model


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_pefts_two_heads_load_one_after_the_other(dtype: torch.dtype, close: float, tmp_path: Path) -> None:
    theirs = two_of_peft(dtype)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours, plain = base(dtype), base(dtype)(X.to(dtype))
    for name in RANKS:
        lp.load_adapter(ours, tmp_path / name, adapter=name)
    for name in ("math", "code", "math"):
        theirs.set_adapter(name)
        lp.set_adapter(ours, name)
        torch.testing.assert_close(ours(X.to(dtype)), theirs(X.to(dtype)), rtol=close, atol=close)
        assert not torch.allclose(ours(X.to(dtype)), plain)
    lp.remove_lora(ours)
    assert torch.equal(ours(X.to(dtype)), plain)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_our_two_heads_open_in_one_model_of_peft(dtype: torch.dtype, close: float, tmp_path: Path) -> None:
    ours = base(dtype)
    for name, r in RANKS.items():
        lp.inject_lora(ours, ["q"], r=r, adapter=name, train_also=["norm", "head"])
        with torch.no_grad():
            for module in (ours.norm, ours.head):
                [parameter.add_(torch.randn_like(parameter)) for parameter in module.parameters()]
    randomise(ours)
    for name in RANKS:
        lp.save_adapter(ours, tmp_path / name, adapter=name)
    theirs = peft.PeftModel.from_pretrained(base(dtype), tmp_path / "math", adapter_name="math")
    theirs.load_adapter(tmp_path / "code", adapter_name="code")
    for name in ("code", "math", "code"):
        theirs.set_adapter(name)
        lp.set_adapter(ours, name)
        torch.testing.assert_close(theirs(X.to(dtype)), ours(X.to(dtype)), rtol=close, atol=close)


def test_training_one_of_two_changes_the_other_as_little_as_in_peft() -> None:
    """Both libraries, the same values: steps of AdamW on one, then on the other."""
    theirs, ours = two_of_peft(torch.float64), base(torch.float64)
    for name, r in RANKS.items():
        lp.inject_lora(ours, ["q"], r=r, adapter=name, train_also=["norm", "head"])
    for name in RANKS:
        with torch.no_grad():
            for role in ("lora_A", "lora_B"):
                ours.get_parameter(f"q.{role}.{name}").copy_(getattr(theirs.base_model.model.q, role)[name].weight)
    for name in RANKS:
        theirs.set_adapter(name)
        lp.set_adapter(ours, name, trainable=True)
        for model in (theirs, ours):
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-2)
            for _ in range(3):
                model(X).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    for name in RANKS:
        theirs.set_adapter(name)
        lp.set_adapter(ours, name)
        torch.testing.assert_close(ours(X), theirs(X), rtol=0, atol=1e-12)

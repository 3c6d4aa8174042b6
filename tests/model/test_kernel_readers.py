"""Modules that hand their layers' weights to kernels: adapters sit on the weights, so that they act on every path."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randomise
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import lora_plus as lp
from lora_plus.files import adapter_state_dict
from lora_plus.model.parts import PARTS

WIDTH = 4


class MambaMixer(nn.Module):
    """Reads its weights in training as transformers' module of this name does where its kernels are installed."""

    __module__ = "transformers.models.mamba.modeling_mamba"

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, WIDTH)
        self.conv1d = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)
        self.x_proj, self.dt_proj = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.out_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv1d(self.in_proj(x).mT, self.conv1d.weight, padding=2, groups=WIDTH)[..., : x.shape[1]].mT
        if self.training:
            return h @ (self.out_proj.weight @ self.dt_proj.weight @ self.x_proj.weight).mT
        return self.out_proj(self.x_proj(h) @ self.dt_proj.weight.mT)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = MambaMixer()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(x)


TARGETS = {name: {name} for name in ("conv1d", "x_proj", "dt_proj", "out_proj")}
TARGETS |= {"all-linear": {"in_proj", "x_proj", "dt_proj", "out_proj"}, "mixer.out_proj.weight": {"out_proj"}}


@pytest.mark.parametrize("target", TARGETS)
def test_adapters_of_layers_that_are_only_read_are_live(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Around().double(), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    before = model.requires_grad_(False)(x)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lp.inject_lora(model, [target], r=2)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)  # torch folds products by who has gradients
    assert {name.removeprefix("mixer.") for name in lp.check_adapters(model, x)} == TARGETS[target]
    randomise(model)
    wanted = model(x), model.eval()(x)
    lp.save_adapter(model, tmp_path / "a.safetensors")
    lp.remove_lora(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    lp.load_adapter(model, tmp_path / "a.safetensors")
    torch.testing.assert_close((model.train()(x), model.eval()(x)), wanted, rtol=1e-12, atol=1e-12)
    with lp.merged(model):
        torch.testing.assert_close((model.train()(x), model.eval()(x)), wanted, rtol=1e-12, atol=1e-12)


def test_files_and_programs_that_have_them_as_layers(tmp_path: Path) -> None:
    layers = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    model = Around().double()
    called = nn.ModuleDict({"mixer": nn.ModuleDict({name: getattr(model.mixer, name) for name in layers})})
    randomise(lp.inject_lora(called, layers, r=2, dropout=0.1))
    wanted = adapter_state_dict(called)
    for path in (tmp_path / "a.safetensors", tmp_path / "folder"):
        lp.save_adapter(called, path)
    config, tensors = lp.files.to_peft(called, for_="vllm")
    lp.remove_lora(called)
    for path in (tmp_path / "a.safetensors", tmp_path / "folder"):
        with pytest.warns(UserWarning, match=r"there is no dropout, so that of 'mixer\.dt_proj', .* is left out"):
            lp.load_adapter(model, path)
        found = {name.replace("lora_parameters.weight.", ""): each for name, each in adapter_state_dict(model).items()}
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        ours = lp.files.to_peft(model, for_="vllm")
        assert ours[0]["target_modules"] == config["target_modules"]
        assert ours[1].keys() == tensors.keys() and all(torch.equal(ours[1][name], tensors[name]) for name in tensors)
        lp.remove_lora(model)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.mT


def test_a_computed_parameter_says_what_to_do() -> None:
    model = nn.Module()
    model.inner = nn.Module()
    model.inner.w = nn.Parameter(torch.randn(4, 4))
    model.layer = weight_norm(nn.Linear(4, 4))
    parametrize.register_parametrization(model.inner, "w", Symmetric())
    line = "inner.parametrizations.w (a parameter that a parametrization computes; call torch.nn.utils.parametrize."
    with pytest.raises(ValueError, match=re.escape(line)) as error:
        lp.inject_lora(model, ["w"])
    assert "name what is in it" not in str(error.value)
    parametrize.remove_parametrizations(model.inner, "w")
    lp.inject_lora(model, ["w", "layer"])


# ---- transformers ----------------------------------------------------------------------------------------------------

LAYERS = ("conv1d", "x_proj", "dt_proj", "out_proj")


@pytest.mark.slow
@pytest.mark.peers
def test_the_table_has_what_transformers_reads() -> None:
    models: Any = pytest.importorskip("transformers.models")
    found = {}
    for each in pkgutil.iter_modules(models.__path__):
        path = Path(models.__path__[0]) / each.name / f"modeling_{each.name}.py"
        if not path.exists() or "conv1d.weight" not in path.read_text():
            continue
        module = importlib.import_module(f"transformers.models.{each.name}.modeling_{each.name}")
        for name, kind in vars(module).items():
            if inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__:
                own = [method for key, method in vars(kind).items() if inspect.isfunction(method) and "init" not in key]
                text = "".join(map(inspect.getsource, own))
                read = [layer for layer in LAYERS if re.search(rf"self\.{layer}\.weight\b(?!\.dtype|\.device)", text)]
                found |= {f"transformers.{name}": read} if "conv1d" in read else {}
    listed = {name: parts(nn.Module()) for name, parts in PARTS.items() if isinstance(name, str)}
    assert found == {name: [part.child for part in listed.get(name, [])] for name in found}
    assert len(found) >= 10

"""The wrappers that torch ships are seen through: files, reports and verbs are those of the plain model inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lora_plus as lp
from lora_plus.files import adapter_state_dict
from lora_plus.model import adapter_names

WRAP: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": partial(torch.compile, backend="eager"),
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "AveragedModel, buffers": partial(AveragedModel, use_buffers=True),
    "checkpoint": checkpoint_wrapper,
    "offload": offload_wrapper,
    "two of them": lambda model: AveragedModel(nn.DataParallel(model)),
}
X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).double()


def adapted(seed: int = 7) -> nn.Module:
    return randomise(lp.inject_lora(plain(), ["0"], r=2, alpha=4, train_also=["1"]), seed)


def saved(model: nn.Module, folder: Path) -> dict[str, bytes]:
    lp.save_adapter(model, folder / "a.safetensors")
    lp.save_adapter(model, folder / "peft")
    lp.export_adapter(model, folder / "export")
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("wrap", WRAP.values(), ids=WRAP.keys())
def test_a_wrapped_model_is_saved_and_described_as_the_plain_one(wrap: Any, tmp_path: Path) -> None:
    model = adapted().eval()
    wrapped = wrap(model)
    assert saved(wrapped, tmp_path / "wrapped") == saved(model, tmp_path / "plain")
    assert lp.lora_summary(wrapped) == lp.lora_summary(model)
    state, expected = adapter_state_dict(wrapped), adapter_state_dict(model)
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    with lp.merged(wrapped) as merged:
        torch.testing.assert_close(merged(X), model(X), rtol=1e-12, atol=1e-12)
    with lp.disabled(wrapped):
        torch.testing.assert_close(wrapped(X), plain().eval()(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrap", WRAP.values(), ids=WRAP.keys())
def test_verbs_reach_the_model_inside(wrap: Any) -> None:
    wrapped = wrap(adapted())
    lp.rename_adapter(wrapped, "default", "other")
    lp.set_adapter(wrapped, "other", trainable=False)
    assert adapter_names(wrapped) == ["other"] and not any(p.requires_grad for p in wrapped.parameters())
    lp.remove_lora(wrapped)
    assert torch.equal(wrapped.eval()(X), plain().eval()(X))


AVERAGES = {"plain": {}, "buffers": {"use_buffers": True}, "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.75)}}


@pytest.mark.parametrize("settings", AVERAGES.values(), ids=AVERAGES.keys())
def test_the_averaged_adapter_is_what_is_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted()
    averaged = AveragedModel(model, **settings)
    means: dict[str, Tensor] = {}
    for step in range(3):
        randomise(model, seed=step)
        averaged.update_parameters(model)
        weight = (0.25 if "multi_avg_fn" in settings else 1 / (step + 1)) if step else 1.0
        for key, tensor in adapter_state_dict(model).items():
            before = means.get(key, torch.zeros_like(tensor))
            means[key] = before + weight * (tensor - before) if tensor.is_floating_point() else tensor.clone()
    lp.save_adapter(averaged, tmp_path / "a.safetensors")
    loaded = lp.load_adapter(plain(), tmp_path / "a.safetensors")
    state = adapter_state_dict(loaded)
    assert state.keys() == means.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, means[key].to(tensor.dtype), rtol=1e-12, atol=1e-12)
    assert torch.equal(loaded.eval()(X), averaged.eval()(X))
    assert int(averaged.n_averaged) == 3


def test_what_is_added_to_an_average_would_not_be_averaged(tmp_path: Path) -> None:
    lp.save_adapter(adapted(), tmp_path / "a.safetensors")
    averaged = AveragedModel(plain())
    before = copy.deepcopy(averaged.state_dict())
    for add in (
        lambda: lp.inject_lora(averaged, ["0"]),
        lambda: lp.load_adapter(averaged, tmp_path / "a.safetensors"),
        lambda: lp.inject_lora(nn.DataParallel(averaged), ["0"]),
    ):
        with pytest.raises(
            ValueError,
            match="wrapped in AveragedModel, which would not average new parameters with those of the same place in "
            "the model; do it before the model is wrapped",
        ):
            add()
    assert averaged.state_dict().keys() == before.keys()
    assert lp.load_adapter(averaged.module, tmp_path / "a.safetensors") is averaged.module

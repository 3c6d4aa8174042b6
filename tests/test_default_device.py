"""A default device that somebody has set, as for making a model without values, changes nothing of what is computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from cases import OwnConv, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_plus as lp
from lora_plus.surgery import combine_adapters, extract_adapter, resize_adapter
from lora_plus.tensors.low_rank import truncated
from lora_plus.training import reset_lora_parameters


def plain(size: int = 6) -> nn.Module:
    with torch.device("cpu"):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 3))


def adapted(size: int = 6) -> nn.Module:
    model = lp.inject_lora(plain(size), "all-linear", r=2, generator=torch.Generator().manual_seed(1))
    with torch.device("cpu"):
        return randomise(model)


def ones(weight: Tensor, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    return weight.new_ones(r, weight.shape[1]), weight.new_ones(weight.shape[0], r)


def through(name: str) -> Callable[[Path], Tensor]:
    """An adapter that is written in a format and read again, anew and into one that is there."""

    def run(folder: Path) -> Tensor:
        lp.save_adapter(adapted(), folder / name)
        fresh = lp.load_adapter(plain(), folder / name)
        lp.load_adapter(fresh, folder / name, replace=True)
        return output(fresh)

    return run


def output(model: nn.Module) -> Tensor:
    y: Tensor = model(torch.linspace(-1, 1, model[0].in_features, device="cpu")[None])
    return y.detach()


def kohya(folder: Path) -> Tensor:
    lp.save_adapter(adapted(), folder / "k.safetensors", format="kohya")
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(folder / "k.safetensors").items())])


def checkpoint(folder: Path) -> Tensor:
    save_file(dict(plain().state_dict()), folder / "base.safetensors")
    lp.save_adapter(lp.inject_lora(plain(), ["0"], r=2, init=ones), folder / "a.safetensors")
    out = folder / "out.safetensors"
    out.unlink(missing_ok=True)
    with mock.patch.object(os, "copy_file_range", side_effect=OSError, create=True):  # as on some file systems
        lp.merge_checkpoint(folder / "base.safetensors", folder / "a.safetensors", out)
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(out).items())])


def reset(folder: Path) -> Tensor:
    model = adapted()
    reset_lora_parameters(model, generator=torch.Generator().manual_seed(2))
    return torch.cat([model[0].lora_A["default"].detach(), model[0].lora_B["default"].detach().mT])


def own_forward(folder: Path) -> Tensor:
    with torch.device("cpu"):
        torch.manual_seed(0)
        model, x = nn.Sequential(OwnConv(2, 3, 2)), torch.ones(1, 2, 4, 4)
    model = lp.inject_lora(model, ["0"], r=2, variant="dora", generator=torch.Generator().manual_seed(1))
    return model(x).detach()


def checked(folder: Path) -> Tensor:
    model = adapted()
    lp.check_adapters(model, torch.ones(2, 6, device="cpu"))
    return output(model)


def combined(folder: Path) -> Tensor:
    model = lp.add_adapter(adapted(), "b", generator=torch.Generator().manual_seed(3))
    combine_adapters(model, ["default", "b"], adapter="c", method="svd", r=1)
    return output(model)


def resized(folder: Path) -> Tensor:
    model = adapted()
    resize_adapter(model, r=1)
    return output(model)


def extracted(folder: Path) -> Tensor:
    model, tuned = plain(), lp.merge_and_unload(adapted())
    extract_adapter(model, tuned, targets="all-linear", r=2)
    return output(model)


def large(folder: Path) -> Tensor:
    matrix = torch.outer(*[torch.linspace(-1, 1, size, device="cpu") for size in (1100, 1030)])
    found = truncated(matrix, 2)
    return found.B @ found.A


OPERATIONS: dict[str, Callable[[Path], Tensor]] = {
    "native": through("a.safetensors"),
    "peft": through("a"),
    **{
        each.__name__: each
        for each in (kohya, checkpoint, reset, own_forward, checked, combined, resized, extracted, large)
    },
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_the_default_device_does_not_matter(operation: Callable[[Path], Tensor], tmp_path: Path) -> None:
    wanted = operation(tmp_path)
    with torch.device("meta"):
        found = operation(tmp_path)
    assert torch.equal(found, wanted)

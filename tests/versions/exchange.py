"""Folders of the PEFT that is installed, both ways: equal outputs to 1e-12 in float64, and no warning from PEFT.

Run by ``run.sh``, with releases of PEFT that the other tests do not run with.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import lora_plus
from lora_plus.engines.peft import peft_roles

Settings = dict[str, Any]

LORA: Settings = {"target_modules": ["1", "2"], "r": 3, "lora_alpha": 5}
SETTINGS: dict[str, Settings] = {
    "lora": LORA,
    "rslora": LORA | {"use_rslora": True},
    "dora": LORA | {"use_dora": True},
    "patterns": LORA | {"rank_pattern": {"2": 2}, "alpha_pattern": {"1": 7}},
    "a pattern as target": LORA | {"target_modules": r".*\.?[12]"},
    "trained in full": LORA | {"modules_to_save": ["3"]},
}


def linears() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Unflatten(0, (1, -1)), nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, (1, 2), stride=2))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], list[str]]] = {
    "linear": (linears, lambda: torch.tensor([[0, 1, 2], [3, 4, 6]]), list(SETTINGS)),
    "embedding": (linears, lambda: torch.tensor([[0, 1, 2], [3, 4, 6]]), ["lora", "rslora"]),
    "convolution": (convolutions, lambda: torch.randn(2, 6, 5, dtype=torch.float64), ["lora", "rslora", "dora"]),
}


def base(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double().eval()


def drawn(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def check(name: str, setting: str) -> float:
    """The largest difference of outputs, both ways."""
    make, inputs, _ = MODELS[name]
    config = SETTINGS[setting] | ({"target_modules": ["0"]} if name == "embedding" else {})
    x = inputs()
    theirs = drawn(peft.get_peft_model(base(make), peft.LoraConfig(**config)))
    assert next(iter(peft_roles(theirs)))
    plain = base(make)(x)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(f"{folder}/theirs")
        ours = lora_plus.load_adapter(base(make), Path(folder, "theirs"))
        lora_plus.save_adapter(ours, Path(folder, "ours"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = peft.PeftModel.from_pretrained(base(make), f"{folder}/ours").eval()
        assert (ours(x) - plain).abs().max() > 1e-3, "the adapter is inert"
        differences = [(model(x) - ours(x)).abs().max().item() for model in (theirs, again)]
        merged = lora_plus.merge_and_unload(copy.deepcopy(ours))
    return max(*differences, (merged(x) - ours(x)).abs().max().item())


def main() -> None:
    wrong = []
    for name, (_, _, settings) in MODELS.items():
        for setting in settings:
            difference = check(name, setting)
            print(f"peft {peft.__version__}: {name}, {setting}: {difference:.1e}")
            if not difference <= 1e-12:
                wrong.append((name, setting))
    if wrong:
        raise SystemExit(f"not the same: {wrong}")


if __name__ == "__main__":
    main()

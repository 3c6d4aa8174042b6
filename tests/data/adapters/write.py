"""Write the adapter files of this folder, and what the models compute with them.

Version 0.1.0 at commit 7aff020 wrote what is here, and `tests/test_old_files.py` reads it with the present version. Do
not write these files again: that would only show that a version reads what it writes. This is how they were made, from
the root of the repository::

    git worktree add /tmp/old 7aff020
    PYTHONPATH=/tmp/old:tests python tests/data/adapters/write.py tests/data/adapters

For the format of a later version, add cases with names of their own, write into another folder, and copy the new files.

The models come from `tests/adapter_models.py`. A and B are set by a formula too. PiSSA's A and B and DoRA's magnitude
start from the weight, and a formula moves them. So no random number is in the files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from adapter_models import Bounded, Fused, Net, Parameters, Pipeline, built, numbers
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_plus
from lora_plus.training import fold_lr_ratio


@dataclass
class Case:
    """One adapter and how it is saved."""

    file: str
    model_class: Callable[[], nn.Module]
    targets: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    format: str | None = None
    fold: float | None = None
    """The ratio that is folded into the adapter while it is trained and saved."""
    metadata: dict[str, str] = field(default_factory=dict)


INPUTS: dict[Callable[[], nn.Module], Tensor] = {
    Net: torch.arange(10).reshape(1, 2, 5) % 9,
    Bounded: torch.arange(10).reshape(2, 5) % 9,
    Fused: numbers(2, 3, 4, seed=50),
    Parameters: numbers(2, 3, 4, seed=51),
    Pipeline: numbers(2, 3, 4, 3, seed=52),
}
"""What each model is run on."""

LAYERS = ["embed", "mix", "conv", "up", "proj"]
IN_PEFT = ["embed", "mix", "conv", "proj"]  # which has no transposed convolutions
PATTERNS = {"rank_pattern": {"conv": 3, "proj": 1}, "alpha_pattern": {"embed": 2, "proj": 0.75}}
PARTS = ["attn", "gru", "experts.inner", "experts.outer", "reader.layer.weight"]
UNET = ["unet.conv_in", "to_q", "to_out.0", "q_proj"]
OF_UNET = {"rank_pattern": {"unet.conv_in": 3, "q_proj": 1}, "alpha_pattern": {"unet.conv_in": 5, "to_q": 0.75}}

CASES = [
    Case("lora.safetensors", Net, LAYERS, {"train_also": ["head"]}, metadata={"note": "grüße"}),
    Case("float32.safetensors", Net, LAYERS, {"train_also": ["head"]}, torch.float32),
    Case("bfloat16.safetensors", Net, LAYERS, {"dtype": torch.bfloat16}, torch.float32),
    Case("rslora.safetensors", Net, LAYERS, {"scaling": "rslora", "dropout": 0.25, **PATTERNS}),
    Case("dora.safetensors", Net, LAYERS, {"variant": "dora"}),
    Case("lora_fa.safetensors", Net, LAYERS, {"variant": "lora_fa"}),
    Case("pissa.safetensors", Net, LAYERS, {"init": "pissa"}),
    Case("folded.safetensors", Net, LAYERS, PATTERNS, fold=3),
    Case("max_norm.safetensors", Bounded, ["embed", "proj"]),
    Case("fused.safetensors", Fused, ["c_attn.q", "c_attn.v", "qkv"],
         {"fused": {"c_attn": ["q", "k", "v"], "qkv": {"q": 5, "k": 1, "v": 2}}, "rank_pattern": {"qkv.k": 1}}),
    Case("parameters.safetensors", Parameters, PARTS,
         {"layouts": {"inner": "e i o -> e o i"}, "rank_pattern": {"attn.v": 1}}),
    Case("peft", Net, IN_PEFT, {"train_also": ["head"], **PATTERNS}),
    Case("peft-dora", Net, ["mix", "proj"], {"variant": "dora"}),
    Case("peft-parameters", Parameters, ["attn", "experts.outer"]),
    Case("kohya.safetensors", Pipeline, UNET, OF_UNET, format="kohya"),
    Case("diffusers.safetensors", Pipeline, UNET, OF_UNET, format="diffusers"),
]  # fmt: skip


@torch.no_grad()
def trained(case: Case) -> nn.Module:
    """The model with an adapter as if it had been trained."""
    model = built(case.model_class, case.dtype)
    lora_plus.inject_lora(model, case.targets, **{"r": 2, "alpha": 3, **case.options})
    if case.fold is not None:
        fold_lr_ratio(model, case.fold)
    computed = case.options.get("init") == "pissa"
    for seed, (name, tensor) in enumerate(sorted(model.state_dict(keep_vars=True).items()), 60):
        moved = numbers(*tensor.shape, seed=seed).to(tensor.dtype) / 2
        *_, role = name.rpartition(".lora_")
        if role.startswith(("A.", "B.")) and not computed:
            tensor.copy_(moved)
        elif role.startswith(("A.", "B.", "magnitude.")):
            tensor.add_(moved)
        elif name.startswith("head.") and "train_also" in case.options:
            tensor.add_(3 if name.endswith("num_batches_tracked") else moved.abs())
    return model


def main(folder: Path) -> None:
    expected = {}
    for case in CASES:
        model = trained(case)
        lora_plus.save_adapter(model, folder / case.file, format=case.format, metadata=case.metadata)
        x = INPUTS[case.model_class]
        x = x.to(case.dtype) if x.is_floating_point() else x
        with torch.no_grad():
            expected |= {f"{case.file}.input": x.clone(), f"{case.file}.output": model(x).contiguous()}
    save_file(expected, folder / "expected.safetensors")
    print(f"written by {lora_plus.__file__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The same run through PEFT's layers, as a check of ours: same start, same groups, same batches, the same losses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from methods import RANK, SCALE
from tasks import Setting, Task
from torch import nn
from training import adapted, train

from lora_plus import LoRALinear
from lora_plus.layers import LoRAConv2d

CHECKED = ("LoRA+ x4", "DoRA")
"""Methods that are checked; of those in the table PEFT has the same ones."""


@dataclass(frozen=True)
class Check:
    """Training losses of one setting, step by step."""

    task: str
    method: str
    rate: float
    seed: int
    ours: list[float]
    theirs: list[float]

    @property
    def difference(self) -> float:
        """The largest over all steps."""
        return max(abs(a - b) for a, b in zip(self.ours, self.theirs, strict=True))


def through_peft(model: nn.Module, ours: nn.Module, variant: str) -> tuple[nn.Module, list[list[nn.Parameter]]]:
    """The model with PEFT's adapters that start as ours do, and its parameters: those of A, of B, and the others."""
    import peft

    layers = {name: m for name, m in ours.named_modules() if isinstance(m, (LoRALinear, LoRAConv2d))}
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=int(SCALE * RANK),
        target_modules=list(layers),
        modules_to_save=["head"],
        use_dora=variant == "dora",
    )
    made: nn.Module = peft.get_peft_model(model, config).eval()
    factors: list[list[nn.Parameter]] = [[], []]
    with torch.no_grad():
        for name, layer in layers.items():
            theirs = made.base_model.model.get_submodule(name)  # type: ignore[union-attr, operator]
            pairs = ((layer.lora_A, theirs.lora_A), (layer.lora_B, theirs.lora_B))
            for parameters, (start, factor) in zip(factors, pairs, strict=True):
                weight = factor["default"].weight  # type: ignore[index, union-attr]
                weight.copy_(start["default"].view_as(weight))
                parameters.append(weight)
    taken = {id(parameter) for parameters in factors for parameter in parameters}
    others = [p for p in made.parameters() if p.requires_grad and id(p) not in taken]
    return made, [*factors, others]


def compared(name: str, task: Task, setting: Setting, method: str, rate: float, seed: int) -> Check:
    """Train the task with our layers and with PEFT's."""
    chosen = setting.methods[method]
    ours = adapted(task, setting, chosen, seed)
    theirs, parameters = through_peft(task.model(), ours, chosen.variant)
    root = chosen.lr_ratio**0.5
    groups = zip(parameters, (rate / root, rate * root, rate), strict=True)
    optimizers = {
        ours: chosen.optimizer_of(ours, rate),
        theirs: torch.optim.AdamW([{"params": p, "lr": lr} for p, lr in groups], weight_decay=0.0),
    }
    losses = [[loss for _, loss in train(model, made, task, setting, seed)] for model, made in optimizers.items()]
    return Check(name, method, rate, seed, *losses)


def read_checks(path: Path) -> list[Check]:
    """All checks of a file; none if there is no file."""
    return [Check(**plain) for plain in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def write_checks(path: Path, checks: Sequence[Check]) -> None:
    """Write the file."""
    path.write_text(json.dumps([asdict(check) for check in checks], indent=0) + "\n", encoding="utf-8")

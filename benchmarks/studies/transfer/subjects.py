"""What is trained: a toy, and pretrained models; a table."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "finetune"))  # the tasks and how they are trained
from tasks import TASKS, Setting, Task
from training import score, train

import lora_plus


class Rates(NamedTuple):
    """How an adapter is put in and trained, by the names of `inject_lora` and of the group builder."""

    r: int
    alpha: float
    g: float
    """The geometric mean of the rates of A and B."""
    ratio: float


class Subject(NamedTuple):
    """Something that can be trained with an adapter."""

    words: str
    """What it is, for the page."""
    start: float
    """The loss before training."""
    run: Callable[[Rates, int], float]
    """From the settings and a seed to the held-out loss afterwards."""


@dataclass(frozen=True)
class Plan:
    """How a subject is made, and the rates that are tried."""

    load: Callable[[bool], Subject]
    """``load(short)``; short is for a quick look."""
    centre: float
    """g * sqrt(r * s) in the middle of the grid."""


def optimizer_of(model: nn.Module, rates: Rates) -> torch.optim.Optimizer:
    """AdamW without decay, at the two rates."""
    return lora_plus.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=rates.g, lr_ratio=rates.ratio, lr_mode="geometric"
    )


# ---- pretrained models -----------------------------------------------------------------------------------------------


def pretrained(setting: Setting, short: bool) -> Subject:
    """A task of the fine-tuning study; the head stays the linear probe."""
    setting = replace(setting, sizes=(300, 60, 60), steps=6) if short else setting
    task = setting.load(*setting.sizes)
    words = (
        f"{setting.words} The head is the linear probe and stays as it is. {setting.steps} steps of {setting.batch}."
    )
    return Subject(words, score(task.start, task.validation).loss, partial(_fine_tuned, task, setting))


def _fine_tuned(task: Task, setting: Setting, rates: Rates, seed: int) -> float:
    model = lora_plus.inject_lora(
        task.model(), setting.targets, r=rates.r, alpha=rates.alpha, generator=torch.Generator().manual_seed(seed)
    )
    for _ in train(model, optimizer_of(model, rates), task, setting, seed):
        pass
    return score(model, task.validation).loss


# ---- a toy -----------------------------------------------------------------------------------------------------------

WIDTH, INPUTS, OUTPUTS, NEEDED = 256, 64, 8, 24
"""Of the toy, and the rank of what it has to learn."""


class Toy(nn.Module):
    """64-256-256-8 with ReLU."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.hidden, self.last = (
            nn.Linear(INPUTS, WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH, bias=False),
            nn.Linear(WIDTH, OUTPUTS, bias=False),
        )
        for layer in (self.first, self.hidden, self.last):
            layer.weight = nn.Parameter(_drawn(layer.weight.shape, generator) * layer.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.hidden(torch.relu(self.first(x)))))
        return y


def toy(short: bool) -> Subject:
    """Its hidden weight lacks a matrix of rank 24."""
    steps = 10 if short else 150
    words = (
        f"A random ReLU net of {INPUTS}-{WIDTH}-{WIDTH}-{OUTPUTS} learns from a teacher: the same net with a matrix of "
        f"rank {NEEDED} added to its hidden weight. Only that weight has an adapter. {steps} steps of 64, mean square "
        "error."
    )
    return Subject(words, _toy_loss(None, 0, 0), lambda rates, seed: _toy_loss(rates, seed, steps))


def _toy_loss(rates: Rates | None, seed: int, steps: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    model = Toy(generator)
    more = _drawn((WIDTH, NEEDED), generator) @ _drawn((NEEDED, WIDTH), generator) / math.sqrt(NEEDED * WIDTH)
    teacher = Toy(torch.Generator().manual_seed(seed))
    teacher.hidden.weight = nn.Parameter(model.hidden.weight.detach() + more)
    held_out = _drawn((512, INPUTS), generator)
    if rates is not None:
        lora_plus.inject_lora(model, ["hidden"], r=rates.r, alpha=rates.alpha, generator=generator)
        optimizer = optimizer_of(model, rates)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(steps):
            x = _drawn((64, INPUTS), generator)
            loss = (model(x) - teacher(x).detach()).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        loss = (model(held_out) - teacher(held_out)).square().mean()
    return loss.item() if math.isfinite(loss.item()) else math.inf


def _drawn(shape: Any, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


SUBJECTS: dict[str, Plan] = {
    "toy": Plan(toy, 2.0**-5),
    **{name: Plan(partial(pretrained, setting), 2.0**-8) for name, setting in TASKS.items()},
}

"""One run: a method at a rate with a seed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from methods import Method, Sizes
from tasks import Setting, Split, Task
from torch import Tensor, nn

import lora_plus
from examples.demo.answers import IGNORED
from lora_plus.training import init_from_gradients

GRADIENT_BATCHES = 4
"""Batches that an init from gradients looks at, besides those it trains on."""
CHECKS, STEPS_APART = 4, 20
"""How often the validation loss is taken at least during a run that asks for its curve, and after how many steps."""


@dataclass(frozen=True)
class Score:
    """On held-out examples."""

    loss: float
    """Mean cross-entropy in nats, of an answer of several tokens per token."""
    accuracy: float
    """Share of examples that are answered right, with every token of the answer.

    Greedy decoding writes an answer if and only if each of its tokens is the likeliest after those before it, so that
    one pass over the right answers tells what decoding token by token would give.
    """


@dataclass(frozen=True)
class Outcome:
    """What a run gave."""

    validation: Score
    test: Score | None
    curve: list[tuple[int, float]]
    """Steps done and validation loss, the last one at the end; empty if it was not asked for."""
    step_seconds: float
    """CPU time of a training step."""


@torch.no_grad()
def score(model: nn.Module, split: Split, size: int = 64) -> Score:
    """Loss and accuracy; a loss that is not finite counts as infinite."""
    parts = [split.at(slice(n, n + size)) for n in range(0, len(split.labels), size)]
    logits = torch.cat([model(*part.inputs) for part in parts])
    loss = cross_entropy(logits, split.labels).item()
    right = (logits.argmax(-1) == split.labels) | (split.labels == IGNORED)
    accuracy = right.reshape(len(right), -1).all(1).float().mean().item()
    return Score(loss if math.isfinite(loss) else math.inf, accuracy)


def batches(split: Split, size: int, generator: torch.Generator) -> Iterator[Split]:
    """Endless batches: the examples in a new order at each pass, the incomplete last batch left out."""
    while True:
        order = torch.randperm(len(split.labels), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            yield split.at(order[start : start + size])


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all labels that are counted: logits ``(..., classes)``, labels ``(...)``."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def loss_of(model: nn.Module, batch: Split) -> Tensor:
    """Mean cross-entropy of a batch."""
    return cross_entropy(model(*batch.inputs), batch.labels)


def sizes(task: Task, setting: Setting, method: Method) -> Sizes:
    """What the rank of a method can depend on."""
    counted = []
    for targets in (setting.targets, method.targets or setting.targets):
        model = lora_plus.inject_lora(task.model(), targets, r=1)
        rows = lora_plus.lora_summary(model).rows
        weights = sum(model.get_parameter(f"{row.name}.weight").numel() for row in rows)
        counted.append((weights, sum(row.parameters for row in rows)))
    (weights, of_all), (_, own) = counted
    return Sizes(weights, of_all, own)


def adapted(task: Task, setting: Setting, method: Method, seed: int) -> nn.Module:
    """The task's model, of which what this method trains can be trained; adapters are fresh."""
    model = task.model()
    if method.in_full:
        model.requires_grad_(False)
        for module in (model.body, *map(model.get_submodule, setting.also)):
            module.requires_grad_(True)
        return model
    rank = method.rank if isinstance(method.rank, int) else method.rank(sizes(task, setting, method))
    lora_plus.inject_lora(
        model,
        method.targets or setting.targets,
        r=rank,
        alpha=method.scale * rank,
        init=method.init,
        variant=method.variant,
        train_also=list(setting.also),
        generator=torch.Generator().manual_seed(seed),
    )
    if method.from_gradients:
        extra = batches(task.train, setting.batch, torch.Generator().manual_seed(seed + 10**6))
        init_from_gradients(model, lambda batch: loss_of(model, batch), [next(extra) for _ in range(GRADIENT_BATCHES)])
    return model


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, setting: Setting, seed: int
) -> Iterator[tuple[int, float]]:
    """Yields the steps done and the training loss after each step. The rates fall linearly to zero.

    The batches depend on the seed only, so all methods see the same ones.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / setting.steps)
    stream = batches(task.train, setting.batch, torch.Generator().manual_seed(seed))
    for step in range(1, setting.steps + 1):
        loss = loss_of(model, next(stream))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step, loss.item()


def run(task: Task, setting: Setting, method: Method, rate: float, seed: int, *, whole: bool) -> Outcome:
    """Train and score.

    Args:
        task: the model and the data.
        setting: how it is trained.
        method: what is compared.
        rate: the geometric mean of A's and B's rate; the head and magnitudes learn at it.
        seed: of A and of the batches.
        whole: whether to take the validation curve and the test score too, as the report needs.
    """
    model = adapted(task, setting, method, seed)
    optimizer = method.optimizer_of(model, rate)
    every = max(1, min(setting.steps // CHECKS, STEPS_APART))
    curve, seconds = [], 0.0
    start = time.process_time()
    for step, _ in train(model, optimizer, task, setting, seed):
        seconds += time.process_time() - start
        if whole and step % every == 0 and step < setting.steps:
            curve.append((step, score(model, task.validation).loss))
        start = time.process_time()
    validation = score(model, task.validation)
    if whole:
        curve.append((setting.steps, validation.loss))
    test = score(model, task.test) if whole else None
    return Outcome(validation, test, curve, seconds / setting.steps)

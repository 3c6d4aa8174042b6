"""DistributedDataParallel: adapters train as they do in one process on the whole batch, and what cannot be is loud."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_model import (
    LENGTH,
    LR,
    LR_RATIO,
    VOCABULARY,
    WEIGHT_DECAY,
    WIDTH,
    Block,
    batches,
    distance,
    lora_model,
    loss_of,
    optimizer_for,
    train,
    trained,
)
from processes import Processes
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.parallel import DistributedDataParallel

import lora_plus as lp
from lora_plus.files import adapter_state_dict

STEPS = 5
RANKS = 2
AdamW = torch.optim.AdamW


def shares(steps: int = STEPS) -> list[Tensor]:
    return batches(steps, rank=torch.distributed.get_rank(), world=RANKS)


# ---- parity --------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Adapters on parameters: rows of an attention's weight, and stacked experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.experts = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        x = x + self.attention(x, x, x, need_weights=False, attn_mask=mask)[0]
        return self.head(x + (x[:, None] @ self.experts.mT).sum(1).tanh())


def mixed() -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed()
    targets = ["attention.in_proj_weight", "attention.out_proj.weight", "experts"]
    return lp.inject_lora(model, targets, r=4, alpha=8, generator=generator)


def checkpointed() -> nn.Module:
    model = lora_model()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    return model


def redundancy_free(model: nn.Module) -> torch.optim.Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # whose module warns of parts of torch

    groups = lp.loraplus_param_groups(model, lr=LR, lr_ratio=LR_RATIO, weight_decay=WEIGHT_DECAY)
    return ZeroRedundancyOptimizer(groups, AdamW, lr=LR)


def falling(step: int) -> float:
    return 0.7**step


@dataclass(frozen=True)
class Setting:
    """How a run on two processes differs from that in one."""

    make: Callable[[], nn.Module] = lora_model
    options: dict[str, Any] = field(default_factory=dict)
    """Of DistributedDataParallel."""
    build: Callable[[nn.Module], torch.optim.Optimizer] = optimizer_for
    build_one: Callable[[nn.Module], torch.optim.Optimizer] = optimizer_for
    """The optimizer of the one process."""
    before: bool = False
    """Whether the optimizer is built before the model is wrapped."""
    compiled: bool = False
    """Whether the model is compiled before it is wrapped."""


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return optimizer_for(model, fused=True)


SETTINGS = {
    "as it is": Setting(),
    "embedding": Setting(lambda: lora_model(embedding=True)),
    "optimizer before": Setting(before=True),
    "static graph": Setting(options={"static_graph": True}),
    "views of buckets": Setting(options={"gradient_as_bucket_view": True}),
    "sharded optimizer": Setting(build=redundancy_free),
    "attention and experts": Setting(mixed),
    "dora": Setting(lambda: lora_model(variant="dora")),
    "fused": Setting(build=fused, build_one=fused),
    "activation checkpointing": Setting(checkpointed),
    "compiled": Setting(compiled=True),
}


def scheduled(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> dict[str, Tensor]:
    """What training with a schedule reaches, under the plain model's names."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, falling)
    for tokens in data:
        train(model, optimizer, [tokens])
        scheduler.step()
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in trained(model).items()}


def parity(name: str) -> float:
    setting = SETTINGS[name]
    model, one = setting.make(), setting.make()
    early = setting.build(model) if setting.before else None
    run: Any = torch.compile(model, backend="aot_eager") if setting.compiled else model
    wrapped = DistributedDataParallel(run, **setting.options)
    optimizer = early or setting.build(wrapped)
    lp.check_optimizer(optimizer, wrapped, lr_ratio=LR_RATIO)
    reached = scheduled(wrapped, optimizer, shares())
    return distance(reached, scheduled(one, setting.build_one(one), batches(STEPS)))


def all_parities() -> dict[str, float]:
    return {name: parity(name) for name in SETTINGS}


def test_ddp_trains_as_one_process_does(two_processes: Processes) -> None:
    for rank in two_processes(all_parities):
        assert {name: difference for name, difference in rank.items() if not difference <= 1e-6} == {}


def accumulated() -> tuple[float, float]:
    """Two batches a step, the first without a reduction; against one process on all of it, in float64."""
    model = DistributedDataParallel(lora_model().double())
    optimizer, data = optimizer_for(model), shares(2 * STEPS)
    for first, second in zip(data[::2], data[1::2], strict=True):
        with model.no_sync():
            (loss_of(model, first) / 2).backward()
        (loss_of(model, second) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    one, whole = lora_model().double(), batches(2 * STEPS)
    pairs = [torch.cat(pair) for pair in zip(whole[::2], whole[1::2], strict=True)]
    train(one, optimizer_for(one), pairs)
    untrained = distance(trained(one), trained(lora_model().double()))
    return distance(trained(model), trained(one)), untrained


def test_gradients_accumulate_without_reduction(two_processes: Processes) -> None:
    for difference, moved in two_processes(accumulated):
        assert difference <= 1e-12 < moved


def unseeded() -> tuple[float, dict[str, Tensor]]:
    """Adapters drawn with another seed on each rank, then wrapped."""
    model = lora_model(generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    drawn = trained(model)
    wrapped = DistributedDataParallel(model)
    lp.check_optimizer(optimizer_for(wrapped), wrapped)
    return distance(drawn, trained(wrapped)), trained(wrapped)


def test_ranks_without_a_common_seed_are_made_equal_by_wrapping(two_processes: Processes) -> None:
    (first_changed, first), (second_changed, second) = two_processes(unseeded)
    assert distance(first, second) == first_changed == 0 < second_changed


# ---- what DDP cannot do --------------------------------------------------------------------------------------------


def two_adapters() -> nn.Module:
    """Both trainable, the first one active."""
    model = lora_model()
    lp.add_adapter(model, "other", r=2, generator=torch.Generator().manual_seed(3))
    lp.set_adapter(model, ["default", "other"], trainable=True)
    lp.set_adapter(model, "default")
    return model


def attempt(model: nn.Module) -> tuple[str, str]:
    """What is found, and what three steps raise."""
    optimizer = optimizer_for(model)
    errors = []
    for action in (lambda: lp.check_optimizer(optimizer, model), lambda: train(model, optimizer, shares(3))):
        try:
            action()
            errors.append("")
        except (ValueError, RuntimeError) as error:
            errors.append(str(error))
    return errors[0], errors[1]


def inactive() -> dict[str, tuple[str, str]]:
    frozen = two_adapters()
    lp.set_adapter(frozen, "default", trainable=True)
    return {
        "trainable": attempt(DistributedDataParallel(two_adapters())),
        "frozen": attempt(DistributedDataParallel(frozen)),
        "unused ones looked for": attempt(DistributedDataParallel(two_adapters(), find_unused_parameters=True)),
    }


def test_an_inactive_adapter_fails_the_second_step_unless_frozen(two_processes: Processes) -> None:
    for found in two_processes(inactive):
        assert "the adapter 'other' is trainable but not active" in found["trainable"][0]
        assert "before DDP wraps the model" in found["trainable"][0]
        assert "Expected to have finished reduction in the prior iteration" in found["trainable"][1]
        assert found["frozen"] == ("", "")
        assert "'other' is trainable but not active" in found["unused ones looked for"][0]
        assert found["unused ones looked for"][1] == ""


def injected_into_wrapped() -> str:
    model = DistributedDataParallel(lora_model())
    with pytest.raises(ValueError) as caught:
        lp.add_adapter(model, "late", r=2)
    return str(caught.value)


def test_injecting_into_a_wrapped_model_is_refused(two_processes: Processes) -> None:
    for message in two_processes(injected_into_wrapped):
        assert "do it before the model is wrapped" in message


# ---- saving and resuming -------------------------------------------------------------------------------------------


def saved(folder: Path) -> tuple[float, float]:
    """How far plain models are from the wrapped one whose adapter they loaded, and from where it started."""
    model = DistributedDataParallel(lora_model(embedding=True))
    train(model, optimizer_for(model), shares())
    if torch.distributed.get_rank() == 0:
        lp.save_adapter(model, folder / "adapter.safetensors")
    torch.distributed.barrier()
    fresh = lora_model(embedding=True)
    start = trained(fresh)
    lp.remove_lora(fresh)
    lp.load_adapter(fresh, folder / "adapter.safetensors")
    return distance(trained(fresh), trained(model)), distance(start, trained(model))


def test_what_a_wrapped_model_saves_loads_into_a_plain_one(two_processes: Processes, tmp_path: Path) -> None:
    for difference, moved in two_processes(saved, tmp_path):
        assert difference == 0 < moved


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def resumed(before: int) -> tuple[float, bool]:
    """How far a run that was stopped is from one that was not, and whether the groups are the same."""
    model = DistributedDataParallel(lora_model(embedding=True))
    optimizer = optimizer_for(model)
    train(model, optimizer, shares()[:before])
    stored = io.BytesIO()
    torch.save({"model": trained(model), "optimizer": optimizer.state_dict()}, stored)
    stored.seek(0)
    train(model, optimizer, shares()[before:])

    state = torch.load(stored)
    again = lora_model(embedding=True)
    with torch.no_grad():
        for name, tensor in adapter_state_dict(again).items():
            tensor.copy_(state["model"][name])
    wrapped = DistributedDataParallel(again)
    resuming = optimizer_for(wrapped, lr=9e-9, lr_ratio=2.0)
    resuming.load_state_dict(state["optimizer"])
    lp.check_optimizer(resuming, wrapped, lr_ratio=LR_RATIO)
    kept = copy.deepcopy(settings_of(resuming))
    train(wrapped, resuming, shares()[before:])
    return distance(trained(wrapped), trained(model)), kept == settings_of(optimizer)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(two_processes: Processes) -> None:
    assert two_processes(resumed, 2) == [(0.0, True)] * RANKS


# ---- a ratio of 1 --------------------------------------------------------------------------------------------------


def plain_lora(model: nn.Module) -> torch.optim.Optimizer:
    """Written by hand: one rate, no decay of norms."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    adapters = [p for name, p in parameters if "lora_" in name]
    rest = [p for name, p in parameters if "lora_" not in name]
    return AdamW([{"params": adapters, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}], lr=LR)


def ratio_one() -> tuple[float, float]:
    """How far LoRA+ with a ratio of 1, each rank for itself, is from plain LoRA, and from LoRA+."""
    alone = [torch.distributed.new_group([rank]) for rank in range(RANKS)][torch.distributed.get_rank()]
    reached = []
    for build in (plain_lora, lambda model: optimizer_for(model, lr_ratio=1.0), optimizer_for):
        model = DistributedDataParallel(lora_model(embedding=True), process_group=alone)
        optimizer = build(model)
        lp.check_optimizer(optimizer, model)
        train(model, optimizer, batches(STEPS))
        reached.append(trained(model))
    return distance(reached[0], reached[1]), distance(reached[0], reached[2])


def test_a_ratio_of_one_is_plain_lora_to_the_bit(two_processes: Processes) -> None:
    for difference, moved in two_processes(ratio_one):
        assert difference == 0.0 < moved

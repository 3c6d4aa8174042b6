"""FullyShardedDataParallel, ``use_orig_params=True``: training as in one process; what flat parameters cannot do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_model import LR, batches, distance, lora_model, optimizer_for, train, trained
from processes import Processes
from sharded_models import TOKENS, by_fsdp1, by_fully_shard
from torch import nn

import lora_plus as lp

STEPS = 4
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": optimizer_for,
    "SGD": lambda model: lp.create_loraplus_optimizer(model, torch.optim.SGD, lr=LR, lr_ratio=4, weight_decay=0.1),
}
SETTINGS: dict[str, Any] = {"embedding": True, "train_also": ["norm", "head"]}


def groups(optimizer: torch.optim.Optimizer) -> list[tuple[str, int, float, float]]:
    """Name, size, rate and decay of each group."""
    return [(g["name"], len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]


def parity() -> list[str]:
    """What differs from one process on the whole batches; an optimizer can be built before wrapping, too."""
    rank, wrong = torch.distributed.get_rank(), []
    for name, build in OPTIMIZERS.items():
        plain = lora_model(**SETTINGS)
        expected = build(plain)
        train(plain, expected, batches(STEPS))
        for before in (False, True):
            model = lora_model(**SETTINGS)
            early = build(model) if before else None
            model = by_fsdp1(model)
            optimizer = early or build(model)
            train(model, optimizer, batches(STEPS, rank=rank, world=2))
            if groups(optimizer) != groups(expected):
                wrong.append(f"{name}, before={before}: groups {groups(optimizer)}")
            if distance(trained(model), trained(plain)) > 1e-6:
                wrong.append(f"{name}, before={before}: {distance(trained(model), trained(plain))}")
    return wrong


def test_it_trains_as_one_process_does_with_the_same_decay(two_processes: Processes) -> None:
    assert two_processes(parity) == [[], []]


def built_after_a_forward() -> list[Any]:
    """Parameters of an optimizer that are not the model's after the next step, where ``fully_shard`` gathered some."""
    model = by_fully_shard(lora_model(**SETTINGS))
    model(TOKENS)
    optimizer = optimizer_for(model)
    train(model, optimizer, batches(1))
    model.reshard()
    own = {id(parameter) for parameter in model.parameters()}
    return [p.shape for g in optimizer.param_groups for p in g["params"] if id(p) not in own]


def test_an_optimizer_built_after_a_forward_has_the_sharded_parameters(two_processes: Processes) -> None:
    assert two_processes(built_after_a_forward) == [[], []]


def unavailable() -> dict[str, str]:
    """What is refused, with the message; where no module is trained in full, disabling and removing work."""
    model = by_fsdp1(lora_model(non_zero=True))
    adapted = model(TOKENS)
    changes: dict[str, Callable[[], Any]] = {
        "merge": lambda: lp.merge_lora(model),
        "merge_and_unload": lambda: lp.merge_and_unload(model),
        "remove": lambda: lp.remove_lora(model),
        "delete": lambda: lp.delete_adapter(model, "default"),
        "disabled": lambda: lp.disabled(model).__enter__(),
        "rename": lambda: lp.rename_adapter(model, "default", "b"),
        "add": lambda: lp.add_adapter(model, "b"),
    }
    texts = {}
    for name, change in changes.items():
        with pytest.raises(ValueError) as raised:
            change()
        texts[name] = str(raised.value)
    assert torch.equal(model(TOKENS), adapted)
    plain = lora_model(non_zero=True, train_also=())
    with lp.disabled(plain):
        original = plain(TOKENS)
    model = by_fsdp1(plain)
    with lp.disabled(model):
        assert torch.allclose(model(TOKENS), original)
    assert not torch.allclose(model(TOKENS), original)
    lp.remove_lora(model)
    assert torch.allclose(model(TOKENS), original)
    return texts


def test_what_flat_parameters_cannot_do_is_refused(two_processes: Processes) -> None:
    for texts in two_processes(unavailable):
        for name in ("merge", "merge_and_unload"):
            assert "merging needs whole parameters: those of this model are sharded by FullyShardedDa" in texts[name]
        for name in ("remove", "delete", "disabled"):
            assert "needs the original values" in texts[name] and "norm' is trained in full" in texts[name]
        for name in ("rename", "add"):
            assert "before the model is sharded" in texts[name]

"""On two processes: what would train nothing, or replicas of its own on each rank, is silent, and found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_model import LR_RATIO, batches, distance, lora_model, optimizer_for, reference, train, trained
from processes import Processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import lora_plus as lp
from lora_plus.model.tree import adapters_of
from lora_plus.training import rebind_optimizer

STEPS = 3
RANKS = 2


def shares(steps: int = STEPS) -> list[torch.Tensor]:
    return batches(steps, rank=torch.distributed.get_rank(), world=RANKS)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def replicated_mesh() -> Any:
    """Each rank holds the whole model, as the two groups of a hybrid sharding would."""
    return init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicas", "shards"))


def unseeded(model: nn.Module) -> nn.Module:
    """With other A on each rank, as without a seed."""
    generator = torch.Generator().manual_seed(10 + torch.distributed.get_rank())
    with torch.no_grad():
        for _, adapter, _ in adapters_of(model):
            for role, parameter in adapter.parameters():
                if role == "A":
                    parameter.normal_(std=0.1, generator=generator)
    return model


def refusal(optimizer: Any, model: nn.Module, **options: Any) -> str:
    """The findings, or nothing."""
    try:
        lp.check_optimizer(optimizer, model, **options)
    except ValueError as error:
        return str(error)
    return ""


def apart(model: nn.Module) -> float:
    """How far the trained parameters are apart between the ranks, each in what it holds."""
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    local = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in own.items()}
    told: list[Any] = [None] * RANKS
    torch.distributed.all_gather_object(told, local)
    return distance(*told)


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> float:
    return distance(trained(model), before)


# ---- what is right -------------------------------------------------------------------------------------------------


def fsdp1(module: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))


def hybrid() -> nn.Module:
    return shard(lora_model(), mesh=replicated_mesh())


def delayed() -> nn.Module:
    """DDP that reduces the last norm on its own."""
    model = lora_model()
    late = [(f"norm.{name}", p) for name, p in model.norm.named_parameters()]
    trigger = model.blocks[0].q.lora_A["default"]
    return DistributedDataParallel(model, delay_all_reduce_named_params=late, param_to_hook_all_reduce=trigger)


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "ddp": lambda: DistributedDataParallel(unseeded(lora_model(embedding=True))),
    "ddp, static graph": lambda: DistributedDataParallel(lora_model(), static_graph=True),
    "ddp, compiled": lambda: torch.compile(DistributedDataParallel(lora_model()), backend="eager"),
    "fully_shard": lambda: shard(lora_model(embedding=True)),
    "fully_shard on the root alone": lambda: fully_shard(lora_model()),
    "hybrid": hybrid,
    "fsdp1": lambda: fsdp1(lora_model()),
}


def right(name: str) -> list[str]:
    """What is found before, during and after training."""
    model = RIGHT[name]()
    optimizer = optimizer_for(model)
    found = [refusal(optimizer, model, lr_ratio=LR_RATIO)]
    train(model, optimizer, shares(1))
    with torch.no_grad():
        model(shares()[0])
    found.append(refusal(optimizer, model))
    train(model, optimizer, shares(1))
    return [*found, refusal(optimizer, model)]


def delayed_alone() -> str:
    """What is found before training; whether torch waits for the delayed reduction is a race of its own."""
    model = delayed()
    return refusal(optimizer_for(model), model, lr_ratio=LR_RATIO)


def test_parameters_that_ddp_reduces_apart_are_reduced(two_processes: Processes) -> None:
    assert two_processes(delayed_alone) == [""] * RANKS


def all_right() -> dict[str, list[str]]:
    return {name: right(name) for name in RIGHT}


def test_what_is_right_passes(two_processes: Processes) -> None:
    assert two_processes(all_right) == [{name: ["", "", ""] for name in RIGHT}] * RANKS


def zero_redundancy() -> str:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # whose module warns of parts of torch

    model = DistributedDataParallel(lora_model())
    groups = lp.loraplus_param_groups(model, lr=1e-3, lr_ratio=LR_RATIO)
    return refusal(ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=1e-3), model, lr_ratio=LR_RATIO)


def test_the_groups_of_a_sharded_optimizer_are_checked_too(two_processes: Processes) -> None:
    assert two_processes(zero_redundancy) == [""] * RANKS


# ---- built before sharding -----------------------------------------------------------------------------------------


def built_before() -> tuple[float, str, float, str]:
    model = lora_model()
    optimizer = optimizer_for(model)
    shard(model)
    before = trained(model)
    train(model, optimizer, shares())
    unmoved, found = moved(model, before), refusal(optimizer, model)

    model = lora_model()
    optimizer = optimizer_for(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with rebind_optimizer(optimizer, model):
        shard(model)
    checked = refusal(optimizer, model, lr_ratio=LR_RATIO)
    train(model, optimizer, shares())
    scheduler.step()
    return unmoved, found, distance(trained(model), reference(STEPS)), checked


def test_an_optimizer_built_before_sharding_trains_nothing_unless_rebound(two_processes: Processes) -> None:
    for unmoved, found, difference, checked in two_processes(built_before):
        assert unmoved == 0.0
        assert "12 of 12 in group 'lora_A', 12 of 12 in group 'lora_B', 6 of 6 in group 'other_no_decay'" in found
        assert "inside `with rebind_optimizer(optimizer, model):`" in found
        assert (checked, difference <= 1e-6) == ("", True)


def distributed() -> tuple[str, str, int, bool]:
    model = lora_model()
    before, optimizer = optimizer_for(model), optimizer_for(model)
    with rebind_optimizer(optimizer, model):
        distribute_module(model, init_device_mesh("cpu", (RANKS,)))
    members = [p for group in optimizer.param_groups for p in group["params"]]
    return (
        refusal(before, model),
        refusal(optimizer, model),
        len(members),
        all(isinstance(member, DTensor) for member in members),
    )


def test_an_optimizer_is_rebound_over_tensor_parallelism(two_processes: Processes) -> None:
    for found, rebound, members, all_distributed in two_processes(distributed):
        assert "12 of 12 in group 'lora_A'" in found
        assert (rebound, members, all_distributed) == ("", 30, True)


# ---- gradients that are not reduced --------------------------------------------------------------------------------


def injected_after_ddp() -> nn.Module:
    model = DistributedDataParallel(lora_model())
    lp.set_adapter(model, "default", trainable=False)
    generator = torch.Generator().manual_seed(0)
    lp.add_adapter(model.module, "late", r=2, generator=generator)
    lp.set_adapter(model, "late", trainable=True)
    return model


def trainable_after_ddp() -> nn.Module:
    model = lora_model(train_also=())  # with a head the change of adapters is refused
    lp.add_adapter(model, "late", r=2, generator=torch.Generator().manual_seed(0))
    lp.set_adapter(model, "default", trainable=True)
    model = DistributedDataParallel(model, find_unused_parameters=True)
    lp.set_adapter(model, "late", trainable=True)
    return model


def without_root() -> nn.Module:
    model = lora_model()
    for block in model.blocks:
        fully_shard(block)
    return model


def without_root_of_fsdp1() -> nn.Module:
    model = lora_model()
    for name, block in list(model.blocks.named_children()):
        setattr(model.blocks, name, fsdp1(block))
    return model


NOT_REDUCED: dict[Callable[[], nn.Module], tuple[str, str]] = {
    injected_after_ddp: ("lora_A.late", "add adapters, and choose what is trainable, before DistributedDataParallel"),
    trainable_after_ddp: ("lora_A.late", "add adapters, and choose what is trainable, before DistributedDataParallel"),
    without_root_of_fsdp1: ("'norm.weight', 'norm.bias' would drift apart", "and wrap the whole of it"),
    without_root: ("'norm.weight', 'norm.bias' would drift apart", "and call fully_shard on the root, too"),
}


def drifting(build: Callable[[], nn.Module]) -> tuple[float, float, str]:
    """How far the ranks are apart before and after training, and what is found."""
    model = build()
    optimizer = optimizer_for(model)
    plain = nn.Module()
    # the shards are each rank's own
    whole = (p for p in model.parameters() if not isinstance(p, DTensor) and not hasattr(p, "_fsdp_flattened"))
    plain.kept = nn.ParameterList(p for p in whole if p.requires_grad)
    start = apart(plain)
    found = refusal(optimizer, model)
    train(model, optimizer, shares())
    return start, apart(plain), found


@pytest.mark.parametrize("build", NOT_REDUCED)
def test_gradients_that_no_engine_reduces_drift_apart_and_are_found(
    two_processes: Processes, build: Callable[[], nn.Module]
) -> None:
    name, advice = NOT_REDUCED[build]
    for start, end, found in two_processes(drifting, build):
        assert start == 0.0 and end > 1e-4
        assert name in found and "would drift apart between ranks" in found and advice in found
        assert len(found.splitlines()) == 2


# ---- replicas that differ from the start ---------------------------------------------------------------------------


def redrawn_after_ddp() -> nn.Module:
    model = DistributedDataParallel(lora_model())
    unseeded(model)
    return model


def unseeded_hybrid() -> nn.Module:
    return shard(unseeded(lora_model()), mesh=replicated_mesh())


def different(build: Callable[[], nn.Module]) -> tuple[float, str]:
    model = build()
    optimizer = optimizer_for(model)
    found = refusal(optimizer, model)
    train(model, optimizer, shares())
    return apart(model), found


@pytest.mark.parametrize("build", [redrawn_after_ddp, unseeded_hybrid])
def test_replicas_that_start_apart_stay_apart_and_are_found(
    two_processes: Processes, build: Callable[[], nn.Module]
) -> None:
    for end, found in two_processes(different, build):
        assert end > 1e-2
        assert ".q.lora_A.default'" in found and "and 9 more differ between ranks" in found
        assert len(found.splitlines()) == 2


def beside_tensor_parallelism() -> tuple[str, str]:
    """Whole adapters beside a layer that is spread over the ranks."""
    found = []
    for prepare in (lambda model: model, unseeded):
        model = prepare(lora_model())
        mesh = init_device_mesh("cpu", (RANKS,))
        model.head.weight = nn.Parameter(distribute_tensor(model.head.weight, mesh, [Replicate()]), requires_grad=False)
        found.append(refusal(optimizer_for(model), model))
    return found[0], found[1]


def test_whole_parameters_beside_distributed_ones_must_be_equal(two_processes: Processes) -> None:
    for equal, unequal in two_processes(beside_tensor_parallelism):
        assert equal == ""
        assert "and 9 more differ between ranks" in unequal


# ---- all ranks alike -----------------------------------------------------------------------------------------------


def wrong_on_one_rank() -> str:
    model = DistributedDataParallel(lora_model())
    optimizer = optimizer_for(model)
    if torch.distributed.get_rank() == 1:
        optimizer.param_groups[0]["lr"] *= 2
    return refusal(optimizer, model)


def test_what_one_rank_finds_all_raise(two_processes: Processes) -> None:
    first, second = two_processes(wrong_on_one_rank)
    assert first == second
    assert "a ratio of 8, where 16 is expected" in first

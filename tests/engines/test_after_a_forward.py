"""Calls between a forward and the next one, where an engine may still hold whole parameters in place of its storage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_model import TARGETS, base_model, batches, distance, optimizer_for, train, trained
from processes import Processes
from sharded_models import TOKENS, by_fsdp1, by_fully_shard
from torch import Tensor, nn

import lora_plus as lp
from lora_plus.files import adapter_state_dict
from lora_plus.model.tree import adapters_of
from lora_plus.training import fold_lr_ratio

WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {"fully_shard": by_fully_shard, "FSDP1": by_fsdp1}


def two_adapters() -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    model = lp.inject_lora(base_model(), [*TARGETS, "embedding", "head"], r=4, generator=generator)
    lp.add_adapter(model, "second", generator=generator)
    lp.set_adapter(model, "default", trainable=True)
    for _, adapter, _ in adapters_of(model):
        nn.init.normal_(adapter.tensors()["lora_B"], std=0.05, generator=generator)
    return model.double()


def sharded_and_alone(way: str) -> list[tuple[nn.Module, list[Tensor]]]:
    """The model over the ranks with this rank's batches, and in one process with all; both have run a forward."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    pairs = [(WAYS[way](two_adapters()), batches(3, rank=rank, world=size)), (two_adapters(), batches(3))]
    for model, _ in pairs:
        with torch.no_grad():
            model(TOKENS)
    return pairs


def chosen(way: str) -> float:
    ends = []
    for model, data in sharded_and_alone(way):
        lp.set_adapter(model, "second", trainable=True)
        train(model, optimizer_for(model), data)
        ends.append({name: adapter_state_dict(model, adapter=name) for name in ("default", "second")})
    return max(distance(ends[0][name], ends[1][name]) for name in ends[0])


def folded(way: str) -> float:
    ends = []
    for model, data in sharded_and_alone(way):
        fold_lr_ratio(model, 4.0)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        train(model, torch.optim.AdamW(trainable, lr=1e-3), data)
        ends.append(trained(model))
    return distance(*ends)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", [chosen, folded])
def test_a_change_after_a_forward_is_one_of_what_is_trained(
    two_processes: Processes, change: Callable[[str], float], way: str
) -> None:
    assert max(two_processes(change, way)) <= 1e-12


def samples_while_training(way: str) -> list[float]:
    """Outputs before and after a step inside of one block, against those of one process; and how far the step led."""
    outputs: list[list[Tensor]] = []
    for model, _ in sharded_and_alone(way):
        lp.set_adapter(model, ["default", "second"], trainable=True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        with lp.adapter_per_sample(model, ["default", "second"]):
            with torch.no_grad():
                before = model(TOKENS)
            model(TOKENS).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                outputs.append([before, model(TOKENS)])
    assert (outputs[1][1] - outputs[1][0]).abs().max() > 1e-3
    return [float((one - other).abs().max()) for one, other in zip(*outputs, strict=True)]


@pytest.mark.parametrize("way", WAYS)
def test_samples_get_their_adapters_as_they_are_after_a_step(two_processes: Processes, way: str) -> None:
    assert max(map(max, two_processes(samples_while_training, way))) <= 1e-12

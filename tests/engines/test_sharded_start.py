"""How adapters start on a model that is sharded: built on the meta device, and drawn anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_model import TARGETS, Transformer, base_model, batches, lora_model, loss_of
from mixed_model import Mixed, add_adapters, mixed_model
from processes import Processes
from sharded_models import by_fully_shard
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

import lora_plus as lp
from lora_plus.files import adapter_state_dict
from lora_plus.tensors.distributed import whole
from lora_plus.training import reset_lora_parameters


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@torch.no_grad()
def loss(model: nn.Module) -> float:
    return float(loss_of(model, batches(1)[0]))


# ---- built on the meta device --------------------------------------------------------------------------------------


def transformer(model: nn.Module) -> nn.Module:
    return lp.inject_lora(model, [*TARGETS, "embedding"], r=4, train_also="norm", generator=seeded())


def mixed_base() -> nn.Module:
    return lp.remove_lora(mixed_model())


Built = tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]
MODELS: dict[str, Built] = {
    "linear layers and an embedding": (base_model, Transformer, transformer),
    "all the rest": (mixed_base, Mixed, add_adapters),
}


def load_from_rank_0(model: nn.Module, base: dict[str, Tensor]) -> None:
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, base if torch.distributed.get_rank() == 0 else {}, options=options)


def load_on_all_ranks(model: nn.Module, base: dict[str, Tensor]) -> None:
    set_model_state_dict(model, base, options=StateDictOptions(full_state_dict=True, strict=False))


LOADS = {"rank 0": load_from_rank_0, "all ranks": load_on_all_ranks}


def built_on_meta(name: str, emptied: str, load: str) -> tuple[list[str], float]:
    values_of, build, adapt = MODELS[name]
    with torch.device("meta"):
        model = build()
    adapt(model)
    if emptied == "before":
        model.to_empty(device="cpu")
    by_fully_shard(model)
    if emptied == "after":
        model.to_empty(device="cpu")
    LOADS[load](model, values_of().state_dict())
    alone = adapt(values_of())
    return differing(values(model), values(alone)), abs(loss(model) - loss(alone))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("emptied", "load"), [("after", "rank 0"), ("after", "all ranks"), ("before", "rank 0"), ("never", "all ranks")]
)
def test_meta_model_starts_as_one_process_does(two_processes: Processes, name: str, emptied: str, load: str) -> None:
    for wrong, far in two_processes(built_on_meta, name, emptied, load):
        assert not wrong and far <= 1e-6


def moved_to_meta() -> dict[str, Any]:
    """A model whose adapters lose their values, too, as they do when a model is sharded that only rank 0 has loaded."""
    model = by_fully_shard(transformer(base_model()).to("meta"))
    model.to_empty(device="cpu")
    tensors = adapter_state_dict(model).items()
    emptied = all(bool(tensor.isnan().all()) for name, tensor in tensors if "lora" in name)
    load_on_all_ranks(model, base_model().state_dict())
    without = loss(model)
    reset_lora_parameters(model, generator=seeded(2))
    alone = transformer(base_model())
    reset_lora_parameters(alone, generator=seeded(2))
    return {"emptied": emptied, "loss": without, "wrong": differing(values(model), values(alone))}


def test_emptied_adapters_show_until_they_are_reset(two_processes: Processes) -> None:
    for answer in two_processes(moved_to_meta):
        assert answer["emptied"] and answer["loss"] != answer["loss"] and not answer["wrong"]


# ---- drawn anew ----------------------------------------------------------------------------------------------------


def tilted(weight: Tensor, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """An init of a user's own that reads the weight."""
    return weight[:r] * 2 + torch.rand(r, weight.shape[1], generator=generator), weight[:, :r].clone()


RESETS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "kaiming": (lambda: lora_model(embedding=True), "kaiming"),
    "orthogonal": (lora_model, "orthogonal"),
    "kaiming_B": (lora_model, "kaiming_B"),
    "of the weight": (lora_model, tilted),
    "pissa": (lambda: lora_model(init="pissa"), "pissa"),
    "kaiming on pissa": (lambda: lora_model(init="pissa"), "kaiming"),
    "dora": (lambda: lora_model(variant="dora"), "gaussian"),
    "all the rest": (mixed_model, "gaussian"),
    "all the rest, of the weight": (mixed_model, tilted),
}


def moved(model: nn.Module) -> nn.Module:
    """Other values in everything that has a value."""
    generator = seeded(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


def reset(name: str, keep: bool) -> list[str]:
    """A model that has run, and where it holds gathered parameters, is drawn anew like one on one process."""
    build, init = RESETS[name]
    model, alone = by_fully_shard(moved(build()), reshard_after_forward=not keep), moved(build())
    loss_of(model, batches(1)[0]).backward()
    # what the other rank draws is of no account
    own = seeded(5 + torch.distributed.get_rank())
    reset_lora_parameters(model, init=init, generator=own)
    reset_lora_parameters(alone, init=init, generator=seeded(5))
    assert abs(loss(model) - loss(alone)) < 1e-5
    return differing(values(model), values(alone))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", RESETS)
def test_reset_draws_what_one_process_draws(two_processes: Processes, name: str, keep: bool) -> None:
    for wrong in two_processes(reset, name, keep):
        assert not wrong


def replicas() -> bool:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = by_fully_shard(lora_model(), mesh=mesh)
    reset_lora_parameters(model, generator=seeded(torch.distributed.get_rank()))
    digest = torch.stack([whole(parameter).double().sum() for parameter in model.parameters()]).sum().reshape(1)
    digests = [torch.empty_like(digest) for _ in range(2)]
    torch.distributed.all_gather(digests, digest)
    return torch.equal(*digests)


def test_replicas_do_not_drift_by_a_reset(two_processes: Processes) -> None:
    assert all(two_processes(replicas))


def refused() -> None:
    model = by_fully_shard(lora_model())
    before = values(model)
    with pytest.raises(ValueError, match="init 'pissa' needs tensors that the adapter 'default' does not have"):
        reset_lora_parameters(model, init="pissa")
    with pytest.raises(KeyError, match="no adapter 'other'"):
        reset_lora_parameters(model, adapter="other")
    with lp.disabled(model), pytest.raises(ValueError, match="are disabled"):
        reset_lora_parameters(model)
    assert not differing(values(model), before)


def test_a_refused_reset_changes_nothing(two_processes: Processes) -> None:
    two_processes(refused)

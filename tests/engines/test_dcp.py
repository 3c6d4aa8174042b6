"""Distributed checkpoints (``torch.distributed.checkpoint``): training goes on, on as many ranks or on others."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from engine_model import LR, batches, distance, lora_model, optimizer_for, reference, train, trained
from mixed_model import mixed_model
from processes import Processes
from sharded_models import FULLY_SHARDED, by_fsdp1
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import lora_plus as lp
from lora_plus.tensors.distributed import fill, whole

STEPS = 3
ALONE = "torch.distributed is disabled, unavailable or uninitialized"
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)

Build = Callable[[], nn.Module]


def build_with_embedding() -> nn.Module:
    return lora_model(embedding=True)


BUILDS: dict[str, Build] = {"linear layers": build_with_embedding, "all the rest": mixed_model}
ENGINES: dict[str, Callable[[nn.Module], nn.Module]] = {
    **FULLY_SHARDED,
    "DistributedDataParallel": DistributedDataParallel,
    "one process": lambda model: model,
}


def mine(engine: str, steps: int) -> list[Tensor]:
    if engine == "one process":
        return batches(steps)
    return batches(steps, rank=torch.distributed.get_rank(), world=torch.distributed.get_world_size())


def start(engine: str, build: Build, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = ENGINES[engine](build())
    return model, optimizer_for(model, **settings)


def groups_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    parts = get_state_dict(model, optimizer, options=TRAINED)
    return dict(zip(("model", "optimizer"), parts, strict=True))


def save(path: str, engine: str, build: str) -> list[dict[str, Any]]:
    model, optimizer = start(engine, BUILDS[build])
    train(model, optimizer, mine(engine, STEPS))
    state = checkpoint(model, optimizer)
    trainable = {name for name, p in BUILDS[build]().named_parameters() if p.requires_grad}
    assert state["model"].keys() == trainable
    dcp.save(state, checkpoint_id=path)
    return groups_of(optimizer)


def resume(path: str, engine: str, build: str) -> tuple[float, list[dict[str, Any]]]:
    """How far six steps, three of them after loading, end from six without a break; and the groups."""
    model, optimizer = start(engine, BUILDS[build], lr=9e-9, lr_ratio=1.0, weight_decay=0.0)  # those of the file hold
    state = checkpoint(model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ALONE)
        dcp.load(state, checkpoint_id=path, no_dist=engine == "one process")
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=TRAINED
    )
    train(model, optimizer, mine(engine, 2 * STEPS)[STEPS:])
    alone = BUILDS[build]()
    train(alone, optimizer_for(alone), batches(2 * STEPS))
    return distance(trained(model), trained(alone)), groups_of(optimizer)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("to", ["fully_shard", "one process"])
def test_resumes(two_processes: Processes, tmp_path: Path, build: str, to: str) -> None:
    saved = two_processes(save, str(tmp_path), "fully_shard", build)[0]
    for far, groups in two_processes(resume, str(tmp_path), to, build):
        assert far <= TOLERANCES[build]
        assert groups == saved
        assert [group["lr"] for group in groups[:2]] == [LR, 16 * LR]
        assert groups[1]["name"] == "lora_B" and groups[1]["loraplus_ratio"] == 16


TOLERANCES = {"linear layers": 1e-6, "all the rest": 2e-5}
"""In float32, where Adam makes more of rounding in the second model."""


@pytest.mark.parametrize(
    ("of", "to"),
    [
        ("fully_shard, layers", "fully_shard"),
        ("fully_shard", "fully_shard, checkpointed"),
        ("hybrid", "fully_shard"),
        ("DistributedDataParallel", "fully_shard"),
        ("fully_shard", "DistributedDataParallel"),
    ],
)
def test_resumes_on_another_engine(two_processes: Processes, tmp_path: Path, of: str, to: str) -> None:
    saved = two_processes(save, str(tmp_path), of, "linear layers")[0]
    for far, groups in two_processes(resume, str(tmp_path), to, "linear layers"):
        assert far <= 1e-6 and groups == saved


def test_one_process_to_two(two_processes: Processes, tmp_path: Path) -> None:
    model, optimizer = start("one process", BUILDS["linear layers"])
    train(model, optimizer, batches(STEPS))
    with pytest.warns(UserWarning, match=ALONE):
        dcp.save(checkpoint(model, optimizer), checkpoint_id=tmp_path, no_dist=True)
    for far, groups in two_processes(resume, str(tmp_path), "fully_shard", "linear layers"):
        assert far <= 1e-6 and groups == groups_of(optimizer)


# ---- whole state dicts -----------------------------------------------------------------------------------------------

FULL = StateDictOptions(full_state_dict=True)


def loads_whole(build: str, broadcast: bool) -> list[str]:
    """Which entries of a whole state dict did not arrive in a sharded model, or were not given back by one that ran."""
    model, _ = start("fully_shard", BUILDS[build])
    source = {name: tensor + 1 for name, tensor in BUILDS[build]().state_dict().items()}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    given = source if torch.distributed.get_rank() == 0 or not broadcast else {}
    set_model_state_dict(model, dict(given), options=options)
    with torch.no_grad():
        model(batches(1)[0])
    states = get_model_state_dict(model, options=FULL), {name: whole(t) for name, t in model.state_dict().items()}
    return [name for state in states for name in state.keys() | source if not torch.equal(state[name], source[name])]


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("build", BUILDS)
def test_whole_state_dicts(two_processes: Processes, build: str, broadcast: bool) -> None:
    for wrong in two_processes(loads_whole, build, broadcast):
        assert not wrong


class Experts(nn.Module):
    """A root with a bare parameter of its own, which is left whole after a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.arange(2 * 8 * 8.0).reshape(2, 8, 8))
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks[0](torch.einsum("b i, e o i -> b o", x, self.experts))
        return out


def parameter_of_the_root() -> tuple[bool, bool]:
    model = ENGINES["fully_shard"](lp.inject_lora(Experts(), ["experts"], r=2))
    start = torch.arange(2 * 8 * 8.0).reshape(2, 8, 8)
    with torch.no_grad():
        model(torch.ones(2, 8))
        saved = torch.equal(whole(model.state_dict()["experts"]), start)
        model(torch.ones(2, 8))
        other = {name: torch.ones_like(tensor) for name, tensor in get_model_state_dict(model).items()}
        model(torch.ones(2, 8))
        model.load_state_dict(other)
        model(torch.ones(2, 8))
    return saved, bool((whole(model.state_dict()["experts"]) == 1).all())


def test_a_parameter_that_is_whole_after_a_forward_is_saved_and_loaded(two_processes: Processes) -> None:
    assert two_processes(parameter_of_the_root) == [(True, True)] * 2


# ---- the optimizer's state -------------------------------------------------------------------------------------------


def reversed_groups() -> tuple[float, list[str]]:
    """The state goes to parameters by their names, and a group's entries go with it."""
    model, optimizer = start("fully_shard", lora_model)
    train(model, optimizer, mine("fully_shard", STEPS))
    parts = copy.deepcopy(trained(model)), get_optimizer_state_dict(model, optimizer)
    model, optimizer = start("fully_shard", lora_model, lr=9e-9)
    optimizer.param_groups.reverse()
    names = [group["name"] for group in optimizer.param_groups]
    for name, parameter in model.named_parameters():
        key = name.removesuffix(".default")
        if key in parts[0]:
            fill(parameter, parts[0][key])
    set_optimizer_state_dict(model, optimizer, parts[1])
    train(model, optimizer, mine("fully_shard", 2 * STEPS)[STEPS:])
    assert [group["name"] for group in optimizer.param_groups] == names
    return distance(trained(model), reference(2 * STEPS)), names


def test_reversed_groups(two_processes: Processes) -> None:
    for far, names in two_processes(reversed_groups):
        assert far <= 1e-6
        assert names.index("lora_B") < names.index("lora_A")


def whole_optimizer_state() -> dict[str, Any]:
    model, optimizer = start("fully_shard", lora_model)
    train(model, optimizer, mine("fully_shard", STEPS))
    return {"model": trained(model), "optimizer": get_optimizer_state_dict(model, optimizer, options=FULL)}


def test_whole_optimizer_state_goes_on_in_one_process(two_processes: Processes, tmp_path: Path) -> None:
    state = two_processes(whole_optimizer_state)[0]
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model, optimizer = start("one process", lora_model, lr=9e-9)
    named = {name.removesuffix(".default"): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, tensor in state["model"].items():
            named[name].copy_(tensor)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, batches(2 * STEPS)[STEPS:])
    assert distance(trained(model), reference(2 * STEPS)) <= 1e-6


def fsdp1() -> tuple[bool, list[dict[str, Any]], list[dict[str, Any]]]:
    model = by_fsdp1(lora_model())
    optimizer = optimizer_for(model)
    train(model, optimizer, batches(STEPS, rank=torch.distributed.get_rank(), world=2))
    state = get_optimizer_state_dict(model, optimizer, options=FULL)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    plain = lora_model()
    names = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    return state["state"].keys() == names, groups, groups_of(optimizer)


def test_fsdp1_optimizer_state_has_the_groups(two_processes: Processes) -> None:
    for named, groups, wanted in two_processes(fsdp1):
        assert named and groups == wanted

"""FSDP2 (``fully_shard`` each block and the root): adapters train as they do in one process on the whole batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_model import LR, VOCABULARY, batches, distance, lora_model, loss_of, optimizer_for, train, trained
from mixed_model import mixed_model
from processes import Processes
from sharded_models import by_fully_shard, by_fully_shard_layers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import lora_plus as lp
from lora_plus.files import adapter_state_dict
from lora_plus.model.tree import adapters_of
from lora_plus.tensors import fused_linear
from lora_plus.training import check_lr_ratio

STEPS = 5


def mine(steps: int = STEPS) -> list[Tensor]:
    return batches(steps, rank=torch.distributed.get_rank(), world=torch.distributed.get_world_size())


def usual(model: nn.Module, data: list[Tensor]) -> None:
    train(model, optimizer_for(model), data)


def parity(
    build: Callable[[], nn.Module],
    run: Callable[[nn.Module, list[Tensor]], None] = usual,
    shard: Callable[[nn.Module], nn.Module] = by_fully_shard,
) -> float:
    """How far two processes, each with its half of the batches, end from one process with all of them; in float64."""
    model, alone = shard(build().double()), build().double()
    start = trained(alone)
    run(model, mine())
    run(alone, batches(STEPS))
    assert distance(trained(alone), start) > 1e-3
    return distance(trained(model), trained(alone))


# ---- what is trained ---------------------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {},
    {"embedding": True},
    {"r": 1},  # less than there are ranks: one of them holds nothing of A
    {"r": 3},
    {"scaling": "rslora"},
    {"variant": "lora_fa"},
    {"variant": "dora"},
    {"init": "pissa"},
    {"init": "kaiming_B"},
]


def settings_parity(settings: dict[str, Any]) -> float:
    return parity(lambda: lora_model(**settings))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_trains_as_one_process_does(two_processes: Processes, settings: dict[str, Any]) -> None:
    assert max(two_processes(settings_parity, settings)) <= 1e-12


def float32() -> float:
    model, alone = by_fully_shard(lora_model()), lora_model()
    usual(model, mine())
    usual(alone, batches(STEPS))
    return distance(trained(model), trained(alone))


def test_float32(two_processes: Processes) -> None:
    assert max(two_processes(float32)) <= 1e-6


def mixed_parity() -> float:
    return parity(mixed_model)


def test_parameters_convolutions_and_row_blocks(two_processes: Processes) -> None:
    assert max(two_processes(mixed_parity)) <= 1e-12


class Recurrent(nn.Module):
    """An embedding, a recurrent layer of this kind, and a head."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layer = kind(8, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.embedding(tokens))[0])
        return out


def recurrent_parity(kind: type[nn.RNNBase]) -> float:
    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Recurrent(kind)
        return lp.inject_lora(model, ["embedding", "layer"], r=2, generator=torch.Generator().manual_seed(1))

    def shard(model: nn.Module) -> nn.Module:
        fully_shard(model.get_submodule("layer"))
        return fully_shard(model)

    return parity(build, shard=shard)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_that_is_sharded_on_its_own(two_processes: Processes, kind: type[nn.RNNBase]) -> None:
    assert max(two_processes(recurrent_parity, kind)) <= 1e-12


def second_adapter(inactive_trains: bool) -> float:
    def build() -> nn.Module:
        model = lp.add_adapter(lora_model(), "second", generator=torch.Generator().manual_seed(3))
        lp.set_adapter(model, "default", trainable=True)
        for _, adapter, _ in adapters_of(model, "second"):
            if inactive_trains:
                adapter.set_trainable(True)
        return model

    return parity(build)


@pytest.mark.parametrize("inactive_trains", [False, True])
def test_inactive_adapter_does_not_disturb(two_processes: Processes, inactive_trains: bool) -> None:
    assert max(two_processes(second_adapter, inactive_trains)) <= 1e-12


def other_adapter_later() -> dict[str, float]:
    """Train one adapter, then the other, which was frozen when the model was sharded and ran for the first time."""

    def build() -> nn.Module:
        model = lp.add_adapter(lora_model(), "second", generator=torch.Generator().manual_seed(3)).double()
        lp.set_adapter(model, "default", trainable=True)
        return model

    ends = []
    for model, data in ((by_fully_shard(build()), mine()), (build(), batches(STEPS))):
        usual(model, data)
        lp.set_adapter(model, "second", trainable=True)
        start = {name: tensor.clone() for name, tensor in adapter_state_dict(model, adapter="second").items()}
        usual(model, data)
        ends.append({name: adapter_state_dict(model, adapter=name) for name in ("default", "second")})
        assert distance(ends[-1]["second"], start) > 1e-3
    return {name: distance(ends[0][name], ends[1][name]) for name in ends[0]}


def test_another_adapter_is_trained_later(two_processes: Processes) -> None:
    for answer in two_processes(other_adapter_later):
        assert max(answer.values()) <= 1e-12


# ---- how it is trained -------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW, a loop": (torch.optim.AdamW, {"foreach": False}),
    "AdamW, foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW, fused": (torch.optim.AdamW, {"fused": True}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
}


def optimizer_parity(name: str) -> float:
    optimizer_class, options = OPTIMIZERS[name]
    lr = 100 * LR if optimizer_class is torch.optim.SGD else LR

    def run(model: nn.Module, data: list[Tensor]) -> None:
        optimizer = lp.create_loraplus_optimizer(model, optimizer_class, lr=lr, weight_decay=0.05, **options)
        train(model, optimizer, data)

    return parity(lora_model, run)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(two_processes: Processes, name: str) -> None:
    assert max(two_processes(optimizer_parity, name)) <= 1e-12


def clipped_and_scheduled(model: nn.Module, data: list[Tensor]) -> None:
    optimizer = optimizer_for(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=len(data))
    for tokens in data:
        loss_of(model, tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        check_lr_ratio(optimizer)


def accumulated(model: nn.Module, data: list[Tensor]) -> None:
    optimizer = optimizer_for(model)
    for tokens in data:
        parts = tokens.chunk(2)
        for number, part in enumerate(parts, 1):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(number == len(parts))
            (loss_of(model, part) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()


LOOPS = {"clipped and scheduled": clipped_and_scheduled, "accumulated": accumulated}


def loop_parity(name: str) -> float:
    return parity(lora_model, LOOPS[name])


@pytest.mark.parametrize("name", LOOPS)
def test_training_loops(two_processes: Processes, name: str) -> None:
    assert max(two_processes(loop_parity, name)) <= 1e-12


# ---- how it is computed and sharded ------------------------------------------------------------------------------


def with_fused_linear(least_work: int) -> tuple[float, int]:
    calls, compute = 0, fused_linear._compute

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return compute(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_linear, "_LEAST_WORK", least_work)
        patch.setattr(fused_linear, "_compute", counted)
        return parity(lora_model), calls


@pytest.mark.parametrize("least_work", [0, 10**9])
def test_fused_linear_function(two_processes: Processes, least_work: int) -> None:
    for far, calls in two_processes(with_fused_linear, least_work):
        assert far <= 1e-12
        assert (calls > 0) == (least_work == 0)


def compiled(model: nn.Module) -> nn.Module:
    # torch looks at .grad of intermediate results while it compiles
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf Tensor")
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend="aot_eager")
    return by_fully_shard(model)


def checkpointed(model: nn.Module) -> nn.Module:
    for number, block in enumerate(model.blocks):  # type: ignore[arg-type]
        model.blocks[number] = checkpoint_wrapper(block)  # type: ignore[operator, index]
    return by_fully_shard(model)


def kept_unby_fully_shard(model: nn.Module) -> nn.Module:
    return by_fully_shard(model, reshard_after_forward=False)


def kept_whole(model: nn.Module) -> nn.Module:
    return by_fully_shard(model, reshard_after_forward=False)


def root_only(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def on_mesh(*shape: int) -> Callable[[nn.Module], nn.Module]:
    def shard(model: nn.Module) -> nn.Module:
        return by_fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))

    return shard


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled blocks": compiled,
    "activation checkpointing": checkpointed,
    "not resharded after forward": kept_whole,
    "the root only": root_only,
    "some layers": by_fully_shard_layers,
    "two replicas": on_mesh(2, 1),
    "one replica on a mesh of two dimensions": on_mesh(1, 2),
}


def way_parity(name: str) -> float:
    return parity(lora_model, shard=WAYS[name])


@pytest.mark.parametrize("name", WAYS)
def test_ways_of_sharding(two_processes: Processes, name: str) -> None:
    assert max(two_processes(way_parity, name)) <= 1e-12


# ---- in half precision -------------------------------------------------------------------------------------------


def gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    loss_of(model, tokens).backward()
    return {
        name: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).double()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def bf16_base(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model


POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
HALF: dict[str, tuple[Callable[[nn.Module], nn.Module], MixedPrecisionPolicy]] = {
    "policy": (lambda model: model, POLICY),
    "bf16 base, policy": (bf16_base, POLICY),
    "bf16 base": (bf16_base, MixedPrecisionPolicy()),
}


def half_precision(name: str) -> dict[str, float]:
    """By adapter tensor, the relative distance of its gradient from that of float64 on one process."""
    prepare, policy = HALF[name]
    model = by_fully_shard(prepare(lora_model(non_zero=True, train_also=())), mp_policy=policy)
    exact = gradients(prepare(lora_model(non_zero=True, train_also=())).double(), batches(1)[0])
    found = gradients(model, mine(1)[0])
    assert found.keys() == exact.keys()
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32}
    return {name: float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact}


@pytest.mark.parametrize("name", HALF)
def test_half_precision(two_processes: Processes, name: str) -> None:
    for errors in two_processes(half_precision, name):
        assert 1e-4 < max(errors.values()) < 0.05

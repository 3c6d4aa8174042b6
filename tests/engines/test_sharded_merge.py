"""Merging sharded models: the weights of one process, and the very bits of the base back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_model import batches, lora_model, loss_of
from processes import Processes
from sharded_models import DISTRIBUTED, FULLY_SHARDED, TOKENS, by_fully_shard
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lora_plus as lp
from lora_plus.files import adapter_state_dict
from lora_plus.model.state import State
from lora_plus.model.tree import adapted_weights, adapters_of
from lora_plus.tensors.distributed import whole

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"embedding": True},
    "dora": {"variant": "dora"},
    "pissa": {"init": "pissa", "embedding": True},
}
CASES = [
    *(("fully_shard", settings) for settings in SETTINGS),
    ("fully_shard, layers", "lora"),
    ("fully_shard, checkpointed", "pissa"),
    ("hybrid", "dora"),
    *(("DTensors", settings) for settings in SETTINGS),
]
USES: dict[str, Callable[[nn.Module], Any]] = {
    "untouched": lambda model: None,
    "after a forward": lambda model: model(TOKENS),
    "after a backward": lambda model: loss_of(model, TOKENS).backward(),
}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole adapted weights as they are now."""
    State(model)  # shards again what a forward left whole
    return {path: whole(weight.weight).clone() for path, weight in adapted_weights(model)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def near(model: nn.Module, expected: Tensor) -> bool:
    return bool((model(TOKENS) - expected).abs().max() <= 1e-12)


def merge_cycles(engine: str, settings: dict[str, Any]) -> list[str]:
    """What is wrong with merging after each kind of use, and with what the model computes then."""
    plain = lora_model(non_zero=True, **settings).double().eval()
    base, adapted, adapter = weights(plain), plain(TOKENS).detach(), adapter_state_dict(plain)
    with lp.disabled(plain):
        original = plain(TOKENS).detach()
    lp.merge_lora(plain)
    merged = weights(plain)
    model = DISTRIBUTED[engine](lora_model(non_zero=True, **settings).double()).eval()
    runs = engine in FULLY_SHARDED
    wrong = []
    for use in USES if runs else ("untouched",):
        USES[use](model)
        for cycle in range(2):
            checks = []
            lp.merge_lora(model)
            checks += [("merged weights", same(weights(model), merged))]
            checks += [("merged output", near(model, adapted) and near(model, adapted))] if runs else []
            with lp.disabled(model), lp.disabled(model):
                checks += [("base weights while disabled", same(weights(model), base))]
                checks += [("base output while disabled", near(model, original))] if runs else []
            checks += [("merged output after disabled", near(model, adapted))] if runs else []
            lp.unmerge_lora(model)
            checks += [("base's bits after unmerging", same(weights(model), base))]
            checks += [("output after unmerging", near(model, adapted))] if runs else []
            wrong += [f"{use}, cycle {cycle}: {what}" for what, right in checks if not right]
    with lp.merged(model):
        wrong += [] if same(weights(model), merged) else ["merged block"]
    return wrong if same(adapter_state_dict(model), adapter) else [*wrong, "adapter"]


@pytest.mark.parametrize(("engine", "settings"), CASES)
def test_merging_shards_is_merging_and_comes_undone(two_processes: Processes, engine: str, settings: str) -> None:
    assert two_processes(merge_cycles, engine, SETTINGS[settings]) == [[], []]


class Mixture(nn.Module):
    """Parameters that others read, a convolution, and a layer with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.own = OwnLinear(8, 8)
        self.experts = nn.Parameter(torch.randn(2, 8, 8))
        self.fused = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention(x, x, x)[0]
        h = self.conv(h.transpose(-1, -2)).transpose(-1, -2)
        h = (self.own(h)[:, None] @ self.experts).sum(1)
        return self.fused(h).unflatten(-1, (3, -1)).sum(-2).relu()


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def mixture(**settings: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixture().double().eval()
        targets = ["attention", "conv", "own", "experts", "fused"]
        lp.inject_lora(model, targets, r=2, fused={"fused": ["a", "b", "c"]}, **settings)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    return model


def merge_mixture() -> list[str]:
    plain, model, x = mixture(), mixture(), torch.linspace(-1, 1, 80, dtype=torch.float64).reshape(2, 5, 8)
    base, expected = weights(plain), plain(x).detach()
    lp.merge_lora(plain)
    merged = weights(plain)
    fully_shard(model)
    wrong = []
    for _ in range(2):
        with torch.no_grad():
            outputs = [model(x)]
            lp.merge_lora(model)
            outputs += [model(x), model(x)]
            wrong += [] if same(weights(model), merged) else ["merged weights"]
            outputs += [model(x)]
            lp.unmerge_lora(model)
            outputs += [model(x)]
            wrong += [] if same(weights(model), base) else ["base's bits"]
        wrong += [f"output {i}" for i, y in enumerate(outputs) if (y - expected).norm() > 1e-12 * expected.norm()]
    return wrong


def test_parameters_convolutions_and_own_forwards_are_merged_in_shards(two_processes: Processes) -> None:
    assert two_processes(merge_mixture) == [[], []]


def mixed_precision() -> tuple[float, float, bool]:
    """How far merging moves the output in bfloat16, of the update's size; how far unmerging; whether bits came back."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = by_fully_shard(lora_model(non_zero=True).eval(), mp_policy=policy)
    with torch.no_grad():
        base = weights(model)
        with lp.disabled(model):
            original = model(TOKENS)
        adapted = model(TOKENS)
        lp.merge_lora(model)
        rounding = float((model(TOKENS) - adapted).norm() / (adapted - original).norm())
        lp.unmerge_lora(model)
        return rounding, float((model(TOKENS) - adapted).abs().max()), same(weights(model), base)


def test_merging_under_mixed_precision_rounds_once(two_processes: Processes) -> None:
    for rounding, after, exact in two_processes(mixed_precision):
        assert rounding < 0.1 and after == 0 and exact


def unloaded() -> list[str]:
    """What is wrong with a model that keeps the merged weights, which is trained on then."""
    wrong = []
    for engine in ("fully_shard", "fully_shard, layers"):
        plain = lp.merge_and_unload(lora_model(non_zero=True).double())
        model = DISTRIBUTED[engine](lora_model(non_zero=True).double())
        model(TOKENS)
        lp.merge_and_unload(model)
        if any("LoRA" in type(module).__name__ for module in model.modules()):
            wrong.append(f"{engine}: LoRA layers are left")
        for each, rank, world in ((plain, 0, 1), (model, torch.distributed.get_rank(), 2)):
            optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
            for tokens in batches(2, rank=rank, world=world):
                loss_of(each, tokens).backward()
                optimizer.step()
                optimizer.zero_grad()
        state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        if state.keys() != plain.state_dict().keys():
            wrong.append(f"{engine}: keys {sorted(state.keys() ^ plain.state_dict().keys())}")
        elif max(float((state[name] - value).abs().max()) for name, value in plain.state_dict().items()) > 1e-12:
            wrong.append(f"{engine}: trained on, it differs from one process")
    return wrong


def test_after_merge_and_unload_it_is_a_plain_sharded_model(two_processes: Processes) -> None:
    assert two_processes(unloaded) == [[], []]


def written_while_disabled() -> list[str]:
    """Tensors of a module trained in full that removing the adapter does not bring back."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))).double()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lp.inject_lora(model, ["0"], train_also=["1"])
    fully_shard(model)
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4)
    model(x).sum().backward()
    with torch.no_grad(), lp.disabled(model):
        model(x)
    lp.remove_lora(model)
    return [name for name, tensor in model.state_dict().items() if not torch.equal(whole(tensor), base[name])]


def test_statistics_collected_while_disabled_are_gone_afterwards(two_processes: Processes) -> None:
    assert two_processes(written_while_disabled) == [[], []]


def changed_while_merged(engine: str) -> tuple[str, bool]:
    """What keeping a merge says after a change of the adapters' memory; whether unmerging brings them into force."""
    model = DISTRIBUTED[engine](lora_model(non_zero=True).double()).eval()
    lp.merge_lora(model)
    for _, adapter, _ in adapters_of(model):
        for role, parameter in adapter.parameters():
            if role == "B":
                parameter.to_local().data.zero_()
    try:
        lp.merge_and_unload(model)
    except ValueError as error:
        said = str(error)
    lp.unmerge_lora(model)
    base = weights(model)
    lp.merge_lora(model)
    return said, same(weights(model), base)


@pytest.mark.parametrize("engine", ["fully_shard", "DTensors"])
def test_a_change_of_shards_is_found_before_a_merge_is_kept(two_processes: Processes, engine: str) -> None:
    for said, in_force in two_processes(changed_while_merged, engine):
        assert "was changed while it was merged" in said and in_force


def merged_others() -> list[float]:
    """How far a merged adapter that is not active is from the same one chosen; then the output after unmerging."""
    model = lora_model(non_zero=True, adapter="a")
    lp.inject_lora(model, ["q", "up"], r=2, adapter="b", init=random_factors)
    model = by_fully_shard(model.double()).eval()
    with torch.no_grad():
        lp.set_adapter(model, "b")
        b = model(TOKENS)
        lp.set_adapter(model, "a")
        a = model(TOKENS)
        with lp.merged(model, adapters=["b"]), lp.disabled(model):
            pass
        with lp.merged(model, adapters=["b"]):
            off = float((model(TOKENS) - b).abs().max())
            keys = [key for key in model.state_dict() if "lora" in key]
        return [off, float((model(TOKENS) - a).abs().max()), len(keys)]


def random_factors(weight: Tensor, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    return torch.ones(r, weight.shape[1]) / 7, torch.ones(weight.shape[0], r) / 3


def test_others_than_the_active_ones_are_merged_in_shards(two_processes: Processes) -> None:
    for off, after, keys in two_processes(merged_others):
        assert off <= 1e-12 and after == 0 and keys == 0

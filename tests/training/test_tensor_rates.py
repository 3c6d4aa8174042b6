"""Learning rates that are tensors: schedulers write into them, and the ratio holds for each group all the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_schedule import KEEP
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lora_plus import create_loraplus_optimizer, inject_lora, loraplus_param_groups
from lora_plus.training import check_lr_ratio, rebind_optimizer, split_loraplus_groups

LR, RATIO = 1e-3, 4.0
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "geometric": {"lr_mode": "geometric"},
    "B": {"lr_mode": "B", "weight_decay": 0.1},
}


def rate(value: float = LR) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def model() -> nn.Module:
    """One that has a group of every kind: DoRA's magnitude, an embedding, a head."""
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    inject_lora(net, ["0"], r=2, adapter="embedding")
    trained = [p for p in net.parameters() if p.requires_grad]
    inject_lora(net, ["1"], r=2, variant="dora", train_also=["2"])
    for parameter in trained:
        parameter.requires_grad_(True)
    return net


def optimizer_of(lr: Tensor, **settings: Any) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model(), torch.optim.AdamW, lr=lr, lr_ratio=RATIO, foreach=False, **settings)


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


def tensors_of(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [group["lr"] for group in groups]


def apart(tensors: list[Tensor]) -> bool:
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_each_group_has_a_rate_of_its_own(settings: dict[str, Any]) -> None:
    lr = rate()
    groups = loraplus_param_groups(model(), lr=lr, lr_ratio=RATIO, **settings)
    assert len(groups) == 6 and apart([lr, *tensors_of(groups)])
    assert apart([lr, *tensors_of(optimizer_of(lr, **settings).param_groups)])
    numbers = loraplus_param_groups(model(), lr=LR, lr_ratio=RATIO, **settings)
    assert [float(each) for each in tensors_of(groups)] == pytest.approx(tensors_of(numbers), rel=1e-15)


def test_a_rate_of_embeddings_is_not_shared_either() -> None:
    lr = rate()
    assert apart([lr, *tensors_of(loraplus_param_groups(model(), lr=rate(), embedding_lr=lr, weight_decay=0.1))])


def follow(optimizer: torch.optim.Optimizer, make: Callable[[torch.optim.Optimizer], Any]) -> set[float]:
    """Run a schedule in which each ratio holds; the rates of A on the way."""
    ratios = {name: each / rates(optimizer)["lora_A"] for name, each in rates(optimizer).items()}
    scheduler = make(optimizer)
    loss = (1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
    seen = set()
    for _ in range(40):
        now = rates(optimizer)
        wanted = {name: ratio * now["lora_A"] for name, ratio in ratios.items()}
        # ReduceLROnPlateau leaves out changes below its eps of 1e-8
        assert now["lora_A"] < 1e-6 or now == pytest.approx(wanted, rel=1e-12)
        seen.add(now["lora_A"])
        optimizer.step()
        scheduler.step(*loss)
    return seen


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("name", KEEP)
def test_the_ratio_holds_at_every_step_of_every_scheduler(name: str, settings: dict[str, Any]) -> None:
    lr = rate()
    optimizer = optimizer_of(lr, **settings)
    check_lr_ratio(optimizer, KEEP[name](optimizer), steps=40)
    optimizer = optimizer_of(lr, **settings)
    assert len(follow(optimizer, KEEP[name])) > 1
    assert float(lr) == LR, "the caller's tensor was written into"


def test_every_scheduler_of_torch_runs_on_tensors() -> None:
    names = {name.partition(",")[0].partition(" ")[0] for name in KEEP}
    assert names == {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert all(inspect.isclass(getattr(lr_scheduler, name)) for name in names)


def test_defaults_are_not_the_tensor_of_the_caller() -> None:
    lr = rate()
    optimizer = optimizer_of(lr)
    assert optimizer.defaults["lr"] is not lr
    assert all(group["lr"] is not optimizer.defaults["lr"] for group in optimizer.param_groups)


@pytest.mark.parametrize("mode", ["A", "geometric", "B"])
def test_split_groups_share_no_rate(mode: str) -> None:
    adapted = inject_lora(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)), ["0", "1"], r=2)
    lr = rate()
    groups = [{"params": list(layer.parameters()), "lr": lr, "extra": lr} for layer in adapted]
    split = split_loraplus_groups(groups, adapted, lr_ratio=RATIO, lr_mode=mode)
    assert apart([lr, *tensors_of(split)])
    assert all(group["extra"] is lr for group in split), "only the rates are the library's business"
    optimizer = torch.optim.SGD([{**group, "extra": None} for group in split], foreach=False)
    check_lr_ratio(optimizer, lr_scheduler.ReduceLROnPlateau(optimizer, patience=0), steps=20)
    before, scheduler = rates(optimizer), lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert rates(optimizer) == pytest.approx({name: each / 100 for name, each in before.items()}, rel=1e-12)
    assert float(lr) == LR


def test_a_rebound_optimizer_keeps_its_rates() -> None:
    adapted = model().to("meta")
    optimizer = create_loraplus_optimizer(adapted, torch.optim.AdamW, lr=rate(), lr_ratio=RATIO, foreach=False)
    held = tensors_of(optimizer.param_groups)
    with rebind_optimizer(optimizer, adapted):
        adapted.to_empty(device="cpu")
    assert all(one is other for one, other in zip(tensors_of(optimizer.param_groups), held, strict=True))
    check_lr_ratio(optimizer, lr_scheduler.ReduceLROnPlateau(optimizer, patience=0), steps=20)


def test_a_rate_that_groups_share_is_found() -> None:
    optimizer = optimizer_of(rate())
    shared = optimizer.param_groups[0]["lr"]
    for group in optimizer.param_groups:
        if group["name"] != "lora_B":
            group["lr"] = shared
    check_lr_ratio(optimizer)
    before = rates(optimizer)
    with pytest.raises(ValueError, match=r"^under ReduceLROnPlateau, at step 2, group 'lora_B' .* ratio of 4"):
        check_lr_ratio(optimizer, lr_scheduler.ReduceLROnPlateau(optimizer, patience=0))
    assert rates(optimizer) == before
    check_lr_ratio(optimizer, lr_scheduler.ExponentialLR(optimizer, 0.9), steps=20)

"""The ratio of the rates: every scheduler of torch keeps it or is named, loops are caught, and rates convert."""

from __future__ import annotations

import contextlib
import copy
import doctest
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lora_plus import create_loraplus_optimizer, inject_lora, loraplus_param_groups
from lora_plus.training import check_lr_ratio, fold_lr_ratio, split_loraplus_groups, watch_lr_ratio

Make = Callable[[torch.optim.Optimizer], Any]


def model() -> nn.Module:
    return inject_lora(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), ["0"], r=2, train_also=["1"])


def optimizer_of(lr_ratio: float = 4.0, **settings: Any) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model(), torch.optim.AdamW, lr=1e-3, lr_ratio=lr_ratio, **settings)


# ---- schedulers ------------------------------------------------------------------------------------------------------


def rates(optimizer: torch.optim.Optimizer, factor: float = 1.0) -> list[float]:
    return [factor * group["lr"] for group in optimizer.param_groups]


def ramp(step: int) -> float:
    return min(1.0, step / 10)


def in_sequence(optimizer: torch.optim.Optimizer, eta_min: float) -> Any:
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=10)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=eta_min)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [10])


def chained(optimizer: torch.optim.Optimizer, eta_min: float) -> Any:
    parts = [lr_scheduler.ExponentialLR(optimizer, 0.99), lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min)]
    return lr_scheduler.ChainedScheduler(parts)


KEEP: dict[str, Make] = {
    "LambdaLR, one function, from zero": lambda o: lr_scheduler.LambdaLR(o, ramp),
    "MultiplicativeLR, one function": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 7),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [5, 20]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 1e-4, total_iters=20),
    "LinearLR to zero": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=20),
    "ExponentialLR until it underflows": lambda o: lr_scheduler.ExponentialLR(o, 0.1),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 30, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 50),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 13, 2),
    "SequentialLR": lambda o: in_sequence(o, 0.0),
    "ChainedScheduler": lambda o: chained(o, 0.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=3),
    "ReduceLROnPlateau, a list": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=3, min_lr=rates(o, 0.05)),
    "CyclicLR, lists": lambda o: lr_scheduler.CyclicLR(o, rates(o, 0.1), rates(o), step_size_up=9),
    "OneCycleLR, a list": lambda o: lr_scheduler.OneCycleLR(o, rates(o), total_steps=60),
}
CHANGE: dict[str, Make] = {
    "LambdaLR, a function for each": lambda o: lr_scheduler.LambdaLR(o, [ramp, lambda _: 1.0, *[ramp] * 2]),
    "MultiplicativeLR, a function for each": lambda o: lr_scheduler.MultiplicativeLR(
        o, [lambda _: 0.9, lambda _: 0.95, lambda _: 0.9, lambda _: 0.9]),
    "CosineAnnealingLR, eta_min": lambda o: lr_scheduler.CosineAnnealingLR(o, 50, eta_min=1e-5),
    "CosineAnnealingWarmRestarts, eta_min": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 50, eta_min=1e-5),
    "SequentialLR, eta_min": lambda o: in_sequence(o, 1e-4),
    "ChainedScheduler, eta_min": lambda o: chained(o, 1e-4),
    "ReduceLROnPlateau, one min_lr": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=3, min_lr=2e-4),
    "ReduceLROnPlateau, a large eps": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=3, eps=1e-3),
    "CyclicLR, numbers": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-3, step_size_up=9),
    "CyclicLR, one number": lambda o: lr_scheduler.CyclicLR(o, rates(o, 0.1), 1e-2, step_size_up=9),
    "OneCycleLR, a number": lambda o: lr_scheduler.OneCycleLR(o, 1e-3, total_steps=60),
}  # fmt: skip
STEPS = 150


def first_change(make: Make) -> int | None:
    """The first step of a true run at which B's rate is not 4 times A's, where one of them still counts."""
    optimizer = optimizer_of()
    scheduler = make(optimizer)
    loss = (1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
    highest = 0.0
    for step in range(STEPS):
        lr = {group["name"]: group["lr"] for group in optimizer.param_groups}
        highest = max(highest, lr["lora_B"], 4 * lr["lora_A"])
        counts = max(lr["lora_B"], 4 * lr["lora_A"]) > 1e-3 * highest
        if counts and not (lr["lora_A"] and abs(lr["lora_B"] / lr["lora_A"] / 4 - 1) < 1e-3):
            return step
        optimizer.step()
        try:
            scheduler.step(*loss)
        except ValueError as error:
            assert "Tried to step" in str(error)
            break
    return None


def test_every_scheduler_of_torch_is_in_a_table() -> None:
    known = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert {name.partition(",")[0].partition(" ")[0] for name in KEEP} == known


@pytest.mark.parametrize("make", KEEP.values(), ids=KEEP.keys())
def test_what_keeps_the_ratio_passes(make: Make) -> None:
    assert first_change(make) is None
    optimizer = optimizer_of()
    check_lr_ratio(optimizer, make(optimizer), steps=STEPS)


@pytest.mark.parametrize("name", CHANGE)
def test_what_changes_the_ratio_is_named_with_the_first_step(name: str) -> None:
    step = first_change(CHANGE[name])
    assert step is not None
    optimizer = optimizer_of()
    scheduler = CHANGE[name](optimizer)
    with pytest.raises(ValueError, match=rf"^under {name.partition(',')[0]}.*, at step {step}, group 'lora_B' learns"):
        check_lr_ratio(optimizer, scheduler)


def test_the_message_in_full() -> None:
    optimizer = optimizer_of()
    with pytest.raises(ValueError) as error:
        check_lr_ratio(optimizer, in_sequence(optimizer, 1e-3))
    assert str(error.value) == (
        "under SequentialLR(LinearLR, CosineAnnealingLR), at step 12, group 'lora_B' learns at 0.003988 and 'lora_A' "
        "at 0.001: a ratio of 3.988, where LoRA+ was set up with 4; multiply all rates by one factor"
    )


@pytest.mark.parametrize("make", [*KEEP.values(), *CHANGE.values()], ids=[*KEEP, *CHANGE])
def test_trying_a_schedule_out_leaves_all_as_it_was(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = optimizer_of()
    scheduler = make(optimizer)
    parts = [scheduler, *getattr(scheduler, "_schedulers", ())]
    before = [repr(vars(part)) for part in parts]  # with the optimizer and its groups
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda *_: pytest.fail("a parameter was copied"))
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("error")
        check_lr_ratio(optimizer, scheduler, steps=20)
    assert [repr(vars(part)) for part in parts] == before
    assert scheduler.optimizer is optimizer and optimizer.state == {}


def test_a_schedule_in_the_middle_of_its_run_is_looked_at_from_there() -> None:
    optimizer = optimizer_of()
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=5e-4)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    with pytest.raises(ValueError, match="under CosineAnnealingLR, at step 0, "):
        check_lr_ratio(optimizer, scheduler)


def test_steps_say_how_far_to_look() -> None:
    optimizer = optimizer_of()
    late = lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 1.0 if step < 30 else 0.5, ramp, ramp])
    check_lr_ratio(optimizer, late, steps=29)
    with pytest.raises(ValueError, match=r"at step 30, group 'lora_B' learns at 0.002 and 'lora_A' at 0.001"):
        check_lr_ratio(optimizer, late, steps=30)


def test_rates_that_are_tensors() -> None:
    optimizer = optimizer_of()
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    check_lr_ratio(optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 300), steps=600)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([1e-3, 4e-3, 1e-3, 1e-3])
    with pytest.raises(ValueError, match="a ratio of 1, where"):
        check_lr_ratio(optimizer, lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-3))


@pytest.mark.parametrize("name", [name for name in CHANGE if "each" not in name and "one number" not in name])
def test_a_ratio_of_one_is_kept_by_what_treats_groups_alike(name: str) -> None:
    optimizer = optimizer_of(1.0)
    check_lr_ratio(optimizer, CHANGE[name](optimizer), steps=100)


class Trainer:
    """Something that holds the model and says how the rates go."""

    def __init__(self, trained: nn.Module) -> None:
        self.model = trained

    def factor(self, step: int) -> float:
        return 1.0 if step < 5 else 0.1


def test_who_a_method_belongs_to_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(model())
    optimizer = create_loraplus_optimizer(trainer.model, torch.optim.AdamW, lr=1e-3)
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda *_: pytest.fail("a parameter was copied"))
    one = lr_scheduler.LambdaLR(optimizer, trainer.factor)
    check_lr_ratio(optimizer, lr_scheduler.ChainedScheduler([one, lr_scheduler.StepLR(optimizer, 3)]), steps=9)
    with pytest.raises(ValueError, match="at step 5, "):
        check_lr_ratio(optimizer, lr_scheduler.LambdaLR(optimizer, [trainer.factor, lambda _: 1.0, *[ramp] * 2]))


class Once:
    """A function of the step that must be called by the run alone, and that cannot be copied."""

    def __call__(self, step: int) -> float:
        return 1.0

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("no copies")


def test_what_cannot_be_tried_out() -> None:
    optimizer, other = optimizer_of(), optimizer_of()
    with pytest.raises(ValueError, match="StepLR sets the rates of another optimizer; pass the one that it was made"):
        check_lr_ratio(optimizer, lr_scheduler.StepLR(other, 3))
    with pytest.raises(TypeError, match=r"Once has no optimizer to be tried out on; use watch_lr_ratio\(optimizer\)"):
        check_lr_ratio(optimizer, Once())
    with pytest.raises(TypeError, match=r"LambdaLR cannot be copied \(no copies\); use watch_lr_ratio"):
        check_lr_ratio(optimizer, lr_scheduler.LambdaLR(optimizer, Once()))
    ended = lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.5][step])
    check_lr_ratio(optimizer, ended, steps=1)
    optimizer.step()
    ended.step()
    with pytest.raises(IndexError):  # it cannot take a single step
        check_lr_ratio(optimizer, ended)


@pytest.mark.parametrize("error", [IndexError, ZeroDivisionError, ValueError, RuntimeError])
def test_an_error_of_a_schedule_is_not_its_end(error: type[Exception]) -> None:
    def broken(step: int) -> float:
        if step == 30:
            raise error("a slip")
        return 1.0

    optimizer = optimizer_of()
    with pytest.raises(error, match="a slip"):
        check_lr_ratio(optimizer, lr_scheduler.LambdaLR(optimizer, broken))
    check_lr_ratio(optimizer, lr_scheduler.LambdaLR(optimizer, broken), steps=29)


def test_a_schedule_is_followed_to_its_end_and_no_further() -> None:
    optimizer = optimizer_of()
    one_cycle = lr_scheduler.OneCycleLR(optimizer, rates(optimizer), total_steps=60)
    parts = [lr_scheduler.StepLR(optimizer, 7), one_cycle]
    for scheduler in (one_cycle, lr_scheduler.ChainedScheduler(parts)):
        check_lr_ratio(optimizer, scheduler)
    for _ in range(60):
        optimizer.step()
        one_cycle.step()
    with pytest.raises(ValueError, match="Tried to step"):  # no step is left to look at
        check_lr_ratio(optimizer, one_cycle)
    check_lr_ratio(optimizer, one_cycle, steps=0)


# ---- the record ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "ratio"), [("A", 4.0), ("geometric", 3.0), ("B", 7.0), ("A", 0.5)])
def test_groups_note_their_ratio_in_every_mode(mode: str, ratio: float) -> None:
    check_lr_ratio(optimizer_of(ratio, lr_mode=mode))
    adapted = model()
    split = split_loraplus_groups([{"params": adapted.parameters(), "lr": 1e-2}], adapted, lr_ratio=ratio, lr_mode=mode)
    noted = {group["name"]: group["loraplus_ratio"] for group in split if "loraplus_ratio" in group}
    assert sorted(noted.values()) == pytest.approx(sorted([1.0, ratio]))
    optimizer = torch.optim.SGD(split)
    check_lr_ratio(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    with pytest.raises(ValueError, match=f"at present .* a ratio of 1, where LoRA.* was set up with {ratio:g}"):
        check_lr_ratio(optimizer)


def two_layers() -> tuple[nn.Module, list[dict[str, Any]]]:
    adapted = inject_lora(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "all-linear", r=2)
    layers = [[p for p in layer.parameters() if p.requires_grad] for layer in adapted]
    return adapted, [{"params": layer[::-1], "lr": lr} for layer, lr in zip(layers, (1e-3, 1e-2), strict=True)]


@pytest.mark.parametrize("mode", ["A", "geometric", "B"])
def test_each_split_group_has_its_own_ratio(mode: str) -> None:
    adapted, groups = two_layers()
    optimizer = torch.optim.SGD(split_loraplus_groups(groups, adapted, lr_ratio=4, lr_mode=mode))
    assert len(optimizer.param_groups) == 4
    thaw = [ramp, ramp, lambda _: 1.0, lambda _: 1.0]
    check_lr_ratio(optimizer, lr_scheduler.LambdaLR(optimizer, thaw))  # each layer in its own way
    with pytest.raises(ValueError, match=r"group 'group_1\S* learns at 0 and 'group_1\S* at"):
        check_lr_ratio(optimizer, lr_scheduler.LambdaLR(optimizer, [*thaw[:3], ramp]))


def test_frozen_factors_have_no_ratio() -> None:
    adapted = model()
    adapted[0].lora_A["default"].requires_grad_(False)
    optimizer = torch.optim.SGD(loraplus_param_groups(adapted, lr=1e-3))
    check_lr_ratio(optimizer, lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=9, cycle_momentum=False))
    adapted, groups = two_layers()
    one_each = [{"params": group["params"][:1], "lr": group["lr"]} for group in groups]  # B alone
    with pytest.raises(ValueError, match=r"no group of the optimizer notes the ratio .* make the groups with lora"):
        check_lr_ratio(torch.optim.SGD(split_loraplus_groups(one_each, adapted, lr_ratio=4)))


def test_the_ratio_survives_saving_and_a_foreign_state_is_noticed() -> None:
    optimizer, resumed = optimizer_of(8.0), optimizer_of(4.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    check_lr_ratio(resumed)  # the rates and the ratio are those of the saved one
    with pytest.raises(ValueError, match=r"where LoRA.* was set up with 8"):
        check_lr_ratio(resumed, lr_scheduler.OneCycleLR(resumed, 1e-3, total_steps=9))
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    resumed.load_state_dict(torch.optim.AdamW(groups).state_dict())
    for check in (check_lr_ratio, watch_lr_ratio):
        with pytest.raises(ValueError, match=r"no group of the optimizer notes the ratio .* the state of such groups"):
            check(resumed)


# ---- loops -----------------------------------------------------------------------------------------------------------


def train(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_a_loop_that_sets_one_rate_is_stopped_before_it_steps() -> None:
    optimizer = optimizer_of()
    handle = watch_lr_ratio(optimizer)
    for factor in (0.0, 0.5, 1.0, 1e-5):
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
        train(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    before = [p.clone() for group in optimizer.param_groups for p in group["params"]]
    with pytest.raises(
        ValueError, match=r"^now group 'lora_B' learns at 0.001 and 'lora_A' at 0.001: a ratio of 1, wh"
    ):
        train(optimizer)
    after = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    handle.remove()
    train(optimizer)


def test_the_watch_goes_with_a_scheduler_and_with_loaded_states() -> None:
    optimizer = optimizer_of()
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=1e-4)
    watch_lr_ratio(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(ValueError, match=r"a ratio of 3\.9"):
        for _ in range(20):
            train(optimizer)
            scheduler.step()


@pytest.mark.parametrize("function", [check_lr_ratio, fold_lr_ratio])
def test_the_examples_in_the_docstrings_run(function: Callable[..., Any]) -> None:
    names = {"torch": torch, "nn": nn, "inject_lora": inject_lora, "model": model(), function.__name__: function}
    names |= {"create_loraplus_optimizer": create_loraplus_optimizer}
    (example,) = doctest.DocTestFinder(recurse=False).find(function, globs=names)
    assert example.examples and ">>>" in (inspect.getdoc(function) or "")
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.skipif(sys.version_info < (3, 14), reason="annotations are evaluated where they are written")
def test_what_annotations_of_a_schedule_name_need_not_be_there() -> None:
    made: dict[str, Any] = {"Base": lr_scheduler.ConstantLR}
    own = "class Own(Base):\n    def step(self, epoch: Nowhere = None) -> Nowhere: return super().step()"
    exec(compile(own, "own.py", "exec", dont_inherit=True), made)
    optimizer = create_loraplus_optimizer(model(), torch.optim.SGD, lr=1.0)
    check_lr_ratio(optimizer, made["Own"](optimizer), steps=3)

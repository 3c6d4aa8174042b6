"""A guard for LoRA+: schedules and loops that move the rates of A and B away from their ratio are found and named."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .groups import LR_RATIO


def check_lr_ratio(optimizer: torch.optim.Optimizer, scheduler: Any = None, *, steps: int = 10_000) -> None:
    """Raise if the rates of A and B have another ratio than they were set up with, now or later in this schedule.

    A copy of the schedule runs on an optimizer without parameters, and the rates are compared after every step. If
    ``step`` needs a loss (`ReduceLROnPlateau`), it gets one that never improves. A schedule that ends, such as
    `OneCycleLR`, is followed to its end. Functions of the scheduler are called for future steps, and their exceptions
    are raised: for a table of rates pass its length as ``steps``. Rates of zero and rates below a thousandth of the
    highest so far are not compared. To keep the ratio, multiply the rates of all groups by one factor; the
    documentation says how, for each scheduler.

    Examples:
        >>> optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=4)
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
        >>> check_lr_ratio(optimizer, scheduler)

    Args:
        optimizer: one with the groups of `loraplus_param_groups` or `split_loraplus_groups`.
        scheduler: the scheduler of this optimizer, or None to compare only its current rates.
        steps: how many steps of the schedule to try; at least as many as the run has.

    Raises:
        ValueError: with the first step at which the ratio changes, the rates, and what to write instead; also if the
            groups store no ratio, or the scheduler belongs to another optimizer.
        TypeError: if the scheduler has no optimizer, or cannot be copied; `watch_lr_ratio` needs neither.
    """
    _check_optimizer(optimizer)
    watch = _Watch()
    if scheduler is None:
        watch.check(optimizer.param_groups, "at present")
        return
    name = _title(scheduler)
    copied = _copied(optimizer, scheduler, name)
    wanted = [1.0] * _required_arguments(copied.step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer does not step in between
        watch.check(copied.optimizer.param_groups, f"under {name}, at step 0,")
        for step in range(1, steps + 1):
            try:
                copied.step(*wanted)
            except ValueError as error:
                if step > 1 and _ENDED in str(error):
                    break
                raise
            watch.check(copied.optimizer.param_groups, f"under {name}, at step {step},")


_ENDED = "Tried to step"
"""How torch's error begins where a schedule is stepped beyond its end."""


def watch_lr_ratio(optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Compare the rates of A and B before every step of the optimizer, and raise if their ratio has changed.

    For loops that set the rates themselves, and for schedules that depend on the run. Reading rates that are tensors
    synchronises with their device. Call ``remove()`` on the result to stop.

    Raises:
        ValueError: if the groups store no ratio. In training, a step raises as `check_lr_ratio` does, before it changes
            a parameter.
    """
    _check_optimizer(optimizer)
    _noted(optimizer.param_groups)
    watch = _Watch()
    return optimizer.register_step_pre_hook(lambda stepping, args, kwargs: watch.check(stepping.param_groups, "now"))


TOLERANCE = 1e-3
"""Relative: far above what rounding adds up to in a schedule, in float32 too, and far below what matters."""
_NEGLIGIBLE = 1e-3
"""Part of the highest rate so far below which rates are not compared."""


class _Watch:
    """Compares rates with the ratio that their groups note, step after step."""

    def __init__(self) -> None:
        self.highest: dict[int, float] = {}
        """By the position of a group of B: the highest rate so far."""

    def check(self, groups: Sequence[Mapping[str, Any]], when: str) -> None:
        """Raise if a group of B is not at its multiple of the rate of A, whose group comes before it."""
        slow: tuple[str, float] | None = None
        for position, group in _noted(groups):
            name, rate, ratio = group.get("name", f"group {position}"), float(group["lr"]), group[LR_RATIO]
            if ratio == 1:
                slow = name, rate
            if slow is None:
                continue
            wanted = ratio * slow[1]
            larger = max(rate, wanted)
            highest = self.highest[position] = max(larger, self.highest.get(position, 0.0))
            if abs(rate - wanted) > TOLERANCE * larger and larger > _NEGLIGIBLE * highest:
                found = f"{rate / slow[1]:.4g}" if slow[1] else "infinite"
                raise ValueError(
                    f"{when} group {name!r} learns at {rate:.4g} and {slow[0]!r} at {slow[1]:.4g}: a ratio of {found}, "
                    f"where LoRA+ was set up with {ratio:.4g}; multiply all rates by one factor"
                )


def _check_optimizer(optimizer: Any) -> None:
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"the optimizer must be one of torch.optim's kind, got a {type(optimizer).__name__}")


def _noted(groups: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """The groups that note a ratio, with their positions."""
    noted = [(position, group) for position, group in enumerate(groups) if LR_RATIO in group]
    if not noted:
        raise ValueError(
            f"no group of the optimizer notes the ratio of the rates of A and B ({LR_RATIO!r}); make the groups with "
            "loraplus_param_groups, and load the state of such groups"
        )
    return noted


class _Rates(torch.optim.Optimizer):
    """Rates for a schedule to act on."""


def _copied(optimizer: torch.optim.Optimizer, scheduler: Any, name: str) -> Any:
    """A copy of the scheduler that acts on rates of its own."""
    scheduled = getattr(scheduler, "optimizer", None)
    if scheduled is None:
        raise TypeError(f"{name} has no optimizer to be tried out on; use watch_lr_ratio(optimizer)")
    if scheduled.param_groups is not optimizer.param_groups:
        raise ValueError(f"{name} sets the rates of another optimizer; pass the one that it was made with")
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    memo: dict[int, Any] = {}  # one for all: a rate that groups share is a tensor that they share in the copy, too
    groups = [{**setting, "params": [torch.zeros(1)]} for setting in copy.deepcopy(settings, memo)]
    defaults = copy.deepcopy(getattr(optimizer, "defaults", {}), memo)  # ZeRO's optimizers have none
    rates = _Rates(groups, defaults)
    try:
        return copy.deepcopy(scheduler, memo | {**_owners(scheduler), id(scheduled): rates, id(optimizer): rates})
    except TypeError as error:
        raise TypeError(f"{name} cannot be copied ({error}); use watch_lr_ratio(optimizer)") from None


def _owners(scheduler: Any) -> dict[int, Any]:
    """By id, whose methods the scheduler calls: not to be copied, for it may be a trainer with the model in it."""
    parts = [scheduler, *getattr(scheduler, "_schedulers", ())]
    values = [value for part in parts for value in vars(part).values()]
    called = [each for value in values for each in (value if isinstance(value, (list, tuple)) else [value])]
    owners = [each.__self__ for each in called if inspect.ismethod(each)]
    return {id(owner): owner for owner in owners if not any(owner is part for part in parts)}


def _title(scheduler: Any) -> str:
    """The scheduler's class, and those of its parts."""
    parts = ", ".join(map(_title, getattr(scheduler, "_schedulers", ())))
    return f"{type(scheduler).__name__}({parts})" if parts else type(scheduler).__name__


def _required_arguments(function: Any) -> int:
    """How many arguments it cannot be called without."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function, **_UNREAD).parameters.values()
    return sum(each.kind in kinds and each.default is each.empty for each in parameters)


_UNREAD: dict[str, Any] = {"annotation_format": 4} if sys.version_info >= (3, 14) else {}
"""Has annotations stay texts: what they name need not be there, and from Python 3.14 on nobody has looked before."""

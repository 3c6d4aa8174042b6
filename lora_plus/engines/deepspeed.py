"""LoRA+ under DeepSpeed: an engine with LoRA+ groups, and guards for its configuration. `zero` holds the parameters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_plus.errors import Problems
from lora_plus.model.state import State
from lora_plus.model.unsaved import unsaved
from lora_plus.packages import needed
from lora_plus.training.groups import LR_RATIO, LrMode, create_loraplus_optimizer, loraplus_param_groups
from lora_plus.training.schedule import check_lr_ratio

with needed(__name__, "deepspeed"):
    import deepspeed
    from deepspeed.runtime import lr_schedules

Groups = Sequence[Mapping[str, Any]]
"""Parameter groups, as `loraplus_param_groups` makes them."""

Config = Mapping[str, Any] | str | PathLike[str]
"""DeepSpeed's configuration, or the name of its JSON file."""


def initialize(
    model: nn.Module,
    *,
    config: Config,
    lr: float,
    lr_ratio: float = 4.0,
    lr_mode: LrMode = "A",
    weight_decay: float = 0.0,
    embedding_lr: float | None = None,
    optimizer_cls: Callable[..., torch.optim.Optimizer] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` with the groups of `loraplus_param_groups`, checked before and after.

    Examples:
        ```
        lp.inject_lora(model, "all-linear")
        adam = torch.optim.AdamW
        engine, *_ = initialize(model, config="ds.json", lr=1e-4, optimizer_cls=adam)
        ```

    Args:
        model: a model with adapters.
        config: DeepSpeed's configuration, or the name of its JSON file.
        lr: as in `loraplus_param_groups`.
        lr_ratio: as in `loraplus_param_groups`.
        lr_mode: as in `loraplus_param_groups`.
        weight_decay: as in `loraplus_param_groups`.
        embedding_lr: as in `loraplus_param_groups`.
        optimizer_cls: as in `create_loraplus_optimizer`; None for the optimizer of the configuration's section.
        kwargs: passed to ``deepspeed.initialize``, such as ``training_data``, or ``lr_scheduler`` as a function of the
            optimizer.

    Returns:
        Engine, optimizer, data loader and scheduler, as ``deepspeed.initialize`` does.

    Raises:
        ValueError: if both or neither of ``optimizer_cls`` and the configuration give an optimizer; as
            `loraplus_param_groups`, `check_config` and `check_engine`. All but the last check before anything is
            changed.
    """
    sections = dict(_sections(config))
    section = sections.get("optimizer")
    if (section is None) == (optimizer_cls is None):
        there = "pass optimizer_cls, such as torch.optim.AdamW" if section is None else "remove one of the two"
        raise ValueError(
            f"the optimizer is either optimizer_cls ({optimizer_cls!r}) or the section 'optimizer' of the DeepSpeed "
            f"config ({section!r}); {there}"
        )
    settings: dict[str, Any] = {
        "lr": lr, "lr_ratio": lr_ratio, "lr_mode": lr_mode, "weight_decay": weight_decay, "embedding_lr": embedding_lr,
    }  # fmt: skip
    given: dict[str, Any]
    if optimizer_cls is None:
        groups = loraplus_param_groups(model, **settings)
        given = {"model_parameters": groups}
    else:
        optimizer = create_loraplus_optimizer(model, optimizer_cls, **settings)
        groups, given = optimizer.param_groups, {"optimizer": optimizer}
    check_config(config, groups=groups)
    engine, *others = deepspeed.initialize(model=model, config=sections, **given, **kwargs)
    check_engine(engine)
    return (engine, *others)


def check_engine(engine: Any) -> None:
    """Raise if a DeepSpeed engine would not train every trainable parameter, or not with LoRA+.

    The rates must have the ratio that their groups store, now and under the engine's scheduler (`check_lr_ratio`). The
    optimizer must hold every trainable parameter; one that was added afterwards is not trained. Tensors that adapters
    need frozen must be frozen. A warning names trainable parameters that are saved with no adapter.

    Args:
        engine: a ``DeepSpeedEngine`` of any ZeRO stage, right after it was made.

    Raises:
        Problems: a ValueError with everything that was found.
    """
    if engine.optimizer is None:
        raise ValueError("the engine has no optimizer; pass one with LoRA+ groups to deepspeed.initialize")
    problems = []
    try:
        check_lr_ratio(engine.basic_optimizer, engine.lr_scheduler)
    except ValueError as error:
        problems.append(f"{error}. {_LOST}")
    held = {id(parameter) for group in _parameters_of(engine.optimizer) for parameter in group}
    left = [name for name, p in engine.module.named_parameters() if p.requires_grad and id(p) not in held]
    if left:
        problems.append(
            f"trainable parameters {left[:3]}{f' and {len(left) - 3} more' if left[3:] else ''} are not in the "
            "optimizer and would stay as they are; inject adapters and build the groups before deepspeed.initialize"
        )
    beside = unsaved(State(engine.module))
    problems += beside.wrong()
    if problems:
        raise Problems("the DeepSpeed engine would not train with LoRA+", problems)
    beside.warn()


_LOST = (
    "DeepSpeed builds one group if its config has a section 'optimizer' and it gets no groups (model_parameters), and "
    "some of its schedules set one rate for all groups; call check_config(config) to see which"
)


def _parameters_of(optimizer: Any) -> list[list[nn.Parameter]]:
    """The model's parameters that an engine's optimizer trains; ZeRO's own groups hold flat copies of them."""
    own = [getattr(optimizer, f"{kind}_groups", None) for kind in ("bit16", "fp16", "bf16")]
    plain = [group["params"] for group in optimizer.param_groups]
    return next((groups for groups in own if groups is not None), plain)


def check_config(config: Config, *, groups: Groups | None = None) -> None:
    """Raise if a DeepSpeed configuration would switch LoRA+ off, which DeepSpeed does without an error.

    From an ``"optimizer"`` section, the Trainer and ``deepspeed.initialize`` without groups build an optimizer with one
    group. A ``"scheduler"`` section is tried on LoRA+ groups with `check_lr_ratio`; ``"auto"`` counts as one rate for
    all.

    Args:
        config: the configuration, or the name of its JSON file.
        groups: the groups that you pass to ``deepspeed.initialize``, as ``model_parameters`` or in an optimizer. None
            if another program calls it, such as the Trainer or Accelerate; lists of rates in the schedule are then not
            tried.

    Raises:
        Problems: a ValueError with everything that was found, and what to write instead.
    """
    sections = _sections(config)
    problems = [*_of_optimizer(sections, groups), *_of_scheduler(sections, groups)]
    if problems:
        where = "this DeepSpeed config" if isinstance(config, Mapping) else f"the DeepSpeed config {str(config)!r}"
        raise Problems(f"{where} would switch LoRA+ off", problems)


def _sections(config: Config) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    sections: Mapping[str, Any] = json.loads(Path(config).read_text(encoding="utf-8"))
    return sections


def _of_optimizer(sections: Mapping[str, Any], groups: Groups | None) -> Iterator[str]:
    section = sections.get("optimizer")
    if section is None:
        return
    if groups is None:
        yield (
            f"'optimizer' ({section.get('type')!r}): an optimizer built from this section has one group with one rate, "
            "also under the Trainer; remove the section, and set rate, decay and betas with the LoRA+ groups, or in "
            "the Trainer's arguments"
        )
        return
    for key, value in section.get("params", {}).items():
        if all(key in group and group[key] != value for group in groups):
            yield (
                f"'optimizer': its {key!r} of {value!r} would have no effect, since every group has one of its own; "
                "leave it out"
            )


_FILLED_IN = {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-3, "warmup_num_steps": 10, "total_num_steps": 100}
"""What ``"auto"`` stands for in a trial: of such a kind as the Trainer fills in, one rate for all groups."""

_TRIAL: Groups = [{"name": "lora_A", "lr": 1e-3, LR_RATIO: 1.0}, {"name": "lora_B", "lr": 4e-3, LR_RATIO: 4.0}]
"""Groups to try a schedule out on where there are none yet."""


def _of_scheduler(sections: Mapping[str, Any], groups: Groups | None) -> Iterator[str]:
    section = sections.get("scheduler")
    if section is None:
        return
    name = section.get("type")
    make = getattr(lr_schedules, str(name), None) or getattr(torch.optim.lr_scheduler, str(name), None)
    settings = section.get("params", {})
    if make is None or (groups is None and any(isinstance(value, list) for value in settings.values())):
        return  # DeepSpeed itself says that it does not know the name; a list belongs to groups
    settings = {key: _FILLED_IN.get(key, value) if value == "auto" else value for key, value in settings.items()}
    trial = [{**group, "params": [torch.zeros(1)]} for group in (_TRIAL if groups is None else groups)]
    optimizer = torch.optim.AdamW(trial)
    scheduler = make(optimizer, **settings)
    try:
        check_lr_ratio(optimizer, scheduler)
    except ValueError:
        yield f"'scheduler' ({name!r} with {section.get('params')}): {_SCHEDULES}"


_SCHEDULES = (
    "it would change the ratio of the rates of A and B, as one rate for all groups does. Use WarmupCosineLR, or "
    "WarmupLR without warmup_max_lr, or with your own groups a list with one rate per group; or remove the section "
    "and pass deepspeed.initialize lr_scheduler=a function of the optimizer (under the Trainer: set lr_scheduler_type)"
)

"""Whether an optimizer trains a model's adapters, all of them, as LoRA+ and alike on all ranks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_plus.errors import Problems, check_number
from lora_plus.layers.adapter import Adapter
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.model.state import State
from lora_plus.model.unsaved import Unsaved, unsaved
from lora_plus.text import some

from .engine_checks import ENGINE_CHECKS
from .groups import LR_RATIO, Roles, group_names, kinds_of_roles, known_roles, trained_with
from .rounding import warn_of_half_precision
from .schedule import TOLERANCE


def check_optimizer(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    model: nn.Module,
    *,
    lr_ratio: float | None = None,
    adapter: str | None = None,
    roles: Roles = (),
) -> None:
    """Raise if this optimizer would not train this model with LoRA+, although no error would occur.

    Call it once before training, after the model is wrapped or sharded and the optimizer is built or its state loaded.
    It checks:

    - Each trainable parameter is in one group, and each parameter of a group is in the model. (An optimizer built
      before ``fully_shard``, ``parallelize_module`` or ``to_empty`` holds parameters that are no longer in the model.)
    - Each trainable adapter is used in the forward: it is active, not merged and not disabled.
    - The rates of A and B have the ratio that their groups store, and the groups contain what their names say. (A state
      loaded into groups in another order changes both.)
    - Frozen tensors are frozen: base weights under adapters, and what a variant (LoRA-FA) or an init (PiSSA) fixes.
    - The engine (DDP, ``fully_shard``, FSDP1) reduces the gradients of all trainable parameters, also of later ones.
      The replicas of DDP or of a replicated DTensor are equal.

    It warns about trainable parameters that are saved with no adapter (unfrozen by hand, and not in ``train_also``),
    and about adapters in half precision, with the share of their entries that a step of Adam can change.

    Under DDP or with DTensors this is a collective: all ranks must call it, and all raise the same error. Parameters
    that ``fully_shard`` left unsharded after a forward are sharded again. For DeepSpeed, which gives the optimizer flat
    copies of the parameters, use ``lora_plus.engines.deepspeed.check_engine``.

    Examples:
        >>> optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=4)
        >>> check_optimizer(optimizer, model, lr_ratio=4)

    Args:
        optimizer: the optimizer, or all optimizers, of the model.
        model: the model as it is trained: wrapped in DDP, sharded, compiled or plain.
        lr_ratio: the ratio that the rates of A and B must have, instead of the stored one; 1 for plain LoRA. With None,
            groups that store no ratio may have any rates.
        adapter: the only adapter that this optimizer trains, as in `loraplus_param_groups`; it must not contain
            parameters of other adapters. None for all adapters.
        roles: for adapters of other libraries, as in `loraplus_param_groups`.

    Raises:
        KeyError: if there is no such adapter.
        ValueError: with all problems, and what to do about each.
        TypeError: if an optimizer is not a torch optimizer, so that its groups cannot be compared with the model.
    """
    optimizers = [*optimizer] if isinstance(optimizer, Sequence) else [optimizer]
    for each in optimizers:
        _check_kind(each)
    if lr_ratio is not None:
        check_number("lr_ratio", lr_ratio, tensor=True)
    training = _Training.of(model, optimizers, lr_ratio, adapter, roles)
    findings = [finding for check in _CHECKS for finding in check(training)]
    for add in ENGINE_CHECKS:
        findings = add(model, findings)
    if findings:
        raise Problems("training would not do what the optimizer is set up for", findings)
    training.beside.warn()
    warn_of_half_precision(training.groups, training.names, (tensor.key for tensor in training.tensors))


def _check_kind(optimizer: Any) -> None:
    """Raise unless it is a torch optimizer, or a wrapper of one."""
    while isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if isinstance(optimizer, (torch.nn.Module, type)):
        raise TypeError(f"the optimizer comes first, and then the model, got {type(optimizer).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"{type(optimizer).__name__} is not a torch optimizer over the model's parameters, and cannot be checked; "
            "for DeepSpeed call lora_plus.engines.deepspeed.check_engine(engine)"
        )


class _Tensor(NamedTuple):
    """A tensor of an adapter, with the id of its parameter as the key."""

    adapter: str
    role: str
    key: int


@dataclass(frozen=True)
class _Training:
    """What is to be trained, and in which groups it is. Parameters go by their ids."""

    groups: list[Mapping[str, Any]]
    ratios: list[set[float]]
    """By group, what its optimizer notes as ratios of rates, or the one that is asked for."""
    labels: list[str]
    """What messages call the groups."""
    position: dict[int, int]
    """The position of its group for each parameter that is in one, the last of them."""
    names: dict[int, str]
    trainable: set[int]
    """Those that these groups are to train."""
    adapter: str | None
    """The only adapter that they are to train."""
    others: set[int]
    """What is trainable beside it; nothing where all adapters are trained."""
    adapters: list[tuple[str, Adapter, AdaptedWeight]]
    tensors: list[_Tensor]
    """The adapters' tensors; those of a place from A to B."""
    beside: Unsaved
    """What is trainable beside them."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        lr_ratio: float | None,
        adapter: str | None,
        roles: Roles,
    ) -> _Training:
        state = State(model)
        groups: list[Mapping[str, Any]] = [group for each in optimizers for group in each.param_groups]
        noted = [{group[LR_RATIO] for group in each.param_groups if LR_RATIO in group} for each in optimizers]
        if lr_ratio is not None:
            noted = [{lr_ratio} for _ in optimizers]
        given = [_Tensor(name, role, id(parameter)) for name, role, parameter in known_roles(roles)]
        ours = [
            _Tensor(each.name, role, id(held)) for _, each, _ in state.adapters() for role, held in each.parameters()
        ]
        tensors = [tensor for tensor in ours + given if adapter in (None, tensor.adapter)]
        if adapter is not None and not tensors:
            raise KeyError(f"the model has no adapter {adapter!r}")
        named = list(model.named_parameters())
        bound = {id(parameter) for _, parameter in named}
        heads = ((head.unit.name, parameter) for head in state.trained() for parameter in head.parameters())
        named += [(name, parameter) for name, parameter in heads if id(parameter) not in bound]  # of inactive adapters
        trainable = {id(parameter) for _, parameter in named if parameter.requires_grad}
        own = trainable if adapter is None else trained_with(state, adapter) | {tensor.key for tensor in tensors}
        return cls(
            groups,
            ratios=[ratios for ratios, each in zip(noted, optimizers, strict=True) for _ in each.param_groups],
            labels=[f"group {group.get('name', position)!r}" for position, group in enumerate(groups)],
            position={id(p): position for position, group in enumerate(groups) for p in group["params"]},
            names={id(parameter): name for name, parameter in named},
            trainable=trainable & own,
            adapter=adapter,
            others=trainable - own,
            adapters=[found for found in state.adapters() if adapter in (None, found[1].name)],
            tensors=tensors,
            beside=unsaved(state, {tensor.key for tensor in given}),
        )


def _stale(training: _Training) -> Iterator[str]:
    counts = [sum(id(p) not in training.names for p in group["params"]) for group in training.groups]
    rows = zip(counts, training.groups, training.labels, strict=True)
    strangers = [f"{count} of {len(group['params'])} in {label}" for count, group, label in rows if count]
    if strangers:
        yield (
            f"the optimizer holds parameters that are not the model's ({', '.join(strangers)}): build it after "
            "they are replaced (sharding, to_empty), or replace them inside `with rebind_optimizer(optimizer, model):`"
        )


def _left_out(training: _Training) -> Iterator[str]:
    left = training.trainable - training.position.keys()
    names = [name for key, name in training.names.items() if key in left]
    if names:
        yield (
            f"{some(names)} would not be trained, being in no group of the optimizer: build its groups with "
            "loraplus_param_groups(model, ...), or freeze them"
        )


def _twice(training: _Training) -> Iterator[str]:
    counts = Counter(id(p) for group in training.groups for p in group["params"])
    names = [training.names[key] for key, count in counts.items() if count > 1 and key in training.names]
    if names:
        yield f"{some(names)} would be trained twice a step: leave each parameter in one group of one optimizer"


def _foreign(training: _Training) -> Iterator[str]:
    names = [training.names[key] for key in training.position if key in training.others]
    if names:
        yield (
            f"{some(names)} would be trained too, which adapter {training.adapter!r} does not have: build the "
            f"optimizer with create_loraplus_optimizer(model, ..., adapter={training.adapter!r})"
        )


def _untrained(training: _Training) -> Iterator[str]:
    if not training.tensors:
        yield "the model has no LoRA adapter: call inject_lora(model, ...) before building the optimizer"
    elif not training.trainable & {tensor.key for tensor in training.tensors}:
        which = "every adapter of the model" if training.adapter is None else f"the adapter {training.adapter!r}"
        yield f"{which} is frozen: choose what is trained with set_adapter(model, name, trainable=True)"


_IDLE: dict[str, tuple[Callable[[AdaptedWeight, str], bool], str]] = {
    "not active": (
        lambda weight, adapter: adapter not in weight.active_names() and weight.lora_override is None,
        "activate it, or freeze it with set_adapter(model, others, trainable=True), before DDP wraps the model",
    ),
    "merged": (lambda weight, _: weight.lora_merge is not None, "call unmerge_lora(model)"),
    "disabled": (lambda weight, _: weight.lora_disabled > 0, "leave the disabled(model) block"),
}
"""Why a trainable adapter may get no gradient: how to see it, and what to do."""


def _idle(training: _Training) -> Iterator[str]:
    trained = [
        (adapter.name, weight)
        for _, adapter, weight in training.adapters
        if any(parameter.requires_grad for _, parameter in adapter.parameters())
    ]
    for state, (holds, advice) in _IDLE.items():
        for name in dict.fromkeys(adapter for adapter, weight in trained if holds(weight, adapter)):
            yield f"the adapter {name!r} is trainable but {state}, and would get no gradient: {advice}"


def _unfit(training: _Training) -> Iterator[str]:
    for line in training.beside.wrong():
        yield f"{line} (these are trainable and must be frozen, or files of the adapter are wrong)"


def _misnamed(training: _Training) -> Iterator[str]:
    of_role = kinds_of_roles()
    kinds = {tensor.key: of_role[tensor.role][0] for tensor in training.tensors if tensor.role in of_role}
    of_group = {name: kind for (kind, _), name in group_names().items()}
    for group in training.groups:
        named = of_group.get(str(group.get("name")))
        own = [id(p) for p in group["params"] if id(p) in training.names.keys() - training.others]
        strange = [training.names[key] for key in own if named not in (None, kinds.get(key, "other"))]
        if strange:
            yield (
                f"group {group['name']!r} holds {some(strange)}, which do not fit its name: load the state of an "
                "optimizer with the same groups in the same order"
            )


def _off_ratio(training: _Training) -> Iterator[str]:
    pairs: dict[tuple[int, int], list[str]] = defaultdict(list)
    position_A: dict[str, int | None] = {}
    for adapter, role, key in training.tensors:
        position = training.position.get(key) if key in training.trainable else None
        if role == "A":
            position_A[adapter] = position
        elif role == "B" and position is not None and (partner := position_A.get(adapter)) is not None:
            pairs[partner, position].append(training.names[key])
    for (of_A, of_B), names in pairs.items():
        noted = training.ratios[of_A] | training.ratios[of_B]
        wanted = noted - {1.0} or noted  # groups of A note 1
        expected = " or ".join(f"{value:.4g}" for value in sorted(wanted))
        rate_A, rate_B = (float(training.groups[position]["lr"]) for position in (of_A, of_B))
        if wanted and all(abs(rate_B - each * rate_A) > TOLERANCE * max(rate_B, each * rate_A) for each in wanted):
            found = f"{rate_B / rate_A:.4g}" if rate_A else "infinite"
            yield (
                f"{some(names)} learns at {rate_B:.4g} in {training.labels[of_B]}, and the A beside it at "
                f"{rate_A:.4g} in {training.labels[of_A]}: a ratio of {found}, where {expected} is expected; call "
                "check_lr_ratio with the scheduler"
            )


_CHECKS = (_stale, _left_out, _twice, _foreign, _untrained, _idle, _unfit, _misnamed, _off_ratio)

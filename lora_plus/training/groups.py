"""LoRA+ (Hayou et al. 2024, arXiv:2402.12354): parameter groups in which B learns at a multiple of A's rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from lora_plus.errors import check_makes_optimizers, check_number, entry_of, named_keywords
from lora_plus.model.state import State
from lora_plus.model.unsaved import unsaved
from lora_plus.tensors.variant import FACTORS, VARIANTS

O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741 - an optimizer's class gives its instance's type

LrMode = Literal["A", "geometric", "B"]
"""What ``lr`` is: A's rate, the geometric mean of both rates, or B's rate."""

LR_MODES: dict[LrMode, Callable[[float, float], tuple[float, float]]] = {
    "A": lambda lr, ratio: (lr, lr * ratio),  # the paper's convention
    "geometric": lambda lr, ratio: (lr / math.sqrt(ratio), lr * math.sqrt(ratio)),
    "B": lambda lr, ratio: (lr / ratio, lr),
}
"""What ``lr`` names: ``(lr, lr_ratio) -> (rate of A, rate of B)``."""

LR_RATIO = "loraplus_ratio"
"""Entry of the groups of A (where it is 1) and B: the group's rate over A's. The group of an A is the last one before
that of its B. Optimizers keep it, also in their ``state_dict``."""

Roles = Iterable[tuple[str, str, nn.Parameter]]
"""``(adapter, role, parameter)`` for each parameter of an adapter."""

_OTHER_ROLES = {
    "B_bias": ("B", False),  # a column of B whose input is 1
    "embedding_A": ("embedding", True),
    "embedding_B": ("embedding", True),
}


def kinds_of_roles() -> dict[str, tuple[str, bool]]:
    """Role of a tensor -> kind of its group, and whether it is decayed where no rule is given, as variants state it."""
    stated = (tensor for variant in VARIANTS.values() for tensor in (*FACTORS, *variant.tensors))
    return {tensor.role: (tensor.group, tensor.decays) for tensor in stated} | _OTHER_ROLES


def group_names() -> dict[tuple[str, bool], str]:
    """``(kind, whether it is decayed)`` -> name of the group, in the order of the groups."""
    usual = {"A": True, "B": True, "embedding": True}
    for kind, decays in (*kinds_of_roles().values(), ("other", True)):
        usual.setdefault(kind, decays)
    return {
        (kind, decays): (kind if kind == "other" else f"lora_{kind}")
        + ("" if decays == usually else "_decay" if decays else "_no_decay")
        for kind, usually in usual.items()
        for decays in (True, False)
    }


@named_keywords
def loraplus_param_groups(
    model: nn.Module,
    *,
    lr: float,
    lr_ratio: float = 4.0,
    lr_mode: LrMode = "A",
    weight_decay: float = 0.0,
    embedding_lr: float | None = None,
    adapter: str | None = None,
    roles: Roles = (),
    decayed: Iterable[nn.Parameter] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: A at one rate, B at ``lr_ratio`` times that rate.

    Each trainable parameter of the model is in exactly one group, and no group is empty. The names of the groups:

    - ``lora_A`` and ``lora_B``, at the two rates;
    - ``lora_embedding``: both matrices of embedding adapters, at ``embedding_lr``;
    - at ``lr``: ``lora_rows`` (``train_rows``), ``lora_magnitude`` (DoRA's; other variants can add groups), ``other``
      and ``other_no_decay`` (heads, norms, biases).

    Token rows, magnitudes, biases, norm weights and other parameters with less than two dimensions are not decayed.
    With ``decayed`` there can also be ``lora_A_no_decay`` and the like. The groups of A and B store their ratio as
    ``"loraplus_ratio"``, which `check_lr_ratio` reads. With ``lr_ratio=1`` and the same weight decay on each parameter,
    training equals plain LoRA bit for bit.

    Args:
        model: a model with adapters; wrapped (DDP, compiled) or not.
        lr: the rate that ``lr_mode`` names; `transfer_lr` converts a rate that was tuned with other settings. If it is
            a tensor, each group gets a copy.
        lr_ratio: rate of B over rate of A. Theory asks for more than 1 at large width.
        lr_mode: what lr is: ``"A"``: A's rate, as in the paper; ``"B"``: B's rate; ``"geometric"``: the geometric mean
            of both rates, which stays the same when you go from a tuned LoRA run to LoRA+.
        weight_decay: of the groups that are decayed. Under AdamW, B decays ``lr_ratio`` times faster than A.
        embedding_lr: rate of both matrices of embedding adapters; None for ``lr``. The original LoRA+ code has 1e-6, at
            which they hardly move.
        adapter: the only adapter to train, with the modules trained in full with it; for one optimizer per adapter
            (`adapter_per_sample`). It need not be active. None for all adapters.
        roles: ``(adapter, role, parameter)`` for adapters of other libraries, with the roles ``"A"``, ``"B"``,
            ``"B_bias"`` (a bias that B adds), ``"embedding_A"``, ``"embedding_B"`` and ``"magnitude"``;
            `lora_plus.engines.peft.peft_roles` gives PEFT's.
        decayed: the parameters that get ``weight_decay``, instead of the rule above.

    Raises:
        KeyError: if there is no such adapter.
        ValueError: if no adapter is trainable and active, a number is out of range, a role is unknown, or a tensor is
            trainable that must be frozen: a base weight under an adapter, or one that a variant or an init fixes.
    """
    rate_A, rate_B = rates(lr, lr_ratio, lr_mode)
    check_number("weight_decay", weight_decay, "finite and at least 0", tensor=True)
    if embedding_lr is not None:
        check_number("embedding_lr", embedding_lr, tensor=True)
    settings: dict[str, dict[str, Any]] = {
        "A": {"lr": rate_A, LR_RATIO: 1.0},
        "B": {"lr": rate_B, LR_RATIO: float(lr_ratio)},
        "embedding": {"lr": lr if embedding_lr is None else embedding_lr},
    }
    state = State(model)  # from here on parameters are the ones that are trained, and not gathered copies
    role_of = _roles(state, adapter, roles)
    unsaved(state).check("the groups were not made")
    own = None if adapter is None else trained_with(state, adapter) | role_of.keys()
    names = group_names()
    rule = None if decayed is None else {id(parameter): parameter for parameter in decayed}
    if others := [each for each in (rule or {}).values() if not isinstance(each, nn.Parameter)]:
        raise TypeError(f"decayed must hold the parameters themselves, got {others[0]!r}")
    members: dict[tuple[str, bool], list[nn.Parameter]] = {key: [] for key in names}
    for parameter, kind, decays in _trained(state, role_of):
        if own is None or id(parameter) in own:
            members[kind, decays if rule is None else id(parameter) in rule].append(parameter)
    if all(kind == "other" for (kind, _), held in members.items() if held):
        raise ValueError(
            f"{'every adapter of the model' if adapter is None else f'adapter {adapter!r}'} is frozen; choose what is "
            "trained with set_adapter(model, name, trainable=True)"
        )
    groups = []
    for (kind, decays), held in members.items():
        if held:
            group = {"params": held, "name": names[kind, decays], **settings.get(kind, {"lr": lr})}
            group |= {"lr": own_rate(group["lr"]), "weight_decay": weight_decay if decays else 0.0}
            groups.append(group)
    return groups


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., O],
    *,
    lr: float,
    lr_ratio: float = 4.0,
    lr_mode: LrMode = "A",
    weight_decay: float = 0.0,
    embedding_lr: float | None = None,
    adapter: str | None = None,
    roles: Roles = (),
    decayed: Iterable[nn.Parameter] | None = None,
    **kwargs: Any,
) -> O:
    """An optimizer over the groups of `loraplus_param_groups`.

    Args:
        model: as in `loraplus_param_groups`.
        lr: the learning rate of A; ``lr_mode`` can make it B's, or the mean of both.
        lr_ratio: the learning rate of B divided by that of A.
        lr_mode: as in `loraplus_param_groups`.
        weight_decay: of matrices; biases, norm weights and magnitudes are not decayed. With AdamW, B decays
            ``lr_ratio`` times faster than A.
        embedding_lr: the learning rate of both matrices of embedding adapters; None for ``lr``.
        adapter: as in `loraplus_param_groups`.
        roles: as in `loraplus_param_groups`.
        decayed: as in `loraplus_param_groups`.
        optimizer_cls: the optimizer's class, or any function ``(groups, lr=..., **kwargs)`` that makes one.
        kwargs: passed on, e.g. ``betas`` or ``fused``.

    Raises:
        ValueError: as `loraplus_param_groups`, and if weight decay is given for an optimizer that has none.
        TypeError: if ``optimizer_cls`` cannot be called, or does not take one of ``kwargs``.
    """
    check_makes_optimizers(optimizer_cls, create_loraplus_optimizer, kwargs)
    groups = loraplus_param_groups(
        model, lr=lr, lr_ratio=lr_ratio, lr_mode=lr_mode, weight_decay=weight_decay, embedding_lr=embedding_lr,
        adapter=adapter, roles=roles, decayed=decayed,
    )  # fmt: skip
    # some schedulers start from optimizer.defaults["lr"], not from the groups
    optimizer = optimizer_cls(groups, lr=own_rate(lr), **kwargs)
    if weight_decay and "weight_decay" not in optimizer.defaults:
        raise ValueError(
            f"{type(optimizer).__name__} has no weight decay, so weight_decay={weight_decay} would have no effect"
        )
    return optimizer


def _roles(state: State, adapter: str | None, given: Roles) -> dict[int, str]:
    """By id, the role of each parameter of an adapter, or of this one. Raises where no trainable one takes part."""
    roles: dict[int, str] = {}
    trained: dict[str, bool] = {}
    for _, each, weight in state.adapters():
        if adapter in (None, each.name):
            for role, parameter in each.parameters():
                roles[id(parameter)] = role
                if parameter.requires_grad:
                    trained[each.name] = trained.get(each.name, False) or each.name in weight.active_names()
    if adapter is None and trained and not any(trained.values()):
        names = sorted(trained)
        raise ValueError(
            f"the trainable adapters {names} are not active and would get no gradient; call "
            f"set_adapter(model, {names}, trainable=True)"
        )
    roles |= {id(parameter): role for name, role, parameter in known_roles(given) if adapter in (None, name)}
    if not roles and adapter is not None:
        raise KeyError(f"the model has no adapter {adapter!r}")
    if not roles:
        raise ValueError("the model has no LoRA adapter; call inject_lora(model, ...) before building the optimizer")
    return roles


def known_roles(given: Roles) -> Roles:
    """These roles; each is checked as it is taken."""
    known = kinds_of_roles()
    for adapter, role, parameter in given:
        if role not in known:
            raise ValueError(f"unknown role {role!r} of the adapter {adapter!r}; choose one of {sorted(known)}")
        yield adapter, role, parameter


def trained_with(state: State, adapter: str) -> set[int]:
    """The ids of the parameters that are trained in full with an adapter."""
    return {id(parameter) for head in state.trained(adapter) for parameter in head.parameters()}


_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def _trained(state: State, roles: Mapping[int, str]) -> Iterator[tuple[nn.Parameter, str, bool]]:
    """Every trainable parameter once, the kind of its group, and whether it is decayed where no rule is given."""
    elsewhere: dict[int, list[Any]] = {}  # by what is bound in its place now, what an inactive adapter trains in full
    for head in (head for head in state.trained() if head.record.shown != head.adapter):
        for name, bound in head.unit.tensors().items():
            elsewhere.setdefault(id(bound), []).append(head.tensors()[name])
    seen: set[int] = set()
    kinds = kinds_of_roles()
    own = ((module, *each) for module in state.model.modules() for each in module._parameters.items())
    for module, name, bound in own:
        for parameter in (bound, *elsewhere.get(id(bound), ())):
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if id(parameter) in roles:
                kind, decays = kinds[roles[id(parameter)]]
            else:
                kind = "other"
                decays = len(state.storage.shape(parameter)) >= 2 and name != "bias" and not isinstance(module, _NORMS)
            yield parameter, kind, decays


def rates(lr: float, lr_ratio: float, lr_mode: LrMode) -> tuple[float, float]:
    """The rates of A and B."""
    check_number("lr", lr, tensor=True)
    check_number("lr_ratio", lr_ratio, tensor=True)
    return entry_of("lr_mode", lr_mode, LR_MODES)(lr, lr_ratio)


def own_rate(lr: Any) -> Any:
    """The rate for one group: schedulers write into a rate that is a tensor, so that no two groups may share one."""
    return lr.clone() if isinstance(lr, torch.Tensor) else lr

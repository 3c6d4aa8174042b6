"""LoRA+ (Hayou et al. 2024, arXiv:2402.12354): parameter groups in which B learns at a multiple of A's rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_plus.errors import check_makes_optimizers, check_passed_on, named_keywords
from lora_plus.layers.adapter import Adapter
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.model.storage import shards_of
from lora_plus.model.tree import adapters_of
from lora_plus.model.unsaved import unsaved
from lora_plus.tensors.variant import FACTORS, VARIANTS

LR_MODES: dict[str, Callable[[float, float], tuple[float, float]]] = {
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

Adapters = Sequence[tuple[str, Adapter, AdaptedWeight]]
"""The adapters of a model, as `adapters_of` gives them."""

_OTHER_ROLES = {
    "B_bias": ("B", False),  # a column of B whose input is 1
    "embedding_A": ("embedding", True),
    "embedding_B": ("embedding", True),
}


def kind_of_role() -> dict[str, tuple[str, bool]]:
    """Role -> what the parameter is to the optimizer, and whether it is decayed where no rule is given."""
    stated = (tensor for variant in VARIANTS.values() for tensor in (*FACTORS, *variant.tensors))
    return {tensor.role: (tensor.group, tensor.decays) for tensor in stated} | _OTHER_ROLES


def group_names() -> dict[tuple[str, bool], str]:
    """``(kind, whether it is decayed)`` -> name of the group, in the order of the groups."""
    usual = {"A": True, "B": True, "embedding": True}
    for kind, decays in kind_of_role().values():
        usual.setdefault(kind, decays)
    usual["other"] = usual.pop("other", True)  # the last one
    names = {kind: kind if kind == "other" else f"lora_{kind}" for kind in usual}
    return {
        (kind, decays): names[kind] + ("" if decays == usually else "_decay" if decays else "_no_decay")
        for kind, usually in usual.items()
        for decays in (True, False)
    }


@named_keywords
def loraplus_param_groups(
    model: nn.Module,
    *,
    lr: float,
    lr_ratio: float = 4.0,
    lr_mode: str = "A",
    weight_decay: float = 0.0,
    embedding_lr: float | None = 1e-6,
    roles: Roles = (),
    decayed: Iterable[nn.Parameter] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: A at one rate, B at ``lr_ratio`` times that rate.

    Each trainable parameter of the model is in exactly one group, and no group is empty. The groups, by their
    ``"name"``:

    - ``lora_A``, ``lora_B``: the adapters' matrices, at the two rates of ``lr_mode``, with decay;
    - ``lora_embedding``: both matrices of embedding adapters, at ``embedding_lr``, with decay;
    - ``lora_magnitude``: DoRA's magnitudes, at ``lr``, without decay; other variants can state groups of their own;
    - ``other``, ``other_no_decay``: whatever else is trained (heads, norms), at ``lr``; biases, norm weights and
      other parameters of less than two dimensions are not decayed.

    The groups of A and B note their ratio as ``"loraplus_ratio"``, which `check_lr_ratio` goes by. Where ``decayed``
    says otherwise than above, a kind has two groups: the other ones are ``lora_A_no_decay``, ``lora_B_no_decay``,
    ``lora_embedding_no_decay`` and ``lora_magnitude_decay``.

    With ``lr_ratio=1, embedding_lr=None`` and the same weight decay on each parameter, training follows plain LoRA with
    the same optimizer bit for bit. Under Adam a ratio is the same as alpha times that ratio at one rate (up to
    epsilon, weight decay and gradient clipping): `fold_lr_ratio` does that for optimizers that take a single rate.

    Args:
        model: a model with adapters; wrapped (DDP, compiled) or not.
        lr: the rate that ``lr_mode`` says; `convert_lr` gives it for a tuned LoRA run. Of a tensor each group gets a
            copy, and none of them the tensor itself.
        lr_ratio: rate of B over rate of A. Theory asks for more than 1 at large width; below 1, A outruns B, which is
            the opposite of LoRA+ but allowed.
        lr_mode: ``"A"``: lr is A's rate, as in the paper; ``"geometric"``: lr is the geometric mean of both rates,
            the one to keep when a tuned LoRA run is switched to LoRA+; ``"B"``: lr is B's rate.
        weight_decay: of the groups that are decayed. With a decoupled decay (AdamW) B decays ``lr_ratio`` times faster
            than A.
        embedding_lr: rate of embedding adapters, absolute as in the original LoRA+ code; None for ``lr``.
        roles: ``(adapter, role, parameter)`` for adapters that are not this library's, with the roles ``"A"``, ``"B"``,
            ``"B_bias"`` (a bias that B adds, at B's rate, without decay), ``"embedding_A"``, ``"embedding_B"`` and
            ``"magnitude"``; `lora_plus.engines.peft.peft_roles` gives PEFT's.
        decayed: the parameters that ``weight_decay`` is for, such as those of a trainer's own rule, in place of the
            rule above.

    Raises:
        ValueError: if the model has no adapter, or none that is trainable, or a number is out of range, or a role is
            not one of those above, or a base weight under an adapter is trainable, or what a variant or an init holds
            fixed.
    """
    rate_A, rate_B = _rates(lr, lr_ratio, lr_mode)
    check_number("weight_decay", weight_decay, least=0.0)
    if embedding_lr is not None:
        check_number("embedding_lr", embedding_lr)
    settings: dict[str, dict[str, Any]] = {
        "A": {"lr": rate_A, LR_RATIO: 1.0},
        "B": {"lr": rate_B, LR_RATIO: float(lr_ratio)},
        "embedding": {"lr": lr if embedding_lr is None else embedding_lr},
    }
    shape = shards_of(model).shape  # from here on parameters are the ones that are trained, and not gathered copies
    adapters = list(adapters_of(model))
    _check_active(adapters)
    unsaved(model).check("the groups were not made")
    names = group_names()
    members: dict[tuple[str, bool], list[nn.Parameter]] = {key: [] for key in names}
    for key, parameter in _grouped(model, _roles(adapters, roles), decayed, shape):
        members[key].append(parameter)
    if all(kind == "other" for (kind, _), held in members.items() if held):
        raise ValueError(
            "every adapter of the model is frozen; choose the one to be trained with "
            "set_adapter(model, name, trainable=True), or load it with load_adapter(..., trainable=True)"
        )
    return [
        {
            "params": held,
            "name": names[kind, decays],
            **setting,
            "lr": own_rate(setting["lr"]),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (kind, decays), held in members.items()
        for setting in [settings.get(kind, {"lr": lr})]
        if held
    ]


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., torch.optim.Optimizer],
    *,
    lr: float,
    lr_ratio: float = 4.0,
    lr_mode: str = "A",
    weight_decay: float = 0.0,
    embedding_lr: float | None = 1e-6,
    roles: Roles = (),
    decayed: Iterable[nn.Parameter] | None = None,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimizer over the groups of `loraplus_param_groups`.

    Args:
        model, lr, lr_ratio, lr_mode, weight_decay, embedding_lr, roles, decayed: as in `loraplus_param_groups`.
        optimizer_cls: the optimizer's class, or any function ``(groups, lr=..., **kwargs)`` that makes one.
        kwargs: passed on, e.g. ``betas`` or ``fused``.

    Raises:
        ValueError: as `loraplus_param_groups`, and if the optimizer knows no weight decay but one is asked for.
        TypeError: if ``optimizer_cls`` cannot be called, or does not take one of ``kwargs``.
    """
    check_makes_optimizers(optimizer_cls)
    check_passed_on(create_loraplus_optimizer, optimizer_cls, kwargs)
    groups = loraplus_param_groups(
        model,
        lr=lr,
        lr_ratio=lr_ratio,
        lr_mode=lr_mode,
        weight_decay=weight_decay,
        embedding_lr=embedding_lr,
        roles=roles,
        decayed=decayed,
    )
    # some schedulers start from optimizer.defaults["lr"], not from the groups
    optimizer = optimizer_cls(groups, lr=own_rate(lr), **kwargs)
    if weight_decay and "weight_decay" not in optimizer.defaults:
        raise ValueError(
            f"{type(optimizer).__name__} has no weight decay, so weight_decay={weight_decay} would have no effect"
        )
    return optimizer


def convert_lr(lr: float, *, lr_ratio: float = 4.0, lr_mode: str = "A") -> float:
    """The ``lr`` of LoRA+ that goes with a tuned rate of plain LoRA.

    It keeps the geometric mean of the rates of A and B at the tuned rate, which is what transfers between ratios:
    ``lr / sqrt(lr_ratio)`` in mode "A", ``lr`` in mode "geometric", ``lr * sqrt(lr_ratio)`` in mode "B".

    Example:
        >>> convert_lr(2e-4, lr_ratio=4)
        0.0001
        >>> convert_lr(2e-4, lr_ratio=4, lr_mode="geometric")
        0.0002
        >>> convert_lr(2e-4, lr_ratio=4, lr_mode="B")
        0.0004

    Args:
        lr: the rate at which plain LoRA does best, with the same optimizer, rank and alpha.
        lr_ratio, lr_mode: as they will be passed to `loraplus_param_groups`.

    Raises:
        ValueError: if a number is out of range, or the mode unknown.
    """
    check_number("lr", lr)
    return lr / math.sqrt(math.prod(_rates(1.0, lr_ratio, lr_mode)))


def split_loraplus_groups(
    groups: Iterable[Mapping[str, Any]], model: nn.Module, *, lr_ratio: float, lr_mode: str = "A"
) -> list[dict[str, Any]]:
    """Split A and B out of parameter groups that exist already, each at its own group's rate times its factor.

    For groups with several base rates, such as layer-wise decay. Everything else, embedding adapters included, stays at
    its group's rate. With ``lr_mode="A"`` only the B matrices leave their group.

    Args:
        groups: dicts with ``"params"`` and ``"lr"``, as for a torch optimizer; they are not changed. Their other
            entries are passed on to the parts.
        model: the model that the parameters belong to.
        lr_ratio, lr_mode: as in `loraplus_param_groups`.

    Returns:
        New groups, none of them empty. The parts are named after their group and ``lora_A`` or ``lora_B``. Where a
        group held both, the parts with A and B note their ratio as ``"loraplus_ratio"``.

    Raises:
        ValueError: if a group has no ``"lr"``, or no group holds a B matrix of the model.
    """
    factor_A, factor_B = _rates(1.0, lr_ratio, lr_mode)
    unsaved(model).check("the groups were not split")
    role_of = {id(parameter): role for _, adapter, _ in adapters_of(model) for role, parameter in adapter.parameters()}
    factors = {"A": factor_A, "B": factor_B}
    part_of = {role: role if factor != 1.0 else "" for role, factor in factors.items()}
    split: list[dict[str, Any]] = []
    found_B = False
    for index, group in enumerate(groups):
        if "lr" not in group:
            raise ValueError(f"group {index} has no 'lr'; give each group the rate that B shall learn at a multiple of")
        parts: dict[str, list[Any]] = {"A": [], "": [], "B": []}  # in this order, A comes before its B
        roles = set()
        for member in group["params"]:
            parameter = member[1] if isinstance(member, tuple) else member
            role = role_of.get(id(parameter), "")
            roles.add(role)
            parts[part_of.get(role, "")].append(member)
        found_B |= "B" in roles
        ratios = {part_of["A"]: 1.0, part_of["B"]: factor_B / factor_A} if {"A", "B"} <= roles else {}
        name = group.get("name", f"group_{index}")
        for role, members in parts.items():
            part = {**group, "params": members, "name": f"{name}.lora_{role}" if role else name}
            part["lr"] = group["lr"] * factors[role] if role else own_rate(group["lr"])
            if role in ratios:
                part[LR_RATIO] = ratios[role]
            if members:
                split.append(part)
    if not found_B:
        raise ValueError(
            "no group holds a B matrix of this model; call inject_lora first and build the groups from its parameters"
        )
    return split


def _check_active(adapters: Adapters) -> None:
    """Raise where only adapters that take no part in the forward are trainable."""
    trainable = {
        (adapter.name, adapter.name in weight.active_names())
        for _, adapter, weight in adapters
        if any(parameter.requires_grad for _, parameter in adapter.parameters())
    }
    if trainable and not any(active for _, active in trainable):
        names = sorted({adapter for adapter, _ in trainable})
        raise ValueError(
            f"the trainable adapters {names} are not active and would get no gradient; call "
            f"set_adapter(model, {names}), or set requires_grad on the parameters of the active one and not on theirs"
        )


def _roles(adapters: Adapters, given: Roles) -> dict[int, str]:
    """By id, the role of each parameter of an adapter."""
    roles = {id(parameter): role for _, adapter, _ in adapters for role, parameter in adapter.parameters()}
    roles |= {id(parameter): role for _, role, parameter in known_roles(given)}
    if not roles:
        raise ValueError("the model has no LoRA adapter; call inject_lora(model, ...) before building the optimizer")
    return roles


def known_roles(given: Roles) -> Roles:
    """These roles; each is checked as it is taken."""
    known = kind_of_role()
    for adapter, role, parameter in given:
        if role not in known:
            raise ValueError(f"unknown role {role!r} of the adapter {adapter!r}; choose one of {sorted(known)}")
        yield adapter, role, parameter


def _grouped(
    model: nn.Module,
    roles: Mapping[int, str],
    decayed: Iterable[nn.Parameter] | None,
    shape: Callable[[nn.Parameter], Sequence[int]],
) -> Iterator[tuple[tuple[str, bool], nn.Parameter]]:
    """``((kind, whether it is decayed), parameter)`` for every trainable parameter, each once.

    ``shape`` gives that of the whole parameter.
    """
    chosen = None if decayed is None else {id(parameter) for parameter in decayed}
    seen: set[int] = set()
    kinds = kind_of_role()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            role = roles.get(id(parameter), "")
            kind, decays = kinds.get(role) or _other_kind(module, name, len(shape(parameter)))
            yield (kind, decays if chosen is None else id(parameter) in chosen), parameter


_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def _other_kind(module: nn.Module, name: str, dimensions: int) -> tuple[str, bool]:
    plain = dimensions >= 2 and name != "bias" and not isinstance(module, _NORMS)
    return "other", plain


def _rates(lr: float, lr_ratio: float, lr_mode: str) -> tuple[float, float]:
    check_number("lr", lr)
    check_number("lr_ratio", lr_ratio)
    try:
        return LR_MODES[lr_mode](lr, lr_ratio)
    except KeyError:
        raise ValueError(f"unknown lr_mode {lr_mode!r}; choose one of {sorted(LR_MODES)}") from None


def own_rate(lr: Any) -> Any:
    """The rate for one group: schedulers write into a rate that is a tensor, so that no two groups may share one."""
    return lr.clone() if isinstance(lr, torch.Tensor) else lr


def check_number(name: str, value: Any, least: float | None = None) -> None:
    """Raise unless the value is a finite number (or one-element tensor) that is positive, or at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.Tensor)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or (number <= 0 if least is None else number < least):
        bound = "positive" if least is None else f"at least {least:g}"
        raise ValueError(f"{name} must be finite and {bound}, got {value!r}")

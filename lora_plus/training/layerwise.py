"""LoRA+ for groups that exist already, such as those of layer-wise learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lora_plus.model.state import State
from lora_plus.model.unsaved import unsaved

from .groups import LR_RATIO, LrMode, own_rate, rates


def split_loraplus_groups(
    groups: Iterable[Mapping[str, Any]], model: nn.Module, *, lr_ratio: float, lr_mode: LrMode = "A"
) -> list[dict[str, Any]]:
    """Split existing parameter groups, so that A and B get their group's rate times their factor.

    For groups with several base rates, such as layer-wise decay. Everything else, also embedding adapters, keeps its
    group's rate. With ``lr_mode="A"`` only the B matrices leave their group. New groups are named after their group
    and ``lora_A`` or ``lora_B``. If a group had both, they store their ratio as ``"loraplus_ratio"``.

    Args:
        groups: dicts with ``"params"`` and ``"lr"``, as for a torch optimizer; they are not changed. Their other
            entries are copied to the parts.
        model: the model that the parameters belong to.
        lr_ratio: as in `loraplus_param_groups`.
        lr_mode: as in `loraplus_param_groups`.

    Raises:
        ValueError: if a group has no ``"lr"``, or no group holds a B matrix of the model.
    """
    factors = dict(zip("AB", rates(1.0, lr_ratio, lr_mode), strict=True))
    state = State(model)
    unsaved(state).check("the groups were not split")
    role_of = {id(parameter): role for _, adapter, _ in state.adapters() for role, parameter in adapter.parameters()}
    part_of = {role: role if factor != 1.0 else "" for role, factor in factors.items()}
    split: list[dict[str, Any]] = []
    found_B = False
    for index, group in enumerate(groups):
        if "lr" not in group:
            raise ValueError(f"group {index} has no 'lr'; give each group its base rate")
        parts: dict[str, list[Any]] = {"A": [], "": [], "B": []}  # in this order, A comes before its B
        roles = set()
        for member in group["params"]:
            parameter = member[1] if isinstance(member, tuple) else member
            role = role_of.get(id(parameter), "")
            roles.add(role)
            parts[part_of.get(role, "")].append(member)
        found_B |= "B" in roles
        ratios = {part_of["A"]: 1.0, part_of["B"]: factors["B"] / factors["A"]} if {"A", "B"} <= roles else {}
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

"""One rule that carries a tuned learning rate to another rank, alpha, scaling, ratio or start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lora_plus.errors import check_keywords, check_number
from lora_plus.tensors.variant import VARIANTS, AdapterSpec

from .groups import rates

DRAWN_A = ("kaiming", "gaussian", "orthogonal")
"""The starts with a random A and B = 0, which the rule for r and scale is derived for."""

DRAWN_B = ("kaiming_B",)
"""The start with a random B and A = 0. With Adam ``alpha * k`` is there the same run as A's rate times k, so that alpha
can change with the ratio. What is derived for B = 0 does not hold until B has moved by more than its start."""

BEST_OVER_LORA: dict[Any, float] = {
    "kaiming": 1.0,
    "pissa": 1 / 10,
    "milora": 1 / 3.2,
    "olora": 1 / 18.2,
    "gradient": 1 / 18.2,
}
"""Best rate of a start over that of plain LoRA at the same r and scale, as arXiv:2602.04998 found it in one family."""

LORA_OVER_FULL, ALPHA_OVER_FULL = 10.0, 32.0
"""Best rate of LoRA over that of full fine-tuning, and the alpha, with alpha / r, at which that was found."""

DEFAULTS: dict[str, Any] = {
    "r": 8,
    "alpha": 16,
    "scaling": "standard",
    "lr_ratio": 1,
    "lr_mode": "A",
    "init": "kaiming",
    "variant": "lora",
    "method": "lora",
}


def transfer_lr(lr: float, tuned: Mapping[str, Any], wanted: Mapping[str, Any]) -> float:
    """Convert a learning rate that was tuned with other settings.

    Under Adam the best rate keeps ``g * sqrt(r * s)``: g is the geometric mean of the rates of A and B, s the scale of
    B A. For the ratio, its mode and alpha this is exact (under Adam ``alpha * k`` is a ratio of k). For r it follows
    arXiv:2602.06204 (muA): no change with ``alpha / r``, ``r ** -1/4`` with ``alpha / sqrt(r)``, ``r ** -1/2`` at a
    fixed scale. With ``init="kaiming_B"`` it is exact if alpha and the ratio change by the same factor. Between inits,
    and from or to full fine-tuning, it multiplies by published **empirical** factors: PiSSA 1/10, MiLoRA 1/3.2, OLoRA
    and `init_from_gradients` 1/18.2 of LoRA's best rate (arXiv:2602.04998, one family of models); LoRA with alpha 32
    ten times the rate of full fine-tuning ("LoRA Without Regret", Thinking Machines 2025; another user found three
    times).

    Examples:
        >>> plus = {"lr_ratio": 4, "lr_mode": "A"}
        >>> transfer_lr(2e-4, tuned={"lr_ratio": 1}, wanted=plus)
        0.0001
        >>> tuned = {"r": 8, "scaling": "rslora"}
        >>> transfer_lr(2e-4, tuned=tuned, wanted=tuned | {"r": 128})
        0.0001

    Args:
        lr: the tuned rate, as it was passed with ``tuned``.
        tuned: the settings that it was tuned with, with the names of `inject_lora` and `loraplus_param_groups`: ``r``,
            ``alpha``, ``scaling``, ``init``, ``variant``, ``lr_ratio``, ``lr_mode``, and ``method``, ``"lora"`` or
            ``"full"`` for full fine-tuning. A missing setting has `inject_lora`'s default.
            Name ``lr_ratio`` on both sides, or on neither if it stays; 1 is plain LoRA.
            ``init`` can also be ``"gradient"``, for `init_from_gradients`.
        wanted: the settings to convert the rate to, with the same names.

    Raises:
        ValueError: if a value is out of range, if a side leaves out ``lr_ratio`` and the rate depends on it, or if no
            factor is known: between variants, between other inits, and for another r or scale with an init whose A is
            not random or whose B is not zero, except for the case above.
        TypeError: if a setting is unknown, or its value has another type.
    """
    check_number("lr", lr, tensor=True)
    before, after = _settings("tuned", tuned), _settings("wanted", wanted)
    _check_ratios({"tuned": tuned, "wanted": wanted})
    factor = _kept(before) / _kept(after)
    _check_known(before, after)
    return float(lr) * factor


def _settings(which: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of one side, checked, and the scale as ``"scale"``."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{which} must be the settings of a run, such as {{'r': 8}}, got {given!r}")
    check_keywords(f"transfer_lr's {which}", given, DEFAULTS)
    settings = {**DEFAULTS, **given}
    if settings["method"] not in ("lora", "full"):
        raise ValueError(f"unknown method {settings['method']!r} in {which}; choose 'lora' or 'full'")
    if settings["method"] == "full" and (beside := sorted(given.keys() - {"method"})):
        raise ValueError(f"full fine-tuning has no {', '.join(beside)}; leave that out of {which}")
    spec = AdapterSpec(settings["r"], settings["alpha"], settings["scaling"], settings["variant"])
    return {**settings, "scale": abs(spec.scale)}


def _check_ratios(sides: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise where the rate depends on the ratio and a side leaves it out."""
    matters = any({"lr_ratio", "lr_mode"} & given.keys() or given.get("method") == "full" for given in sides.values())
    for which, given in sides.items():
        if matters and "lr_ratio" not in given and given.get("method") != "full":
            raise ValueError(
                f"{which} has no lr_ratio, on which the rate depends here; name it (1 is plain LoRA, and "
                "create_loraplus_optimizer's default is 4)"
            )


def _check_known(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raise where nothing is known of how the best rate moves."""
    variants, inits = ({each[key] for each in (before, after)} for key in ("variant", "init"))
    if len(variants) > 1:
        raise ValueError(f"no factor is known between the variants {sorted(variants)}; tune the rate again")
    if "lora_A" in VARIANTS[before["variant"]].frozen:
        raise ValueError(
            f"the rule is for a trained A, and variant {before['variant']!r} freezes it; tune the rate again"
        )
    if len(inits) > 1 and not inits <= BEST_OVER_LORA.keys():
        raise ValueError(
            f"no factor is known between the inits {sorted(map(str, inits))}, only between {sorted(BEST_OVER_LORA)}; "
            "tune the rate again"
        )
    moved = any(before[key] != after[key] for key in ("r", "scale"))
    if moved and not inits & set(DRAWN_A) and not _is_the_same_run(before, after):
        raise ValueError(f"no rule for another r or scale is known with init {before['init']!r}; tune the rate again")


def _is_the_same_run(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether A starts at zero, and the ratio moves with the scale."""
    turned = math.isclose(after["lr_ratio"] * before["scale"], before["lr_ratio"] * after["scale"])
    return turned and before["init"] in DRAWN_B and before["r"] == after["r"]


def _kept(settings: Mapping[str, Any]) -> float:
    """What the rule keeps, for ``lr=1``: ``g * sqrt(r * s)``, as plain LoRA's."""
    if settings["method"] == "full":
        return LORA_OVER_FULL * math.sqrt(ALPHA_OVER_FULL)
    mean = math.sqrt(math.prod(rates(1.0, settings["lr_ratio"], settings["lr_mode"])))
    return mean * math.sqrt(settings["r"] * settings["scale"]) / BEST_OVER_LORA.get(settings["init"], 1.0)

"""PEFT's ``adapter_config.json``: what is checked when one is read, and what it says of each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from lora_plus.errors import shortened, warn_user
from lora_plus.text import printable

from .pattern_keys import Patterns
from .token_rows import FIELD, wrong_indices

CONFIG = "adapter_config.json"

USER_FIELDS = ("base_model_name_or_path", "revision", "task_type")
"""Fields of the config that say something about the base model; a user may set them as metadata."""

_HARMLESS = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "lora_alpha",
    "rank_pattern", "alpha_pattern", "runtime_config", "target_modules", "target_parameters", "use_dora", "use_rslora",
    "velora_config", "bias", "init_lora_weights", FIELD, *USER_FIELDS,
}  # fmt: skip
"""Fields that are read here, or that do not change what the saved tensors mean."""

_OTHER_METHODS = {
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "megatron_config",
    "monteclora_config", "use_bdlora", "use_qalora",
}  # fmt: skip
"""Fields of other methods, which must be empty."""

_KNOWN = (0, 21)
"""The version of PEFT that has no other fields than these two sets; a newer one may have more."""

_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Inits after which PEFT's tensors belong to a base weight that PEFT changes at load time, unless converted on save."""


def checked_config(
    config: Any, problems: list[str], where: str = CONFIG, *, biases: Collection[str] = ()
) -> dict[str, Any] | None:
    """The config with PEFT's defaults and its patterns as `Patterns`; None if something is wrong with it.

    What is wrong is added to ``problems``. ``biases`` are the settings of ``bias`` that can be read; without them
    neither trained biases can nor those of ``lora_bias``.
    """
    if not isinstance(config, Mapping) or not all(isinstance(name, str) for name in config):
        problems.append(f"{where} must be a JSON object, got {type(config).__name__}")
        return None
    if config.get("peft_type") != "LORA":
        problems.append(f"{where}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
        return None
    count = len(problems)
    # a JSON file need not have the defaults that PEFT's config class has
    config = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, **config}
    r, alpha = config["r"], config["lora_alpha"]
    if not _is_int(r) or r <= 0:
        problems.append(f"{where}: r must be a positive integer, got {r!r}")
    if not _is_number(alpha) or alpha == 0:
        problems.append(f"{where}: lora_alpha must be a finite number and not 0, got {alpha!r}")
    if not _is_number(config["lora_dropout"]) or not 0 <= config["lora_dropout"] < 1:
        problems.append(f"{where}: lora_dropout must be a number in [0, 1), got {config['lora_dropout']!r}")
    for field, fits in (("rank_pattern", _is_int), ("alpha_pattern", _is_number)):
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict) or not all(isinstance(k, str) and fits(v) for k, v in pattern.items()):
            problems.append(f"{where}: {field} must be an object of numbers, got {pattern!r}")
            continue
        wrong: list[str] = []
        config[field] = Patterns(pattern, wrong)
        problems += [f"{where}: {field}: {line}" for line in wrong]
    for field in ("use_rslora", "use_dora", *(["lora_bias"] if biases else [])):
        if not isinstance(config.get(field), (bool, type(None))):
            problems.append(f"{where}: {field} must be true or false, got {config[field]!r}")
    for field in ("modules_to_save", "target_parameters"):
        names = config.get(field) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            problems.append(f"{where}: {field} must be a list of names, got {names!r}")
    if (why := wrong_indices(config.get(FIELD))) is not None:
        problems.append(f"{where}: {why}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_BASE_CHANGING):
        problems.append(
            f"{where}: init_lora_weights is {init!r}: its tensors belong to a base weight that PEFT changes when it "
            "loads them; save them again with path_initial_model_for_weight_conversion"
        )
    if not biases and config.get("bias", "none") != "none":
        problems.append(f"{where}: bias is {config['bias']!r}, and trained biases cannot be read; expected 'none'")
    elif biases and config.get("bias", "none") not in biases:
        problems.append(f"{where}: bias is {config['bias']!r}, expected one of {', '.join(map(repr, biases))}")
    harmless = _HARMLESS | ({"lora_bias"} if biases else set())
    others = {name: value for name, value in sorted(config.items()) if name not in harmless and value}
    version = config.get("peft_version")
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    newer = numbers is not None and (int(numbers[1]), int(numbers[2])) > _KNOWN
    unknown = [name for name in others if newer and name not in _OTHER_METHODS]
    problems += [
        f"{where}: {name} is {value!r}, which plain LoRA and DoRA do not have"
        for name, value in others.items()
        if name not in unknown
    ]
    if unknown and len(problems) == count:
        told = shortened(", ".join(f"{name} is {others[name]!r}" for name in unknown), 300)
        warn_user(
            f"{where} was written by peft {printable(shortened(version, 30))}, and {printable(told)}: peft "
            f"{'.'.join(map(str, _KNOWN))} has no such fields, and they are ignored; compare an output with that peft"
        )
    return config if len(problems) == count else None


def settings_of(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of the adapter of a module or parameter."""
    return {
        "r": [*config["rank_pattern"].values(name), config["r"]][0],
        "alpha": [*config["alpha_pattern"].values(name), config["lora_alpha"]][0],
        "scaling": "rslora" if config.get("use_rslora") else "standard",
        "variant": "dora" if config.get("use_dora") else "lora",
        "dropout": config["lora_dropout"],
    }


def fan_in_fan_out(kinds: Mapping[str, str], start: bool) -> dict[str, bool]:
    """The setting ``fan_in_fan_out`` as PEFT has it after each module, by their kinds in the order of the model.

    PEFT changes its one config to fit a linear layer or its transposed kind; the next modules get what it then says.
    """
    states = {}
    for name, kind in kinds.items():
        start = {"Linear": False, "TransposedLinear": True}.get(kind, start)
        states[name] = start
    return states


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False

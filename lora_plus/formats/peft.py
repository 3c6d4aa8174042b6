"""PEFT's checkpoint format: ``adapter_config.json`` and ``adapter_model.safetensors`` in one folder.

Written and read as peft 0.21 does. Of the config, only what decides the result is written; module names are written in
full, and pattern keys are anchored, so that nothing depends on their order.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, BaseLayer, LayerAdapter, Problems, most_common

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
METADATA = {"format": "pt"}
PREFIX = "base_model.model."

USER_FIELDS = ("base_model_name_or_path", "revision", "task_type")
"""Fields of the config that say something about the base model; a user may set them as metadata."""

_HARMLESS = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "lora_alpha",
    "rank_pattern", "alpha_pattern", "runtime_config", "target_modules", "use_dora", "use_rslora", "velora_config",
    "bias", "init_lora_weights", *USER_FIELDS,
}  # fmt: skip
"""Fields that are read here, or that do not change what the saved tensors mean. Any other one must be empty."""

_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Inits after which PEFT's tensors belong to a base weight that PEFT changes at load time, unless converted on save."""

_SUFFIXES = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
}
_EMBEDDING_SUFFIXES = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
_OTHER_SUFFIXES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(
    adapter: Adapter, module_names: Collection[str], containers: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config of a PEFT folder.

    Args:
        adapter: the adapter.
        module_names: the names of all modules of the model, against accidental matches.
        containers: those of them that have no forward of their own, as an ``nn.ModuleList`` has none.

    Raises:
        Problems: naming every layer or setting that PEFT's format cannot express exactly.
    """
    problems = _inexpressible(adapter, module_names, containers)
    if problems:
        raise Problems("the adapter cannot be written in PEFT's format", problems)
    layers = {name: _to_peft(layer) for name, layer in sorted(adapter.layers.items())}
    rslora = all(layer.settings["scaling"] == "rslora" for layer in layers.values())
    ranks = {name: layer.settings["r"] for name, layer in layers.items()}
    alphas = {name: _alpha(layer, rslora) for name, layer in layers.items()}
    r, alpha = most_common(list(ranks.values())), most_common(list(alphas.values()))
    targets = sorted(layers)
    accidents = {name for name in module_names for target in targets if name.endswith(f".{target}")} - set(targets)
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        # PEFT also adapts modules whose name ends in a listed one; a regular expression matches whole names only
        "target_modules": "|".join(map(re.escape, targets)) if accidents else targets,
        "rank_pattern": {_anchored(name): rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {_anchored(name): value for name, value in alphas.items() if value != alpha},
        "modules_to_save": sorted(adapter.trained) or None,
        "lora_dropout": most_common([layer.settings["dropout"] for layer in layers.values()]),
        "use_rslora": rslora,
        "use_dora": any(layer.settings["variant"] == "dora" for layer in layers.values()),
        "fan_in_fan_out": any(layer.base.layout == "i o -> o i" for layer in layers.values()),
        "init_lora_weights": True,
        "bias": "none",
        "inference_mode": True,
        **{name: adapter.metadata.get(name) for name in USER_FIELDS},
    }
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        suffixes = _OTHER_SUFFIXES | (_EMBEDDING_SUFFIXES if _is_embedding(layer.base) else {})
        tensors |= {f"{PREFIX}{path}.{suffixes[name]}": tensor for name, tensor in layer.tensors.items()}
    for path, trained in adapter.trained.items():
        tensors |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in trained.items()}
    return tensors, config


def _inexpressible(adapter: Adapter, module_names: Collection[str], containers: Collection[str]) -> list[str]:
    problems = []
    if "" in adapter.layers or "" in adapter.trained:
        problems.append("the model itself is adapted, and PEFT names only modules inside a model")
    if len({layer.settings["variant"] for layer in adapter.layers.values()}) > 1:
        problems.append("some layers are DoRA and some are not, and PEFT has one setting for all")
    if len({layer.settings["dropout"] for layer in adapter.layers.values()}) > 1:
        problems.append("layers differ in dropout, and PEFT has one setting for all")
    for name, layer in adapter.layers.items():
        problems += [f"{name!r}: {reason}" for reason in _not_in_peft(layer)]
    for path in adapter.trained:
        reasons = _trained_not_in_peft(path, adapter, module_names)
        if path in containers:
            reasons.append("PEFT trains only modules with a forward of their own in full")
        problems += [f"train_also {path!r}: {reason}" for reason in reasons]
    unknown = sorted(set(adapter.metadata) - set(USER_FIELDS))
    problems += [f"metadata {name!r}: PEFT's config has no such field; it knows {USER_FIELDS}" for name in unknown]
    return problems


def _not_in_peft(layer: LayerAdapter) -> list[str]:
    reasons = []
    if "max_norm" in layer.base.facts:
        reasons.append("PEFT adds the update of an embedding after applying max_norm, this library before")
    if "groups" in layer.base.facts and layer.settings["variant"] == "dora":
        reasons.append("PEFT has no DoRA for grouped convolutions")
    return reasons


def _trained_not_in_peft(path: str, adapter: Adapter, module_names: Collection[str]) -> list[str]:
    wrapped = [name for name in module_names if name.endswith(path) and name not in adapter.trained]
    reasons = [f"PEFT would take {name!r} for it, which ends in the same" for name in wrapped]
    try:
        # PEFT also reads the name as a regular expression, for modules that get no adapter
        kept_out = re.compile(rf"(^|.*\.){path}($|\..*)")
    except re.error:
        return [*reasons, "PEFT reads the name as a regular expression, and it is not a valid one"]
    hits = [name for name in adapter.layers if name not in wrapped and kept_out.match(name)]
    return reasons + [f"PEFT reads the name as a regular expression, and {name!r} matches it" for name in hits]


def _to_peft(layer: LayerAdapter) -> LayerAdapter:
    """The same update with tensors in PEFT's shapes."""
    shape, groups = layer.base.shape, layer.base.facts.get("groups", 1)
    if len(shape) == 2:
        return layer
    A, B = layer.tensors["lora_A"], layer.tensors["lora_B"]
    A = A.reshape(-1, *shape[1:])  # (r, in / groups, *kernel)
    r, per_group = A.shape[:2]
    settings = layer.settings
    if groups > 1:
        # PEFT's A sees the channels of all groups: once per group, zero outside that group's channels
        blocks = A.new_zeros(groups, r, groups, per_group, *shape[2:])
        for group in range(groups):
            blocks[group, :, group] = A
        A = blocks.reshape(groups * r, groups * per_group, *shape[2:])
        settings = settings | {"r": groups * r, "alpha": layer.scale * groups * r, "scaling": "standard"}
    pointwise = [1] * (len(shape) - 2)
    tensors = {"lora_A": A, "lora_B": B.reshape(*B.shape, *pointwise)}
    if "lora_magnitude" in layer.tensors:
        tensors["lora_magnitude"] = layer.tensors["lora_magnitude"].reshape(1, -1, *pointwise)
    return LayerAdapter(layer.base, settings, layer.scale, tensors)


def _alpha(layer: LayerAdapter, rslora: bool) -> float:
    """The alpha that gives the layer's scale under the file's one scaling rule."""
    same_rule = layer.settings["scaling"] == ("rslora" if rslora else "standard")
    alpha = float(layer.settings["alpha"] if same_rule else layer.scale * layer.settings["r"])
    return int(alpha) if alpha.is_integer() else alpha


def _anchored(name: str) -> str:
    return f"^{re.escape(name)}"


def _is_embedding(base: BaseLayer) -> bool:
    return base.layout == "n d -> d n"


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(
    tensors: dict[str, Tensor],
    config: Any,
    bases: Mapping[str, BaseLayer | None],
    scale: Callable[[dict[str, Any]], float],
    problems: list[str],
) -> Adapter:
    """The adapter that a PEFT folder describes; what is wrong with it is added to ``problems``.

    Args:
        tensors: all tensors of ``adapter_model.safetensors``.
        config: ``adapter_config.json``, parsed.
        bases: every module name of the model, with its base layer if it can be adapted.
        scale: the factor of B A that follows from a layer's settings; raises on settings that are not valid.
        problems: list to add to.
    """
    checked = _checked_config(config, problems)
    if checked is None:
        return Adapter({}, {})
    metadata = {name: checked[name] for name in USER_FIELDS if isinstance(checked.get(name), str)}
    adapter = Adapter({}, {}, metadata)
    saved = checked.get("modules_to_save") or []
    trained_names = [name for name in bases if any(name.endswith(entry) for entry in saved)]
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        name = key.removeprefix(PREFIX)
        path, part = next(
            ((name.removesuffix(f".{end}"), part) for end, part in _SUFFIXES.items() if name.endswith(f".{end}")),
            (None, ""),
        )
        owner = next((module for module in trained_names if name.startswith(f"{module}.")), None)
        if not key.startswith(PREFIX):
            problems.append(f"tensor {key!r}: expected a name that starts with {PREFIX!r}")
        elif "base_layer" in name.split("."):
            problems.append(f"tensor {key!r}: adapters of attention modules, parameters and biases cannot be read")
        elif path is not None:
            parts.setdefault(path, {})[part] = tensor
        elif owner is not None:
            adapter.trained.setdefault(owner, {})[name.removeprefix(f"{owner}.")] = tensor
        else:
            problems.append(f"tensor {key!r} is neither part of an adapter nor of modules_to_save {saved}")
    missing = [entry for entry in saved if not any(name.endswith(entry) for name in adapter.trained)]
    problems += [f"modules_to_save {entry!r} has no tensors in the file" for entry in missing]
    for path, found in parts.items():
        layer = _from_peft(path, found, checked, bases, scale, problems)
        if layer is not None:
            adapter.layers[path] = layer
    _warn_of_ambiguous_patterns(checked, adapter)
    return adapter


def _checked_config(config: Any, problems: list[str]) -> dict[str, Any] | None:
    if not isinstance(config, dict):
        problems.append(f"{CONFIG} must be a JSON object, got {type(config).__name__}")
        return None
    if config.get("peft_type") != "LORA":
        problems.append(f"{CONFIG}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
        return None
    count = len(problems)
    # a JSON file need not have the defaults that PEFT's config class has
    config = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, **config}
    r, alpha = config["r"], config["lora_alpha"]
    if not _is_int(r) or r <= 0:
        problems.append(f"{CONFIG}: r must be a positive integer, got {r!r}")
    if not _is_number(alpha) or alpha == 0:
        problems.append(f"{CONFIG}: lora_alpha must be a finite number and not 0, got {alpha!r}")
    if not _is_number(config["lora_dropout"]) or not 0 <= config["lora_dropout"] < 1:
        problems.append(f"{CONFIG}: lora_dropout must be a number in [0, 1), got {config['lora_dropout']!r}")
    for field, fits in (("rank_pattern", _is_int), ("alpha_pattern", _is_number)):
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict) or not all(isinstance(k, str) and fits(v) for k, v in pattern.items()):
            problems.append(f"{CONFIG}: {field} must be an object of numbers, got {pattern!r}")
            continue
        problems += [f"{CONFIG}: {field}: {key!r} is not a regular expression" for key in pattern if not _is_regex(key)]
    for field in ("use_rslora", "use_dora"):
        if not isinstance(config.get(field), (bool, type(None))):
            problems.append(f"{CONFIG}: {field} must be true or false, got {config[field]!r}")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        problems.append(f"{CONFIG}: modules_to_save must be a list of names, got {saved!r}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_BASE_CHANGING):
        problems.append(
            f"{CONFIG}: init_lora_weights is {init!r}: its tensors belong to a base weight that PEFT changes when it "
            "loads them; save them again with path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") != "none":
        problems.append(f"{CONFIG}: bias is {config['bias']!r}, and trained biases cannot be read; expected 'none'")
    problems += [
        f"{CONFIG}: {name} is {value!r}, which plain LoRA and DoRA do not have"
        for name, value in sorted(config.items())
        if name not in _HARMLESS and value
    ]
    return config if len(problems) == count else None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _is_regex(key: str) -> bool:
    try:
        re.compile(_pattern(key))
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _from_peft(
    path: str,
    found: dict[str, Tensor],
    config: dict[str, Any],
    bases: Mapping[str, BaseLayer | None],
    scale: Callable[[dict[str, Any]], float],
    problems: list[str],
) -> LayerAdapter | None:
    """One layer's adapter with tensors in our shapes."""
    variant = "dora" if config.get("use_dora") else "lora"
    wanted = ("lora_A", "lora_B", "lora_magnitude")[: 3 if variant == "dora" else 2]
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    problems += [f"{path!r}: {_OTHER_SUFFIXES[name]} is missing" for name in missing]
    problems += [f"{path!r}: {_OTHER_SUFFIXES[name]} is there, but use_dora is not set" for name in extra]
    base = bases.get(path)
    if missing or extra:
        return None
    flat = [name for name in ("lora_A", "lora_B") if found[name].ndim < 2]
    if flat:
        shapes = [f"{_OTHER_SUFFIXES[name]} has shape {tuple(found[name].shape)}" for name in flat]
        problems.append(f"{path!r}: {' and '.join(shapes)}, expected two dimensions or more")
        return None
    r = found["lora_A"].shape[0]
    alpha = _first_match(config.get("alpha_pattern"), path, config["lora_alpha"])
    stated = _first_match(config.get("rank_pattern"), path, config["r"])
    if stated != r:
        problems.append(f"{path!r}: rank {r} in the file, {stated} in the config")
        return None
    scaling = "rslora" if config.get("use_rslora") else "standard"
    settings = {"r": r, "alpha": alpha, "scaling": scaling, "variant": variant, "dropout": config["lora_dropout"]}
    try:
        factor = scale(settings)
    except (TypeError, ValueError, OverflowError) as error:
        problems.append(f"{path!r}: {error}")
        return None
    if base is None:
        # the reader of the file reports modules that are not there or cannot be adapted
        return LayerAdapter(BaseLayer("", "", ()), settings, factor, found)
    if "max_norm" in base.facts:
        problems.append(f"{path!r}: PEFT adds the update of an embedding after applying max_norm, this library before")
        return None
    layer = LayerAdapter(base, settings, factor, found)
    return layer if len(base.shape) == 2 else _from_peft_conv(path, layer, problems)


def _from_peft_conv(path: str, layer: LayerAdapter, problems: list[str]) -> LayerAdapter | None:
    shape, groups = layer.base.shape, layer.base.facts.get("groups", 1)
    A, B, r = layer.tensors["lora_A"], layer.tensors["lora_B"], layer.settings["r"]
    expected = {
        "lora_A.weight": (A, (r, shape[1] * groups, *shape[2:])),
        "lora_B.weight": (B, (shape[0], r // groups, *[1] * (len(shape) - 2))),
    }
    if "lora_magnitude" in layer.tensors:
        pointwise = [1] * (len(shape) - 2)
        expected["lora_magnitude_vector"] = (layer.tensors["lora_magnitude"], (1, shape[0], *pointwise))
    wrong = [
        f"{path!r}: {name} has shape {tuple(tensor.shape)}, expected {size}"
        for name, (tensor, size) in expected.items()
        if tuple(tensor.shape) != size
    ]
    if wrong or r % groups:
        problems += wrong or [f"{path!r}: rank {r} is not a multiple of its {groups} groups"]
        return None
    settings = layer.settings
    rows, B = A.flatten(1), B.flatten(1)
    if groups > 1:
        blocks = A.reshape(groups, r // groups, groups, -1)  # (block of rows, row, group of channels, channel)
        own = torch.stack([blocks[group, :, group] for group in range(groups)])
        if torch.count_nonzero(blocks) != torch.count_nonzero(own):
            problems.append(f"{path!r}: the adapter mixes the channels of groups, which a grouped weight cannot hold")
            return None
        if all(torch.equal(block, own[0]) for block in own):
            rows = own[0]
        else:
            # our groups share one A: it holds the rows of all groups, and B picks each group's own
            rows, small = own.flatten(0, 1), B.reshape(groups, -1, r // groups)
            B = torch.block_diag(*small)
        settings = settings | {"r": len(rows), "alpha": layer.scale * len(rows), "scaling": "standard"}
    tensors = {"lora_A": rows.contiguous(), "lora_B": B.contiguous()}
    if "lora_magnitude" in layer.tensors:
        tensors["lora_magnitude"] = layer.tensors["lora_magnitude"].flatten()
    return LayerAdapter(layer.base, settings, layer.scale, tensors)


def _first_match(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule: the first key, in the file's order, that matches the end of the name at a dot."""
    return next((value for key, value in (pattern or {}).items() if _matches(key, path)), default)


def _matches(key: str, path: str) -> bool:
    return re.match(_pattern(key), path) is not None


def _pattern(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _warn_of_ambiguous_patterns(config: dict[str, Any], adapter: Adapter) -> None:
    pattern = config.get("alpha_pattern") or {}
    ambiguous = [
        path for path in adapter.layers if len({value for key, value in pattern.items() if _matches(key, path)}) > 1
    ]
    if ambiguous:
        warnings.warn(
            f"alpha_pattern gives several values for {', '.join(map(repr, ambiguous))}; the first key counts, but PEFT "
            "sorts the keys when it saves, so the order in this file may not be the one the adapter was trained with; "
            "check their scale",
            stacklevel=2,
        )

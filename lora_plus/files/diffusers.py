"""The format of diffusers: one safetensors file for the components of a pipeline, such as ``unet.``.

Tensors are named ``<module>.lora_A.weight`` and ``<module>.lora_B.weight``, as in PEFT without its prefix, or in older
files ``<module>.lora.down.weight`` and ``<module>.lora.up.weight``, where a module is called by its component, if that
is stated, and its name there. The scale is alpha / r. The header's metadata ``lora_adapter_metadata`` is a JSON object
with PEFT's config of each component, under keys such as ``unet.lora_alpha``; in files without it there may be tensors
``<module>.alpha``, one number each; where there is neither, alpha = r. Source: ``loaders/lora_base.py``,
``loaders/peft.py`` and ``utils/state_dict_utils.py`` of diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .formats import FORMATS, Contents, Files, Format
from .json_text import parsed
from .outline import outline_named_by, outline_of
from .pairs import Dialect, Pair, assemble, find_pairs, format_problems
from .peft import folder as peft
from .peft.config import checked_config, settings_of
from .peft.names import PREFIX
from .saved_adapter import SavedAdapter
from .target import Target

KEY = "lora_adapter_metadata"

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

DIALECT = Dialect(
    "diffusers",
    (
        ("lora_A.weight", "lora_B.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ),
    "lora_magnitude_vector",
    ".",
    {component: (component,) for component in COMPONENTS},
)

_ATTENTION = {
    **{f".processor.to_{name}_lora.": f".to_{name}.lora." for name in "qkv"},
    ".processor.to_out_lora.": ".to_out.0.lora.",
    **{f".self_attn.to_{name}_lora.": f".self_attn.{name}_proj.lora." for name in "qkv"},
    ".self_attn.to_out_lora.": ".self_attn.out_proj.lora.",
}
"""How the oldest files call the adapters of attention layers, in a U-Net and in a text encoder, and what they mean."""


def recognises(file: Contents) -> bool:
    """Whether a file is in this format; the tensors of a PEFT folder are not."""
    return not any(name.startswith(PREFIX) for name in file.tensors) and any(
        DIALECT.names(_spelled_out(name)) for name in file.tensors
    )


def read(files: Files, target: Target, problems: list[str]) -> SavedAdapter:
    """The adapter that a file describes."""
    tensors, metadata = files[""]
    spelled = {name: _spelled_out(name) for name in tensors}
    problems += [
        f"tensor {name!r}: {usual!r} is there too, which is another name of it"
        for name, usual in spelled.items()
        if name != usual and usual in tensors
    ]
    pairs = find_pairs({spelled[name]: tensor for name, tensor in tensors.items()}, DIALECT, problems)
    configs = _configs(metadata, problems)

    def settings(module: str, pair: Pair) -> dict[str, Any] | None:
        component = DIALECT.component(module)
        config = configs.get(component)
        if config is None:
            return pair.settings()
        dora = "lora_magnitude" in pair.tensors
        said = settings_of(module.removeprefix(f"{component}."), config)
        wrong = {
            f"rank {pair.r} in the file, {said['r']} in its metadata": said["r"] != pair.r,
            "alpha is there, and the file has its settings in its metadata": pair.alpha is not None,
            "lora_magnitude_vector is missing": said["variant"] == "dora" and not dora,
            "lora_magnitude_vector is there, but use_dora is not set": said["variant"] != "dora" and dora,
        }
        lines = [f"{module!r}: {line}" for line, is_so in wrong.items() if is_so]
        problems.extend(lines)
        return None if lines else said

    return assemble(pairs, DIALECT, settings, target, problems)


def _spelled_out(name: str) -> str:
    for old, new in _ATTENTION.items():
        name = name.replace(old, new)
    return name


def _configs(metadata: Mapping[str, str], problems: list[str]) -> dict[str, dict[str, Any]]:
    """PEFT's config of each component that the metadata has one of; the empty name is that of a file without any."""
    if KEY not in metadata:
        return {}
    try:
        document = parsed(metadata[KEY])
    except ValueError as error:
        problems.append(f"metadata {KEY!r} is not valid JSON: {error}")
        return {}
    if not isinstance(document, dict):
        problems.append(f"metadata {KEY!r} must be a JSON object, got {type(document).__name__}")
        return {}
    found: dict[str, dict[str, Any]] = {}
    for key, value in document.items():
        component = DIALECT.component(key)
        found.setdefault(component, {"peft_type": "LORA"})[key.removeprefix(f"{component}.")] = value
    where = f"metadata {KEY!r}"
    checked = {name: checked_config(config, problems, where) for name, config in found.items()}
    return {name: config for name, config in checked.items() if config is not None}


def write(adapter: SavedAdapter, target: Target, problems: list[str]) -> Files:
    """The file; equal adapters give equal files."""
    wrong = format_problems(adapter, DIALECT)
    parts: dict[str, SavedAdapter] = {}
    for name, layer in adapter.layers.items():
        component = DIALECT.component(name)
        parts.setdefault(component, SavedAdapter({}, {})).layers[name.removeprefix(f"{component}.")] = layer
    if len(parts) > 1 and "" in parts:
        wrong += [f"{name!r} is in none of {COMPONENTS}, and others are" for name in parts[""].layers]
    tensors: dict[str, Tensor] = {}
    document: dict[str, Any] = {}
    for component, part in () if wrong else parts.items():
        start = f"{component}." if component else ""
        lines: list[str] = []
        own, config = peft.contents(part, outline_of(target, component) or outline_named_by(part), lines)
        wrong += [f"{component or 'the model'}: {line}" for line in lines]
        tensors |= {start + name.removeprefix(PREFIX): tensor for name, tensor in own.items()}
        document |= {start + key: value for key, value in config.items()}
    problems += wrong
    return {"": Contents(tensors, {KEY: json.dumps(document, sort_keys=True, allow_nan=False)})}


FORMATS["diffusers"] = Format(
    "diffusers' format",
    "one file of diffusers, `unet....lora_A.weight`; the older `lora.down.weight` is read too",
    read,
    write,
    recognises,
)

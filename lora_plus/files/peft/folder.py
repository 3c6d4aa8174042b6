"""What is in PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, from an adapter and back to one.

As peft 0.21 has it; `files.save` and `files.read` do the writing and reading. Of the config, only what decides the
result is written; module names are written in full, and pattern keys are anchored, so that nothing depends on their
order. PEFT adapts whole linear layers, embeddings and convolutions, attention modules as one, and parameters, the
latter while the module that has them is called.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_plus.errors import warn_user
from lora_plus.files.checks import without_values
from lora_plus.files.formats import FORMATS, Contents, Files, Format
from lora_plus.files.outline import Outline, outline_named_by, outline_of, readers_in, ties_in
from lora_plus.files.saved_adapter import SavedAdapter, alpha_under, most_common
from lora_plus.files.target import ModelTarget, Target
from lora_plus.files.tied import joined, spread
from lora_plus.files.token_rows import is_rows
from lora_plus.text import endings

from . import parts
from .biases import SETTINGS, key_of, setting_of, trained_parameters
from .config import CONFIG, USER_FIELDS, checked_config
from .limits import format_problems, tied_to_others, units
from .names import PREFIX, moved, wrappers
from .reader import DOUBLED, Reader
from .renaming import FolderTarget, in_file_names, parameters_of, without_left_out
from .shapes import implied_target
from .stacked import with_stacks
from .tensors import attention_to_peft, join_rows, layer_to_peft, parameter_to_peft
from .token_rows import FIELD, is_rows_key, rows_from_peft, rows_problems, rows_to_peft

WEIGHTS = "adapter_model.safetensors"


def read(files: Files, target: Target, problems: list[str]) -> SavedAdapter:
    """The adapter that a folder describes, under its own names."""
    tensors, config = _checked_tensors(files[WEIGHTS].tensors, problems), files[CONFIG]
    if target.rename.given:
        tensors, config = without_left_out(tensors, config, target.rename)
    checked = checked_config(config, problems, biases=SETTINGS)
    if checked is None:
        return SavedAdapter({}, {})
    tied = bool(checked.get("ensure_weight_tying"))
    repeats = _repeats(tensors, checked, target) if tied else set[str]()
    tensors = {key: tensor for key, tensor in tensors.items() if key not in repeats} if repeats else tensors
    outline = outline_of(target)
    rows = {key: tensor for key, tensor in tensors.items() if is_rows_key(key)}
    others = {key: tensor for key, tensor in tensors.items() if key not in rows}
    if outline is None:
        known = implied_target(target, others, checked, problems)
    elif target.rename.given:
        known = in_file_names(target, outline, tensors)
    else:
        known = FolderTarget(outline, target.base, target.repeats, readers_in(target), parameters_of(target))
    known = with_stacks(known, others) if checked.get("target_parameters") else known
    if problems:
        return SavedAdapter({}, {})
    adapter = Reader(checked, known, problems).read(others)
    if tied and not problems:
        adapter = _tied_again(adapter, target)
    told = parts.read(files[WEIGHTS].metadata, problems)
    if not problems:
        adapter, told = (parts.taken_apart(adapter, told), told) if told else parts.of_model(adapter, target)
        adapter = parts.narrowed(adapter, told)
    if rows or checked.get(FIELD):
        adapter.layers |= rows_from_peft(rows, checked, known, target, problems)
    trained = [target.rename(path) or "" for path, held in adapter.trained.items() if "" not in held]
    problems += [
        f"{name!r} is trained in full and tied to {other!r}, which PEFT unties; untie them in the model first"
        for name, other in (tied_to_others(ties_in(target), trained) if trained else ())
        if f"{PREFIX}{other}" not in repeats
    ]
    return adapter


def _repeats(tensors: Mapping[str, Tensor], config: Mapping[str, Any], target: Target) -> set[str]:
    """The tensors that PEFT saves once more, of what is tied to a module that is trained in full."""
    saved = tuple(config.get("modules_to_save") or ())
    repeats = set[str]()
    for names in ties_in(target) if saved else ():
        keys = {name.rpartition(".")[0].endswith(saved): f"{PREFIX}{name}" for name in names}
        first, other = (tensors.get(keys.get(whether, "")) for whether in (True, False))
        if first is not None and other is not None and first.dtype == other.dtype and torch.equal(first, other):
            repeats.add(keys[False])
    return repeats


def _tied_again(adapter: SavedAdapter, target: Target) -> SavedAdapter:
    """The adapter with one A and B where PEFT kept those of an embedding and of its head alike."""
    kinds = {name: layer.base.kind for name, layer in adapter.layers.items()}
    embeddings = [name for name, kind in kinds.items() if kind == "Embedding"]
    heads = [name for name, kind in kinds.items() if kind in ("Linear", "") and name.rpartition(".")[2] == "lm_head"]
    ties = {frozenset(each) for names in ties_in(target) for each in itertools.combinations(names, 2)}
    pairs = [(name, head) for name in embeddings for head in heads]
    if isinstance(target, ModelTarget):
        weights = {name: f"{target.rename(name)}.weight" for name in (*embeddings, *heads)}
        pairs = [(name, head) for name, head in pairs if {weights[name], weights[head]} in ties]
    adapter, differing = joined(adapter, pairs)
    if (embeddings or heads) and (not pairs or differing):  # else what is tied are modules trained in full, or rows
        what = f"{' and '.join(differing)} differ in it" if differing else "no such layers are tied here"
        warn_user(
            f"{CONFIG} says ensure_weight_tying, which gives an embedding and its head one A and B, but {what}; each "
            "adapted layer gets an adapter of its own"
        )
    return adapter


def _checked_tensors(tensors: Any, problems: list[str]) -> Mapping[str, Tensor]:
    """The dense tensors among these, which can be anything where they come from memory."""
    if not isinstance(tensors, Mapping):
        problems.append(f"the tensors must be a mapping from names to tensors, got {type(tensors).__name__}")
        return {}
    told = {
        name: without_values(tensor) or ("" if isinstance(name, str) else "is no name")
        for name, tensor in tensors.items()
    }
    problems += [f"{name!r} {why}" for name, why in told.items() if why]
    return {name: tensor for name, tensor in tensors.items() if not told[name]}


def write(adapter: SavedAdapter, target: Target, problems: list[str]) -> Files:
    """The files of a folder."""
    twice = _tied_by_peft(adapter, target) if adapter.trained else {}
    ties = [names for names in ties_in(target) if twice.keys().isdisjoint(names)] if adapter.trained else []
    outline = outline_of(target) or outline_named_by(adapter)
    problems += rows_problems(adapter, outline, target)
    named, indices = ({}, {}) if problems else rows_to_peft(adapter)
    about, mapping = _base_model(target)
    layers = {name: layer for name, layer in adapter.layers.items() if not is_rows(layer)}
    plain = replace(adapter, layers=layers, metadata=about | adapter.metadata)
    tensors, config = contents(plain, outline, problems, ties) if plain.layers else ({}, {})
    if config and twice:
        tensors |= {f"{PREFIX}{other}": tensors[f"{PREFIX}{name}"].clone() for other, name in twice.items()}
        config["ensure_weight_tying"] = True
    if config and not config["task_type"]:
        config |= mapping
    tensors, config = {**tensors, **named}, {**config, **indices}
    told = {} if problems else parts.written(units(spread(plain)))
    return {WEIGHTS: Contents(tensors, {"format": "pt", **told}), CONFIG: config}


def _tied_by_peft(adapter: SavedAdapter, target: Target) -> dict[str, str]:
    """By their names, the weights that PEFT ties to those of modules trained in full, which have the other names.

    It looks for them in models of Transformers, and saves both.
    """
    model = target.modules.get("") if isinstance(target, ModelTarget) else None
    found: dict[str, str] = {}
    for names in ties_in(target) if getattr(model, "_tied_weights_keys", None) else ():
        owners = {name.rpartition(".")[0]: name for name in names}
        inside = [owner for owner in owners if [*adapter.trained.get(owner, ())] == ["weight"]]
        if len(inside) == 1 and sorted(owner.rpartition(".")[2] for owner in owners) == ["embed_tokens", "lm_head"]:
            name = owners.pop(inside[0])
            found[next(iter(owners.values()))] = name
    return found


def _base_model(target: Target) -> tuple[dict[str, str], dict[str, Any]]:
    """By what PEFT's ``AutoPeftModel`` classes build the base model: its name, and its class unless a task says it."""
    model = target.modules.get("") if isinstance(target, ModelTarget) else None
    name = getattr(model, "name_or_path", None)
    about = {"base_model_name_or_path": name} if name and isinstance(name, str) else {}
    for cls in type(model).__mro__:
        # classes made on the fly, by us or by fully_shard, cannot be imported
        known = getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls
        if known and hasattr(cls, "from_pretrained"):
            return about, {"auto_mapping": {"base_model_class": cls.__name__, "parent_library": cls.__module__}}
    return about, {}


def contents(
    adapter: SavedAdapter, outline: Outline, problems: list[str], ties: list[list[str]] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config of a folder; what PEFT's format cannot express exactly is added to the problems."""
    found = units(adapter)
    wrong = format_problems(adapter, found, outline, ties or [])
    bias = setting_of(adapter, found, outline, wrong)
    if wrong:
        problems += wrong
        return {}, {}
    tied = any("tied" in layer.base.facts for layer in adapter.layers.values())
    adapter = spread(adapter)
    found = units(adapter)
    modules = {name: layer_to_peft(join_rows(list(layers.values()))) for name, layers in found.modules.items()}
    modules |= {name: attention_to_peft(list(parts.values())) for name, parts in found.attentions.items()}
    parameters = {
        name: parameter_to_peft(join_rows(list(layers.values())), name.rpartition(".")[0] in outline.transposed)
        for name, layers in found.parameters.items()
    }
    layers = dict(sorted({**modules, **parameters}.items()))
    rslora = all(layer.spec.scaling == "rslora" for layer in layers.values())
    scaling = "rslora" if rslora else "standard"
    ranks = {name: layer.spec.r for name, layer in layers.items()}
    alphas = {name: alpha_under(layer, scaling) for name, layer in layers.items()}
    # PEFT says of a pattern that only a parameter matches that nothing does, so it is parameters that need none
    usual = parameters or layers
    r, alpha = (most_common([values[name] for name in layers if name in usual]) for values in (ranks, alphas))
    targets = sorted(modules)
    others = (ending for name in outline.names if name not in modules for ending in endings(name))
    accidents = not outline.whole or any(ending in modules for ending in others)
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        # PEFT also adapts modules whose name ends in a listed one; a regular expression matches whole names only
        "target_modules": "|".join(map(re.escape, targets)) if accidents else targets,
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "modules_to_save": sorted(adapter.trained.keys() - trained_parameters(adapter)) or None,
        "lora_dropout": max(layer.spec.dropout for layer in layers.values()),  # attention has none in PEFT
        "use_rslora": rslora,
        "use_dora": any(layer.spec.variant == "dora" for layer in layers.values()),
        "fan_in_fan_out": found.transposed and not found.attentions,  # as PEFT comes to the first layer
        "init_lora_weights": True,
        "bias": bias,
        "inference_mode": True,
        # fields that older releases of PEFT do not know, and warn of even where they say nothing
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        **({"ensure_weight_tying": True} if tied else {}),
        **{name: adapter.metadata.get(name) for name in USER_FIELDS},
    }
    wrapped, owners = wrappers(parameters, outline)
    paths = {name: path for path, name in wrapped.items()} | {name: moved(name, owners) for name in modules}
    tensors = {
        f"{PREFIX}{paths[name]}.{end}": tensor
        for name, layer in layers.items()
        for end, tensor in layer.tensors.items()
    }
    for path, trained in adapter.trained.items():
        tensors |= {
            f"{PREFIX}{path}.{name}" if name else f"{PREFIX}{key_of(path, found)}": tensor
            for name, tensor in trained.items()
        }
    own = {name: part.base.facts for group in found.attentions.values() for name, part in group.items()}
    doubled = [name for name, facts in own.items() if "rows" not in facts]
    if doubled:
        warn_user(
            f"the file says W + s B A of {', '.join(map(repr, sorted(doubled)))}, but {DOUBLED}; to compute the same "
            "there, halve their lora_B after loading"
        )
    return tensors, config


FORMATS["peft"] = Format(
    "PEFT's format",
    f"a folder in PEFT's format: `{CONFIG}` and `{WEIGHTS}`",
    read,
    write,
    metadata=USER_FIELDS,
    folder=(WEIGHTS, CONFIG),
)

"""What a folder says beside PEFT's config: the parts that one of PEFT's adapters was put together from.

PEFT has one adapter for a whole layer, and one rank for an attention module, so that the adapters of some rows stand in
blocks of a wider one. The metadata of the tensors' file, which PEFT does not read, has an entry for each part::

    {"c_attn.q": {"of": "c_attn", "rows": [0, 16], "r": 2, "at": 0}, ...}

``at`` is the first row of A and column of B. Parts are taken out only where the tensors have nothing beside them, so a
file whose tensors were changed is read as the whole that it is. ``start`` is as in the native format.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_plus.files.json_text import parsed
from lora_plus.files.saved_adapter import SavedAdapter, SavedLayer
from lora_plus.files.starts import START
from lora_plus.files.target import ModelTarget, Target
from lora_plus.layers.kinds import DTYPES
from lora_plus.model.places import adapted_places
from lora_plus.tensors.variant import SUBTRACTED

from .limits import Units
from .tensors import ATTENTION, offsets

KEY = "lora_plus_parts"

Parts = dict[str, dict[str, Any]]


def written(found: Units) -> dict[str, str]:
    """The metadata of a file with these units; none where each is as PEFT has it."""
    told: Parts = {}
    for unit, layers in (*found.modules.items(), *found.attentions.items()):
        blocks = {name: layer for name, layer in layers.items() if "rows" in layer.base.facts}
        others = {name: layer for name, layer in layers.items() if name not in blocks}
        entries = dict(zip(blocks, offsets(list(blocks.values())), strict=True)) | dict.fromkeys(others, 0)
        for name, first in entries.items():
            facts = layers[name].base.facts
            if blocks or unit in found.attentions or START in facts:
                own = {fact: facts[fact] for fact in ("rows", START) if fact in facts}
                told[name] = {"of": unit, "r": layers[name].spec.r, "at": first, **own}
    return {KEY: json.dumps(told, sort_keys=True, separators=(",", ":"))} if told else {}


def read(metadata: Mapping[str, str], problems: list[str]) -> Parts:
    """The parts by their names."""
    try:
        told = parsed(metadata.get(KEY, "{}"))
    except ValueError as error:
        problems.append(f"metadata {KEY!r} is not valid JSON: {error}")
        return {}
    valid = isinstance(told, dict) and all(map(_is_entry, told.values()))
    if not valid:
        problems.append(f"metadata {KEY!r} does not say of, r and at of each part")
    return told if valid else {}


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("of"), str):
        return False
    rows = entry.get("rows", [0, 1])
    if not (isinstance(rows, list) and [*map(type, rows)] == [int, int] and 0 <= rows[0] < rows[1]):
        return False
    return type(entry.get("r")) is int and entry["r"] > 0 and type(entry.get("at")) is int and entry["at"] >= 0


def taken_apart(adapter: SavedAdapter, told: Parts) -> SavedAdapter:
    """The adapter with the parts that it was put together from, where its tensors are those of such parts."""
    layers = dict(adapter.layers)
    by_unit: dict[str, Parts] = {}
    for name, entry in told.items():
        by_unit.setdefault(entry["of"], {})[name] = entry
    for unit, parts in by_unit.items():
        if unit in layers:  # a linear layer, of rows or with a start
            rows = {name: entry for name, entry in parts.items() if "rows" in entry}
            apart = _rows(unit, layers[unit], rows) if rows else None
            if apart is not None and layers.keys().isdisjoint(apart):
                del layers[unit]
                layers |= apart
        else:
            layers |= _attention(unit, layers, parts)
        for name, entry in parts.items():
            if START in entry and name in layers and layers[name].spec.r == entry["r"]:
                base = layers[name].base
                layers[name] = replace(layers[name], base=replace(base, facts={**base.facts, START: entry[START]}))
    return replace(adapter, layers=dict(sorted((name, layer) for name, layer in layers.items() if layer is not None)))


def of_model(adapter: SavedAdapter, target: Target) -> tuple[SavedAdapter, Parts]:
    """The adapter with the parts that one of a model's own adapters has, and what is told of these then.

    A config and tensors in memory have no place for a note. Where rows of a linear layer have adapters in the model,
    the whole layer can have none; of attention, parts without an update are left out beside others that have one.
    """
    by_adapter: dict[str, Parts] = {}
    held = list(adapted_places(target.named)) if isinstance(target, ModelTarget) and not target.rename.given else []
    parts = [(place, own, place.base().facts) for place, own in held if place.rows is not None or place.of is not None]
    for place, own, facts in sorted(parts, key=lambda part: part[2].get("rows", [math.inf])):
        unit, _, parameter = facts.get("parameter", "").rpartition(".")
        if facts.get("of") == ATTENTION:
            unit = unit.removesuffix("out_proj").removesuffix(".") if parameter == "weight" else unit
            inside = [layer for name, layer in adapter.layers.items() if name.startswith(f"{unit}.")]
            if not any(torch.count_nonzero(layer.tensors["lora_B"]) for layer in inside if layer.base.facts.get("of")):
                continue
        elif "rows" not in facts:
            continue
        told = by_adapter.setdefault(own.name, {})
        first = sum(entry["r"] for entry in told.values() if entry["of"] == unit) if "rows" in facts else 0
        r = own.spec.r * (2 if SUBTRACTED[0] in own.tensors() else 1)
        told[place.name] = {"of": unit, "r": r, "at": first, **({"rows": facts["rows"]} if "rows" in facts else {})}
    for told in by_adapter.values():
        apart = taken_apart(adapter, told)
        if apart.layers.keys() != adapter.layers.keys():
            return apart, told
    return adapter, {}


def narrowed(adapter: SavedAdapter, told: Parts) -> SavedAdapter:
    """The adapter with parts of attention that nothing is told of at the rank of the columns that their B uses.

    That is so where these are the same for two parts of a weight, or have none in common: where each part has a block.
    A part without any had no adapter then.
    """
    layers = dict(adapter.layers)
    weights: dict[str, dict[str, Tensor]] = {}
    for name, layer in adapter.layers.items():
        if layer.base.facts.get("of") == ATTENTION and name not in told:
            weights.setdefault(layer.base.weight_name(name), {})[name] = layer.tensors["lora_B"].any(dim=0)
    for parts in weights.values():
        blocks = [used for used in parts.values() if used.any()]
        apart = all(torch.equal(one, two) or not (one & two).any() for one, two in itertools.combinations(blocks, 2))
        for name, used in parts.items() if apart and not all(block.all() for block in blocks) else ():
            layer = layers.pop(name)
            if used.any():
                A, B = layer.factors()
                spec = layer.spec.at_rank(int(used.sum()))
                layers[name] = SavedLayer(layer.base, spec, {"lora_A": A[used], "lora_B": B[:, used]})
    return replace(adapter, layers=dict(sorted(layers.items())))


def _rows(unit: str, layer: SavedLayer, parts: Parts) -> dict[str, SavedLayer] | None:
    """The adapters of rows of a linear layer; None if there is more to it than these."""
    if layer.tensors.keys() != {"lora_A", "lora_B"} or not all(name.startswith(f"{unit}.") for name in parts):
        return None
    if layer.tensors["lora_B"].dtype not in DTYPES:  # which whoever takes the adapter refuses
        return None
    rest, found = layer.tensors["lora_B"].clone(), {}
    for name, entry in parts.items():
        rows, own = slice(*entry["rows"]), _cut(layer, entry, entry["rows"])
        if own is None or entry["rows"][1] > len(rest):
            return None
        rest[rows, entry["at"] : entry["at"] + entry["r"]] = 0
        facts = {**layer.base.facts, "parameter": f"{unit}.weight", "rows": entry["rows"]}
        found[name] = replace(own, base=replace(layer.base, facts=facts))
    return None if torch.count_nonzero(rest) else found


def _attention(unit: str, layers: Mapping[str, SavedLayer], parts: Parts) -> dict[str, Any]:
    """The parts of an attention module with their own ranks; None for one that it did not have."""
    there = {
        name: layer for name, layer in layers.items() if name.startswith(f"{unit}.") and layer.base.facts.get("of")
    }
    found: dict[str, Any] = {}
    for name, layer in there.items():
        B = layer.tensors["lora_B"]
        own = _cut(layer, parts[name]) if name in parts else None
        if own is None and (name in parts or torch.count_nonzero(B)):
            return {}
        if own is not None and torch.count_nonzero(own.tensors["lora_B"]) != torch.count_nonzero(B):
            return {}
        found[name] = own
    return found


def _cut(layer: SavedLayer, entry: Mapping[str, Any], rows: list[int] | None = None) -> SavedLayer | None:
    """The adapter of a part; None if the rank of the whole is less."""
    first, r = entry["at"], entry["r"]
    if first + r > layer.spec.r:
        return None
    B: Tensor = layer.tensors["lora_B"] if rows is None else layer.tensors["lora_B"][slice(*rows)]
    tensors = {"lora_A": layer.tensors["lora_A"][first : first + r].clone(), "lora_B": B[:, first : first + r].clone()}
    return SavedLayer(layer.base, layer.spec.at_rank(r), tensors)

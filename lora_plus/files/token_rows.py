"""Rows of tokens in files: what is wrong with those that a file describes, and which layers of an adapter they are."""

from __future__ import annotations

from typing import Any

from lora_plus.layers.base_layer import BaseLayer
from lora_plus.layers.kinds import kinds_by_name
from lora_plus.tensors.token_rows import VARIANT_OF
from lora_plus.tensors.variant import VARIANTS

from .checks import FACTS, SETTINGS_CHECKS
from .saved_adapter import SavedAdapter, SavedLayer

_KINDS = ("Embedding", "Linear")


def is_rows(layer: SavedLayer) -> bool:
    """Whether a layer has rows of tokens, and no A and B."""
    return not VARIANTS[layer.spec.variant].factors


def row_layers(adapter: SavedAdapter) -> list[str]:
    """The names of the layers that have rows of tokens."""
    return [name for name, layer in adapter.layers.items() if not VARIANTS[layer.spec.variant].factors]


def rows_problem(layer: SavedLayer) -> str | None:
    """What is wrong with the settings of rows of tokens, or with ids where there are none; None if nothing is."""
    spec, ids = layer.spec, layer.base.facts.get("ids")
    if VARIANTS[spec.variant].factors:
        return None if ids is None else f"it has ids, which an adapter of the variant {spec.variant!r} has not"
    if ids is None or "rows" in layer.base.facts or VARIANT_OF.get(layer.base.layout) != spec.variant:
        return f"variant {spec.variant!r} is for ids of a whole {' or '.join(_KINDS)}"
    if spec.r != len(ids) or spec.scale != 1 or spec.dropout:
        return (
            f"{len(ids)} ids have r {len(ids)}, scale 1 and no dropout, got {spec.r}, {spec.scale:g}, {spec.dropout:g}"
        )
    return None


def _are_ids(base: BaseLayer, ids: Any) -> bool:
    if base.kind not in _KINDS or not isinstance(ids, list) or {*map(type, ids)} != {int}:
        return False
    return len(set(ids)) == len(ids) and all(0 <= each < base.shape[0] for each in ids)


def _are_readers(base: BaseLayer, kinds: Any) -> bool:
    # none, where the format leaves it to the model which layers have the weight
    return isinstance(kinds, dict) and all(kind in [*kinds_by_name()] for kind in kinds.values())


FACTS |= {"ids": _are_ids, "tied": _are_readers}
SETTINGS_CHECKS.append(rows_problem)

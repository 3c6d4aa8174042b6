"""What every file format reads and writes: one adapter as plain data, without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_plus.layers.base import BaseLayer


@dataclass
class SavedLayer:
    """An adapter on one layer."""

    base: BaseLayer
    settings: dict[str, Any]
    """r, alpha, scaling, variant, dropout."""
    scale: float
    """The factor of B A that follows from the settings."""
    tensors: dict[str, Tensor]
    """``lora_A (r, in)``, ``lora_B (out, r)``, and ``lora_magnitude (out,)`` for DoRA; of a stack, one of each."""


@dataclass
class SavedAdapter:
    """An adapter on a whole model, by module name."""

    layers: dict[str, SavedLayer]
    trained: dict[str, dict[str, Tensor]]
    """Modules trained in full, each with its tensors by their name inside the module."""
    metadata: dict[str, str] = field(default_factory=dict)
    """What the user wrote beside it."""
    resolved: bool = False
    """Whether the names are those of what it is loaded into, not those of the file."""


def alpha_under(layer: SavedLayer, scaling: str) -> float:
    """The alpha that gives a layer's scale under a file's scaling rule, which is the layer's own or alpha / r."""
    alpha = float(
        layer.settings["alpha"] if layer.settings["scaling"] == scaling else layer.scale * layer.settings["r"]
    )
    return int(alpha) if alpha.is_integer() else alpha


def most_common(values: Sequence[Any]) -> Any:
    """The value that occurs most often, the first of them if there are several."""
    return Counter(values).most_common(1)[0][0]

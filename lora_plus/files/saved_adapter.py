"""What every file format reads and writes: one adapter as plain data, without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_plus.layers.adapter import whole_factors
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.tensors.variant import AdapterSpec

SETTINGS = ("r", "alpha", "scaling", "variant", "dropout")
"""What files say of an adapter besides its tensors."""


@dataclass
class SavedLayer:
    """An adapter on one layer."""

    base: BaseLayer
    """The kind of the layer, and how its weight is stored."""
    spec: AdapterSpec
    """The settings: r, alpha, scaling, variant and so on."""
    tensors: dict[str, Tensor]
    """``lora_A (r, in)``, ``lora_B (out, r)``, and ``lora_magnitude (out,)`` for DoRA; of a stack, one of each."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole update."""
        return whole_factors(self.tensors)


@dataclass
class SavedAdapter:
    """An adapter on a whole model, by module name."""

    layers: dict[str, SavedLayer]
    """Adapted layers, parameters and blocks of rows by their names."""
    trained: dict[str, dict[str, Tensor]]
    """Modules trained in full, each with its tensors by their names inside the module; parameters trained in full by
    their full names, each with one tensor, whose name is empty."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The user's metadata."""
    format: str = ""
    """The format of the file that it was read from; empty if it was not read from a file."""
    resolved: bool = False
    """Whether the names are those of the model or checkpoint that it is loaded into, not those of the file."""


def settings_of(spec: AdapterSpec) -> dict[str, Any]:
    """The settings of an adapter by their names."""
    return {name: getattr(spec, name) for name in SETTINGS}


def checked_spec(
    where: str, settings: Mapping[str, Any], problems: list[str], make: Callable[..., AdapterSpec] = AdapterSpec
) -> AdapterSpec | None:
    """An adapter's settings as a file states them; None if they are not valid, which is added to the problems."""
    try:
        return make(**settings)
    except (TypeError, ValueError, OverflowError) as error:
        problems.append(f"{where}: {error}")
        return None


def alpha_under(layer: SavedLayer, scaling: str) -> float:
    """The alpha that gives a layer's scale under a file's scaling rule, which is the layer's own or alpha / r."""
    spec = layer.spec
    alpha = float(spec.alpha if spec.scaling == scaling else spec.scale * spec.r)
    return int(alpha) if alpha.is_integer() else alpha


def most_common(values: Sequence[Any]) -> Any:
    """The value that occurs most often, the first of them if there are several."""
    return Counter(values).most_common(1)[0][0]

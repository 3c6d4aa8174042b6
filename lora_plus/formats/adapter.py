"""What every file format reads and writes: one adapter as plain data, without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_plus.text_table import printable

PARAMETER = "Parameter"
"""The kind of a parameter that is adapted on its own."""


@dataclass(frozen=True)
class BaseLayer:
    """What a file needs to know of the layer that an adapter belongs to."""

    kind: str
    """Class of the plain layer, e.g. ``"Linear"``, or ``"Parameter"``."""
    layout: str
    """einops pattern from the stored weight to its matrix view ``(out, in)``."""
    shape: tuple[int, ...]
    """Shape of the stored weight."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else decides what the adapter computes: ``groups``, ``max_norm``; for a parameter or a block of rows, the
    full name of the ``parameter`` and the ``rows``; ``of``, the class of the module that reads the parameter itself."""


@dataclass
class LayerAdapter:
    """An adapter on one layer."""

    base: BaseLayer
    settings: dict[str, Any]
    """r, alpha, scaling, variant, dropout."""
    scale: float
    """The factor of B A that follows from the settings."""
    tensors: dict[str, Tensor]
    """``lora_A (r, in)``, ``lora_B (out, r)``, and ``lora_magnitude (out,)`` for DoRA; of a stack, one of each."""


@dataclass
class Adapter:
    """An adapter on a whole model, by module name."""

    layers: dict[str, LayerAdapter]
    trained: dict[str, dict[str, Tensor]]
    """Modules trained in full, each with its tensors by their name inside the module."""
    metadata: dict[str, str] = field(default_factory=dict)
    """What the user wrote beside it."""
    resolved: bool = False
    """Whether the names are those of what it is loaded into, not those of the file."""


def alpha_under(layer: LayerAdapter, scaling: str) -> float:
    """The alpha that gives a layer's scale under a file's scaling rule, which is the layer's own or alpha / r."""
    alpha = float(
        layer.settings["alpha"] if layer.settings["scaling"] == scaling else layer.scale * layer.settings["r"]
    )
    return int(alpha) if alpha.is_integer() else alpha


def most_common(values: Sequence[Any]) -> Any:
    """The value that occurs most often, the first of them if there are several."""
    return Counter(values).most_common(1)[0][0]


def shortened(text: str, length: int) -> str:
    """A text that is at most so long; what is cut out of its middle is counted."""
    if len(text) <= length:
        return text
    note = f"... ({len(text) - length} characters) ..."
    kept = length // 2
    return f"{text[:kept]}{note}{text[len(text) - kept :]}"


class Problems(ValueError):
    """Everything that is wrong with one file, in one error."""

    SHOWN = 30
    LONGEST = 600
    """Characters of a line; a file can say a value of any length."""

    def __init__(self, where: object, problems: Sequence[str]) -> None:
        self.where, self.problems = where, list(problems)
        shown = [f"  {printable(shortened(line, self.LONGEST))}" for line in self.problems[: self.SHOWN]]
        if len(self.problems) > self.SHOWN:
            shown.append(f"  and {len(self.problems) - self.SHOWN} more")
        super().__init__(f"{where}:\n" + "\n".join(shown))

    def __reduce__(self) -> Any:  # one rank tells the others
        return type(self), (self.where, self.problems)

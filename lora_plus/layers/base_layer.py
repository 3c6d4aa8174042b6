"""`BaseLayer`: what a file says of the weight that an adapter belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora_plus.text import join


@dataclass(frozen=True)
class BaseLayer:
    """What a file stores about the layer of an adapter."""

    kind: str
    """Class of the plain layer, e.g. ``"Linear"``, or ``"Parameter"``."""
    layout: str
    """einops pattern from the stored weight to its matrix view ``(out, in)``."""
    shape: tuple[int, ...]
    """Shape of the stored weight."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Other settings that change the result: ``groups``, ``max_norm``; for a parameter or a block of rows, the full
    name of the ``parameter`` and the ``rows``; ``of``, the class of a module that reads its parameter itself."""

    @property
    def rows(self) -> tuple[int, int] | None:
        """The rows of the matrix view that the adapter is on, the first and the one after the last; None for all."""
        return tuple(self.facts["rows"]) if "rows" in self.facts else None

    def weight_name(self, name: str) -> str:
        """The full name of the weight, of a layer of this name."""
        weight: str = self.facts.get("parameter", join(name, "weight"))
        return weight


PARAMETER = "Parameter"
"""The kind of a parameter that is adapted on its own."""

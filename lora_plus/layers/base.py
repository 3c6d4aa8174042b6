"""What a file needs to know of an adapted weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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


PARAMETER = "Parameter"
"""The kind of a parameter that is adapted on its own."""

"""What the place of an adapter says of it that started from the weight, such as one of PiSSA."""

from __future__ import annotations

from dataclasses import replace

from lora_plus.layers.adapter import Adapter
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.tensors.variant import SUBTRACTED

from .places import Place


def with_start(place: Place, adapter: Adapter) -> Place:
    """The place, which tells files the r and the alpha of an adapter whose start is taken out of it."""
    if SUBTRACTED[0] not in adapter.modules or SUBTRACTED[0] not in adapter.tensors():
        return place
    base, start = place.base, {"r": adapter.spec.r, "alpha": adapter.spec.alpha}

    def told() -> BaseLayer:
        own = base()
        return replace(own, facts=own.facts | {"start": start})

    place.base = told  # type: ignore[method-assign]
    return place

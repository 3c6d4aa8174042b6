"""An adapter that a model has already, and that gets the values of a saved one in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lora_plus.layers.adapter import Adapter
from lora_plus.model.places import Place, adapted_places
from lora_plus.model.state import State
from lora_plus.tensors.matrix import accumulation_dtype
from lora_plus.tensors.variant import SUBTRACTED

from .saved_adapter import SavedAdapter, SavedLayer


@dataclass(frozen=True)
class Existing:
    """An adapter of a model."""

    state: State
    name: str
    exact: bool
    """Whether it takes values only as they are: of its own rank, scale, dropout and dtypes."""

    def by_place(self) -> dict[Any, tuple[Place, Adapter]]:
        """The adapter in each of its places, by the places' keys."""
        return {place.key: (place, each) for place, each in adapted_places(self.state.modules, self.name)}

    def differences(self, data: SavedAdapter, places: Mapping[str, Place]) -> Iterator[str]:
        """Why it cannot get the values of a saved adapter, whose layers belong into these places."""
        left = self.by_place()
        for name, place in places.items():
            if place.key not in left:
                yield f"{name!r} has no adapter {self.name!r} in the model"
                continue
            file, ours = self._compared(data.layers[name], left.pop(place.key)[1])
            for field in ours | file:
                if file.get(field) != ours.get(field):
                    yield f"{name!r}: {field} {file.get(field)!r} in the file, {ours.get(field)!r} in the model"
        yield from (f"{place.name!r} has no adapter in the file" for place, _ in left.values())
        trained = {path for path, _, _ in self.state.trained(self.name)}
        yield from (f"{path!r} is not trained in full in the file" for path in sorted(trained - data.trained.keys()))
        yield from (f"{path!r} is not trained in full in the model" for path in sorted(data.trained.keys() - trained))

    def _compared(self, layer: SavedLayer, own: Adapter) -> tuple[dict[str, Any], dict[str, Any]]:
        """What must be alike of a saved layer and the model's."""
        both = (layer.spec, layer.tensors), (own.spec, own.tensors())
        if self.exact:
            return tuple(  # type: ignore[return-value]
                asdict(spec) | {f"{part}.dtype": tensor.dtype for part, tensor in tensors.items()}
                for spec, tensors in both
            )
        return tuple(  # type: ignore[return-value]
            {"variant": spec.variant, "tensors": sorted(tensors), "r": max(spec.r, own.spec.r)}
            for spec, tensors in both
        )

    def values(self, data: SavedAdapter, places: Mapping[str, Place]) -> list[tuple[Tensor, Tensor]]:
        """Each tensor of it with its new values: of its rank and scale, so that the update is the saved one's."""
        there = self.by_place()
        pairs: list[tuple[Tensor, Tensor]] = []
        for name, layer in data.layers.items():
            own = there[places[name].key][1]
            factor = layer.spec.scale / own.spec.scale
            for part, held in own.tensors().items():
                values = saved = layer.tensors[part]
                if saved.shape != held.shape:
                    values = saved.new_zeros(held.shape)
                    values[tuple(map(slice, saved.shape))] = saved
                if factor != 1 and part in ("lora_B", SUBTRACTED[1]):
                    values = values.to(accumulation_dtype(values.dtype, held.dtype)) * factor
                pairs.append((held, values))
        return pairs

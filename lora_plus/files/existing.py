"""An adapter that a model has already, and that gets the values of a saved one in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from lora_plus.errors import Problems
from lora_plus.layers.adapter import Adapter
from lora_plus.model.places import Place, adapted_places
from lora_plus.model.state import State
from lora_plus.tensors.distributed import local
from lora_plus.tensors.matrix import accumulation_dtype
from lora_plus.tensors.variant import SUBTRACTED, AdapterSpec
from lora_plus.text import join

from .checks import is_finite
from .saved_adapter import SavedAdapter


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
            layer, (held, own) = data.layers[name], left.pop(place.key)
            file = self._settings(layer.spec, layer.tensors, own) | {"ids": [*place.ids]}
            ours = self._settings(own.spec, own.tensors(), own) | {"ids": [*held.ids]}
            for field in ours | file:
                if file.get(field) != ours.get(field):
                    yield f"{name!r}: {field} {file.get(field)!r} in the file, {ours.get(field)!r} in the model"
            if any(tensor.is_meta for tensor in own.tensors().values()):
                yield f"{name!r}: the model's adapter has no values (it is on the meta device)"
        yield from (f"{place.name!r} has no adapter in the file" for place, _ in left.values())
        trained = {head.unit.name for head in self.state.trained(self.name)}
        yield from (f"{path!r} is not trained in full in the file" for path in sorted(trained - data.trained.keys()))
        yield from (f"{path!r} is not trained in full in the model" for path in sorted(data.trained.keys() - trained))

    def _settings(self, spec: AdapterSpec, tensors: Mapping[str, Tensor], own: Adapter) -> dict[str, Any]:
        """What must be alike of a saved layer and the model's ``own``, of one of the two."""
        if self.exact:
            settings = {each.name: getattr(spec, each.name) for each in fields(spec) if each.compare}
            return settings | {f"{part}.dtype": tensor.dtype for part, tensor in tensors.items()}
        return {"variant": spec.variant, "tensors": sorted(tensors), "r": max(spec.r, own.spec.r)}

    def values(self, data: SavedAdapter, places: Mapping[str, Place]) -> list[tuple[Tensor, Tensor]]:
        """Each tensor of it with its new values: of its rank, scale and dtype, so that the update is the saved one's.

        Raises:
            ValueError: if a value that is finite in the file is not in the model's dtype.
        """
        there = self.by_place()
        pairs, lost = list[tuple[Tensor, Tensor]](), list[str]()
        own_memory = {_memory(held) for _, each in there.values() for held in each.tensors().values()}
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
                rounded = values.to(held.dtype, copy=_memory(values) in own_memory)
                if rounded is not saved and not is_finite(rounded):
                    lost.append(f"{join(name, part)!r} has values that are not finite in {held.dtype} at this scale")
                pairs.append((held, rounded.to(held.device)))  # which fails, if at all, before a value is written
        if lost:
            raise Problems("the adapter cannot be loaded; the model is unchanged", lost)
        return pairs


def _memory(tensor: Tensor) -> int:
    """Where the memory begins that a tensor lies in."""
    return local(tensor).untyped_storage().data_ptr()

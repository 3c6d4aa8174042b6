"""What was adapted in a model, as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lora_plus.layers.adapter import Adapter
from lora_plus.layers.layer import LoRALayer
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.text import aligned, join

from .state import State
from .tied import Ties
from .tree import sites_in
from .unsaved import unsaved


@dataclass(frozen=True)
class SummaryRow:
    """One adapter on one layer."""

    name: str
    """Name of the layer, parameter or block of rows in the model; the first one if it has several."""
    layer: str
    """The class of the layer without adapters, or ``"parameter"``."""
    adapter: str
    """The name of the adapter."""
    r: int
    """Rank."""
    alpha: float
    """Numerator of the scaling."""
    scale: float
    """The factor of B A."""
    parameters: int
    """Number of values of the adapter on this layer."""
    note: str
    """A remark, such as that the layer is merged; mostly empty."""


@dataclass(frozen=True)
class Summary:
    """The result of `lora_summary`. ``str()`` of it is a table."""

    rows: list[SummaryRow]
    """A row for each adapter on each layer."""
    trained: list[tuple[str, str, int]]
    """Modules and parameters trained in full: name, adapter, number of parameters."""
    trainable: int
    """Trainable parameters of the whole model, each counted once."""
    total: int
    """All parameters of the model, each counted once."""
    unsaved: list[tuple[str, int]]
    """Trainable parameters that are saved with no adapter: name and number of values."""

    def __str__(self) -> str:
        head = ("layer", "type", "adapter", "r", "alpha", "scale", "parameters", "note")
        cells = [head] + [
            (row.name or "(model)", row.layer, row.adapter, str(row.r), f"{row.alpha:g}", f"{row.scale:.4g}",
             f"{row.parameters:,}", row.note)
            for row in self.rows
        ]  # fmt: skip
        cells += [(name, "in full", adapter, "", "", "", f"{size:,}", "") for name, adapter, size in self.trained]
        cells += [(name, "trained, not saved", "", "", "", "", f"{size:,}", "") for name, size in self.unsaved]
        share = f"{self.trainable / self.total:.2%}" if self.total else "0%"
        return "\n".join([*aligned(cells), f"{self.trainable:,} of {self.total:,} parameters are trainable ({share})"])


def _with_followers(state: State) -> Iterator[tuple[str, Adapter, AdaptedWeight]]:
    """As `Tree.adapters`, and with those that follow the adapter of another layer."""
    for owner_name, weight, site in sites_in(state.modules):
        for adapter in site.lora_adapters.values():
            yield join(owner_name, site.lora_label), adapter, weight


def lora_summary(model: nn.Module) -> Summary:
    """A table of the adapted layers: ranks, scales, parameters (of whole tensors, if sharded), and notes."""
    state = State(model)
    rows, shape, ties = [], state.storage.shape, Ties(state)
    for path, adapter, weight in _with_followers(state):
        what = weight.base_class.__name__ if isinstance(weight, LoRALayer) else "parameter"
        shapes = {container: shape(tensor) for container, tensor in adapter.tensors().items()}
        size, spec = sum(math.prod(each) for each in shapes.values()) * adapter.held, adapter.spec
        merge, full_rank = weight.lora_merge, shapes.get("lora_A", (math.inf,))[-1]
        full_rank = min(full_rank, shapes.get("lora_B", (math.inf, math.inf))[-2])
        notes = {
            "has those of a layer with the same weight": not adapter.held,
            f"variant {spec.variant}": spec.variant != "lora",
            f"r exceeds the weight's full rank {full_rank}": spec.r > full_rank,
            **dict.fromkeys(ties.notes(adapter, weight), True),
            "inactive": adapter.name not in weight.active_names(),
            f"scale times {adapter.strength:g}": adapter.strength != 1,
            "merged": merge is not None and adapter.name in merge.adapters,
            f"rounding lost {merge.lost if merge else 0} of the update": merge is not None and merge.lost is not None,
        }
        note = "; ".join(note for note, holds in notes.items() if holds)
        rows.append(SummaryRow(path, what, adapter.name, spec.r, spec.alpha, spec.scale, size, note))
    trained = [
        (head.unit.name, str(head.adapter), sum(math.prod(shape(p)) for p in dict.fromkeys(head.parameters())))
        for head in state.trained()
    ]
    parameters = {id(parameter): parameter for parameter in state.parameters()}.values()
    trainable = sum(math.prod(shape(p)) for p in parameters if p.requires_grad)
    beside = [(name, math.prod(shape(parameter))) for name, parameter in unsaved(state).parameters.items()]
    return Summary(rows, trained, trainable, sum(math.prod(shape(p)) for p in parameters), beside)

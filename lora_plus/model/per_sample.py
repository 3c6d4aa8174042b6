"""Over a whole model: a different adapter for each sample of a batch.

Linear layers take two batched products: the factors of the adapters are stacked, the sample's own are gathered from
the stack (``benchmarks/results/2026-11-22.md`` has other ways). All other layers, and variants that are not sums,
compute the samples of one adapter after those of another. Where all samples have the same adapter, a layer computes
what it does with that one active.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_plus.layers.adapter import ActiveAdapter
from lora_plus.layers.layer import LoRALayer
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.tensors.distributed import is_dtensor
from lora_plus.tensors.matrix import accumulation_dtype
from lora_plus.tensors.variant import only_adds

from .state import Need, require
from .train_also import units_in

M = TypeVar("M", bound=nn.Module)


@contextmanager
def adapter_per_sample(model: M, adapters: Sequence[str | None]) -> Iterator[M]:
    """Inside a ``with`` block, compute each sample of a batch with its own adapter, or with none.

    Sample i is index i of the first dimension of each adapted layer's input and output. Its result is the same as alone
    with its adapter chosen by `set_adapter`, with gradients for the adapters that have ``requires_grad``. If its name
    is None, or a layer has no such adapter, the result is the base's, bit for bit. Adapters may differ in rank, variant
    and all other settings. Modules trained in full are those of the active adapter, for all samples.

    With activation checkpointing the backward pass must be inside the block, because it computes layers again. Values
    that engines write through ``.data`` are used from the next forward with gradients or the next block on.

    Examples:
        >>> from lora_plus import inject_lora
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("a", "b"):
        ...     _ = inject_lora(model, ["0"], r=2, adapter=name)
        >>> with adapter_per_sample(model, ["a", "b", None]):
        ...     y = model(torch.randn(3, 4))

    Args:
        model: a model with adapters.
        adapters: for each sample of the batch, the name of its adapter, or None for the base.

    Raises:
        TypeError: if ``adapters`` is not a list of names.
        KeyError: if the model holds no adapter of such a name.
        ValueError: if the list is empty, the model has no adapter, it is merged or disabled, or a whole batch shares an
            adapted parameter or a module trained in full. Inside the block: if a layer gets another number of samples,
            or adapters are chosen, added, deleted or merged.
    """
    if isinstance(adapters, str | None) or not all(name is None or isinstance(name, str) for name in adapters):
        raise TypeError(f"expected a list with the name of an adapter, or None, for each sample, got {adapters!r}")
    names = tuple(adapters)
    if not names:
        raise ValueError("expected the name of an adapter, or None, for each sample of the batch, got an empty list")
    chosen = [name for name in dict.fromkeys(names) if name is not None]
    needs = Need.ADAPTED | Need.UNDISABLED | Need.UNMERGED
    state = require(model, "choosing an adapter for each sample", needs, adapters=chosen)
    for unit, record in units_in(state):
        needed = dict.fromkeys(name if name in record.held else None for name in names)
        if len(needed) == 1 and record.shown in needed:
            continue
        adapter = next(filter(None, (*needed, record.shown)))
        instead = "run the samples of each adapter on their own, with set_adapter"
        if len(needed) == 1:
            instead = f"choose one of the batch before, with set_adapter: {record.shown!r} is active"
        raise ValueError(
            f"{unit.name!r} is trained in full with the adapter {adapter!r}, and a batch has only one {unit.name!r}; "
            f"{instead}"
        )
    made: list[SampleAdapters] = []
    groupings = {}
    for path, weight in state.weights:
        key = (tuple(weight.adapter_names()), weight.weight.device)
        if key not in groupings:
            groupings[key] = group_samples(names, *key)
        grouping = groupings[key]
        if grouping.adapters and not isinstance(weight, LoRALayer):
            raise ValueError(
                f"{path!r} is adapted in the weight by {list(grouping.adapters)}, and all samples of a batch share the "
                "weight; run the samples of each adapter on their own, with set_adapter"
            )
        made.append(SampleAdapters(weight, path, grouping))
    # nn.Module's own __setattr__ is slow
    attributes = [vars(weight) for _, weight in state.weights]
    outer = [own["lora_override"] for own in attributes]
    try:
        for own, samples in zip(attributes, made, strict=True):
            own["lora_override"] = samples
        yield model
    finally:
        for own, before in zip(attributes, outer, strict=True):
            own["lora_override"] = before


class Grouping(NamedTuple):
    """Which samples of a batch have which adapter. The tensors are indices, on one device."""

    size: int
    """The number of samples."""
    adapters: tuple[str, ...]
    """The adapters that samples have, each once."""
    rows: Tensor | None
    """The samples that have an adapter; None if all have one."""
    which: Tensor | None
    """For each of these, the position of its adapter; None if they lie in the adapters' order, as many for each."""
    groups: tuple[tuple[str | None, Tensor], ...]
    """The samples of each adapter, and those that have none."""
    back: Tensor
    """The position of each sample in the groups, one after the other."""


def group_samples(names: Sequence[str | None], order: Sequence[str], device: torch.device) -> Grouping:
    """Group the samples by the name of their adapter, in the given order of adapters; others are as none."""

    def index(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    samples: dict[str | None, list[int]] = {name: [] for name in (*order, None)}
    for sample, name in enumerate(names):
        samples[name if name in samples else None].append(sample)
    adapters = tuple(name for name in order if samples[name])
    position = {name: n for n, name in enumerate(adapters)}
    which = [position[name] for name in names if name in position]
    in_order = [n for n in range(len(adapters)) for _ in range(len(which) // len(adapters))]
    there = {name: own for name, own in samples.items() if own}
    in_groups = [sample for own in there.values() for sample in own]
    return Grouping(
        len(names),
        adapters,
        index([sample for sample, name in enumerate(names) if name in position]) if samples[None] else None,
        None if which == in_order else index(which),
        tuple((name, index(own)) for name, own in there.items()),
        index(sorted(range(len(names)), key=in_groups.__getitem__)),
    )


class SampleAdapters:
    """The adapters of a batch's samples on one layer, which has this name and all of the grouping's adapters."""

    def __init__(self, weight: AdaptedWeight, path: str, grouping: Grouping) -> None:
        self.path, self.grouping = path, grouping
        self.adapters = {name: weight.adapter_named(name).unweighted() for name in grouping.adapters}
        specs = [adapter.spec for adapter in self.adapters.values()]
        self.dropouts = {spec.dropout for spec in specs}
        self.drops = any(self.dropouts)
        self.only_sums = all(only_adds(variant) for variant in {spec.variant for spec in specs})
        self._stacked: _Stacked | None = None

    def output(self, layer: LoRALayer, x: Tensor, y: Tensor) -> Tensor:
        """The base's output ``y`` for the input ``x`` with the adapter of each sample joined to it.

        Raises:
            ValueError: if the first dimensions are not the batch, or the layer is cut by tensor parallelism.
        """
        size, groups = self.grouping.size, self.grouping.groups
        if y.ndim <= -layer.channel or x.shape[0] != size or y.shape[0] != size:
            raise ValueError(
                f"layer {self.path!r} got an input of shape {tuple(x.shape)} and gave an output of shape "
                f"{tuple(y.shape)}, but adapter_per_sample has names for {size} samples; make the first dimension of "
                "both the batch (batch_first=True, no flattened tokens)"
            )
        if len(groups) == 1:
            return layer.adapted(x, y, self._of(groups[0][0]))
        if is_dtensor(y):
            raise ValueError(
                f"layer {self.path!r} is cut by tensor parallelism, where all samples have the same adapters; choose "
                "them with set_adapter, one batch after another"
            )
        # without dropout the mode is not asked for, so that a compiled layer serves both
        dropouts = self.dropouts if self.drops and layer.training else {0.0}
        if not layer.linear_low_rank or not self.only_sums or len(dropouts) > 1:
            found = [
                layer.adapted(x.index_select(0, own), y.index_select(0, own), self._of(name)) for name, own in groups
            ]
            return torch.cat(found).index_select(0, self.grouping.back)
        (dropout,) = dropouts
        rows = self.grouping.rows
        if rows is not None:
            x = x.index_select(0, rows)
        if dropout:
            x = F.dropout(x, dropout)
        A, B, scales = self._factors(layer, x.dtype)
        h = torch.bmm(x.reshape(len(A), -1, x.shape[-1]), A.mT)  # (parts, rows, r)
        h = (h * scales[:, None, None]).to(h.dtype)
        update = torch.bmm(h, B).reshape(*x.shape[:-1], B.shape[-1]).to(y.dtype)  # scale_i B_i A_i x_i of each part
        return y + update if rows is None else y.index_add(0, rows, update)

    def shared(self, x: Tensor) -> tuple[ActiveAdapter, ...]:
        """The adapter of all samples, if they have the same one and x is the batch."""
        (name, _), *others = self.grouping.groups
        return () if others or x.ndim < 2 or x.shape[0] != self.grouping.size else self._of(name)

    def _of(self, name: str | None) -> tuple[ActiveAdapter, ...]:
        return () if name is None else (self.adapters[name],)

    def _factors(self, layer: LoRALayer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A ``(parts, r, in)``, B ``(parts, r, out)`` and the scales of the parts, which are samples or adapters.

        Kept from one forward to the next where there are no gradients, until a factor is changed in place or replaced,
        or a forward has gradients.
        """
        if torch.compiler.is_compiling():
            return self._gathered(dtype)
        if torch.is_grad_enabled():
            self._stacked = None  # an engine may write what is trained into the same memory without a trace
            return self._gathered(dtype)
        held = list(layer.noted_tensors(list(self.adapters)).values())
        if any(tensor.is_inference() for tensor in held):  # which count no changes
            return self._gathered(dtype)
        state = [(id(tensor), tensor._version) for tensor in held]
        stacked = self._stacked  # another thread may exchange it meanwhile
        if stacked is None or stacked.state != state or stacked.factors[0].dtype != dtype:
            stacked = self._stacked = _Stacked(state, held, self._gathered(dtype))
        return stacked.factors

    def _gathered(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        factors = [adapter.factors() for adapter in self.adapters.values()]
        first = factors[0][0]
        numbers = [adapter.scale for adapter in self.adapters.values()]
        scales = torch.tensor(numbers, dtype=accumulation_dtype(first.dtype), device=first.device)
        rank = max(len(A) for A, _ in factors)
        A = torch.stack([_widened(A.mT, rank).mT for A, _ in factors]).to(dtype)  # (adapters, r, in)
        B = torch.stack([_widened(B, rank) for _, B in factors]).to(dtype)  # (adapters, out, r)
        which = self.grouping.which
        if which is None:
            return A, B.mT, scales
        return A.index_select(0, which), B.index_select(0, which).mT, scales.index_select(0, which)


class _Stacked(NamedTuple):
    """Factors that are kept, and what they were made of."""

    state: list[tuple[int, int]]
    held: list[Tensor]
    factors: tuple[Tensor, Tensor, Tensor]


def _widened(factor: Tensor, rank: int) -> Tensor:
    """The factor ``(out, r)`` with columns of zeros up to this rank."""
    missing = rank - factor.shape[-1]
    return F.pad(factor, (0, missing)) if missing else factor

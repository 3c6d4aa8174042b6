"""What a layer computes when each sample of a batch has an adapter of its own.

Linear layers take two batched products: the factors of the adapters are stacked, the sample's own are gathered from
the stack. Measured, that was faster at most shapes than a masked product of all factors and than one adapter after
another (``benchmarks/results/2026-11-22.md``). All other layers, and variants that are not sums, compute the samples of
one adapter after those of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_plus.tensors.distributed import is_dtensor
from lora_plus.tensors.matrix import accumulation_dtype, linear_update_each
from lora_plus.tensors.variant import only_adds

if TYPE_CHECKING:
    from .layer import LoRALayer
    from .weight import AdaptedWeight


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
    parts: tuple[tuple[tuple[str, ...], Tensor], ...]
    """The samples of each adapter, and those that have none."""
    back: Tensor
    """The position of each sample in the parts, one after the other."""


def group_samples(names: Sequence[str | None], order: Sequence[str], device: torch.device) -> Grouping:
    """Group the samples by the name of their adapter, in the given order of adapters."""

    def index(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    samples: dict[str | None, list[int]] = {name: [] for name in (*order, None)}
    for sample, name in enumerate(names):
        samples[name].append(sample)
    adapters = tuple(name for name in order if samples[name])
    position = {name: n for n, name in enumerate(adapters)}
    which = [position[name] for name in names if name is not None]
    in_order = [n for n in range(len(adapters)) for _ in range(len(which) // len(adapters))]
    there = {name: own for name, own in samples.items() if own}
    in_parts = [sample for own in there.values() for sample in own]
    return Grouping(
        len(names),
        adapters,
        index([sample for sample, name in enumerate(names) if name is not None]) if samples[None] else None,
        None if which == in_order else index(which),
        tuple((() if name is None else (name,), index(own)) for name, own in there.items()),
        index(sorted(range(len(names)), key=in_parts.__getitem__)),
    )


class SampleAdapters:
    """The adapters of a batch's samples on one layer.

    Args:
        weight: the layer.
        path: its name in the model.
        grouping: the samples by adapter; the layer has all of these adapters.
    """

    def __init__(self, weight: AdaptedWeight, path: str, grouping: Grouping) -> None:
        self.path, self.grouping = path, grouping
        specs = [weight.lora_spec(name) for name in grouping.adapters]
        self.dropouts = {spec.dropout for spec in specs}
        self.only_sums = all(only_adds(spec.variant) for spec in specs)
        self._stacked: _Stacked | None = None

    def output(self, layer: LoRALayer, x: Tensor, y: Tensor) -> Tensor:
        """The base's output ``y`` for the input ``x`` with the adapter of each sample joined to it.

        Raises:
            ValueError: if the first dimensions are not the batch, or the layer is cut by tensor parallelism.
        """
        size, parts = self.grouping.size, self.grouping.parts
        if y.ndim <= -layer.channel or x.shape[0] != size or y.shape[0] != size:
            raise ValueError(
                f"layer {self.path!r} got an input of shape {tuple(x.shape)} and gave an output of shape "
                f"{tuple(y.shape)}, where adapter_per_sample has names for {size} samples; the first dimension of both "
                "must be the batch, not flattened tokens or the sequence (batch_first=True)"
            )
        if len(parts) == 1:
            return layer.adapted(x, y, parts[0][0])
        if is_dtensor(y):
            raise ValueError(
                f"layer {self.path!r} is cut by tensor parallelism, where all samples have the same adapters; choose "
                "them with set_adapter, one batch after another"
            )
        # without dropout the mode is not asked for, so that a compiled layer serves both
        dropouts = self.dropouts if any(self.dropouts) and layer.training else {0.0}
        if not layer.linear_low_rank or not self.only_sums or len(dropouts) > 1:
            found = [layer.adapted(x.index_select(0, own), y.index_select(0, own), name) for name, own in parts]
            return torch.cat(found).index_select(0, self.grouping.back)
        (dropout,) = dropouts
        rows = self.grouping.rows
        if rows is not None:
            x = x.index_select(0, rows)
        if dropout:
            x = F.dropout(x, dropout)
        update = linear_update_each(x, *self._factors(layer, x.dtype)).to(y.dtype)
        return y + update if rows is None else y.index_add(0, rows, update)

    def _factors(self, layer: LoRALayer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A ``(parts, r, in)``, B ``(parts, r, out)`` and the scales of the parts, which are samples or adapters.

        Kept from one forward to the next where there are no gradients, until a factor is changed in place or replaced,
        or a forward has gradients.
        """
        if torch.compiler.is_compiling():
            return self._gathered(layer, dtype)
        if torch.is_grad_enabled():
            self._stacked = None  # an engine may write what is trained into the same memory without a trace
            return self._gathered(layer, dtype)
        held = _held(layer)
        state = [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in held]
        stacked = self._stacked  # another thread may exchange it meanwhile
        if stacked is None or stacked.state != state or stacked.factors[0].dtype != dtype:
            stacked = self._stacked = _Stacked(state, held, self._gathered(layer, dtype))
        return stacked.factors

    def _gathered(self, layer: LoRALayer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        factors = [layer.lora_factors(name) for name in self.grouping.adapters]
        scales = torch.tensor(
            [scale for _, _, scale in factors],
            dtype=accumulation_dtype(factors[0][0].dtype),
            device=factors[0][0].device,
        )
        rank = max(len(A) for A, _, _ in factors)
        A = torch.stack([_widened(A.mT, rank).mT for A, _, _ in factors]).to(dtype)  # (adapters, r, in)
        B = torch.stack([_widened(B, rank) for _, B, _ in factors]).to(dtype)  # (adapters, out, r)
        which = self.grouping.which
        if which is None:
            return A, B.mT, scales
        return A.index_select(0, which), B.index_select(0, which).mT, scales.index_select(0, which)


class _Stacked(NamedTuple):
    """Factors that are kept, and what they were made of."""

    state: list[tuple[int, int]]
    held: list[nn.Parameter]
    factors: tuple[Tensor, Tensor, Tensor]


def _widened(factor: Tensor, rank: int) -> Tensor:
    """The factor ``(out, r)`` with columns of zeros up to this rank."""
    missing = rank - factor.shape[-1]
    return F.pad(factor, (0, missing)) if missing else factor


def _held(layer: LoRALayer) -> list[nn.Parameter]:
    """The factors of all adapters of a layer."""
    containers = (site._modules.get(name) for site in layer.adapter_sites() for name in ("lora_A", "lora_B"))
    return [tensor for held in containers if held is not None for tensor in held._parameters.values()]  # type: ignore[misc]

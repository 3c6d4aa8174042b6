"""What adapters amount to, told from their factors: size and spectrum of each update, and how far two are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_plus.files.saved_adapter import SavedAdapter, SavedLayer, settings_of
from lora_plus.files.starts import without_start
from lora_plus.files.token_rows import is_rows
from lora_plus.tensors.low_rank import singular_values
from lora_plus.tensors.token_rows import ROWS
from lora_plus.text import join


@dataclass(frozen=True)
class LayerMeasures:
    """Settings and figures of an adapter on one layer. Norms are Frobenius norms; of a stack, over all matrices."""

    name: str
    kind: str
    """Class of the plain layer, or ``"Parameter"``."""
    shape: tuple[int, ...]
    """Shape of the stored weight."""
    r: int
    alpha: float
    scaling: str
    variant: str
    dropout: float
    scale: float
    dtype: str
    norm: float
    """||s B A||; with DoRA, before the rows are rescaled."""
    largest_share: float | None
    """The largest singular value's part of the sum of squares; mean over a stack. None if B A is zero."""
    effective_rank: float | None
    """exp of the entropy of these parts: r if all are equal. Mean over a stack. None if B A is zero."""
    singular_values: tuple[float, ...]
    """At most r singular values of s B A, the largest first; for a stack, the root mean square of each."""


def measure(name: str, layer: SavedLayer) -> LayerMeasures:
    """The measures of one layer's adapter, computed in float64."""
    squares = singular_values(*_scaled(layer)).square()
    total = squares.sum(-1, keepdim=True)
    live = (total > 0).flatten()
    shares = (squares / total).reshape(-1, squares.shape[-1])[live]
    ranks = torch.special.entr(shares).sum(-1).exp()
    return LayerMeasures(
        name,
        layer.base.kind,
        layer.base.shape,
        **settings_of(layer.spec),
        scale=layer.spec.scale,
        dtype=str(next(iter(layer.tensors.values())).dtype).removeprefix("torch."),
        norm=float(total.sum().sqrt()),
        largest_share=float(shares.amax(-1).mean()) if len(shares) else None,
        effective_rank=float(ranks.mean()) if len(shares) else None,
        singular_values=tuple(squares.reshape(-1, squares.shape[-1]).mean(0).sqrt().tolist()),
    )


@dataclass(frozen=True)
class LayerDifference:
    """The differences of two adapters on one layer."""

    name: str
    """The name of the layer."""
    settings: dict[str, tuple[Any, Any]]
    """Settings that differ, with both values."""
    relative: float | None
    """||dA - dB|| / ||dA|| of the updates: infinite if only dA is zero, None if the two are for different layers."""
    magnitude: float | None
    """The same for DoRA's magnitudes, or other tensors of a variant besides A and B; None unless both have some."""


@dataclass(frozen=True)
class AdapterDifference:
    """The differences of two adapters, the result of `diff_saved`."""

    layers: list[LayerDifference]
    """The layers that both have."""
    only_a: list[str]
    """The layers that only the first has."""
    only_b: list[str]
    """The layers that only the second has."""
    trained: dict[str, float | None]
    """Tensors trained in full that differ, with ||a - b|| / ||a||; None where one lacks it or the shapes differ."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs, to the bit."""
        same = all(not (layer.settings or layer.relative or layer.magnitude) for layer in self.layers)
        known = all(layer.relative is not None for layer in self.layers)
        return same and known and not (self.only_a or self.only_b or self.trained)


def diff_saved(a: SavedAdapter, b: SavedAdapter) -> AdapterDifference:
    """Compare two adapters: their settings and their updates. The ranks may differ.

    ``s_a B_a A_a - s_b B_b A_b`` is a product of the factors side by side, so its norm needs only matrices of rank by
    rank.
    """
    both = [name for name in a.layers if name in b.layers]
    ours, theirs = _trained(a), _trained(b)
    apart = {name: _relative_or_none(ours.get(name), theirs.get(name)) for name in {**ours, **theirs}}
    return AdapterDifference(
        [_layer_difference(name, a.layers[name], b.layers[name]) for name in both],
        [name for name in a.layers if name not in b.layers],
        [name for name in b.layers if name not in a.layers],
        {name: value for name, value in apart.items() if value != 0},
    )


def _layer_difference(name: str, a: SavedLayer, b: SavedLayer) -> LayerDifference:
    ours, theirs = settings_of(a.spec), settings_of(b.spec)
    settings = {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}
    if without_start(a.base) != without_start(b.base):
        return LayerDifference(name, settings, None, None)
    (A, B), (C, D) = (_scaled(layer) for layer in (a, b))
    magnitudes = [_besides(layer) for layer in (a, b)]
    if A.shape == C.shape and torch.equal(A, C) and torch.equal(B, D):  # a decomposition would leave rounding errors
        return LayerDifference(name, settings, 0.0, _relative_or_none(*magnitudes))
    apart = singular_values(torch.cat([A, C], dim=-2), torch.cat([B, -D], dim=-1)).norm()
    return LayerDifference(name, settings, _ratio(apart, singular_values(A, B).norm()), _relative_or_none(*magnitudes))


def _scaled(layer: SavedLayer) -> tuple[Tensor, Tensor]:
    if is_rows(layer):  # the base that they are compared with is not known
        rows = layer.tensors[ROWS].double()
        return rows, rows.new_ones(layer.spec.r).diag()
    A, B = layer.factors()
    return A.double(), layer.spec.scale * B.double()


def _besides(layer: SavedLayer) -> Tensor | None:
    """The tensors besides A and B, one after the other; None if there are none."""
    others = [layer.tensors[name].flatten() for name in sorted(layer.tensors.keys() - {"lora_A", "lora_B", ROWS})]
    return torch.cat(others) if others else None


def _trained(adapter: SavedAdapter) -> dict[str, Tensor]:
    return {join(path, name): value for path, found in adapter.trained.items() for name, value in found.items()}


def _relative_or_none(a: Tensor | None, b: Tensor | None) -> float | None:
    if a is None or b is None or a.shape != b.shape:
        return None
    if same_bits(a, b):
        return 0.0
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    return _ratio((a.to(wide) - b.to(wide)).norm(), a.to(wide).norm())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape are equal to the bit, also where a value is no number."""
    return a.dtype == b.dtype and torch.equal(*(each.contiguous().flatten().view(torch.uint8) for each in (a, b)))


def _ratio(apart: Tensor, size: Tensor) -> float:
    return 0.0 if not apart else math.inf if not size else float(apart / size)

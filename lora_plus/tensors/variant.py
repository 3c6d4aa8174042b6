"""How the update joins the layer: the scaling rules (alpha / r, alpha / sqrt(r)) and the variants, a table of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from lora_plus.errors import check_count, check_number

from .matrix import add_delta, row_norm, sum_row_norm

SUBTRACTED = ("lora_A0", "lora_B0")
"""The containers of what is taken out of the update again, by inits that start from a part of the weight."""

SCALINGS: dict[str, Callable[[float, int], float]] = {
    "standard": lambda alpha, r: alpha / r,  # Hu et al. 2021, arXiv:2106.09685
    "rslora": lambda alpha, r: alpha / math.sqrt(r),  # Kalajdzievski 2023, arXiv:2312.03732
}

Scaling = Literal["standard", "rslora"]
"""Name of a scaling rule, which gives the scale from alpha and r: the names in `SCALINGS`."""


@dataclass(frozen=True)
class TensorSpec:
    """One of the tensors of an adapter, for all that enumerate, check, save, cut or train them."""

    name: str
    """Its name in the layer and in files: ``lora_`` and something."""
    axes: tuple[str, ...]
    """What each dimension lies along: ``"out"``, ``"in"`` or ``"r"``. That of a stack of matrices comes before them."""
    role: str
    """What it is to the optimizer."""
    group: str
    """Its parameter group: that of ``"A"`` or ``"B"``, at their rates, or another one, ``lora_<group>``, at ``lr``."""
    decays: bool
    """Whether it gets weight decay where the user has no rule for that."""

    def shape(self, matrix: Sequence[int], r: int) -> tuple[int, ...]:
        """Its shape for a weight with a matrix view of this shape, ``(..., out, in)``, at rank r."""
        *stack, out_features, in_features = matrix
        extent = {"out": out_features, "in": in_features, "r": r}
        return (*stack, *map(extent.__getitem__, self.axes))


FACTORS = (
    TensorSpec("lora_A", ("r", "in"), "A", "A", decays=True),
    TensorSpec("lora_B", ("out", "r"), "B", "B", decays=True),
)
"""The tensors of every adapter."""
_TAKEN_OUT = (
    TensorSpec(SUBTRACTED[0], ("r", "in"), "start", "other", decays=True),
    TensorSpec(SUBTRACTED[1], ("out", "r"), "start", "other", decays=True),
)
"""Those of an adapter that started from a part of the weight; they are not trained."""


class HasWeight(Protocol):
    """The layer that an adapter joins, as a variant sees it."""

    def weight_matrix(self) -> Tensor: ...  # the stored weight in its matrix view
    def beside_weight(self, x: Tensor, y: Tensor) -> Tensor | None: ...  # what is in the base's output y besides W x
    def per_channel(self, values: Tensor) -> Tensor: ...  # (out,), shaped to broadcast over the layer's output


class HasFactors(Protocol):
    """An adapter, as its variant sees it."""

    @property
    def scale(self) -> float: ...  # the factor of B A

    def factors(self) -> tuple[Tensor, Tensor]: ...  # A (r, in) and B (out, r)
    def tensors(self) -> Mapping[str, Tensor]: ...  # all its tensors, by their names


class Variant(Protocol):
    """What a variant states; all matrices in the matrix view, float32 or better."""

    factors: tuple[TensorSpec, ...]
    """A and B; empty where these are made of the other tensors."""
    tensors: tuple[TensorSpec, ...]
    """The tensors that it has besides A and B."""
    rescales: bool
    """Whether it rescales the weight: it needs the weight's numbers, all its rows, and to be the only one that does."""
    frozen: tuple[str, ...]
    """The containers whose tensors are not trained."""

    def extra(self, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> dict[str, Tensor]:
        """The tensors that it has besides A and B, by their names, at their initial values."""
        ...

    def join(self, layer: HasWeight, adapter: HasFactors, x: Tensor, y: Tensor, update: Tensor) -> Tensor:
        """The layer's output from its input ``x``, the base's output ``y`` and the low-rank ``update`` of x."""
        ...

    def merge(self, weight: Tensor, A: Tensor, B: Tensor, scale: float, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight that computes what `join` computes, with the same gradients; ``tensors`` has the extra ones.

        Each row of the result depends on the same row of the weight, of B and of the extra tensors that lie along
        ``"out"`` only. The extra tensors may change what is made of ``scale * B A``, but not ask for A or B alone:
        `resize_adapter` finds others with the same product.
        """
        ...


class LoRA:
    """``W + s B A`` (Hu et al. 2021, arXiv:2106.09685, eq. 3)."""

    factors: tuple[TensorSpec, ...] = FACTORS
    tensors: tuple[TensorSpec, ...] = ()
    rescales = False
    frozen: tuple[str, ...] = ()

    def extra(self, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> dict[str, Tensor]:
        return {}

    def join(self, layer: HasWeight, adapter: HasFactors, x: Tensor, y: Tensor, update: Tensor) -> Tensor:
        return y + update.to(y.dtype)

    def merge(self, weight: Tensor, A: Tensor, B: Tensor, scale: float, tensors: Mapping[str, Tensor]) -> Tensor:
        return add_delta(weight, A, B, scale)


class LoRAFA(LoRA):
    """LoRA with A frozen at its start (Zhang et al. 2023, arXiv:2308.03303); the input is not kept for backward."""

    frozen: tuple[str, ...] = ("lora_A",)


class DoRA(LoRA):
    """``m (W + s B A) / ||W + s B A||``, norm by row and detached (Liu et al. 2024, arXiv:2402.09353, eq. 5 and 11)."""

    tensors: tuple[TensorSpec, ...] = (TensorSpec("lora_magnitude", ("out",), "magnitude", "magnitude", decays=False),)
    rescales = True

    def extra(self, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> dict[str, Tensor]:
        if weight.is_meta:
            raise ValueError(
                "DoRA starts from the norm of the weight, which has no values on the meta device; load it first"
            )
        norm = sum_row_norm(weight, A, B, scale)
        if not bool((norm > 0).all()):
            raise ValueError("DoRA divides by the norm of each row of the weight, and this weight has rows of zeros")
        return {"lora_magnitude": norm}

    def join(self, layer: HasWeight, adapter: HasFactors, x: Tensor, y: Tensor, update: Tensor) -> Tensor:
        with torch.no_grad():
            norm = sum_row_norm(layer.weight_matrix(), *adapter.factors(), adapter.scale)
        ratio, beside = layer.per_channel(adapter.tensors()["lora_magnitude"] / norm), layer.beside_weight(x, y)
        y = y + update.to(y.dtype)
        # y + (ratio - 1) * Wx, not ratio * Wx + bias: at the start ratio is 1 and y comes out bit for bit
        return y + (ratio - 1).to(y.dtype) * (y if beside is None else y - beside)

    def merge(self, weight: Tensor, A: Tensor, B: Tensor, scale: float, tensors: Mapping[str, Tensor]) -> Tensor:
        moved = add_delta(weight, A, B, scale)
        ratio = tensors["lora_magnitude"] / row_norm(moved.detach())
        return ratio.unsqueeze(-1) * moved


VARIANTS: dict[str, Variant] = {"lora": LoRA(), "lora_fa": LoRAFA(), "dora": DoRA()}

VariantName = Literal["lora", "lora_fa", "dora"]
"""Name of a variant, which says what is learnt for a weight: the names in `VARIANTS`."""


def only_adds(variant: str) -> bool:
    """Whether ``s B A`` is added as it is, so that updates can be computed, summed and written together."""
    stated = VARIANTS[variant]
    join, merge = getattr(stated.join, "__func__", None), getattr(stated.merge, "__func__", None)
    return join is LoRA.join and merge is LoRA.merge


def needs_input(dropout: float) -> str | None:
    """Why an adapter with this dropout cannot act where a weight is only read; None if it can."""
    return f"dropout {dropout} has no input to act on where only a weight is read" if dropout else None


def whole_only(variant: str) -> str | None:
    """Why a variant cannot act on some rows of a weight; None if it can."""
    if VARIANTS[variant].rescales:
        return f"variant {variant!r} rescales whole weights and cannot act on some rows of one"
    if not only_adds(variant) or not VARIANTS[variant].factors:
        return f"variant {variant!r} is no plain sum and cannot act on some rows of a weight"
    return None


def saved_tensors(variant: str) -> tuple[TensorSpec, ...]:
    """The tensors that an adapter of a variant has in a file."""
    return *VARIANTS[variant].factors, *VARIANTS[variant].tensors


def adapter_tensor_specs(variant: str) -> dict[str, TensorSpec]:
    """The tensors that an adapter of a variant can have, by their names."""
    return {tensor.name: tensor for tensor in (*saved_tensors(variant), *_TAKEN_OUT)}


def known_tensors() -> dict[str, TensorSpec]:
    """The tensors that adapters of any variant can have, by their names."""
    return {name: tensor for variant in VARIANTS for name, tensor in adapter_tensor_specs(variant).items()}


@dataclass(frozen=True)
class AdapterSpec:
    """The settings of one adapter on one layer."""

    r: int
    """Rank: the rows of A and the columns of B."""
    alpha: float
    """Numerator of the scaling rule."""
    scaling: str = "standard"
    """Name of the scaling rule in `SCALINGS`."""
    variant: str = "lora"
    """Name of the variant in `VARIANTS`."""
    dropout: float = 0.0
    """Probability that an entry of the adapter's input is dropped in training."""
    scale: float = field(init=False, compare=False)
    """The factor of B A that follows from alpha, r and the scaling rule."""
    only_adds: bool = field(init=False, compare=False, repr=False)
    """`only_adds` of its variant."""
    drops: bool = field(init=False, compare=False, repr=False)
    """Whether there is dropout: a compiler that holds numbers for variable would trace a test of that number twice."""

    def __post_init__(self) -> None:
        check_count("r", self.r)
        check_number("alpha", self.alpha, "finite and not zero (zero would switch the adapter off)")
        check_number("dropout", self.dropout, "in [0, 1)")
        for setting, name, table in (("scaling", self.scaling, SCALINGS), ("variant", self.variant, VARIANTS)):
            if name not in table:
                known = sorted(each for each in table if table is SCALINGS or VARIANTS[each].factors)
                raise ValueError(f"unknown {setting} {name!r}; choose one of {known}")
        scale = SCALINGS[self.scaling](self.alpha, self.r)
        if not abs(scale) <= torch.finfo(torch.float32).max:
            raise ValueError(f"alpha {self.alpha} and r {self.r} give a scale of {scale:g}, which float32 cannot hold")
        vars(self).update(scale=scale, only_adds=only_adds(self.variant), drops=bool(self.dropout))

    def at_rank(self, r: int) -> AdapterSpec:
        """The settings that give an adapter of another rank the same scale."""
        return replace(self, r=r, alpha=self.scale / SCALINGS[self.scaling](1.0, r))

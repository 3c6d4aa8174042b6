"""The ways of combining several updates ``s B A`` into one, layer by layer; A and B on their own have no sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_plus.tensors.init import uniform
from lora_plus.tensors.low_rank import Factors, truncated, truncated_product


class WeightedUpdate(NamedTuple):
    """One adapter's update of one place, ``factor * B A``; the factor is its scale and its weight."""

    A: Tensor
    B: Tensor
    factor: float


class Options(NamedTuple):
    """What a method can be told."""

    r: int = 0
    density: float = 1.0
    generator: torch.Generator | None = None


def _sum(updates: Sequence[WeightedUpdate], options: Options) -> Factors:
    A = torch.cat([update.A for update in updates], dim=-2)
    return Factors(A, torch.cat([update.factor * update.B for update in updates], dim=-1), 0.0)


def _svd(updates: Sequence[WeightedUpdate], options: Options) -> Factors:
    A, B, _ = _sum(updates, options)
    return truncated_product(A, B, options.r)


def _trimmed(update: Tensor, options: Options) -> Tensor:
    """The given part of the entries, those of the largest size, in this layer; the rest is zero."""
    kept = max(1, round(options.density * update.numel()))
    # not kthvalue, which raises on a GPU when torch is told to use deterministic algorithms only
    least = update.abs().flatten().topk(kept, sorted=False).values.min()
    return update.where(update.abs() >= least, 0)


def _dropped(update: Tensor, options: Options) -> Tensor:
    """Each entry with the given probability, divided by it; zero otherwise."""
    keep = uniform(tuple(update.shape), 0.5, update, options.generator) < options.density - 0.5
    return update.where(keep, 0) / options.density


def _added(updates: Sequence[Tensor]) -> Tensor:
    return sum(updates[1:], updates[0])


def _elected(updates: Sequence[Tensor]) -> Tensor:
    """By entry, the mean of those that have the sign of the sum; entries of zero have none."""
    sign = _added(updates).sign()
    agreeing = [update.sign() == sign for update in updates]
    total = _added([update.where(agrees, 0) for update, agrees in zip(updates, agreeing, strict=True)])
    return total / _added([agrees.to(total.dtype) for agrees in agreeing]).clamp(min=1)


Combine = Callable[[Sequence[WeightedUpdate], Options], Factors]
"""From the updates of one place, of those adapters that have one, to the combined one."""


def _dense(thin: Callable[[Tensor, Options], Tensor], join_up: Callable[[Sequence[Tensor]], Tensor]) -> Combine:
    """A method on the matrices themselves: each made sparse, joined, and cut to rank r."""

    def combine(updates: Sequence[WeightedUpdate], options: Options) -> Factors:
        return truncated(join_up([thin((factor * B) @ A, options) for A, B, factor in updates]), options.r)

    return combine


class Method(NamedTuple):
    """A way of combining."""

    combine: Combine
    options: tuple[str, ...] = ()
    """What it can be told; all but the generator must be."""


METHODS: dict[str, Method] = {
    "sum": Method(_sum),  # the task arithmetic of Ilharco et al. 2022 (arXiv:2212.04089)
    "svd": Method(_svd, ("r",)),
    "ties": Method(_dense(_trimmed, _elected), ("r", "density")),  # Yadav et al. 2023 (arXiv:2306.01708)
    "dare": Method(_dense(_dropped, _added), ("r", "density", "generator")),  # Yu et al. 2023 (arXiv:2311.03099)
    "dare_ties": Method(_dense(_dropped, _elected), ("r", "density", "generator")),
}

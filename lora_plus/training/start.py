"""Another start for an adapter that a model has: drawn anew, or along the gradient of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_plus.errors import Problems, named_keywords
from lora_plus.layers.adapter import Adapter
from lora_plus.model.dry_run import left_as_it_was
from lora_plus.model.places import Place, adapted_places
from lora_plus.model.state import Need, require
from lora_plus.model.tree import replica_group, unwrap
from lora_plus.tensors import matrix as functional
from lora_plus.tensors.distributed import fill, is_dtensor
from lora_plus.tensors.init import Init, InitName, Start
from lora_plus.tensors.low_rank import truncated
from lora_plus.tensors.random_state import draws


@named_keywords
@draws
def reset_lora_parameters(
    model: nn.Module,
    *,
    adapter: str = "default",
    init: InitName | Init = "kaiming",
    generator: torch.Generator | None = None,
) -> None:
    """Initialise an adapter's tensors again on all its layers, in place.

    The parameters stay the same objects, and the adapter's settings stay. Modules trained in full are not changed. A
    DoRA magnitude becomes the norm of the current weight. On a sharded model every rank must call this; the tensors are
    those of one process with the same generator.

    Examples:
        >>> model = inject_lora(nn.Sequential(nn.Linear(8, 8)), ["0"], r=2)
        >>> reset_lora_parameters(model, generator=torch.Generator().manual_seed(1))

    Args:
        model: a model with adapters; wrapped, sharded or not.
        adapter: the adapter's name.
        init: as in `inject_lora`. An init whose start is subtracted (``"pissa"``, ``"milora"``, ``"olora"``) needs an
            adapter that was injected with such an init.
        generator: as in `inject_lora`.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: if the model is merged or disabled, or the init does not fit. The adapter is then as it was.
    """
    needs = Need.UNCOPIED | Need.CHANGEABLE
    state = require(model, "resetting an adapter", needs, adapters=[adapter])
    storage = state.storage
    start = Start(init, None, generator)
    prepared = []
    for place, held in adapted_places(state.modules, adapter):
        with storage.gathered([place.stored()]):
            fresh = place.new_tensors(storage, held.spec, start)
        if not fresh.keys() <= held.tensors().keys():
            raise ValueError(f"init {init!r} needs tensors that the adapter {adapter!r} does not have; inject with it")
        prepared.append((held, fresh))
    for held, fresh in prepared:
        with storage.gathered(held.tensors().values(), write=True):
            for name, parameter in held.tensors().items():
                fill(parameter, fresh[name] if name in fresh else torch.zeros(parameter.shape, device="cpu"))


def init_from_gradients(
    model: nn.Module, loss: Callable[[Any], Tensor], batches: Iterable[Any], *, adapter: str = "default"
) -> None:
    """Start an adapter along the gradient of a loss. One factor stays zero, so the output is unchanged.

    Let G be the gradient of the loss with respect to a layer's weight (its matrix view), summed over the batches. The
    rows of A become the top r right singular vectors of G, with norm ``1/sqrt(3)``, about that of the default init. The
    first step of B then moves the layer along the best rank-r approximation of G, as in LoRA-GA (arXiv:2407.05000) and
    LoRA-One (arXiv:2502.01235). Unlike there, the weight, the learning rate and the scale do not change. If A is the
    zero factor, as in embeddings, B becomes the top r left singular vectors, with the mean norm of its columns.

    It needs memory for the gradient of each adapted weight. It uses the model's current mode (with dropout in training
    mode). Gradients, buffers and random states are restored afterwards.

    Examples:
        >>> model = inject_lora(nn.Sequential(nn.Linear(8, 8)), "all-linear", r=2)
        >>> batches = [torch.randn(16, 8) for _ in range(2)]
        >>> init_from_gradients(model, lambda x: model(x).square().mean(), batches)

    Args:
        model: a model with a freshly injected adapter; not merged.
        loss: a function from a batch to the loss of this model, a tensor with one element.
        batches: a few batches.
        adapter: the adapter's name.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: naming the layers whose update is not zero, whose weight has no gradient (quantized, sharded, on the
            meta device or not used by the loss), or whose gradient is not finite; if the model is merged, disabled or
            replicated, or there is no batch. The adapter is then as it was.
    """
    if replica_group(model) is not None:
        raise ValueError(
            "the model is wrapped for several processes, whose batches differ; "
            "start the adapter from gradients before the model is wrapped"
        )
    model = unwrap(model)
    state = require(model, "starting an adapter from gradients", Need.WHOLE | Need.CHANGEABLE, adapters=[adapter])
    placed = [(place, each) for place, each in adapted_places(state.modules, adapter) if "lora_A" in each.tensors()]
    failure = f"adapter {adapter!r} cannot start from gradients; it is unchanged"
    _check(failure, placed, _unsuitable)
    weights = {id(place.stored()): place.stored() for place, _ in placed}
    count = 0
    with left_as_it_was(model), _differentiable(weights.values()), torch.enable_grad():
        for batch in batches:
            loss(batch).backward()  # type: ignore[no-untyped-call]
            count += 1
        # looked at inside: afterwards they are gone
        gradients = {key: weight.grad for key, weight in weights.items()}
    if not count:
        raise ValueError("no batch given; pass at least one")
    _check(failure, placed, lambda place, _: _useless(gradients[id(place.stored())]))
    with torch.no_grad():
        for place, each in placed:
            gradient = gradients[id(place.stored())]
            assert gradient is not None
            A, B = (each.tensors()[name] for name in ("lora_A", "lora_B"))
            matrix = place.part_of(functional.to_matrix(gradient, place.base().layout))
            drawn, size = (B.mT, float(B.norm()) / math.sqrt(B.shape[-1])) if B.any() else (A, 1 / math.sqrt(3))
            rows = _top_directions(matrix.mT if B.any() else matrix, A.shape[-2])
            drawn[..., : rows.shape[-2], :] = rows * size


def _top_directions(gradient: Tensor, r: int) -> Tensor:
    """The top right singular vectors ``(..., r, in)``, fewer where there are no more."""
    with functional.full_precision(gradient.device):
        return truncated(gradient.to(functional.accumulation_dtype(gradient.dtype)), r).A


def _unsuitable(place: Place, adapter: Adapter) -> str | None:
    """Why the gradient by this weight cannot be had, or not be used; None if it can."""
    weight, tensors = place.stored(), adapter.tensors()
    reasons = {
        "its weight has no values (meta device); load them first": weight.is_meta,
        "it is sharded; do this before the model is sharded": is_dtensor(weight),
        "its weight is quantized, and has no gradient": not weight.is_floating_point(),
        "its weight is computed by another tool, and is no parameter": not weight.is_leaf,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is None and all(bool(tensors[name].any()) for name in ("lora_A", "lora_B")):
        return "its update is not zero; start from an untrained adapter, injected with an init that leaves A or B zero"
    return reason


def _useless(gradient: Tensor | None) -> str | None:
    if gradient is None or not bool(gradient.any()):
        return "the loss does not depend on it"
    return None if bool(gradient.isfinite().all()) else "its gradient is not finite"


def _check(failure: str, placed: list[tuple[Place, Adapter]], wrong: Callable[[Place, Adapter], str | None]) -> None:
    problems = [f"{place.name!r}: {why}" for place, each in placed if (why := wrong(place, each)) is not None]
    if problems:
        raise Problems(failure, problems)


@contextmanager
def _differentiable(weights: Iterable[Tensor]) -> Iterator[None]:
    """These frozen weights take gradients for the length of a ``with`` block."""
    changed = [weight for weight in weights if not weight.requires_grad]
    for weight in changed:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in changed:
            weight.requires_grad_(False)

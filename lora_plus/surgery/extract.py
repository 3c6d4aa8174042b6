"""The adapter that comes nearest to a fine-tuned model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_plus.layers.adapter_tensors import check_adapter_name
from lora_plus.layers.quantized import store_of_weight
from lora_plus.model.inject import attach, check_injectable, check_selection, check_whole
from lora_plus.model.patterns import select
from lora_plus.model.places import Place
from lora_plus.model.settings import LoRAConfig, Pattern
from lora_plus.model.tree import adapted_weights, unwrap
from lora_plus.tensors import matrix as functional
from lora_plus.tensors.low_rank import truncated
from lora_plus.tensors.matrix import accumulation_dtype
from lora_plus.text import join, near_misses

from .combine import CombineReport, Draft, unusable


def extract_adapter(
    model: nn.Module,
    tuned: nn.Module | Mapping[str, Tensor],
    *,
    targets: Pattern | Sequence[Pattern],
    r: int,
    adapter: str = "default",
    exclude: Pattern | Sequence[Pattern] = (),
    rank_pattern: Mapping[Any, int] | None = None,
    fused: Mapping[Any, Sequence[str] | Mapping[str, int]] | None = None,
    layouts: Mapping[Any, str] | None = None,
    trainable: bool = False,
) -> CombineReport:
    """Add to a model the adapter that comes nearest to a fine-tuned model: the truncated SVD of each weight's change.

    As after an injection, it is the active adapter, and everything else is frozen. Adapters that the model has already
    do not count: what is compared is its own weights. Where those are quantized, the adapter makes up for that too.

    Args:
        model: the model that the tuned one started from; it is changed.
        tuned: a model of the same architecture, plain or merged, or its state dict.
        targets, exclude, rank_pattern, fused, layouts: which layers, as in `inject_lora`.
        r: the largest rank that a layer gets: less where its weight has less.
        adapter: the name of the new adapter.
        trainable: whether it shall be trained.

    Returns:
        A report: ranks, the part of each layer's change that is lost, and the names of biases and other tensors that
        differ but are no target, or whose rows are not.

    Raises:
        ValueError: naming every target that is missing in the tuned model or does not fit, or if no target differs;
            and as `inject_lora`. The model is then as it was.
    """
    check_adapter_name(adapter)
    config = LoRAConfig(
        targets=targets, r=r, alpha=r, exclude=exclude, rank_pattern=rank_pattern, fused=fused, layouts=layouts
    )
    check_injectable(model, adapter)
    check_whole(model, "extracting an adapter")
    state = _tuned_state(tuned)
    selected = [(place, rank) for place, rank, _ in select(unwrap(model), config).places]
    places = [place for place, _ in selected]
    check_selection(model, places, ())
    draft = _extracted(selected, state)
    ignored = list(_differing(places, unwrap(model).state_dict(), state))
    for place in places:
        place.check_adoptable()
    attach(model, adapter, draft.prepared, (), trainable=trainable)
    return draft.report(adapter, ignored)


def _tuned_state(tuned: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Its tensors by name."""
    if isinstance(tuned, nn.Module):
        tuned = unwrap(tuned)
        for path, weight in adapted_weights(tuned):
            weight.check_enabled()
            if weight.lora_merge is None:
                raise ValueError(f"the tuned model has adapters ({path!r} has) that are not merged; merge them first")
        tuned = tuned.state_dict()
    if not isinstance(tuned, Mapping):
        raise TypeError(f"tuned must be a module or a state dict, got {type(tuned).__name__}")
    return {name: tensor for name, tensor in tuned.items() if isinstance(tensor, Tensor)}


def _weight_name(place: Place) -> str:
    return join(place.owner_name, place.parameter or "weight")


@torch.no_grad()
def _extracted(selected: Sequence[tuple[Place, int]], state: Mapping[str, Tensor]) -> Draft:
    draft = Draft()
    differs = False
    for place, r in selected:
        why = _no_counterpart(place, state)
        if why is not None:
            draft.problems.append(why)
            continue
        base, tuned = place.matrix(), _tuned_matrix(place, state)
        dtype = accumulation_dtype(base.dtype, tuned.dtype)
        change = tuned.to(base.device, dtype) - base.to(dtype)
        differs = differs or bool(change.any())
        fit = draft.fit(place, base.device, truncated, change, r)
        if fit is not None:
            draft.add(place, fit, accumulation_dtype(base.dtype))
    if not draft.problems and not differs:
        draft.problems.append("the tuned model is equal to this one in all targets")
    draft.check("no adapter can be extracted; the model is unchanged")
    return draft


def _no_counterpart(place: Place, state: Mapping[str, Tensor]) -> str | None:
    """Why the tuned model has no such weight; None if it has."""
    name, shape = _weight_name(place), place.base().shape
    tensor = state.get(name)
    if tensor is None:
        return f"{name!r} is not in the tuned model{near_misses(name, state)}"
    if store_of_weight(tensor) is not None or not tensor.is_floating_point():
        return f"{name!r} of the tuned model is {store_of_weight(tensor) or tensor.dtype}, expected plain numbers"
    if tuple(tensor.shape) != shape:
        return f"{name!r} has shape {tuple(tensor.shape)} in the tuned model, {shape} here"
    for owner, numbers in (("the tuned model", tensor), ("this model", place.matrix())):
        if (why := unusable(numbers)) is not None:
            return f"{name!r} of {owner} {why}"
    return None


def _tuned_matrix(place: Place, state: Mapping[str, Tensor]) -> Tensor:
    """The matrix view of the tuned weight, or of the rows that the place is."""
    matrix = functional.to_matrix(state[_weight_name(place)], place.base().layout)
    return matrix if place.rows is None else matrix[slice(*place.rows)]


def _differing(places: Sequence[Place], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[str]:
    """Names of tensors of the tuned model that differ from this one's, or that it lacks, outside of these places."""
    taken: dict[str, list[Place]] = {}
    for place in places:
        taken.setdefault(_weight_name(place), []).append(place)
    for name, tensor in theirs.items():
        here = taken.get(name, [])
        if any(place.rows is None for place in here):
            continue
        mine = ours.get(name)
        if mine is None or mine.shape != tensor.shape or store_of_weight(mine) or store_of_weight(tensor):
            yield name
            continue
        changed = mine != tensor.to(mine.device)
        if here:
            changed = functional.to_matrix(changed, here[0].base().layout).clone()
        for place in here:
            changed[slice(*place.rows)] = False  # type: ignore[misc]
        if bool(changed.any()):
            yield name

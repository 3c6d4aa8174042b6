"""The adapter that comes nearest to a fine-tuned model: the truncated SVD of each weight's change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_plus.errors import named_keywords
from lora_plus.layers.adapter import check_adapter_name
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.layers.kinds import why_no_numbers
from lora_plus.model.inject import attach, check_selection
from lora_plus.model.patterns import Pattern
from lora_plus.model.places import Place
from lora_plus.model.selection import Selection
from lora_plus.model.state import Need, require
from lora_plus.model.tree import unwrap
from lora_plus.tensors import matrix as functional
from lora_plus.tensors.low_rank import truncated
from lora_plus.tensors.matrix import accumulation_dtype
from lora_plus.tensors.variant import AdapterSpec
from lora_plus.text import near_misses

from .draft import CombineReport, Draft, unusable


@named_keywords
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
    """Add the adapter that is nearest to a fine-tuned model: the truncated SVD of each weight's change.

    As after `inject_lora`, it is the active adapter, and everything else is frozen. The tuned weights are compared with
    the model's own weights, without its adapters. If these are quantized, the adapter also corrects the quantization.

    Args:
        model: the model that the fine-tuning started from; it is changed.
        tuned: the fine-tuned model, plain or merged, or its state dict.
        targets: which layers, as in `inject_lora`.
        r: the rank of each layer, or the full rank of its weight if that is less.
        adapter: the name of the new adapter.
        exclude: as in `inject_lora`.
        rank_pattern: as in `inject_lora`.
        fused: as in `inject_lora`.
        layouts: as in `inject_lora`.
        trainable: whether the new adapter is trainable.

    Returns:
        A report, which also names biases and other tensors that differ but are not targets.

    Raises:
        ValueError: naming every target that is missing in the tuned model or does not fit, or if no target differs;
            and as `inject_lora`. The model is then as it was.
    """
    check_adapter_name(adapter)
    spec = AdapterSpec(r=r, alpha=r)
    state = require(model, "extracting an adapter", Need.GROWABLE | Need.WHOLE, new=adapter)
    tensors = _tuned_state(tuned)
    selection = Selection(
        state.names, spec, targets, exclude=exclude, rank_pattern=rank_pattern, fused=fused, layouts=layouts
    )
    selected = [(place, spec.r) for place, spec in selection.places]
    places = [place for place, _ in selected]
    check_selection(state, places, ())
    draft = Draft("no adapter can be extracted; the model is unchanged")
    if not extract(draft, _pairs(draft, selected, tensors), ("this model", "the tuned model")) and not draft.problems:
        draft.problems.append("the tuned model is equal to this one in all targets")
    draft.check()
    ignored = list(_differing(places, unwrap(model).state_dict(), tensors))
    prepared = [(place, layer.spec, layer.tensors) for place in places if (layer := draft.layers[place.name])]
    attach(state, adapter, prepared, trainable=trainable)
    return draft.report(adapter, ignored)


class Pair(NamedTuple):
    """A weight of a base and what it has become, as matrix views; and the name and rank that its adapter gets."""

    name: str
    base: BaseLayer
    before: Tensor
    after: Tensor
    r: int


@torch.no_grad()
def extract(draft: Draft, pairs: Iterable[Pair], owners: tuple[str, str]) -> bool:
    """Draft the adapter of the changes, whose owners errors name, holding a pair at a time; whether there are any."""
    changed = False
    for name, base, before, after, r in pairs:
        sides = zip(owners, (before, after), strict=True)
        wrong = [f"{base.weight_name(name)!r} of {owner} {why}" for owner, side in sides if (why := unusable(side))]
        if wrong:
            draft.problems += wrong
            continue
        dtype = accumulation_dtype(before.dtype, after.dtype)
        change = after.to(before.device, dtype) - before.to(dtype)
        changed = changed or bool(change.any())
        fit = draft.fit(name, partial(truncated, change, r), before.device)
        if fit is not None:
            draft.add(name, base, fit, accumulation_dtype(before.dtype))
    return changed


def _tuned_state(tuned: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Its tensors by name."""
    if isinstance(tuned, nn.Module):
        tuned = unwrap(tuned)
        for path, weight in require(tuned, "extracting an adapter", Need.ENABLED).weights:
            if weight.lora_merge is None:
                raise ValueError(f"the tuned model has adapters ({path!r} has) that are not merged; merge them first")
        tuned = tuned.state_dict()
    if not isinstance(tuned, Mapping):
        raise TypeError(f"tuned must be a module or a state dict, got {type(tuned).__name__}")
    return {name: tensor for name, tensor in tuned.items() if isinstance(tensor, Tensor)}


def _pairs(draft: Draft, selected: Sequence[tuple[Place, int]], state: Mapping[str, Tensor]) -> Iterator[Pair]:
    for place, r in selected:
        base = place.base()
        name = base.weight_name(place.name)
        why = _no_counterpart(name, base, state)
        if why is None:
            matrix = functional.to_matrix(state[name], base.layout)
            yield Pair(place.name, base, place.matrix(), matrix if base.rows is None else matrix[slice(*base.rows)], r)
        else:
            draft.problems.append(why)


def _no_counterpart(name: str, base: BaseLayer, state: Mapping[str, Tensor]) -> str | None:
    """Why the tuned model has no such weight; None if it has."""
    tensor = state.get(name)
    if tensor is None:
        return f"{name!r} is not in the tuned model{near_misses(name, state)}"
    if why_no_numbers(tensor) is not None or not tensor.is_floating_point():
        return f"{name!r} of the tuned model is {why_no_numbers(tensor) or tensor.dtype}, expected plain numbers"
    if tuple(tensor.shape) != base.shape:
        return f"{name!r} has shape {tuple(tensor.shape)} in the tuned model, {base.shape} here"
    return None


def _differing(places: Sequence[Place], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[str]:
    """Names of tensors of the tuned model that differ from this one's, or that it lacks, outside of these places."""
    taken: dict[str, list[BaseLayer]] = {}
    for place in places:
        base = place.base()
        taken.setdefault(base.weight_name(place.name), []).append(base)
    for name, tensor in theirs.items():
        here = taken.get(name, [])
        if any(base.rows is None for base in here):
            continue
        mine = ours.get(name)
        if mine is None or mine.shape != tensor.shape or why_no_numbers(mine) or why_no_numbers(tensor):
            yield name
            continue
        changed = mine != tensor.to(mine.device)
        for base in here:
            changed = functional.to_matrix(changed, base.layout).clone()
            changed[slice(*base.facts["rows"])] = False
            changed = functional.from_matrix(changed, base.layout, base.shape)
        if bool(changed.any()):
            yield name

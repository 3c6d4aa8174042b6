"""Several adapters combined into one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_plus.errors import check_count, check_number, named_keywords
from lora_plus.files.checks import row_problems
from lora_plus.files.save import describe
from lora_plus.files.saved_adapter import SavedAdapter, SavedLayer
from lora_plus.files.starts import without_starts
from lora_plus.files.token_rows import is_rows
from lora_plus.layers.adapter import check_adapter_name
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.model.inject import attach
from lora_plus.model.places import adapted_places
from lora_plus.model.state import Need, require
from lora_plus.tensors.matrix import accumulation_dtype
from lora_plus.tensors.random_state import draws
from lora_plus.tensors.variant import VARIANTS, only_adds

from .draft import CombineReport, Draft, unusable
from .methods import METHODS, Method, Options, WeightedUpdate


@named_keywords
@draws
def combine_adapters(
    model: nn.Module,
    adapters: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    adapter: str = "combined",
    method: str = "sum",
    r: int | None = None,
    density: float | None = None,
    generator: torch.Generator | None = None,
    trainable: bool = False,
) -> CombineReport:
    """Combine several adapters of a model into a new one. Their ranks and layers may differ.

    Let ``D_i = w_i s_i B_i A_i``, or zero if adapter i does not have the layer. The update of each layer is:

    - ``"sum"``: ``D_1 + D_2 + ...``, exact: the factors side by side, so ranks add up.
    - ``"svd"``: the best approximation of that sum of rank r, without a matrix of the layer's size.
    - ``"ties"``: keep the largest entries of each D_i, a fraction ``density`` of them; for each entry, average those
      with the sign of their sum; reduce to rank r (arXiv:2306.01708).
    - ``"dare"``: keep each entry of D_i with probability ``density``, divided by it; sum, and reduce to rank r
      (arXiv:2311.03099).
    - ``"dare_ties"``: drop entries as in dare, and continue as in ties.

    The last three need a matrix of the layer's size for each adapter, for one layer at a time. The combined adapters do
    not change. As after `inject_lora`, the new adapter is active and the others are frozen.

    Args:
        model: a model with adapters; it is changed.
        adapters: the names of the adapters to combine.
        weights: a factor for each, which may be negative; None for 1.
        adapter: the name of the new adapter.
        method: one of the above.
        r: the largest rank that a layer gets; for all methods but ``"sum"``.
        density: the fraction of entries to keep, above 0 and at most 1; for the last three methods.
        generator: source of the random numbers of ``"dare"`` and ``"dare_ties"``; None for torch's global generator.
        trainable: whether the new adapter is trainable.

    Raises:
        KeyError: if the model holds no adapter of such a name.
        TypeError, ValueError: if a setting is out of range, missing, or without effect for the method; if an adapter
            cannot be combined (DoRA, ``train_also``, non-finite values); if the model is sharded, merged or disabled,
            or has an adapter of the new name. The model is then as it was.
    """
    check_adapter_name(adapter)
    chosen = _chosen(method, {"r": r, "density": density, "generator": generator})
    factors = _factors(adapters, weights)
    needs = Need.GROWABLE | Need.WHOLE | Need.TRAINED
    state = require(model, "combining adapters", needs, adapters=list(factors), new=adapter)
    draft = Draft(f"adapters {list(factors)} cannot be combined; the model is unchanged")
    _combine(draft, {name: describe(state, name) for name in factors}, factors, *chosen)
    report = draft.report(adapter)
    places = {place.name: place for place, _ in adapted_places(state.modules)}
    prepared = [(places[name], layer.spec, layer.tensors) for name, layer in draft.layers.items()]
    attach(state, adapter, prepared, trainable=trainable)
    return report


@draws
def combine_saved(
    adapters: Mapping[str, SavedAdapter],
    *,
    weights: Sequence[float] | None = None,
    method: str = "sum",
    r: int | None = None,
    density: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[SavedAdapter, CombineReport]:
    """Combine saved adapters of one model, as `combine_adapters` does in a model.

    Args:
        adapters: the adapters, under names for error messages, such as their paths.
        weights: as in `combine_adapters`.
        method: as in `combine_adapters`.
        r: as in `combine_adapters`.
        density: as in `combine_adapters`.
        generator: as in `combine_adapters`.

    Returns:
        The new adapter, with the metadata that all have in common, and the report.

    Raises:
        TypeError, ValueError: as `combine_adapters`, and naming each layer that differs from adapter to adapter.
    """
    if not isinstance(adapters, Mapping):
        raise TypeError(f"adapters must map names to saved adapters, got a {type(adapters).__name__}")
    chosen = _chosen(method, {"r": r, "density": density, "generator": generator})
    factors = _factors(list(adapters), weights)
    draft = Draft(f"adapters {list(factors)} cannot be combined")
    _combine(draft, adapters, factors, *chosen)
    report = draft.report()
    first, *others = [adapter.metadata.items() for adapter in adapters.values()]
    shared = {key: text for key, text in first if all((key, text) in other for other in others)}
    return SavedAdapter(draft.layers, {}, shared), report


@torch.no_grad()
def _combine(
    draft: Draft, adapters: Mapping[str, SavedAdapter], weights: Mapping[str, float], method: Method, options: Options
) -> None:
    adapters = {name: without_starts(adapter) for name, adapter in adapters.items()}
    draft.problems += [
        f"{path!r} is trained in full with {name!r}, and such values cannot be added; use adapters without train_also"
        for name in weights
        for path in adapters[name].trained
    ]
    for place in sorted({place for adapter in adapters.values() for place in adapter.layers}):
        layers = {name: adapters[name].layers[place] for name in weights if place in adapters[name].layers}
        wrong = [f"{place!r}{why}" for why in _no_summands(layers)]
        draft.problems += wrong
        if wrong:
            continue
        factors = {name: layer.factors() for name, layer in layers.items()}
        dtype = accumulation_dtype(*(factor.dtype for pair in factors.values() for factor in pair))
        updates = [
            WeightedUpdate(A.to(dtype), B.to(dtype), weights[name] * layers[name].spec.scale)
            for name, (A, B) in factors.items()
        ]
        fit = draft.fit(place, partial(method.combine, updates, options), updates[0].A.device)
        if fit is not None:
            draft.add(place, next(iter(layers.values())).base, fit, dtype)
    draft.problems += row_problems(SavedAdapter(draft.layers, {}))


def _no_summands(layers: Mapping[str, SavedLayer]) -> Iterator[str]:
    """Why the adapters of a layer cannot be added up."""
    first, base = next((name, layer.base) for name, layer in layers.items())
    for name, layer in layers.items():
        if layer.base != base:
            yield f" is a {_told(layer.base)} in {name!r}, and a {_told(base)} in {first!r}"
            continue
        variant = layer.spec.variant
        kind = f": {name!r} is of the variant {variant!r}"
        if is_rows(layer):
            yield f": {name!r} has rows of tokens there, which cannot be added"
        elif VARIANTS[variant].rescales:
            yield f"{kind}, which rescales the weight and cannot be added"
        elif not only_adds(variant):
            yield f"{kind}, which is more than a product of A and B"
        elif (why := unusable(*layer.factors())) is not None:
            yield f": {name!r} {why}"


def _told(base: BaseLayer) -> str:
    return " ".join([base.kind, str(base.shape), *(f"{name} {value}" for name, value in base.facts.items())])


def _chosen(method: str, given: Mapping[str, Any]) -> tuple[Method, Options]:
    """The method and what it is told, checked."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {list(METHODS)}")
    takes = METHODS[method].options
    for name, value in given.items():
        if value is not None and name not in takes:
            others = [other for other, entry in METHODS.items() if name in entry.options]
            raise ValueError(f"{name} has no effect with method {method!r}; leave it out, or choose one of {others}")
        if value is None and name in takes and name != "generator":
            raise ValueError(f"method {method!r} needs {name}")
    options = Options(**{name: value for name, value in given.items() if value is not None})
    if "r" in takes:
        check_count("r", options.r)
    check_number("density", options.density, "above 0 and at most 1")
    return METHODS[method], options


def _factors(adapters: Sequence[str], weights: Sequence[float] | None) -> dict[str, float]:
    """The weight of each adapter, checked."""
    if isinstance(adapters, str):
        raise TypeError(f"adapters must be a list of names, got {adapters!r}")
    names = list(adapters)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"adapters must be one name or more, each once, got {names}")
    numbers = [1.0] * len(names) if weights is None else list(weights)
    if len(numbers) != len(names):
        raise ValueError(f"weights must be one for each of the {len(names)} adapters, got {len(numbers)}")
    for name, number in zip(names, numbers, strict=True):
        check_number(f"the weight of {name!r}", number, "finite")
    return dict(zip(names, numbers, strict=True))

"""An adapter given another rank."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from lora_plus.errors import check_count, named_keywords
from lora_plus.files.save import describe
from lora_plus.files.saved_adapter import SavedAdapter, SavedLayer
from lora_plus.files.starts import without_start
from lora_plus.files.token_rows import is_rows
from lora_plus.model.places import adapted_places
from lora_plus.model.state import Need, require
from lora_plus.tensors.init import Lookup, Start
from lora_plus.tensors.low_rank import Factors, truncated_product
from lora_plus.tensors.matrix import accumulation_dtype
from lora_plus.tensors.random_state import draws
from lora_plus.tensors.variant import VARIANTS, AdapterSpec

from .draft import CombineReport, Draft, unusable


@named_keywords
@draws
def resize_adapter(
    model: nn.Module, *, r: int, adapter: str = "default", generator: torch.Generator | None = None
) -> CombineReport:
    """Change the rank of an adapter in place: a higher rank keeps the update exactly, a lower one takes the nearest.

    For a higher rank A gets new rows and B new columns, initialised as usual: one of the two is zero. Scale, scaling
    rule, ``requires_grad`` and other tensors (DoRA's magnitudes) stay; alpha follows from the scale. A and B become new
    parameters, so build the optimizer afterwards. An adapter with a subtracted start (PiSSA, MiLoRA, OLoRA) counts as
    one of rank 2 r, and becomes a plain one.

    Args:
        model: a model with the adapter; it is changed.
        r: the new rank, on all of its layers.
        adapter: the adapter's name.
        generator: source of the new rows of A; None for torch's global generator.

    Raises:
        KeyError: if the model holds no adapter of this name.
        TypeError, ValueError: if r is not a positive int, the model is sharded, merged or disabled, or the adapter's
            values are not finite. The model is then as it was.
    """
    check_count("r", r)
    state = require(model, "resizing an adapter", Need.GROWABLE | Need.WHOLE | Need.TRAINED, adapters=[adapter])
    placed = {place.name: (place, each) for place, each in adapted_places(state.modules, adapter)}
    draft = Draft(f"adapter {adapter!r} cannot be resized; it is unchanged")
    plain = describe(state, adapter)
    _resize(draft, plain, r, generator)
    report = draft.report(adapter)
    parts = ("lora_A", "lora_B")
    for name, (_, each) in placed.items():
        layer, own = draft.layers[name], each.tensors()
        if layer is not plain.layers[name] or layer.spec.r != each.spec.r:
            each.exchange({part: nn.Parameter(layer.tensors[part], own[part].requires_grad) for part in parts})
            each.forget_start()
        each.spec = layer.spec
    return report


@draws
def resize_saved(
    adapter: SavedAdapter, *, r: int, generator: torch.Generator | None = None
) -> tuple[SavedAdapter, CombineReport]:
    """A saved adapter at another rank, as by `resize_adapter`; everything else stays.

    Raises:
        TypeError, ValueError: if r is not a positive int, or the adapter's values are too large to compute with.
    """
    check_count("r", r)
    draft = Draft("the adapter cannot be resized")
    _resize(draft, adapter, r, generator)
    report = draft.report()
    return replace(adapter, layers=draft.layers), report


@torch.no_grad()
def _resize(draft: Draft, adapter: SavedAdapter, r: int, generator: torch.Generator | None) -> None:
    """Draft the adapter at the new rank."""
    for name, layer in sorted(adapter.layers.items()):
        if is_rows(layer):
            draft.layers[name], draft.errors[name] = layer, 0.0
            continue
        A, B = layer.factors()
        if (why := unusable(A, B) or _tied(layer.spec)) is not None:
            draft.problems.append(f"{name!r} {why}")
            continue
        if r == layer.spec.r:
            draft.layers[name], draft.errors[name] = layer, 0.0
            continue
        fit: Factors | None = Factors(A, B, 0.0)
        if r < layer.spec.r:
            dtype = accumulation_dtype(A.dtype, B.dtype)
            fit = draft.fit(name, partial(truncated_product, A.to(dtype), B.to(dtype), r), A.device)
        if fit is not None:
            draft.layers[name] = _grown(layer, fit, r, generator)
            draft.errors[name] = fit.error


def _tied(spec: AdapterSpec) -> str | None:
    """Why an adapter cannot have another rank; None if it can."""
    tied = [tensor.name for tensor in VARIANTS[spec.variant].tensors if "r" in tensor.axes]
    return f"is of the variant {spec.variant!r}, whose {', '.join(tied)} cannot have another rank" if tied else None


def _grown(layer: SavedLayer, fit: Factors, r: int, generator: torch.Generator | None) -> SavedLayer:
    """The layer with these factors, filled up to rank r with an update of zero.

    Directions that are zero in A and in B, as an update of zero gives them, would never be learnt; they start anew.
    """
    own, (A, B, _) = layer.tensors, fit
    used = (A.any(dim=-1) | B.any(dim=-2)).reshape(-1, A.shape[-2]).any(dim=0)
    A, B = A[..., used, :], B[..., used]
    missing = r - A.shape[-2]  # also where the rank falls, but not below the full one
    if missing:
        weight = A.new_empty(1).expand(*A.shape[:-2], B.shape[-2], A.shape[-1])  # of which only the shape counts
        lookup = Lookup(None) if layer.base.kind == "Embedding" else None
        new_A, new_B = Start(generator=generator).factors(weight, layer.spec.at_rank(missing), lookup)
        A, B = torch.cat([A, new_A.to(A)], dim=-2), torch.cat([B, new_B.to(B)], dim=-1)
    factors = {"lora_A": A.to(own["lora_A"].dtype).contiguous(), "lora_B": B.to(own["lora_B"].dtype).contiguous()}
    return SavedLayer(without_start(layer.base), layer.spec.at_rank(r), {**own, **factors})

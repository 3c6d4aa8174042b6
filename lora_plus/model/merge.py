"""Over a whole model: fold adapters into the weights, take them out again bit for bit, or keep them for good."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_plus.errors import Problems, warn_user
from lora_plus.layers.adapter import ActiveAdapter, summands
from lora_plus.layers.layer import LoRALayer
from lora_plus.layers.merge_state import Merge, versions
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.tensors.distributed import is_dtensor
from lora_plus.tensors.merged_weight import merged_weight
from lora_plus.text import counted, join, median_and_worst, printable

from .dry_run import left_as_it_was
from .inject import gc_paused, make_plain
from .state import EXCHANGE, Need, State, require
from .train_also import units_in, unmark_trained
from .tree import adapted_weights, own_parameters, owner_path

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class MergeReport:
    """The report of `merge_lora`. ``str()`` of it is a short text."""

    layers: list[str]
    """Names of the merged layers."""
    lost: dict[str, float]
    """For weights below float32: the relative error of the update after rounding to the weight's dtype.

    For a weight with more than half a million elements it is an estimate from every eighth block of rows.
    """
    untied: list[tuple[str, list[str]]]
    """Merged layers whose weight was shared, and the other names of that weight, which keep the base's values."""

    def __str__(self) -> str:
        lines = [f"merged {counted(len(self.layers), 'layer')}"]
        if self.lost:
            lines.append(
                f"rounding to half precision lost {median_and_worst(self.lost, '.2%', ' of the update')} (sampled)"
            )
        lines += [f"{name!r} is no longer tied to {printable(', '.join(others))}" for name, others in self.untied]
        return "\n".join(lines)


def merge_lora(model: nn.Module, *, adapters: Sequence[str] | None = None) -> MergeReport:
    """Merge adapters into the weights of a model; `unmerge_lora` undoes it.

    Each adapted layer gets a new weight that contains its adapters. The base's own parameter is kept aside. Adapters
    that are not merged have no effect until `unmerge_lora`, which restores those that are active now.

    The merged weight is computed in float32 or better, and rounded once to the weight's dtype. A weight that is shared
    with another layer is not shared while merged; a warning names such layers. If the weights are sharded by
    ``fully_shard`` or tensor parallelism, every rank must call this and `unmerge_lora`; the shards are overwritten.

    Args:
        model: the model; it is changed.
        adapters: names of the adapters to merge; None for the active ones. Active adapters keep their factors
            (`set_adapter`); the factor of others is 1.

    Returns:
        A report: the layers, and how much of each update was lost in rounding.

    Raises:
        KeyError: if the model has no such adapter.
        ValueError: if there is nothing to merge, the model is merged already, a layer's weight cannot be replaced, a
            merged weight would not be finite, or the model is sharded by FullyShardedDataParallel or ZeRO-3. The model
            is then as it was.
    """
    return _merge(_mergeable(model, adapters), adapters)


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`: each layer gets its own parameter back, the same object with the same bits.

    Raises:
        ValueError: if the model is not merged.
    """
    state = require(model, "unmerging", Need.ENABLED | Need.HIDEABLE)
    bound = [weight for _, weight in state.weights if weight.lora_merge is not None]
    if not bound:
        raise ValueError("the model is not merged")
    EXCHANGE[-1](state, (name for _, weight in state.weights for name in weight.active_names()), ())
    for weight in bound:
        weight.unmerge()


@contextmanager
def merged(model: M, *, adapters: Sequence[str] | None = None) -> Iterator[M]:
    """Merge a model inside a ``with`` block; afterwards it is merged or unmerged as before."""
    state = _mergeable(model, adapters)
    if not (was_merged := _is_merged(state, adapters)):
        _merge(state, adapters)
    try:
        yield model
    finally:
        if not was_merged and any(weight.lora_merge is not None for _, weight in adapted_weights(model)):
            unmerge_lora(model)


def merge_and_unload(model: M, *, adapters: Sequence[str] | None = None, dequantize: bool = False) -> M:
    """Merge the adapters for good: the layers become plain modules with merged weights.

    The adapters and the original weights are deleted. Modules trained in full keep their trained values.
    ``requires_grad`` is as it was before the first injection.

    Args:
        model: as in `merge_lora`.
        adapters: as in `merge_lora`.
        dequantize: turn adapted layers with a quantized weight into plain ``nn.Linear`` layers. Their weight gets the
            dtype from before quantization, if the package stores it.

    Returns:
        The same model.

    Raises:
        KeyError, ValueError: as `merge_lora`; a model that is merged already keeps its merged weights.
    """
    state = _mergeable(model, adapters, Need.RESTORABLE | Need.UNFOLLOWED)
    if not _is_merged(state, adapters):
        _merge(state, adapters, dequantize=dequantize)
    unmark_trained([unit for unit, _ in units_in(state)])
    make_plain(state)
    return model


def _mergeable(model: nn.Module, adapters: Sequence[str] | None, needs: Need = Need.ENABLED) -> State:
    saved = ", or merge the saved adapter (merge_checkpoint)"
    return require(model, "merging", needs | Need.ENABLED | Need.WHOLE, adapters=adapters or (), instead=saved)


def _is_merged(state: State, adapters: Sequence[str] | None) -> bool:
    """Whether the model is merged with these adapters; a model that is merged in any other way is an error."""
    if not any(weight.lora_merge is not None for _, weight in state.weights):
        return False
    for path, weight in state.weights:
        merge = weight.lora_merge
        if merge is None:
            raise ValueError(f"{path!r} is not merged, and other layers are; call unmerge_lora(model) first")
        there, wanted = list(merge.adapters), [adapter.name for adapter in _wanted(weight, adapters)]
        if there != wanted:
            raise ValueError(f"{path!r} is merged with {there}, not with {wanted}; call unmerge_lora(model) first")
        weight.check_unchanged(merge, by_value=True)
    return True


def _wanted(weight: AdaptedWeight, adapters: Sequence[str] | None) -> tuple[ActiveAdapter, ...]:
    return weight.lora_active if adapters is None else weight.in_order(adapters)


@gc_paused()
@torch.no_grad()
def _merge(state: State, adapters: Sequence[str] | None, *, dequantize: bool = False) -> MergeReport:
    """Merge a model: nothing is changed before all weights are computed and checked."""
    merges: list[tuple[str, AdaptedWeight, Merge]] = []
    chosen = [(path, weight, _wanted(weight, adapters)) for path, weight in state.weights]
    ties = _ties(state, [each for each in chosen if each[2]])
    results, problems = dict[Any, Merge | str](), []
    for path, weight, wanted in chosen:
        key = _key(weight, wanted)
        if (wanted or weight.lora_merge is not None) and key not in results:
            results[key] = _refusal(weight, ties.get(path, []), dequantize) or _merged_state(state, weight, wanted)
        made = results.get(key, Merge())  # where nothing is merged, what else there is has no effect, and no keys
        if isinstance(made, str):
            problems.append(f"{path!r}: {made}")
        else:
            merges.append((path, weight, made))
    if problems:
        raise Problems("nothing was merged, because of", problems)
    lost = {path: merge.lost for path, _, merge in merges if merge.lost is not None}
    report = MergeReport([path for path, _, merge in merges if merge.adapters], lost, list(ties.items()))
    if not report.layers:
        raise ValueError("there is no active adapter to merge; call inject_lora or set_adapter first")
    for path, others in report.untied:
        warn_user(
            f"the weight of {path!r} is shared with {', '.join(others)}: merging gives {path!r} its own, so load "
            "its checkpoint into an untied model; to keep the tie, use inject_lora(..., tied='both')"
        )
    EXCHANGE[-1](state, (name for _, _, merge in merges for name in merge.adapters), ())
    for _, weight, merge in merges:
        weight.bind_merged(merge)
    return report


def _merged_state(state: State, weight: AdaptedWeight, adapters: Sequence[ActiveAdapter]) -> Merge | str:
    """The merged state of a weight, or why it cannot be merged. Every rank must call it if the weight is a DTensor."""
    names = tuple(adapter.name for adapter in adapters)
    own, tensors = weight.weight, weight.noted_tensors(names)
    with state.storage.exposed(weight):
        base, dtype = weight.dense_weight()
        try:
            bound, lost = merged_weight(base, weight.layout, summands(adapters), dtype)
        except ValueError as error:
            return str(error)
        if isinstance(own, nn.Parameter):
            bound = nn.Parameter(bound, requires_grad=own.requires_grad)
        if isinstance(weight, LoRALayer) and (differs := _unlike(weight, adapters, bound)) is not None:
            return differs
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    merge = Merge(adapters=names, copies=copies, versions=versions(tensors), lost=lost, own=own, bound=bound)
    return state.storage.bound(merge, tensors)


def _refusal(weight: AdaptedWeight, others: list[str], dequantize: bool) -> str | None:
    """Why a weight, which has these other names, cannot be merged; None if it can."""
    if weight.lora_merge is not None:
        return "it is merged already; call unmerge_lora(model) first"
    if weight.stored_quantized and not dequantize:
        return (
            "its weight is quantized, and quantizing a merged one again would lose most of the update; call "
            "merge_and_unload(model, dequantize=True)"
        )
    if weight.weight_slot() is None:
        return (
            "its weight is computed by a parametrization or a hook; remove that before merging, e.g. with "
            "torch.nn.utils.parametrize.remove_parametrizations, which leaves the adapter in place"
        )
    if weight.weight.is_meta:
        return "its weight has no values here (meta device); load them first, or remove the hooks that offload them"
    if others and is_dtensor(weight.weight):
        return (
            f"its weight is shared with {', '.join(others)}, and merging writes into the shards, so that these would "
            "be changed, too; merge the saved files instead (merge_checkpoint)"
        )
    return None


def _unlike(layer: LoRALayer, adapters: Sequence[ActiveAdapter], bound: Tensor) -> str | None:
    """Why the merged weight does not compute what the adapters do, where the layer's forward is a user's own.

    Such a forward may mask, scale or normalise its weight; then ``W + s B A`` in its place is something else.
    """
    x = layer.trial_input() if layer.has_own_forward else None
    if x is None:
        return None
    active, slot = layer.lora_active, layer.weight_slot()
    assert slot is not None
    original = slot.tensor
    with left_as_it_was(layer):
        layer.eval()
        try:
            base = layer.base_forward(x)
            layer.lora_active = tuple(adapters)
            unmerged = layer.forward(x)
            slot.bind(bound)
            merged_output = layer.base_forward(x)
        except Exception as error:
            return f"its own forward could not be tried out on one input ({type(error).__name__}: {error})"
        finally:
            slot.bind(original)
            layer.lora_active = active
    rounding = 32 * torch.finfo(bound.dtype).eps * unmerged.abs().max()
    if (merged_output - unmerged).abs().max() > 0.01 * (unmerged - base).abs().max() + rounding:
        return "its own forward changes its weight before using it, so merging would change the result"
    return None


def _key(weight: AdaptedWeight, adapters: Sequence[ActiveAdapter]) -> Any:
    """The same for weights that become one merged weight: tied ones, with adapters of which one follows the other.

    Not for shards, which are written into: that would happen once for each of the weights.
    """
    tensors = weight.noted_tensors([adapter.name for adapter in adapters]).values()
    return (id(weight if is_dtensor(weight.weight) else weight.weight), *map(id, tensors))


def _ties(state: State, merged: Sequence[tuple[str, AdaptedWeight, Any]]) -> dict[str, list[str]]:
    """Which of these weights have other names outside of the layers that get the same merged weight."""
    names: dict[int, list[str]] = {id(weight.weight): [] for _, weight, _ in merged}
    alike: dict[Any, list[str]] = {}
    inside = {id(weight): alike.setdefault(_key(weight, adapters), []) for _, weight, adapters in merged}
    for path, module in state.names:
        for name, parameter in own_parameters(module):
            if id(parameter) in names:
                names[id(parameter)].append(join(path, name))
        if id(module) in inside and isinstance(module, AdaptedWeight):
            inside[id(module)].append(join(owner_path(path, module), module.weight_name))
    # a weight that is computed is another tensor each time
    found = ((path, {*names.get(id(weight.weight), ())}.difference(inside[id(weight)])) for path, weight, _ in merged)
    return {path: sorted(others) for path, others in found if others}

"""The adapters of a model: which it has, which take part, and adding, renaming, deleting and disabling them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from lora_plus.errors import Problems, check_number, named_keywords, shortened
from lora_plus.layers.adapter import check_adapter_name
from lora_plus.layers.class_swap import SwappedModule
from lora_plus.layers.freezing import restore_requires_grad
from lora_plus.layers.fused_kernels import resume_nesting
from lora_plus.tensors.init import Init, InitName, Start
from lora_plus.tensors.random_state import draws
from lora_plus.tensors.variant import VARIANTS, Scaling, VariantName

from .heads import originals
from .inject import attach, gc_paused, make_active
from .places import adapted_places
from .state import EXCHANGE, Need, require
from .train_also import drop_heads, units_in
from .tree import adapted_weights, adapters_of

M = TypeVar("M", bound=nn.Module)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters that the model holds, layer by layer in the order in which they were added."""
    return list(dict.fromkeys(adapter.name for _, adapter, _ in adapters_of(model)))


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that take part in the forward, layer by layer in the order in which they act."""
    return list(dict.fromkeys(name for _, weight in adapted_weights(model) for name in weight.active_names()))


@named_keywords
def set_adapter(
    model: nn.Module, adapters: str | Sequence[str] | Mapping[str, float], *, trainable: bool | None = None
) -> None:
    """Choose the active adapters, one or several. The forward uses only these.

    Modules in ``train_also`` belong to their adapter. They get the values of the adapter that is chosen here, or the
    base's values if no chosen adapter trains them.

    Args:
        model: a model with adapters.
        adapters: a name, several names, or a mapping from name to a factor of the adapter's scale, of any sign, such as
            ``{"style": 0.6, "task": 1.0}``. The factor holds until the next call, also in merging. It is not saved.
        trainable: True makes these adapters, and the modules trained in full with them, trainable and freezes all
            others; False freezes all; None leaves ``requires_grad`` as it is.

    Raises:
        KeyError: if the model holds no adapter of such a name.
        TypeError: if a factor is not a number.
        ValueError: if the model is merged; if two DoRA adapters are on one layer, or two adapters train one module in
            full; if a factor is not finite, or not 1 for DoRA; if modules trained in full would have to be exchanged in
            a sharded or wrapped model. The model is then as it was.
    """
    if not isinstance(adapters, Iterable):
        got = shortened(repr(adapters), 40)
        raise TypeError(f"adapters must be a name, several, or a mapping from name to factor, got {got}")
    names = (adapters,) if isinstance(adapters, str) else tuple(adapters)
    state = require(model, "choosing adapters", Need.CHANGEABLE, adapters=names)
    strengths = adapters if isinstance(adapters, Mapping) else dict.fromkeys(names, 1.0)
    names = tuple(strengths)
    for name, factor in strengths.items():
        check_number(f"the factor of {name!r}", factor, "finite")
    for path, weight in state.weights:
        for each in weight.in_order(names):
            factor = strengths[each.name]
            if VARIANTS[each.spec.variant].rescales and factor != 1:
                raise ValueError(
                    f"the factor of {each.name!r} must be 1, got {factor}: on {path!r} its variant "
                    f"{each.spec.variant!r} rescales the weight, so its effect is not proportional to its scale"
                )
    make_active(state, names, strengths, trainable=trainable)


@named_keywords
@gc_paused()
@draws
def add_adapter(
    model: M,
    adapter: str,
    *,
    like: str = "default",
    r: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    scaling: Scaling | None = None,
    variant: VariantName | None = None,
    init: InitName | Init = "kaiming",
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> M:
    """Add an adapter with the layers and settings of one that the model has, and with new initial values.

    As after `inject_lora`, the new adapter is active and trainable, and the others are frozen. It trains no module in
    full (``train_also``): if it needs its own head, use `inject_lora`. It also copies alpha, including a ratio that
    `fold_lr_ratio` has put there.

    Examples:
        >>> from lora_plus import inject_lora
        >>> from lora_plus.model import adapter_names
        >>> model = inject_lora(nn.Sequential(nn.Linear(8, 8)), ["0"], r=4, adapter="math")
        >>> adapter_names(add_adapter(model, "code", like="math"))
        ['math', 'code']

    Args:
        model: a model with adapters; it is changed.
        adapter: the name of the new adapter.
        like: the name of the adapter to copy the layers and settings from.
        r: as in `inject_lora`, on all layers; None for those of each layer.
        alpha: as in `inject_lora`, on all layers; None for those of each layer.
        dropout: as in `inject_lora`, on all layers; None for those of each layer.
        scaling: as in `inject_lora`, on all layers; None for those of each layer.
        variant: as in `inject_lora`, on all layers; None for those of each layer.
        init: as in `inject_lora`.
        generator: as in `inject_lora`.
        dtype: dtype of A and B; None for that of the other adapter.

    Returns:
        The same model.

    Raises:
        KeyError, TypeError, ValueError: if there is no adapter ``like``, the name is taken, a setting is out of range
            or does not fit a layer, or the model is merged or disabled. The model is then as it was.
    """
    check_adapter_name(adapter)
    state = require(model, "adding an adapter", Need.GROWABLE, adapters=[like], new=adapter)
    start = Start(init, dtype, generator)
    given = {"r": r, "alpha": alpha, "dropout": dropout, "scaling": scaling, "variant": variant}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    chosen = [
        (
            place,
            replace(other.spec, **changes) if VARIANTS[other.spec.variant].factors else other.spec,
            replace(start, dtype=dtype or next(iter(other.tensors().values())).dtype),
        )
        for place, other in adapted_places(state.modules, like)
    ]
    misfits = [f"{place.name!r}: {why}" for place, spec, _ in chosen if (why := place.misfits(spec)) is not None]
    if misfits:
        raise Problems(f"no adapter like {like!r} with these settings was added, because of", misfits)
    with state.storage.outlined():
        prepared = [(place, spec, place.new_tensors(state.storage, spec, own)) for place, spec, own in chosen]
        attach(state, adapter, prepared)
    return model


def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name; only the keys in ``state_dict()`` change.

    Its parameters stay the same objects, so optimizers stay valid.

    Raises:
        KeyError: if the model holds no adapter of the old name.
        TypeError, ValueError: if the new name is not valid or is taken, the adapters are disabled, the model is
            sharded by ``fully_shard``, or a layer outside of this part of a model shares the adapter.
    """
    check_adapter_name(new)
    needs = Need.UNSHARDED | Need.UNFOLLOWED | Need.ENABLED
    state = require(model, "renaming an adapter", needs, adapters=[old], new=new)
    for _, weight in state.weights:
        weight.rename_everywhere(old, new)
    for _, record, _ in state.trained(old):
        record.held = {new if name == old else name: tensors for name, tensors in record.held.items()}
        record.shown, record.home = (new if name == old else name for name in (record.shown, record.home))


def delete_adapter(model: nn.Module, adapter: str) -> None:
    """Delete one adapter. Layers without any adapter become plain again.

    Modules that it trained in full get the base's values. If it was the active one, no adapter is active afterwards:
    choose another with `set_adapter`.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: if the model is merged, or a layer outside of this part of a model shares the adapter.
    """
    needs = Need.CHANGEABLE | Need.RESTORABLE | Need.UNFOLLOWED | Need.EXCHANGEABLE
    state = require(model, "deleting an adapter", needs, adapters=[adapter])
    heads = list(state.trained(adapter))
    left = {name for _, weight in state.weights for name in weight.active_names()} - {adapter}
    EXCHANGE[-1](state, left, heads)
    drop_heads(state, heads, state.storage)
    modules = [module for _, module in state.modules]
    for module in modules:
        if isinstance(module, SwappedModule):
            module.drop_everywhere(adapter)
    if not any(state.adapters()):
        resume_nesting(modules)
        restore_requires_grad(modules)


@contextmanager
def disabled(model: M) -> Iterator[M]:
    """Use the base model inside a ``with`` block; afterwards the previous state is restored.

    Inside, adapters are skipped, and the original weights replace merged ones and modules trained in full.
    ``requires_grad`` and the merge state do not change.

    Raises:
        ValueError: if the model has no adapter (one that is injected inside would not be disabled), or if a module is
            trained in full and sharded by FullyShardedDataParallel or ZeRO-3.
    """
    state = require(model, "disabling adapters", Need.ADAPTED | Need.EXCHANGEABLE | Need.HIDEABLE)
    weights = [weight for _, weight in state.weights]
    for weight in weights:
        weight.disable()
    try:
        with originals(units_in(state)):
            yield model
    finally:
        for weight in weights:
            weight.enable()
        state.storage.settle()

"""Loads an adapter into a model: reads it, finds its places, checks everything, and only then changes the model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_plus.errors import Problems, named_keywords
from lora_plus.layers.adapter import check_adapter_name
from lora_plus.layers.freezing import set_requires_grad
from lora_plus.model.dry_run import map_tensors
from lora_plus.model.inject import attach, check_selection, gc_paused, make_active
from lora_plus.model.places import Place
from lora_plus.model.state import Need, State, require
from lora_plus.model.train_also import Head, Unit
from lora_plus.tensors.distributed import fill

from .existing import Existing
from .fit import FITTERS, choose_places, trained_units
from .paths import PathLike, stated
from .read import InMemory, described
from .rename import Names, Renaming, renamed
from .saved_adapter import SavedAdapter
from .target import ModelTarget
from .tensor_file import read_all

M = TypeVar("M", bound=nn.Module)

_FILLABLE = Need.UNMERGED | Need.UNCOPIED | Need.WHOLE | Need.TRAINED


@named_keywords
@gc_paused()
def load_adapter(
    model: M,
    source: PathLike | InMemory,
    *,
    adapter: str = "default",
    trainable: bool = False,
    names: Names | None = None,
    replace: bool = False,
) -> M:
    """Load an adapter from a file or a PEFT folder into a model, and make it the active one.

    This also injects it, so no `inject_lora` is needed before: ranks, scales and layers are those of the file. Modules
    that were trained in full get the file's values. Everything is read and checked before the model is changed.

    With ``replace=True``, an adapter of this name that the model has gets the new values in place. Its parameters stay
    the same objects, so optimizers, compiled graphs and engines stay valid. Its rank, scale and dropout stay, and
    whether it is active and trainable. Its layers must be those of the file. A lower rank is filled up with zeros, and
    another scale is multiplied into B. Refused are a higher rank, another variant and values that the model's dtype
    cannot hold.

    A model that is sharded by ``fully_shard`` or tensor parallelism must have an adapter of this name, with the file's
    layers and settings, from before sharding. It gets the file's values, as with ``replace=True``. Every rank must call
    this and read the file; if one cannot, all raise its error.

    Args:
        model: a model with the layers that the adapter was made for; it is changed.
        source: a file or folder in any of the formats; the format is detected. If a folder contains the folders of
            several adapters, pass one of these. Or an adapter in memory: the result of `read_adapter`, or of `to_peft`
            (the config and the tensors of a PEFT folder); its values are copied.
        adapter: the adapter's name in this model.
        trainable: whether the adapter, and the modules trained with it, are trainable. Everything else is frozen in
            either case.
        names: from names of modules in the file to names in the model, if they differ: a mapping of prefixes, such as
            ``{"model.layers": "blocks"}``, or a function. (With PEFT folders the function is also called for modules
            around adapted ones.) A new name of None leaves out what has the old one, such as ``{"lora_te": None}``.
        replace: whether to write into an existing adapter of this name; if there is none, it is injected.

    Returns:
        The same model.

    Raises:
        ValueError: one error with all problems of the file, and all that does not fit the model.
        FileNotFoundError: if there is no such file or folder.
    """
    check_adapter_name(adapter)
    state = State(model)
    storage = state.storage
    fillable = storage.fixed and not storage.flat
    there = (fillable or replace) and any(state.adapters(adapter))
    existing = Existing(state, adapter, exact=not replace) if there else None
    if existing is not None:
        require(state, "loading into an adapter", _FILLABLE if replace else Need.CHANGEABLE)
    else:
        before = ", or inject one of its name and settings before, to be loaded into after" if fillable else ""
        taken = "load_adapter adds one itself: leave inject_lora out, or pass replace=True (or another name)"
        require(state, "loading an adapter", Need.GROWABLE, new=adapter, instead=before, taken=taken)
    # by somebody else, who may go on to write into it, as we may do ourselves
    owned = isinstance(source, (SavedAdapter, tuple))
    with storage.outlined():
        data, places, units = storage.on_every_rank(lambda: _fitted(state, source, names, existing))
        if existing is not None:
            values = storage.on_every_rank(partial(existing.values, data, places))
            if trainable or not replace:
                set_requires_grad((module for _, module in state.modules), False)
                make_active(state, (adapter,), trainable=trainable)
            for tensor, new in values:
                fill(tensor, new)
        else:
            placed = [(places[name], layer) for name, layer in data.layers.items()]
            prepared = [(place, layer.spec, _at_home(layer.tensors, place.stored(), owned)) for place, layer in placed]
            attach(state, adapter, prepared, [*units.values()], trainable=trainable)
    for name, tensors in (map_tensors(data.trained, Tensor.clone) if owned else data.trained).items():
        held = Head(units[name], units[name].record(), adapter).tensors()
        storage.write((tensor, tensors[part]) for part, tensor in held.items())
    return model


def _fitted(
    state: State, source: PathLike | InMemory, names: Names | None, existing: Existing | None
) -> tuple[SavedAdapter, dict[str, Place], dict[str, Unit]]:
    """What a source holds, where in the model each layer of it belongs, and what of it is trained in full.

    ``existing`` is the adapter of the model that gets the values, if any.
    """
    given = source if isinstance(source, (SavedAdapter, tuple)) else stated(source)
    target = ModelTarget(state.names, Renaming(names))
    problems: list[str] = []
    data = described(given, target, problems)
    if data.layers or data.trained:
        if target.rename.given and not data.resolved:
            data = renamed(data, target.rename, problems)
        problems += target.rename.unused()
    for fitted in FITTERS:
        data = fitted(data, target, problems)
    places = choose_places(data, target, problems)
    units = trained_units(data, target, places, problems)
    if not problems and not data.layers:
        problems.append("it has no adapted layer")
    if existing is not None:
        problems += existing.differences(data, places)
    if problems:
        what = f"adapter {str(source)!r}" if isinstance(given, Path) else "the adapter"
        raise Problems(f"{what} cannot be loaded; the model is unchanged", problems)
    if existing is None:
        check_selection(state, list(places.values()), [*units.values()])
    read_all([*(layer.tensors for layer in data.layers.values()), *data.trained.values()])
    return data, places, units


def _at_home(tensors: Mapping[str, Tensor], weight: Tensor, copy: bool) -> dict[str, Tensor]:
    """An adapter's tensors where the weight is, or on the CPU where it has no values yet; in memory of their own."""
    home = torch.device("cpu") if weight.is_meta else weight.device
    return {part: tensor.to(home, copy=copy) for part, tensor in tensors.items()}

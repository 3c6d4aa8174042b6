"""Loads an adapter into a model: reads it, finds its places, checks everything, and only then changes the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_plus.errors import Problems
from lora_plus.layers.adapter import check_adapter_name
from lora_plus.layers.freezing import set_requires_grad
from lora_plus.model.inject import attach, check_selection, gc_paused, make_active
from lora_plus.model.places import Place, adapted_places
from lora_plus.model.state import Need, State, require
from lora_plus.tensors.distributed import fill

from .fit import choose_places, trained_problems
from .paths import PathLike, stated
from .read import described
from .rename import Names, Renaming, renamed
from .saved_adapter import SavedAdapter, SavedLayer
from .target import ModelTarget
from .tensor_file import read_all

M = TypeVar("M", bound=nn.Module)


@gc_paused()
def load_adapter(
    model: M,
    path: PathLike,
    *,
    adapter: str = "default",
    trainable: bool = False,
    names: Names | None = None,
) -> M:
    """Inject the adapter that a file or a PEFT folder describes, with its tensors, and make it the active one.

    No `inject_lora` is needed before: ranks, scales and layers are the file's. Modules that were trained in full get
    the file's values. Everything is read and checked before the model is touched.

    A model that is sharded by ``fully_shard`` or tensor parallelism must have an adapter of this name, with the file's
    layers and settings, from before it was sharded: it gets the file's values. Every rank must call this and read the
    file; where one cannot, all raise its error.

    Args:
        model: a model with the layers that the adapter was made for; it is changed.
        path: a file or folder in any of the formats; which it is shows in the file. Of a folder that holds folders of
            several adapters, give one of these.
        adapter: the name that it gets in this model.
        trainable: whether the adapter, and the modules trained with it, shall be trained further. Everything else is
            frozen in either case.
        names: from the names of modules in the file to those in the model, where they differ: a mapping of prefixes,
            such as ``{"model.layers": "blocks"}``, or a function, which PEFT folders also ask for the modules around
            adapted ones. None for a new name leaves out what is called so, such as ``{"lora_te": None}``.

    Returns:
        The same model.

    Raises:
        ValueError: one error with everything that is wrong with the file, or that does not fit the model.
        FileNotFoundError: if there is no such file or folder.
    """
    check_adapter_name(adapter)
    state = State(model)
    storage = state.storage
    fillable = storage.fixed and not storage.flat
    refills = fillable and any(state.adapters(adapter))
    if refills:
        require(state, "loading into an adapter", Need.CHANGEABLE)
    else:
        before = ", or inject one of its name and settings before, to be loaded into after"
        require(state, "loading an adapter", Need.GROWABLE, new=adapter, instead=before if fillable else "")
    with storage.outlined():
        data, places, modules = storage.on_every_rank(
            lambda: _fitted(state, stated(path), names, adapter if refills else None)
        )
        placed = [(places[name], layer) for name, layer in data.layers.items()]
        if refills:
            _refill(state, adapter, placed, trainable=trainable)
        else:
            prepared = [(place, layer.spec, _at_home(layer.tensors, place.stored())) for place, layer in placed]
            attach(state, adapter, prepared, [modules[name] for name in data.trained], trainable=trainable)
    for name, tensors in data.trained.items():
        held = modules[name].state_dict(keep_vars=True)
        storage.write((tensor, tensors[part]) for part, tensor in held.items())
    return model


def _fitted(
    state: State, path: Path, names: Names | None, existing: str | None
) -> tuple[SavedAdapter, dict[str, Place], dict[str, nn.Module]]:
    """What a file holds, where in the model each layer of it belongs, and the model's modules by their names.

    ``existing`` is the adapter of the model that gets the values, if any.
    """
    target = ModelTarget(state.names, Renaming(names))
    problems: list[str] = []
    data = described(path, target, problems)
    if data.layers or data.trained:
        if target.rename.given and not data.resolved:
            data = renamed(data, target.rename, problems)
        problems += target.rename.unused()
    places = choose_places(data, target, problems)
    problems += trained_problems(data, target, places) if data.trained else ()
    if not problems and not data.layers:
        problems.append("it has no adapted layer")
    if existing is not None:
        problems += _differences(state, existing, data, places)
    if problems:
        raise Problems(f"adapter {str(path)!r} cannot be loaded; the model is unchanged", problems)
    if existing is None:
        check_selection(state, list(places.values()), [target.found[id(target.modules[name])] for name in data.trained])
    read_all([*(layer.tensors for layer in data.layers.values()), *data.trained.values()])
    return data, places, target.modules


def _at_home(tensors: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """An adapter's tensors where the weight is, or on the CPU where it has no values yet."""
    home = torch.device("cpu") if weight.is_meta else weight.device
    return {part: tensor.to(home) for part, tensor in tensors.items()}


# ---- into an adapter that a sharded model has already ----------------------------------------------------------------


def _differences(state: State, adapter: str, data: SavedAdapter, places: Mapping[str, Place]) -> list[str]:
    """How the adapter of this name in the model differs from the file's in anything but values."""
    placed = {place.key: (place, each) for place, each in adapted_places(state.modules, adapter)}
    problems = []
    for name, place in places.items():
        if place.key not in placed:
            problems.append(f"{name!r} has no adapter {adapter!r} in the model")
            continue
        _, own = placed.pop(place.key)
        layer = data.layers[name]
        ours = asdict(own.spec) | {f"{part}.dtype": tensor.dtype for part, tensor in own.tensors().items()}
        file = asdict(layer.spec) | {f"{part}.dtype": tensor.dtype for part, tensor in layer.tensors.items()}
        problems += [
            f"{name!r}: {field} {file.get(field)!r} in the file, {ours.get(field)!r} in the model"
            for field in ours | file
            if file.get(field) != ours.get(field)
        ]
    problems += [f"{place.name!r} has no adapter in the file" for place, _ in placed.values()]
    trained = {path for path, _, _ in state.trained(adapter)}
    problems += [f"{path!r} is not trained in full in the file" for path in sorted(trained - data.trained.keys())]
    problems += [f"{path!r} is not trained in full in the model" for path in sorted(data.trained.keys() - trained)]
    return problems


def _refill(state: State, adapter: str, placed: Sequence[tuple[Place, SavedLayer]], *, trainable: bool) -> None:
    """Write the values of the file's layers into the model's adapter, and make it the active one, on every rank."""
    there = {place.key: each for place, each in adapted_places(state.modules, adapter)}
    for place, layer in placed:
        held = there[place.key].tensors()
        for part, tensor in layer.tensors.items():
            fill(held[part], tensor)
    set_requires_grad((module for _, module in state.modules), False)
    make_active(state, (adapter,), trainable=trainable)

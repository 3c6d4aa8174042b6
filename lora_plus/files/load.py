"""Save an adapter to disk and load one: atomic writing, strict reading, and nothing changed unless all is well."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_plus.errors import Problems
from lora_plus.layers.adapter_tensors import check_adapter_name
from lora_plus.layers.base import PARAMETER, BaseLayer
from lora_plus.layers.kinds import DTYPES
from lora_plus.model.adapters import adapter_names, check_adapter
from lora_plus.model.collector import collector_paused
from lora_plus.model.inject import attach, check_injectable, check_selection, check_unsharded
from lora_plus.model.places import Found, Place, adapted_places, find_modules, overlaps
from lora_plus.model.settings import LAYOUTS
from lora_plus.model.storage import Shards, shards_of
from lora_plus.model.train_also import trained_modules
from lora_plus.model.tree import is_spare_replica, submodule
from lora_plus.model.unsaved import check_saved
from lora_plus.tensors.distributed import fill
from lora_plus.tensors.variant import AdapterSpec
from lora_plus.text import join, near_misses
from lora_plus.version import __version__

from . import diffusers, kohya, native
from .atomic import write_safetensors
from .model_target import ModelTarget, outline
from .peft.folder import tied_to_others, write_folder
from .read import base_problem, is_finite, read_adapter, shape_problems, value_problems
from .refill import check_refillable, refill, refill_problems
from .regular import stated
from .rename import Names, Renaming, renamed
from .saved_adapter import SavedAdapter, SavedLayer
from .unread_tensors import read_all


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str = "default",
    format: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one adapter, and the modules trained with it, to disk.

    A path that ends in ``.safetensors`` gets the native format, one self-describing file; any other path becomes a
    folder in PEFT's format, but for one with the ending of a pickle, such as ``.pt``, which is refused. The formats of
    kohya's sd-scripts and of diffusers are one file too. Both name the parts of a pipeline by the model's children
    ``unet``, ``transformer``, ``text_encoder`` and ``text_encoder_2``, so put them into an ``nn.ModuleDict``; of a
    model without them, kohya's file is one for a U-Net, and diffusers' names no part.

    A file appears whole or not at all: an interrupted save leaves the old one, and the next one removes what was left
    beside it. A save that is killed just when it renames the files of a PEFT folder with other settings leaves a folder
    without config, which is refused until the next save. The same adapter gives the same bytes. A file that is replaced
    keeps its permissions, and only regular files are replaced; a link is followed.

    Where the parameters are sharded (``fully_shard``, tensor parallelism, FullyShardedDataParallel, ZeRO-3) every rank
    must call this. They are gathered, one rank writes, and all return when the files are there, or raise what the
    writer raises. Of a model in DistributedDataParallel the first rank writes, and the others return at once.

    Parameters that were unfrozen by hand are saved with no adapter: a warning names those that are trainable.

    Args:
        model: the model that holds the adapter.
        path: file or folder; missing folders are made.
        adapter: the adapter's name.
        format: ``"native"``, ``"peft"``, ``"kohya"`` (which keeps no dropout) or ``"diffusers"``; None to go by the
            path.
        metadata: texts to keep with it. PEFT's format has room for ``base_model_name_or_path``, ``revision`` and
            ``task_type`` only, kohya's and diffusers' for none.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: if the adapter is not finite, or the format cannot express it exactly, or weights under it or what
            its variant or init holds fixed are trainable. Nothing is written then.
        OSError: if the disk is full or cannot be written, or at the path is neither a regular file nor nothing, such as
            a device; it names the path. The old files are as they were.
    """
    if format is None and Path(path).suffix in _PICKLES:
        raise ValueError(
            f"{str(path)!r} has the name of a pickle, which is not written; end it in '.safetensors' for one file, or "
            "leave the ending out for a folder in PEFT's format"
        )
    real = Path(os.path.realpath(stated(path)))
    chosen = ("native" if str(path).endswith(".safetensors") else "peft") if format is None else format
    if chosen not in _WRITERS:
        raise ValueError(f"unknown format {format!r}; choose one of {sorted(_WRITERS)}, or None to go by the path")
    for key, text in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata must map str to str, got {key!r}: {text!r}")
    check_adapter(model, adapter)
    check_saved(model, adapter, f"adapter {adapter!r} was not saved")
    if is_spare_replica(model):
        return
    data = describe(model, adapter, metadata)

    def write() -> None:
        broken = not_finite(data, model)
        if broken:
            raise Problems(f"adapter {adapter!r} was not saved", broken)
        _WRITERS[chosen](real, data, model)

    shards_of(model).on_one_rank(write)


@collector_paused()
def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str = "default",
    trainable: bool = False,
    names: Names | None = None,
) -> nn.Module:
    """Inject the adapter that a file or a PEFT folder describes, with its tensors, and make it the active one.

    No `inject_lora` is needed before: ranks, scales and layers are the file's. Modules that were trained in full get
    the file's values. Everything is read and checked before the model is touched.

    A model that is sharded by ``fully_shard`` or tensor parallelism must have an adapter of this name, with the file's
    layers and settings, from before it was sharded: it gets the file's values. Every rank must call this and read the
    file; where one cannot, all raise its error.

    Args:
        model: a model with the layers that the adapter was made for; it is changed.
        path: a ``.safetensors`` file in the native format, in kohya's or in diffusers', or a folder in PEFT's; which
            it is shows in the file. Of a folder that holds folders of several adapters, give one of these.
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
    shards = shards_of(model)
    refills = shards.fixed and not shards.flat and adapter in adapter_names(model)
    if refills:
        check_refillable(model)
    else:
        instead = "" if shards.flat else ", or inject one of its name and settings before, to be loaded into after"
        check_unsharded(model, f"load the adapter before the model is sharded{instead}")
        check_injectable(model, adapter)
    with shards.outlined():
        data, chosen, by_name = shards.on_every_rank(lambda: _read(model, stated(path), adapter, names, refills))
        if refills:
            refill(model, adapter, data, chosen, trainable=trainable)
        else:
            prepared = []
            for name, layer in data.layers.items():
                place, spec = chosen[name]
                weight = place.stored()
                home = torch.device("cpu") if weight.is_meta else weight.device
                prepared.append((place, spec, {part: tensor.to(home) for part, tensor in layer.tensors.items()}))
            attach(model, adapter, prepared, [by_name[name].module for name in data.trained], trainable=trainable)
    for name, tensors in data.trained.items():
        held = by_name[name].module.state_dict(keep_vars=True)
        with shards.gathered(held.values(), write=True):
            for part, tensor in held.items():
                fill(tensor, tensors[part])
    return model


def _read(
    model: nn.Module, path: Path, adapter: str, names: Names | None, refills: bool
) -> tuple[SavedAdapter, dict[str, tuple[Place, AdapterSpec]], dict[str, Found]]:
    """What a file holds, where in the model its layers belong, and the model's modules; all is checked."""
    target = ModelTarget(model, Renaming(names))
    by_name, places = target.by_name, target.places
    problems: list[str] = []
    data = read_adapter(path, target, problems)
    if data.layers or data.trained:
        if target.rename.given and not data.resolved:
            data = renamed(data, target.rename, problems)
        problems += target.rename.unused()
    if not data.layers.keys() <= places.keys():
        places = target.parameters | places
    chosen = _choose_places(data, places, by_name, problems)
    _check_trained(data, by_name, chosen, problems)
    if path.is_dir():
        problems += [
            f"{name!r} is trained in full and tied to {other!r}, which PEFT unties; untie them in the model first"
            for name, other in tied_to_others(model, data.trained)
        ]
    if not problems and not data.layers:
        problems.append("it has no adapted layer")
    if refills:
        problems += refill_problems(model, adapter, data, chosen)
    if problems:
        raise Problems(f"adapter {str(path)!r} cannot be loaded; the model is unchanged", problems)
    if not refills:
        check_selection(model, [place for place, _ in chosen.values()], [by_name[name] for name in data.trained])
    read_all([*(layer.tensors for layer in data.layers.values()), *data.trained.values()])
    return data, chosen, by_name


# ---- model -> plain data ---------------------------------------------------------------------------------------------


def describe(model: nn.Module, adapter: str, metadata: Mapping[str, str] | None = None) -> SavedAdapter:
    """One adapter of a model as plain data. Sharded tensors are gathered, so every rank must call this."""
    check_adapter(model, adapter)
    shards = shards_of(model)
    layers = {}
    for place, site in adapted_places(model):
        if adapter in site.lora_specs:
            spec, tensors = site.plain(adapter, shards.whole(site.adapter_tensors(adapter)))
            layers[place.name] = SavedLayer(_base(place, shards), spec, tensors)
    found = list(trained_modules(model, adapter))
    if any(record.exchanged for _, _, record in found):
        raise ValueError("the modules trained in full show their original values; save outside of disabled(model)")
    inside = {id(child) for _, module, _ in found for child in module.modules() if child is not module}
    trained = {
        path: shards.whole(module.state_dict(keep_vars=True)) for path, module, _ in found if id(module) not in inside
    }
    return SavedAdapter(layers, trained, dict(metadata or {}))


def _base(place: Place, shards: Shards) -> BaseLayer:
    base = place.base()
    return replace(base, shape=tuple(shards.shape(place.stored()))) if shards.flat else base


def not_finite(data: SavedAdapter, model: nn.Module) -> list[str]:
    """The adapter's tensors, and the parameters trained with it, that have values that are not finite."""
    tensors = [
        (join(name, part), tensor) for name, layer in data.layers.items() for part, tensor in layer.tensors.items()
    ]
    tensors += [
        (join(name, part), trained[part])
        for name, trained in data.trained.items()
        for part, _ in submodule(model, name).named_parameters()
        if part in trained
    ]
    return [f"{name!r} has values that are not finite" for name, tensor in tensors if not is_finite(tensor)]


# ---- writing ---------------------------------------------------------------------------------------------------------


def _write_native(path: Path, data: SavedAdapter, model: nn.Module) -> None:
    tensors, metadata = native.write(data, __version__)
    write_safetensors(path, tensors, metadata)


def _write_kohya(path: Path, data: SavedAdapter, model: nn.Module) -> None:
    names = [name for entry in find_modules(model).values() for name in entry.names]
    write_safetensors(path, kohya.write(data, names), {})


def _write_diffusers(path: Path, data: SavedAdapter, model: nn.Module) -> None:
    tensors, metadata = diffusers.write(data, lambda name: outline(find_modules(submodule(model, name))))
    write_safetensors(path, tensors, metadata)


_WRITERS: dict[str, Callable[[Path, SavedAdapter, nn.Module], None]] = {
    "native": _write_native,
    "peft": write_folder,
    "kohya": _write_kohya,
    "diffusers": _write_diffusers,
}

_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}

FORMATS = tuple(_WRITERS)
"""What `save_adapter` can write."""


# ---- checking against the model --------------------------------------------------------------------------------------


def _choose_places(
    data: SavedAdapter, places: Mapping[str, Place], by_name: Mapping[str, Found], problems: list[str]
) -> dict[str, tuple[Place, AdapterSpec]]:
    """The place in the model and the settings of each layer of the file; what does not fit is added to the problems."""
    chosen: dict[str, tuple[Place, AdapterSpec]] = {}
    seen: dict[Any, str] = {}
    missing: list[str] = []
    for name, layer in data.layers.items():
        place = _place(name, layer.base, places, by_name)
        if place is None:
            missing.append(name)
            continue
        chosen[name] = place, layer.spec
        reason = place.refusal() or place.overlapped()
        if reason is not None:
            problems.append(f"{name!r} cannot be adapted: it is {reason}")
            continue
        first = seen.setdefault(place.key, name)
        if first != name:
            problems.append(f"{name!r} and {first!r} are one module in this model")
        unfit = place.misfits(layer.spec)
        misfits = [f"{name!r}: {line}" for line in _misfits(layer, place.base())]
        # the values of what does not fit the model can be of any size
        problems += [*(misfits or value_problems(name, layer)), *([f"{name!r}: {unfit}"] if unfit else [])]
    problems += _missing_modules(missing, by_name)
    problems += overlaps({place.key: place for place, _ in chosen.values()}.values())
    problems += _unlike_blocks(chosen)
    return chosen


def _unlike_blocks(chosen: Mapping[str, tuple[Place, AdapterSpec]]) -> Iterator[str]:
    """Rows of one weight with different dropout, which have one input between them."""
    first: dict[int, tuple[str, float]] = {}
    for name, (place, spec) in chosen.items():
        other, dropout = first.setdefault(id(place.owner), (name, spec.dropout))
        if place.parameter is None and dropout != spec.dropout:
            told = f"dropout {dropout} and {spec.dropout}"
            yield f"{other!r} and {name!r} are rows of one weight with {told}; write the same for both"


def _place(name: str, base: BaseLayer, places: Mapping[str, Place], by_name: Mapping[str, Found]) -> Place | None:
    """Where in the model a layer of the file belongs."""
    rows = base.facts.get("rows")
    owner_name = base.facts.get("parameter", "").rpartition(".")[0]
    inside = name.startswith(f"{owner_name}.") or not owner_name
    if base.kind != PARAMETER and rows is not None and inside and owner_name in by_name:
        label = name.removeprefix(owner_name).removeprefix(".")
        owner = by_name[owner_name].module
        return Place(owner, by_name[owner_name].name, [(name, owner)], label=label, rows=tuple(rows))
    place = places.get(name)
    if place is not None and base.kind == PARAMETER and base.layout in LAYOUTS:
        return replace(place, layout=base.layout)  # a user may have stated it
    return place


def _missing_modules(names: list[str], by_name: Mapping[str, Found]) -> list[str]:
    # looking for near misses is slow, and a few of them show what is wrong
    hints = [near_misses(name, by_name) for name in names[:3]] + [""] * len(names[3:])
    return [f"{name!r}: the model has no such module{hint}" for name, hint in zip(names, hints, strict=True)]


_BASE_FIELDS = ("kind", "layout", "shape", "facts")


def _misfits(layer: SavedLayer, base: BaseLayer) -> list[str]:
    """How a layer's adapter differs from what this layer of the model needs."""
    if layer.base != base:
        pairs = [(field, getattr(layer.base, field), getattr(base, field)) for field in _BASE_FIELDS]
        return [f"{field} {file!r} in the file, {ours!r} in the model" for field, file, ours in pairs if file != ours]
    # True and 1.0 equal 1, and are no extents
    told = layer.base.facts or not all(type(extent) is int for extent in layer.base.shape)
    wrong = base_problem(layer.base) if told else None
    return shape_problems(layer) if wrong is None else [wrong]


def _check_trained(
    data: SavedAdapter,
    by_name: Mapping[str, Found],
    chosen: Mapping[str, tuple[Place, AdapterSpec]],
    problems: list[str],
) -> None:
    adapted = {id(place.owner): name for name, (place, _) in chosen.items()}
    seen: dict[int, str] = {}
    for name, tensors in data.trained.items():
        if name not in by_name:
            problems += _missing_modules([name], by_name)
            continue
        module = by_name[name].module
        first = seen.setdefault(id(module), name)
        if first != name:
            problems.append(f"{name!r} and {first!r} are one module in this model")
        inside = [adapted[id(child)] for child in module.modules() if id(child) in adapted]
        if inside:
            problems.append(f"{name!r} is trained in full, but {inside[0]!r} in it has an adapter")
            continue
        wanted: dict[str, Any] = module.state_dict(keep_vars=True)
        problems += [f"{join(name, part)!r} is missing" for part in wanted if part not in tensors]
        for part, tensor in tensors.items():
            reason = _trained_misfit(tensor, wanted[part]) if part in wanted else f"{name!r} has no such tensor"
            if reason is not None:
                problems.append(f"{join(name, part)!r}: {reason}")


def _trained_misfit(tensor: Tensor, wanted: Tensor) -> str | None:
    """Why a tensor of a module trained in full cannot take the place of the model's own; None if it can."""
    if tensor.shape != wanted.shape:
        return f"shape {tuple(tensor.shape)} in the file, {tuple(wanted.shape)} in the model"
    if tensor.dtype != wanted.dtype and not (tensor.dtype in DTYPES and wanted.dtype in DTYPES):
        return f"{tensor.dtype} in the file, {wanted.dtype} in the model"
    if wanted.is_meta:
        return "the model has no values for it yet (it is on the meta device); load the base model first"
    if isinstance(wanted, nn.Parameter) and not is_finite(tensor):
        return "values that are not finite"
    return None

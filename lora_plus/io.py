"""Save an adapter to disk and load one: atomic writing, strict reading, and nothing changed unless all is well."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor, nn

from . import functional
from .adapter_tensors import check_adapter_name
from .adapters import check_adapter, join, unwrap, whole
from .collector import collector_paused
from .formats import native, peft
from .formats.adapter import Adapter, BaseLayer, LayerAdapter, Problems
from .inject import attach, check_injectable, check_selection
from .layers import lora_class
from .lora_layer import lora_layers
from .targets import Found, find_modules, near_misses, refusal
from .trained import trained_modules
from .variants import AdapterSpec
from .version import __version__

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
    folder in PEFT's format. A file appears whole or not at all: an interrupted save leaves the old one. The same
    adapter gives the same bytes.

    Args:
        model: the model that holds the adapter.
        path: file or folder; missing folders are made.
        adapter: the adapter's name.
        format: ``"native"`` or ``"peft"``; None to go by the path.
        metadata: texts to keep with it. PEFT's format has room for ``base_model_name_or_path``, ``revision`` and
            ``task_type`` only.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: if the adapter is not finite, or the format cannot express it exactly. Nothing is written then.
    """
    chosen = ("native" if str(path).endswith(".safetensors") else "peft") if format is None else format
    if chosen not in _WRITERS:
        raise ValueError(f"unknown format {format!r}; choose one of {sorted(_WRITERS)}, or None to go by the path")
    for key, text in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata must map str to str, got {key!r}: {text!r}")
    model = unwrap(model)
    data = describe(model, adapter, metadata)
    broken = [
        f"{join(name, part)!r} has values that are not finite"
        for name, layer in data.layers.items()
        for part, tensor in layer.tensors.items()
        if not _is_finite(tensor)
    ]
    broken += [
        f"{join(name, part)!r} has values that are not finite"
        for name, tensors in data.trained.items()
        for part, _ in model.get_submodule(name).named_parameters()
        if part in tensors and not _is_finite(tensors[part])
    ]
    if broken:
        raise Problems(f"adapter {adapter!r} was not saved", broken)
    _WRITERS[chosen](Path(os.path.realpath(path)), data, model)


@collector_paused()
def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, adapter: str = "default", trainable: bool = False
) -> nn.Module:
    """Inject the adapter that a file or a PEFT folder describes, with its tensors, and make it the active one.

    No `inject_lora` is needed before: ranks, scales and layers are the file's. Modules that were trained in full get
    the file's values. Everything is read and checked before the model is touched.

    Args:
        model: a model with the layers that the adapter was made for; it is changed.
        path: a ``.safetensors`` file in the native format, or a folder in PEFT's.
        adapter: the name that it gets in this model.
        trainable: whether the adapter, and the modules trained with it, shall be trained further. Everything else is
            frozen in either case.

    Returns:
        The same model.

    Raises:
        ValueError: one error with everything that is wrong with the file, or that does not fit the model.
        FileNotFoundError: if there is no such file or folder.
    """
    check_adapter_name(adapter)
    check_injectable(model, adapter)
    path = Path(path)
    found = find_modules(unwrap(model))
    by_name = {name: entry for entry in found.values() for name in entry.names}
    problems: list[str] = []
    data = _read(path, by_name, problems)
    _check_layers(data, by_name, problems)
    _check_trained(data, by_name, problems)
    if not problems and not data.layers:
        problems.append("it has no adapted layer")
    if problems:
        raise Problems(f"adapter {str(path)!r} cannot be loaded; the model is unchanged", problems)
    trained = [by_name[name] for name in data.trained]
    check_selection(model, [by_name[name] for name in data.layers], trained)
    prepared = []
    for name, layer in data.layers.items():
        weight = by_name[name].module.weight
        assert isinstance(weight, Tensor)
        home = torch.device("cpu") if weight.is_meta else weight.device
        tensors = {part: tensor.to(home) for part, tensor in layer.tensors.items()}
        prepared.append((by_name[name].module, AdapterSpec(**layer.settings), tensors))
    attach(model, adapter, prepared, [entry.module for entry in trained], trainable=trainable)
    with torch.no_grad():
        for name, tensors in data.trained.items():
            for part, tensor in by_name[name].module.state_dict(keep_vars=True).items():
                tensor.copy_(tensors[part])
    return model


# ---- model -> plain data ---------------------------------------------------------------------------------------------


def describe(model: nn.Module, adapter: str, metadata: Mapping[str, str] | None = None) -> Adapter:
    """One adapter of a model as plain data. Sharded tensors are gathered, so every rank must call this."""
    check_adapter(model, adapter)
    layers = {}
    for path, layer in lora_layers(model):
        if adapter in layer.lora_specs:
            spec = layer.lora_specs[adapter]
            settings = {name: getattr(spec, name) for name in native.SETTINGS}
            tensors = {name: whole(tensor) for name, tensor in layer.adapter_tensors(adapter).items()}
            layers[path] = LayerAdapter(_base(layer), settings, spec.scale, tensors)
    found = list(trained_modules(model, adapter))
    if any(record.exchanged for _, _, record in found):
        raise ValueError("the modules trained in full show their original values; save outside of disabled(model)")
    inside = {id(child) for _, module, _ in found for child in module.modules() if child is not module}
    trained = {
        path: {name: whole(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
        for path, module, _ in found
        if id(module) not in inside
    }
    return Adapter(layers, trained, dict(metadata or {}))


def _base(module: nn.Module) -> BaseLayer:
    kind = lora_class(module)
    assert kind is not None
    assert isinstance(module.weight, Tensor)
    # a user's own subclass is written as the torch layer that it is
    return BaseLayer(kind.kind_name(), kind.layout, tuple(module.weight.shape), kind.base_facts(module))


# ---- writing ---------------------------------------------------------------------------------------------------------


def _write_native(path: Path, data: Adapter, model: nn.Module) -> None:
    tensors, metadata = native.write(data, __version__)
    write_safetensors(path, tensors, metadata)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _write_peft(path: Path, data: Adapter, model: nn.Module) -> None:
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    containers = [name for name in data.trained if isinstance(model.get_submodule(name), _CONTAINERS)]
    tied = _tied_to_others(model, list(data.trained))
    if tied:
        raise Problems("the adapter cannot be written in PEFT's format", tied)
    tensors, config = peft.write(data, names, containers)
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with _replacing(path / peft.WEIGHTS, path / peft.CONFIG) as (weights, config_file):
        _serialize(weights, tensors, peft.METADATA)
        config_file.write_text(text, encoding="utf-8")


def _tied_to_others(model: nn.Module, trained: list[str]) -> list[str]:
    """Parameters of modules trained in full that modules outside share: PEFT would load them untied."""
    inside: dict[int, str] = {}
    outside: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owned = any(not path or name.startswith(f"{path}.") for path in trained)
        (inside if owned else outside).setdefault(id(parameter), name)
    return [
        f"train_also {name!r} is tied to {outside[key]!r}, and PEFT would untie them; train both, or save a file"
        for key, name in inside.items()
        if key in outside
    ]


_WRITERS: dict[str, Callable[[Path, Adapter, nn.Module], None]] = {"native": _write_native, "peft": _write_peft}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, with a header that is the same for the same contents."""
    with _replacing(path) as (temporary,):
        _serialize(temporary, tensors, metadata)


def _serialize(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape), data_ptr=tensor.data_ptr(),
            data_len=tensor.numel() * tensor.element_size(),
        )
        for name, tensor in held.items()
    }  # fmt: skip
    serialize_file(specs, str(path), dict(metadata))


@contextmanager
def _replacing(*paths: Path) -> Iterator[list[Path]]:
    """Temporary paths beside ``paths`` that take their places when the block ends well, and are removed otherwise.

    What was written is on the disk before a name changes, so a crash leaves the old file or the new one, whole. Of
    several files the last is the one without which the others are not read: where it changes, it is out of the way
    until the others are in place, so a crash between two renames leaves no mixture of old and new that could be read.
    """
    temporaries = [path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp") for path in paths]
    last, aside = paths[-1], temporaries[-1].with_suffix(".old")
    try:
        for path, temporary in zip(paths, temporaries, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
        modes = [temporary.stat().st_mode for temporary in temporaries]
        yield temporaries
        for temporary, mode in zip(temporaries, modes, strict=True):
            temporary.chmod(mode)  # safetensors makes its files readable by the owner only
            _flush(temporary)
        if len(paths) > 1 and last.exists() and last.read_bytes() != temporaries[-1].read_bytes():
            os.replace(last, aside)
        for path, temporary in zip(paths, temporaries, strict=True):
            os.replace(temporary, path)
        if os.name == "posix":  # a rename is lasting once its folder is written; elsewhere folders cannot be opened
            for folder in {path.parent for path in paths}:
                _flush(folder)
    finally:
        if aside.exists() and temporaries[0].exists():  # nothing took its place yet
            os.replace(aside, last)
        for leftover in (*temporaries, aside):
            leftover.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path, by_name: Mapping[str, Found], problems: list[str]) -> Adapter:
    """The adapter at a path, in whichever format it is."""
    if path.is_dir():
        return _read_peft(path, by_name, problems)
    if not path.exists():
        raise FileNotFoundError(f"there is no adapter at {str(path)!r}")
    tensors, metadata = _read_safetensors(path, problems)
    if problems:
        return Adapter({}, {})
    if native.KEY not in metadata:
        hint = f"; give the folder {str(path.parent)!r}" if (path.parent / peft.CONFIG).exists() else ""
        problems.append(f"it is a safetensors file, but its header does not describe an adapter{hint}")
        return Adapter({}, {})
    return native.read(tensors, metadata, _scale, problems)


def _read_peft(path: Path, by_name: Mapping[str, Found], problems: list[str]) -> Adapter:
    present = [name for name in (peft.CONFIG, peft.WEIGHTS) if (path / name).exists()]
    for name in {peft.CONFIG, peft.WEIGHTS} - set(present):
        pickled = (path / name).with_suffix(".bin").exists()
        hint = "; there is a .bin file, which is a pickle and is not read: convert it to safetensors" if pickled else ""
        problems.append(f"the folder has no {name}{hint}")
    if problems:
        return Adapter({}, {})
    try:
        config = json.loads((path / peft.CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        problems.append(f"{peft.CONFIG} is not valid JSON: {error}")
    tensors, _ = _read_safetensors(path / peft.WEIGHTS, problems)
    if problems:
        return Adapter({}, {})
    bases = {name: None if refusal(entry) else _base(entry.module) for name, entry in by_name.items()}
    return peft.read(tensors, config, bases, _scale, problems)


def _scale(settings: dict[str, Any]) -> float:
    return AdapterSpec(**settings).scale


def _read_safetensors(path: Path, problems: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            # copies, because what safetensors hands out may be a window on the file
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        problems.append(f"{path.name} is not a whole safetensors file: {error}")
        return {}, {}


# ---- checking against the model --------------------------------------------------------------------------------------


def _check_layers(data: Adapter, by_name: Mapping[str, Found], problems: list[str]) -> None:
    seen: dict[int, str] = {}
    missing: list[str] = []
    for name, layer in data.layers.items():
        for part, tensor in layer.tensors.items():
            if tensor.dtype not in _DTYPES:
                problems.append(f"{join(name, part)!r} is {tensor.dtype}, expected one of {_DTYPES}")
            elif not _is_finite(tensor):
                problems.append(f"{join(name, part)!r} has values that are not finite")
        if name not in by_name:
            missing.append(name)
            continue
        entry = by_name[name]
        reason = refusal(entry)
        if reason is not None:
            problems.append(f"{name!r} cannot be adapted: it is {reason}")
            continue
        first = seen.setdefault(id(entry.module), name)
        if first != name:
            problems.append(f"{name!r} and {first!r} are one module in this model")
        problems += [f"{name!r}: {line}" for line in _misfits(layer, _base(entry.module))]
    problems += _missing_modules(missing, by_name)


def _missing_modules(names: list[str], by_name: Mapping[str, Found]) -> list[str]:
    # looking for near misses is slow, and a few of them show what is wrong
    hints = [near_misses(name, by_name) for name in names[:3]] + [""] * len(names[3:])
    return [f"{name!r}: the model has no such module{hint}" for name, hint in zip(names, hints, strict=True)]


_BASE_FIELDS = ("kind", "layout", "shape", "facts")


def _misfits(layer: LayerAdapter, base: BaseLayer) -> list[str]:
    """How a layer's adapter differs from what this layer of the model needs."""
    pairs = [(field, getattr(layer.base, field), getattr(base, field)) for field in _BASE_FIELDS]
    lines = [f"{field} {file!r} in the file, {ours!r} in the model" for field, file, ours in pairs if file != ours]
    if lines:
        return lines
    out_features, in_features = functional.matrix_shape(base.layout, base.shape)
    r = layer.settings["r"]
    expected = {"lora_A": (r, in_features), "lora_B": (out_features, r), "lora_magnitude": (out_features,)}
    return [
        f"{part} has shape {tuple(tensor.shape)}, expected {expected[part]}"
        for part, tensor in layer.tensors.items()
        if tuple(tensor.shape) != expected[part]
    ]


def _check_trained(data: Adapter, by_name: Mapping[str, Found], problems: list[str]) -> None:
    adapted = {id(by_name[name].module): name for name in data.layers if name in by_name}
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
    if tensor.dtype != wanted.dtype and not (tensor.dtype in _DTYPES and wanted.dtype in _DTYPES):
        return f"{tensor.dtype} in the file, {wanted.dtype} in the model"
    if wanted.is_meta:
        return "the model has no values for it yet (it is on the meta device); load the base model first"
    if isinstance(wanted, nn.Parameter) and not _is_finite(tensor):
        return "values that are not finite"
    return None


def _is_finite(tensor: Tensor) -> bool:
    return tensor.dtype not in _DTYPES or bool(torch.isfinite(tensor).all())

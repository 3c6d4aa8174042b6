"""The library's own format: one safetensors file that says of itself all it takes to load it or merge it.

Tensors are named ``<module>.lora_A``, ``<module>.lora_B``, and ``<module>.lora_magnitude`` or whatever else the variant
states; those of modules and parameters trained in full keep their plain names. The header's metadata has one entry,
``lora_plus``, a JSON document::

    {"format_version": 1, "library_version": "0.1.0",
     "r": 8, "alpha": 16, "scaling": "standard", "variant": "lora", "dropout": 0.0,
     "layers": {"blocks.0.q": {"kind": "Linear", "layout": "o i -> o i", "shape": [64, 64]},
                "blocks.0.v": {"kind": "Linear", "layout": "o i -> o i", "shape": [64, 64], "r": 4}},
     "train_also": {"head": ["bias", "weight"], "blocks.0.q.bias": [""]},
     "metadata": {}}

A layer's entry repeats a setting only where it deviates from the one on top; ``groups`` and ``max_norm`` are there for
layers that have them. An adapter of a parameter that no layer is called for has the kind ``"Parameter"``, and ``of``
where a known module reads it; an adapter of some rows has ``rows``, the first one and the one after the last. Both have
``parameter``, the weight's full name. Rows of tokens have ``ids``, a tensor ``lora_rows`` in the place of A and B,
and in ``tied``, by name, the kinds of the other layers that have the same weight. An adapter with such an entry is that
of these layers too. ``start`` has the r and the alpha of an adapter that started from the weight: it has rank 2 r in
the file, and the second half of A and B is what it started from.

The update of a layer is ``scale * B @ A`` with ``scale = alpha / r`` (``"standard"``) or ``alpha / sqrt(r)``
(``"rslora"``), a matrix ``(out, in)`` in the layout that the entry states, or a stack of them.
"""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from lora_plus.layers.base_layer import BaseLayer
from lora_plus.tensors.variant import AdapterSpec, saved_tensors
from lora_plus.text import join, parents
from lora_plus.version import __version__

from .formats import FORMATS, Contents, Files, Format
from .json_text import parsed
from .saved_adapter import SETTINGS, SavedAdapter, SavedLayer, checked_spec, most_common, settings_of
from .target import Target

KEY = "lora_plus"
VERSION = 1
FACTS = ("groups", "max_norm", "parameter", "rows", "of", "ids", "tied", "start")
_ENTRIES = {"kind", "layout", "shape", *FACTS, *SETTINGS}


def write(adapter: SavedAdapter, target: Target, problems: list[str]) -> Files:
    """The file; equal adapters give equal files."""
    layers = dict(sorted(adapter.layers.items()))
    common = {name: most_common([getattr(layer.spec, name) for layer in layers.values()]) for name in SETTINGS}
    deviating = {  # layers share their settings, mostly
        key: {name: value for name, value in settings_of(spec).items() if value != common[name]}
        for key, spec in {id(layer.spec): layer.spec for layer in layers.values()}.items()
    }
    document = {
        "format_version": VERSION,
        "library_version": __version__,
        **common,
        "layers": {
            name: {"kind": layer.base.kind, "layout": layer.base.layout, "shape": layer.base.shape}
            | {fact: layer.base.facts[fact] for fact in FACTS if fact in layer.base.facts}
            | deviating[id(layer.spec)]
            for name, layer in layers.items()
        },
        "train_also": {name: sorted(tensors) for name, tensors in sorted(adapter.trained.items())},
        "metadata": dict(sorted(adapter.metadata.items())),
    }
    tensors = {join(path, name): tensor for path, layer in layers.items() for name, tensor in layer.tensors.items()}
    for path, trained in adapter.trained.items():
        tensors |= {join(path, name): tensor for name, tensor in trained.items()}
    return {"": Contents(tensors, {KEY: json.dumps(document, allow_nan=False, separators=(",", ":"))})}


def read(files: Files, target: Target, problems: list[str]) -> SavedAdapter:
    """The adapter that a file describes; this format needs to know nothing of the target."""
    tensors, metadata = files[""]
    document = _document(metadata[KEY], problems)
    adapter = SavedAdapter({}, {}, dict(document.get("metadata", {})))
    left, unread = dict(tensors), set[str]()
    usual = checked_spec("", {name: document.get(name) for name in SETTINGS}, [])
    for path, entry in document.get("layers", {}).items():
        layer = _layer(path, entry, document, usual, left, problems)
        if layer is None:
            unread.add(path)
        else:
            adapter.layers[path] = layer
    for path, names in document.get("train_also", {}).items():
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not names or not texts or len(set(names)) < len(names):
            problems.append(f"train_also {path!r}: expected a list of different tensor names, got {names!r}")
            unread.add(path)
            continue
        found = {name: left.pop(join(path, name)) for name in names if join(path, name) in left}
        problems += [f"tensor {join(path, name)!r} is missing" for name in names if name not in found]
        if len(found) == len(names):
            adapter.trained[path] = found
    if document:
        extra = [name for name in sorted(left) if "" not in unread and unread.isdisjoint(parents(name))]
        problems += [f"tensor {name!r} belongs to no layer that the file describes" for name in extra]
    return adapter


def _document(text: str, problems: list[str]) -> dict[str, Any]:
    try:
        document = parsed(text)
    except ValueError as error:
        problems.append(f"metadata {KEY!r} is not valid JSON: {error}")
        return {}
    if not isinstance(document, dict):
        problems.append(f"metadata {KEY!r} must be a JSON object, got {type(document).__name__}")
        return {}
    version = document.get("format_version")
    if version != VERSION or not isinstance(version, int) or isinstance(version, bool):
        problems.append(f"format_version is {version!r}, this library reads {VERSION}")
        return {}
    known = {"format_version", "library_version", "layers", "train_also", "metadata", *SETTINGS}
    problems += [f"unknown entry {name!r}" for name in sorted(set(document) - known)]
    problems += [f"entry {name!r} is missing" for name in (*SETTINGS, "layers") if name not in document]
    wrong = [name for name in ("layers", "train_also", "metadata") if not isinstance(document.get(name, {}), dict)]
    problems += [f"entry {name!r} must be an object, got {document[name]!r}" for name in wrong]
    if wrong:
        return {}
    for name, text in document.get("metadata", {}).items():
        if not isinstance(text, str):
            problems.append(f"metadata {name!r} must be a text, got {text!r}")
    return document


def _layer(
    path: str,
    entry: Any,
    document: dict[str, Any],
    usual: AdapterSpec | None,
    left: dict[str, Tensor],
    problems: list[str],
) -> SavedLayer | None:
    """One layer of the document with its tensors, out of those ``left``; ``usual`` are the settings on top."""
    if not isinstance(entry, dict):
        problems.append(f"layer {path!r}: expected an object, got {entry!r}")
        return None
    unknown = sorted(entry.keys() - _ENTRIES)
    problems += [f"layer {path!r}: unknown entry {name!r}" for name in unknown]
    kind, layout, shape = entry.get("kind"), entry.get("layout"), entry.get("shape")
    plain = isinstance(shape, list) and {*map(type, shape)} <= {int, float, str, bool}
    if not (isinstance(kind, str) and isinstance(layout, str) and plain):
        problems.append(f"layer {path!r}: kind, layout and shape must be there, got {kind!r}, {layout!r}, {shape!r}")
        return None
    spec = usual
    if usual is None or not entry.keys().isdisjoint(SETTINGS):
        settings = {name: entry.get(name, document.get(name)) for name in SETTINGS}
        spec = checked_spec(f"layer {path!r}", settings, problems)
    if spec is None:
        return None
    names = {tensor.name: join(path, tensor.name) for tensor in saved_tensors(spec.variant)}
    found = {part: left.pop(name) for part, name in names.items() if name in left}
    if len(found) < len(names):
        problems += [f"tensor {name!r} is missing" for part, name in names.items() if part not in found]
        return None
    facts = {name: entry[name] for name in FACTS if name in entry}
    rows, parameter = facts.get("rows", [0, 1]), facts.get("parameter", "")
    if not (isinstance(rows, list) and [*map(type, rows)] == [int, int] and 0 <= rows[0] < rows[1]):
        problems.append(f"layer {path!r}: rows must be the first one and the one after the last, got {rows!r}")
        return None
    if not isinstance(parameter, str):
        problems.append(f"layer {path!r}: parameter must be a name, got {parameter!r}")
        return None
    return SavedLayer(BaseLayer(kind, layout, tuple(shape or ()), facts), spec, found)


FORMATS["native"] = Format(
    "the native format",
    "one safetensors file that describes itself",
    read,
    write,
    lambda file: KEY in file.metadata,
    metadata=None,
)

"""The adapter that comes nearest to a fine-tuned checkpoint on the disk, tensor after tensor, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lora_plus.errors import Problems, check_count
from lora_plus.files.checks import base_problem
from lora_plus.files.paths import PathLike, stated
from lora_plus.files.save import FormatName, write_adapter
from lora_plus.files.saved_adapter import SavedAdapter
from lora_plus.files.tensor_file import DTYPES as STORED
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.layers.kinds import DTYPES, kinds_by_name
from lora_plus.model.patterns import as_patterns, matcher
from lora_plus.surgery.draft import CombineReport, Draft
from lora_plus.surgery.extract import Pair, extract
from lora_plus.surgery.measures import same_bits
from lora_plus.tensors.matrix import to_matrix
from lora_plus.text import join, near_misses

from .folder import Checkpoint
from .merge import Progress


def extract_checkpoint(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    *,
    r: int,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    kinds: Mapping[str, str] | None = None,
    format: FormatName | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> CombineReport:
    """Write the adapter that is nearest to a fine-tuned checkpoint: the truncated SVD of each weight's change.

    Like `extract_adapter`, for checkpoints that `merge_checkpoint` reads. Memory holds the factors and a few tensors at
    a time. Layers with usual names of embeddings (``embed_tokens``, ``wte``) count as embeddings, all other weights of
    two dimensions as linear layers, unless ``kinds`` says otherwise. Loading into a model refuses a layer of another
    kind; `merge_checkpoint` gives the same result for all kinds that store (out, in).

    Args:
        base: the checkpoint that the fine-tuning started from.
        tuned: the fine-tuned checkpoint, with the same names.
        out: path of the adapter, as in `save_adapter`.
        r: the rank of each layer, or the full rank of its weight if that is less.
        targets: names or globs of layers; None for all whose weights have the same shape in both. Layers with equal
            weights get no adapter.
        exclude: names or globs of layers that get no adapter.
        kinds: the kind of layer by name or glob, such as ``{"c_attn": "TransposedLinear"}``. Weights of more than two
            dimensions, such as those of convolutions without groups, are adapted only if their kind is given.
        format: as in `save_adapter`.
        metadata: as in `save_adapter`.
        progress: called after each tensor with the number of tensors that are done, and of all.

    Returns:
        A report, which also names all other tensors that differ, that are in one checkpoint only, or that cannot be
        read.

    Raises:
        ValueError: one error with every pattern that matches nothing and every target that is missing in the tuned
            checkpoint or does not fit, or if no target differs. Nothing is written then.
        FileNotFoundError: if a checkpoint is not there.
        OSError: if a file of a checkpoint is replaced or written to meanwhile, or ``out`` cannot be written.
    """
    check_count("r", r)
    stated(out)
    for path in (base, tuned):
        if not stated(path).exists():
            raise FileNotFoundError(f"there is no checkpoint at {str(path)!r}")
    ours, theirs = Checkpoint(Path(base)), Checkpoint(Path(tuned))
    failure = f"no adapter can be extracted from {str(tuned)!r}"
    layers, problems = _selected(ours, theirs, targets, exclude, kinds or {})
    if problems:
        raise Problems(failure, problems)
    draft, ignored = Draft(failure), list[str]()
    extract(draft, _pairs(layers, ours, theirs, r, ignored, progress), ("the base checkpoint", "the tuned checkpoint"))
    for checkpoint in (ours, theirs):
        checkpoint.check()
    if not draft.problems and not draft.layers:
        draft.problems.append(f"it is equal to {str(base)!r} in all targets")
    draft.check()
    write_adapter(SavedAdapter(draft.layers, {}, dict(metadata or {})), out, format=format)
    return draft.report(ignored=ignored)


_USUAL_KINDS = dict.fromkeys(
    ("embed_tokens", "tok_embeddings", "token_type_embeddings", "word_embeddings", "wpe", "wte"), "Embedding"
)
"""What layers of these names are in the models of transformers and torchtune."""

_NO_MODULE = nn.Module()
"""What a checkpoint has in the place of a module: names and globs do not ask for it."""


def _selected(
    ours: Checkpoint, theirs: Checkpoint, targets: Any, exclude: Any, kinds: Mapping[str, str]
) -> tuple[dict[str, BaseLayer], list[str]]:
    """The layers that may get an adapter, by name, and what is wrong with the settings that select them."""
    layers = _layers(ours, kinds)
    problems = []

    def matching(setting: str, patterns: Any) -> set[str]:
        found = set()
        for pattern in patterns:
            hits = {name for name in layers if matcher(pattern)(name, _NO_MODULE)}
            if not hits:
                hint = near_misses(pattern, layers)
                problems.append(f"{setting} {pattern!r} matches no weight that can have an adapter{hint}")
            found |= hits
        return found

    matching("kinds", kinds)
    excluded = matching("exclude", as_patterns(exclude))
    wanted = layers.keys() if targets is None else matching("target", as_patterns(targets))
    asked = {name: layer for name, layer in layers.items() if name in wanted - excluded}
    misfits = {name: _misfit(join(name, "weight"), layer, theirs) for name, layer in asked.items()}
    if targets is not None:
        problems += [why for why in misfits.values() if why is not None]
    chosen = {name: layer for name, layer in asked.items() if misfits[name] is None}
    if not chosen and not problems:
        problems.append("no weight that can have an adapter is in both checkpoints with one shape, and not excluded")
    return chosen, problems


def _layers(checkpoint: Checkpoint, kinds: Mapping[str, str]) -> dict[str, BaseLayer]:
    """The layers that a checkpoint may have, by name."""
    by_name = kinds_by_name()
    unknown = sorted(set(kinds.values()) - by_name.keys())
    if unknown:
        raise ValueError(f"unknown kind of layer {unknown[0]!r}; choose one of {sorted(by_name)}")
    known = [(matcher(pattern), kind) for pattern, kind in (*kinds.items(), *_USUAL_KINDS.items())]
    found = {}
    for tensor, stored in checkpoint.tensors.items():
        owner, _, parameter = tensor.rpartition(".")
        kind = by_name[next((kind for matches, kind in known if matches(owner, _NO_MODULE)), "Linear")]
        layer = BaseLayer(kind.kind_name(), kind.layout, stored.shape)
        if parameter == "weight" and STORED.get(stored.dtype) in DTYPES and base_problem(layer) is None:
            found[owner] = layer
    return found


def _misfit(name: str, layer: BaseLayer, theirs: Checkpoint) -> str | None:
    """Why the tuned checkpoint has no such weight; None if it has."""
    stored = theirs.tensors.get(name)
    if stored is None:
        return f"{name!r} is not in the tuned checkpoint{near_misses(name, theirs.tensors)}"
    if stored.shape != layer.shape or STORED.get(stored.dtype) not in DTYPES:
        return f"{name!r} is {stored.dtype} of shape {stored.shape} in the tuned checkpoint, expected {layer.shape}"
    return None


def _pairs(
    layers: Mapping[str, BaseLayer],
    ours: Checkpoint,
    theirs: Checkpoint,
    r: int,
    ignored: list[str],
    progress: Progress | None,
) -> Iterator[Pair]:
    """The weights of these layers that differ; the names of all else that does are added to ``ignored``."""
    by_weight = {layer.weight_name(name): name for name, layer in layers.items()}
    names = [*theirs.tensors, *(name for name in ours.tensors if name not in theirs.tensors)]
    for done, tensor in enumerate(names, 1):
        if _differs(tensor, ours, theirs):
            if tensor in by_weight:
                name = by_weight[tensor]
                before, after = (to_matrix(each.read(tensor), layers[name].layout) for each in (ours, theirs))
                yield Pair(name, layers[name], before, after, r)
            else:
                ignored.append(tensor)
        if progress is not None:
            progress(done, len(names))


def _differs(name: str, ours: Checkpoint, theirs: Checkpoint) -> bool:
    """Whether a tensor is not the same in both, as far as it can be read."""
    mine, other = ours.tensors.get(name), theirs.tensors.get(name)
    if mine is None or other is None or mine.shape != other.shape or not {mine.dtype, other.dtype} <= STORED.keys():
        return True
    a, b = ours.read(name), theirs.read(name)
    if same_bits(a, b):
        return False
    try:
        return bool((a != b).any())
    except RuntimeError:  # torch does not compare all dtypes
        return True

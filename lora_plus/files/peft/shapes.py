"""What PEFT's format leaves to the model, told from the shapes of the weights that an adapter belongs to."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lora_plus.errors import warn_user
from lora_plus.files.outline import Outline
from lora_plus.files.target import Target
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.layers.kinds import kinds_by_name
from lora_plus.tensors.matrix import matrix_shape
from lora_plus.text import parents

from .names import OUT_PROJECTION, PREFIX, split_key
from .renaming import FolderTarget, parameters_of

Shape = tuple[int, ...]

_LINEAR, _TRANSPOSED = "Linear", "TransposedLinear"
_CONVOLUTIONS = {3: "Conv1d", 4: "Conv2d", 5: "Conv3d"}
"""By the number of dimensions of the weight."""

_INSTEAD = "load the adapter into its model and save it as a .safetensors file"


def implied_target(
    target: Target, tensors: Mapping[str, Tensor], config: Mapping[str, Any], problems: list[str]
) -> FolderTarget:
    """What a PEFT folder says of what it belongs to, where that is no model.

    Which way round a matrix is stored shows where it is not square. Square ones follow the config's fan_in_fan_out,
    which is the setting of PEFT's last layer, so the others have to agree with it. Where it says that they are stored
    as (in, out), and no layer called alike shows it, there is a warning: a model with such layers has linear ones too.

    Where the target has no names, A and B have to tell the shapes. What cannot be told is added to the problems.
    """
    parts: dict[str, dict[str, Shape]] = {}
    embeddings: set[str] = set()
    names: dict[str, None] = {"": None}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        split = split_key(name)
        inside = [*parents(name)]
        if split is not None:
            parts.setdefault(split[0], {})[split[1]] = tuple(tensor.shape)
            embeddings |= {split[0]} if name.endswith(".lora_embedding_A") else set()
            inside = [split[0], *parents(split[0])]
        names |= dict.fromkeys(path for path in inside[::-1] if "base_layer" not in path.split("."))
    transposed = bool(config.get("fan_in_fan_out"))
    shape_of = target.shape
    if target.names() is None:
        shape_of = functools.partial(_implied_shape, parts, embeddings, transposed)
    if config.get("target_parameters"):
        problems.append(f"how target_parameters are stored cannot be told without the model; {_INSTEAD}")
    else:
        problems += [
            f"{path!r} is an attention module, whose parts cannot be told without the model; {_INSTEAD}"
            for path in parts
            if shape_of(f"{path}.weight") is None and shape_of(f"{path}.in_proj_weight") is not None
        ]
    shapes = {path: shape for path in parts if (shape := shape_of(f"{path}.weight")) is not None}
    linear = {path: shape for path, shape in shapes.items() if len(shape) == 2 and path not in embeddings}
    bases = {
        path: _of_kind("Embedding", shape) if len(shape) == 2 else _convolution(shape, parts[path].get("lora_A", shape))
        for path, shape in shapes.items()
        if path not in linear
    }
    fitting = {path: _ways_round(shape, parts[path]) for path, shape in linear.items()}
    certain = {kind for kinds in fitting.values() if len(kinds) == 1 for kind in kinds}
    usual = _TRANSPOSED if transposed else _LINEAR
    for path, kinds in fitting.items():
        if len(kinds) == 2 and certain - {usual}:
            problems.append(
                f"{path!r}: whether its square weight is stored as (out, in) or as (in, out) cannot be told, because "
                f"other layers differ from fan_in_fan_out, {transposed}; {_INSTEAD}"
            )
        bases[path] = _of_kind(kinds[0] if len(kinds) == 1 else usual, linear[path])
    sure = {path.rpartition(".")[2] for path, kinds in fitting.items() if len(kinds) == 1}
    doubtful = [path for path, kinds in fitting.items() if len(kinds) == 2 and path.rpartition(".")[2] not in sure]
    if usual == _TRANSPOSED and doubtful and sure:
        warn_user(
            f"the square weights of {', '.join(map(repr, doubtful[:3]))}{' and more' * (len(doubtful) > 3)} are taken "
            f"as stored (in, out), as fan_in_fan_out says; if they are of nn.Linear layers, {_INSTEAD}"
        )
    whole = target.names() is not None
    return FolderTarget(
        Outline({}, names, whole=False), bases.get, target.repeats, parameter=parameters_of(target), whole=whole
    )


def _implied_shape(
    parts: Mapping[str, Mapping[str, Shape]], embeddings: Collection[str], transposed: bool, name: str
) -> Shape | None:
    """The shape of the weight of this name that A and B belong to; None where there is none, or they do not fit."""
    path, _, weight = name.rpartition(".")
    A, B = (parts.get(path, {}).get(part, ()) for part in ("lora_A", "lora_B"))
    is_attention = f"{path}{OUT_PROJECTION}" in parts
    if weight != ("in_proj_weight" if is_attention else "weight") or len(A) != len(B) or len(A) < 2:
        return None
    if path in embeddings or (len(A) == 2 and transposed):
        return A[1], B[0]
    groups = A[0] // max(1, B[1])  # A sees the channels of all groups, B the rank of its own
    return B[0], A[1] // max(1, groups if len(A) > 2 else 1), *A[2:]


def usual_base(shape: Shape) -> BaseLayer | None:
    """The linear layer or convolution that has a weight of this shape; None if there is none."""
    kind = _LINEAR if len(shape) == 2 else _CONVOLUTIONS.get(len(shape))
    return None if kind is None else _of_kind(kind, shape)


def _of_kind(kind: str, shape: Shape, **facts: Any) -> BaseLayer:
    return BaseLayer(kind, kinds_by_name()[kind].layout, shape, facts)


def _convolution(shape: Shape, A: Shape) -> BaseLayer | None:
    """The convolution that has a weight of this shape; None if there is none."""
    if len(shape) not in _CONVOLUTIONS:
        return None
    groups = A[1] // shape[1] if len(A) > 1 and shape[1] else 1  # A sees the channels of all groups
    return _of_kind(_CONVOLUTIONS[len(shape)], shape, **({"groups": groups} if groups > 1 else {}))


def _ways_round(shape: Shape, parts: Mapping[str, Shape]) -> list[str]:
    """The kinds of linear layer that the adapter fits, of a weight of this shape."""
    ends = parts.get("lora_B", ())[:1] + parts.get("lora_A", ())[1:]
    by_name = kinds_by_name()
    return [kind for kind in (_LINEAR, _TRANSPOSED) if matrix_shape(by_name[kind].layout, shape) == ends]

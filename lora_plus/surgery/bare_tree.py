"""Modules for the layers that an adapter file describes: their kinds and shapes, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_plus.errors import Problems
from lora_plus.layers.base import PARAMETER, BaseLayer
from lora_plus.model.parts import PARTS
from lora_plus.text import join

Shape = tuple[int, ...]


class BareModel(nn.Module):
    """The root of a tree that has just those parts of a model which files name."""

    is_outline = True


def bare_tree(bases: Mapping[str, BaseLayer], trained: Mapping[str, Mapping[str, Tensor]], where: str) -> nn.Module:
    """A tree with these layers and parameters, on the meta device, and these modules trained in full.

    Args:
        bases: what `base_problem` finds no fault with, by the names of adapters.
        trained: by module, its tensors, whose shapes and dtypes count.
        where: what says so, for the error.

    Raises:
        Problems: if no module can have such a name or such properties.
    """
    makers: dict[str, Callable[[], nn.Module]] = {}
    parameters: dict[str, Tensor] = {}
    parts: dict[str, tuple[str, dict[str, Shape]]] = {}
    for name, base in bases.items():
        full = base.facts.get("parameter", join(name, "weight"))
        owner, _, parameter = full.rpartition(".")
        if base.kind != PARAMETER:
            makers.setdefault(owner, partial(_LAYERS[base.kind], base.shape, base.facts))
            continue
        parameters[full] = torch.empty(base.shape, device="meta")
        if "of" in base.facts:
            path = owner.removesuffix(_CHILD).removesuffix(".") if parameter == "weight" else owner
            parts.setdefault(path, (base.facts["of"], {}))[1][full.removeprefix(path).lstrip(".")] = base.shape
    makers |= {path: partial(_reader, *found) for path, found in parts.items()}
    tensors = {join(path, part): tensor for path, found in trained.items() for part, tensor in found.items()}
    parameters |= {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}

    problems: list[str] = []
    root = _made("", makers.pop("", BareModel), problems) or BareModel()
    for path, make in sorted(makers.items()):  # a module comes before what it holds
        module = _made(path, make, problems)
        if module is not None:
            _put(root, path, partial(nn.Module.add_module, module=module), problems)
    for path in trained:
        _module_at(root, path, problems)
    for name, tensor in parameters.items():
        if tensor.is_floating_point():
            add = partial(nn.Module.register_parameter, param=nn.Parameter(tensor, requires_grad=False))
        else:
            add = partial(nn.Module.register_buffer, tensor=tensor)
        _put(root, name, add, problems)
    if problems:
        raise Problems(f"no model can have the layers of {where}", problems)
    return root


# ---- the kinds -------------------------------------------------------------------------------------------------------


class _Transposed(nn.Module):
    """What a linear layer that stores its weight as (in, out) is known by."""

    def __init__(self, shape: Shape, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.nf = shape[1]
        self.weight = nn.Parameter(torch.empty(shape, device="meta"))


def _linear(shape: Shape, facts: Mapping[str, Any]) -> nn.Module:
    return nn.Linear(shape[1], shape[0], bias=False, device="meta")


def _embedding(shape: Shape, facts: Mapping[str, Any]) -> nn.Module:
    return nn.Embedding(shape[0], shape[1], max_norm=facts.get("max_norm"), device="meta")


def _convolution(kind: Any, shape: Shape, facts: Mapping[str, Any]) -> nn.Module:
    groups = facts.get("groups", 1)
    ends = (shape[0], shape[1] * groups) if kind in _BACKWARDS else (shape[1] * groups, shape[0])
    made: nn.Module = kind(*ends, shape[2:], groups=groups, bias=False, device="meta")
    return made


_BACKWARDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_BACKWARDS)

_LAYERS: dict[str, Callable[[Shape, Mapping[str, Any]], nn.Module]] = {
    "Linear": _linear,
    "TransposedLinear": _Transposed,
    "Embedding": _embedding,
    **{kind.__name__: partial(_convolution, kind) for kind in _CONVOLUTIONS},
}
"""From the shape of the weight and what a file says besides to the layer."""


def _attention(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    apart = any(name.endswith("_proj_weight") and name != "in_proj_weight" for name in shapes)
    width = next(shape[1] if name == "in_proj_weight" else shape[0] for name, shape in shapes.items())
    return {"embed_dim": width, "_qkv_same_embed_dim": not apart}


_READERS: dict[str, Callable[[Mapping[str, Shape]], dict[str, Any]]] = {
    "MultiheadAttention": _attention,
    "RNNBase": lambda shapes: {"_flat_weights_names": list(shapes)},
    "RNNCellBase": lambda shapes: {},
    "EmbeddingBag": lambda shapes: {"max_norm": None, "sparse": False},
    "Bilinear": lambda shapes: {},
}
"""By the name of a module that reads its weights itself: the attributes that say which parts it has."""

_CHILD = "out_proj"
"""The module inside an attention module that has one of its weights."""


def _reader(of: str, shapes: Mapping[str, Shape]) -> nn.Module:
    """A module that has parts, without what its constructor would ask for and make."""
    found = next((kind for kind in PARTS if kind.__name__ == of), None)
    if found is None or of not in _READERS:
        raise ValueError(f"unknown module {of!r}")
    module: nn.Module = found.__new__(found)
    nn.Module.__init__(module)
    vars(module).update(_READERS[of](shapes))
    return module


# ---- the tree --------------------------------------------------------------------------------------------------------


def _made(path: str, make: Callable[[], nn.Module], problems: list[str]) -> nn.Module | None:
    try:
        return make()
    except (TypeError, ValueError) as error:
        problems.append(f"{path!r}: {error}")
        return None


def _put(root: nn.Module, path: str, add: Callable[..., None], problems: list[str]) -> None:
    """Add something to the module that its name says, which is made if it is not there."""
    owner, _, name = path.rpartition(".")
    parent = _module_at(root, owner, problems)
    if parent is not None:
        try:
            add(parent, name)
        except KeyError as error:
            problems.append(f"{path!r}: {error.args[0]}")


def _module_at(root: nn.Module, path: str, problems: list[str]) -> nn.Module | None:
    module = root
    for name in path.split(".") if path else ():
        if name not in module._modules:
            try:
                module.add_module(name, nn.Module())
            except KeyError as error:
                problems.append(f"{path!r}: {error.args[0]}")
                return None
        child = module._modules[name]
        assert child is not None
        module = child
    return module

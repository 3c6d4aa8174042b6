"""Modules whose own code reads their weights, or those of layers inside them, and calls no layer for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Part:
    """A parameter of a module, or some rows of one."""

    parameter: str
    label: str
    """Its name inside the submodule that owns the parameter; empty where it is that submodule's one."""
    child: str = ""
    """The submodule that owns the parameter; empty for the module itself."""
    rows: tuple[int, int] | None = None
    layout: str = "o i -> o i"
    aliases: tuple[str, ...] = ()
    """Further names inside the module, which several parts can share; so can the parameter's and the module's own."""
    linear: bool = False
    """Whether it is a linear map of activations, as ``"all-linear"`` takes them."""
    refusal: str | None = None
    """Why it cannot have adapters, as a noun phrase, where the module's settings say so."""


PARTS: dict[type[nn.Module] | str, Callable[[nn.Module], list[Part]]] = {}
"""Module class -> the parts of such a module; a subclass is served by the nearest entry.

Another package's class by the package and its name, ``"transformers.MambaMixer"``, so that none is imported for it.
"""


def _attention(module: nn.Module) -> list[Part]:
    assert isinstance(module, nn.MultiheadAttention)
    width = module.embed_dim
    out = Part("weight", "", "out_proj", aliases=("out",), linear=True)
    parts = []
    for index, name in enumerate("qkv"):
        packed = module._qkv_same_embed_dim
        rows = (index * width, (index + 1) * width) if packed else None
        parameter = "in_proj_weight" if packed else f"{name}_proj_weight"
        parts.append(Part(parameter, name, rows=rows, aliases=("in_proj",), linear=True))
    return [*parts, out]


def _recurrent(module: nn.Module) -> list[Part]:
    names = module._flat_weights_names if isinstance(module, nn.RNNBase) else ("weight_ih", "weight_hh")
    return [Part(name, name) for name in names if name.startswith("weight")]


def _bag(module: nn.Module) -> list[Part]:
    assert isinstance(module, nn.EmbeddingBag)
    refusal = "EmbeddingBag with max_norm, which rescales rows of its weight in place" if module.max_norm else None
    if module.sparse:
        refusal = "EmbeddingBag with sparse gradients"
    return [Part("weight", "weight", layout="n d -> d n", refusal=refusal)]


def _bilinear(module: nn.Module) -> list[Part]:
    return [Part("weight", "weight", layout="o i j -> o (i j)")]


PARTS |= {
    nn.MultiheadAttention: _attention,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent,
    nn.EmbeddingBag: _bag,
    nn.Bilinear: _bilinear,
}


_READ = {
    ("conv1d", "x_proj", "dt_proj", "out_proj"): ("MambaMixer", "FalconMambaMixer"),
    ("conv1d", "dt_proj"): ("JambaMambaMixer",),
    ("conv1d", "out_proj"): (
        "Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "NemotronHMamba2Mixer",
        "Zamba2MambaMixer",
    ),
    ("conv1d",): (
        "ZambaMambaMixer", "Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet",
        "Qwen4ExpTextGatedDeltaNet", "OlmoHybridGatedDeltaNet", "KimiLinearDeltaAttention",
        "BailingHybridDeltaAttention", "Glm5NextTextLinearAttention", "InklingShortConvolution",
        "Inkling2ShortConvolution",
    ),
}  # fmt: skip
"""Layers -> state-space modules of transformers that hand the layers' weights to kernels, at least in training."""


def _of_kernels(names: tuple[str, ...]) -> list[Part]:
    convolution = Part("weight", "", "conv1d", layout="o i j -> o (i j)")
    return [convolution if name == "conv1d" else Part("weight", "", name, linear=True) for name in names]


PARTS |= {
    f"transformers.{module}": lambda module, names=names: _of_kernels(names)  # type: ignore[misc]
    for names, modules in _READ.items()
    for module in modules
}


def reader_of(kind: type[nn.Module]) -> tuple[str | None, Callable[[nn.Module], list[Part]]] | None:
    """The class of torch's that such modules are of, None for another package's, and its parts; None for no entry."""
    for parent in kind.__mro__:
        if parent in PARTS:
            return parent.__name__, PARTS[parent]
        if (named := PARTS.get(f"{parent.__module__.partition('.')[0]}.{parent.__name__}")) is not None:
            return None, named
    return None

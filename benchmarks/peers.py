"""The ways of adding LoRA that are compared: a table from name to builder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lora_plus

Builder = Callable[..., nn.Module]
"""(model, targets, r, and settings in the library's own words) -> the adapted model.

A target is the last part of a layer's name; alpha is 2 r.
"""


def _linears(model: nn.Module, targets: Sequence[str]) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Each targeted layer with its parent and its name there."""
    for path, module in list(model.named_modules()):
        owner, _, name = path.rpartition(".")
        if isinstance(module, nn.Linear) and name in targets:
            yield model.get_submodule(owner), name, module


def _new_factors(layer: nn.Linear, r: int, dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter]:
    """Empty A ``(r, in)`` and B ``(out, r)``; `build` fills them."""
    shapes = ((r, layer.in_features), (layer.out_features, r))
    A, B = (nn.Parameter(torch.empty(shape, device=layer.weight.device, dtype=dtype)) for shape in shapes)
    return A, B


class _Wrapper(nn.Module):
    """What is pasted into projects: ``base(x) + s B A x`` in the input's dtype."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        self.base, self.scale = base, 2.0
        self.A, self.B = _new_factors(base, r, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + (x @ self.A.to(x.dtype).T @ self.B.to(x.dtype).T) * self.scale
        return y


class _Parametrization(nn.Module):
    """minLoRA's: ``W -> W + s B A``, in the weight's dtype."""

    def __init__(self, layer: nn.Linear, r: int) -> None:
        super().__init__()
        self.A, self.B = _new_factors(layer, r, layer.weight.dtype)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 2.0 * (self.B @ self.A)


def _frozen(model: nn.Module, targets: Sequence[str], r: int) -> nn.Module:
    return model


def _lora_plus(model: nn.Module, targets: Sequence[str], r: int, **settings: Any) -> nn.Module:
    return lora_plus.inject_lora(model, targets, r=r, alpha=2 * r, **settings)


def _peft(
    model: nn.Module, targets: Sequence[str], r: int, *, autocast_adapter_dtype: bool = True, **settings: Any
) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=r, lora_alpha=2 * r, **{"target_modules": list(targets), **settings})
    made: nn.Module = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)  # type: ignore[arg-type]
    return made


def _loralib(model: nn.Module, targets: Sequence[str], r: int) -> nn.Module:
    import loralib

    for owner, name, layer in _linears(model, targets):
        where = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        bias = layer.bias is not None
        made: Any = loralib.Linear(layer.in_features, layer.out_features, r=r, lora_alpha=2 * r, bias=bias, **where)
        made.weight, made.bias = layer.weight, layer.bias
        setattr(owner, name, made)
    return model


def _parametrization(model: nn.Module, targets: Sequence[str], r: int) -> nn.Module:
    for _, _, layer in _linears(model, targets):
        parametrize.register_parametrization(layer, "weight", _Parametrization(layer, r))
    return model


def _naive(model: nn.Module, targets: Sequence[str], r: int) -> nn.Module:
    for owner, name, layer in _linears(model, targets):
        setattr(owner, name, _Wrapper(layer, r))
    return model


PEERS: dict[str, Builder] = {
    "frozen": _frozen,
    "lora_plus": _lora_plus,
    "peft": _peft,
    "loralib": _loralib,
    "parametrization": _parametrization,
    "naive": _naive,
}
FLOOR = "frozen"


def build(name: str, model: nn.Module, targets: Sequence[str], r: int, **settings: Any) -> nn.Module:
    """The model with adapters, in training mode. The base's parameters are frozen, and shared with ``model``.

    All builders get the same A and B, drawn layer by layer, so that all of them compute the same. The settings are
    those of the library; DoRA's magnitudes stay as it makes them.
    """
    shared: Any = {id(parameter): parameter for parameter in model.parameters()}
    base = copy.deepcopy(model.requires_grad_(False), shared)
    made = PEERS[name](base, targets, r, **settings)
    generator, own = torch.Generator().manual_seed(0), {id(parameter) for parameter in model.parameters()}
    with torch.no_grad():
        for parameter in made.parameters():
            if id(parameter) not in own and parameter.ndim > 1:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return made.train()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer gets."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapter_dtype(model: nn.Module) -> str:
    """The dtype of the adapters, or a dash for none."""
    found = {str(parameter.dtype).removeprefix("torch.") for parameter in trainable(model)}
    return ", ".join(sorted(found)) or "-"

"""The module-swapping utility: put adapters into a model, and take them out again."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_tensors import AdapterTensors, check_adapter_name
from .collector import collector_paused
from .config import LoRAConfig, Pattern
from .freezing import restore_requires_grad, set_requires_grad
from .init import Init
from .layers import lora_class
from .lora_layer import LoRALayer, lora_layers
from .targets import Found, select
from .trained import mark_trained, trained_modules, unmark_trained
from .variants import AdapterSpec


@collector_paused()
def inject_lora(
    model: nn.Module,
    targets: Pattern | Sequence[Pattern],
    *,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    exclude: Pattern | Sequence[Pattern] = (),
    rank_pattern: Mapping[Any, int] | None = None,
    alpha_pattern: Mapping[Any, float] | None = None,
    scaling: str = "standard",
    init: str | Init = "kaiming",
    variant: str = "lora",
    train_also: Pattern | Sequence[Pattern] = (),
    adapter: str = "default",
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Give the selected layers of a model a low-rank adapter and freeze everything else.

    The layers become LoRA layers in place: the same objects, with the same parameters under the same names. With
    B = 0, as the default init leaves it, the model computes what it computed before.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = inject_lora(model, ["0"], r=2, train_also=["2"])
        >>> sorted(name for name, p in model.named_parameters() if p.requires_grad)
        ['0.lora_A.default', '0.lora_B.default', '2.bias', '2.weight']

    Args:
        model: any module; it is changed.
        targets: which layers: a pattern or a list of patterns. A pattern is a name (``"q"`` matches ``q`` and
            whatever ends in ``.q``), a glob (``"layers.*.mlp.*"``, which may also start at any dot), a compiled
            regular expression (on the full name), a module type, a function ``(name, module) -> bool``, or
            ``"all-linear"``: every linear layer but the parts of ``nn.MultiheadAttention``, a head tied to an
            embedding, and what ``exclude`` or ``train_also`` names. ``""`` is the model itself.
        r: rank of the update.
        alpha: numerator of the scaling.
        dropout: probability that an entry of an adapter's input is dropped in training.
        exclude: patterns of layers that get no adapter although a target matches them.
        rank_pattern: ``{pattern: r}`` for layers that deviate from ``r``; two keys on one layer are an error.
        alpha_pattern: the same for ``alpha``.
        scaling: ``"standard"`` (alpha / r) or ``"rslora"`` (alpha / sqrt(r)).
        init: a name in ``lora_plus.init.INITS`` or a function ``(weight, r, generator) -> (A, B)``.
        variant: ``"lora"`` or ``"dora"``.
        train_also: patterns of modules to train in full and save with the adapter, such as a new head.
        adapter: name of the adapter. A model can hold several; the one injected last is the active one.
        dtype: of A and B; None for float32, or the base's own where that is wider.
        generator: source of all random numbers; None for torch's global generator.

    Returns:
        The same model.

    Raises:
        ValueError: naming every pattern that matches nothing or nothing that can be adapted, and every setting out
            of range. The model is then as it was.
    """
    check_adapter_name(adapter)
    config = LoRAConfig(
        targets=targets, r=r, alpha=alpha, dropout=dropout, exclude=exclude, rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern, scaling=scaling, init=init, variant=variant, train_also=train_also, dtype=dtype,
    )  # fmt: skip
    check_injectable(model, adapter)
    selection = select(model, config)
    check_selection(model, [found for found, _, _ in selection.layers], selection.train_also)
    spec_of = functools.cache(lambda layer_r, layer_alpha: config.spec(r=layer_r, alpha=layer_alpha))
    prepared = []
    for found, layer_r, layer_alpha in selection.layers:
        kind, spec = lora_class(found.module), spec_of(layer_r, layer_alpha)
        assert kind is not None
        kind.class_for(type(found.module))  # a class that cannot be derived from fails here, before anything is changed
        tensors = kind.new_tensors(found.module, spec, init=init, dtype=dtype, generator=generator)
        prepared.append((found.module, spec, tensors))
    attach(model, adapter, prepared, [found.module for found in selection.train_also])
    return model


def remove_lora(model: nn.Module) -> nn.Module:
    """Take all adapters out: the plain model again, as it was before the first injection.

    Classes, parameter names and ``requires_grad`` are restored, merged layers get their own weight back, and modules
    that were trained in full (``train_also``) get their original values back. `merge_and_unload` keeps the training.

    Returns:
        The same model.
    """
    check_enabled(model)
    for _, module, _ in list(trained_modules(model)):
        unmark_trained(module, restore=True)
    for _, layer in list(lora_layers(model)):
        if layer.lora_merge is not None:
            layer.bind_weight(layer.lora_merge.weight)
        layer.restore()
    restore_requires_grad(model.modules())
    return model


def attach(
    model: nn.Module,
    adapter: str,
    prepared: Sequence[tuple[nn.Module, AdapterSpec, dict[str, Tensor]]],
    train_also: Sequence[nn.Module],
    *,
    trainable: bool = True,
) -> None:
    """Put prepared adapter tensors on the layers, freeze the rest of the model, and make the adapter the active one."""
    for module in train_also:
        mark_trained(module, adapter)
    modules = list(model.modules())
    set_requires_grad((module for module in modules if not isinstance(module, AdapterTensors)), False)
    for module in train_also:
        set_requires_grad(module.modules(), trainable)
    for module in modules:
        if isinstance(module, LoRALayer):
            module.activate(())
            for _, _, parameter in module.lora_parameters():
                parameter.requires_grad_(False)
    for module, spec, tensors in prepared:
        kind = lora_class(module)
        assert kind is not None
        layer = module if isinstance(module, LoRALayer) else kind.adopt(module)
        layer.add_adapter(adapter, spec, tensors, trainable=trainable)
        if layer is model:  # what it is a part of is not known
            layer.stay_off_fast_path()
    for parent in modules:
        if isinstance(parent, nn.TransformerEncoderLayer):
            for child in parent.children():
                if isinstance(child, LoRALayer):
                    child.stay_off_fast_path()


def check_enabled(model: nn.Module) -> None:
    """Raise inside a ``disabled`` block of this model."""
    for _, layer in lora_layers(model):
        layer.check_enabled()


def check_injectable(model: nn.Module, adapter: str) -> None:
    """Raise if an adapter of this name cannot be added to the model now."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "the model is wrapped in DistributedDataParallel, which would not reduce the gradients of new "
                "parameters; add the adapter to the plain model first, then wrap it"
            )
        if not isinstance(layer, LoRALayer):
            continue
        layer.check_enabled()
        if adapter in layer.lora_specs:
            raise ValueError(
                f"the model has an adapter {adapter!r} already (on {name or 'itself'!r}); "
                "give the new one another name, or call remove_lora(model) first"
            )
        if layer.lora_merge is not None:
            raise ValueError(f"the model is merged ({name!r} is); call unmerge_lora(model) before adding an adapter")


def check_selection(model: nn.Module, layers: Sequence[Found], train_also: Sequence[Found]) -> None:
    """Raise if a layer is inside a module that another adapter trains in full, or a module cannot be so trained."""
    for name, module, record in trained_modules(model):
        inside = {id(child) for child in module.modules()}
        for found in layers:
            if id(found.module) in inside:
                raise ValueError(
                    f"{found.name!r} cannot be adapted: {name!r} is trained in full with the adapter {record.adapter!r}"
                )
    for found in train_also:
        for _, _, record in trained_modules(found.module):
            raise ValueError(f"{found.name!r} is already trained in full with the adapter {record.adapter!r}")
        if not any(parameter.is_floating_point() for parameter in found.module.parameters()):
            raise ValueError(f"train_also: {found.name!r} ({type(found.module).__name__}) has no parameter to train")
        if not all(isinstance(value, Tensor) for value in found.module.state_dict(keep_vars=True).values()):
            raise ValueError(f"train_also: {found.name!r} has state that is not a tensor and could not be restored")
        if any(isinstance(child, LoRALayer) for child in found.module.modules()):
            raise ValueError(f"train_also: {found.name!r} contains an adapted layer")

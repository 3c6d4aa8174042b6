"""Walking over a model, past what holds the tensors of its adapters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_plus.errors import check_model
from lora_plus.layers.adapter import Adapter, AdapterTensors
from lora_plus.layers.site import AdapterSite, BaseParameters
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.text import join

Named = Sequence[tuple[str, nn.Module]]
"""Modules with their names."""


class Tree:
    """The modules of a model from one walk, without the containers of adapters' tensors.

    Wrappers that engines put around modules are passed by, and names are those of the model without them. Torch's chain
    of generators takes three times as long, which shows where there are thousands of layers.
    """

    def __init__(self, model: nn.Module) -> None:
        check_model(model)
        self.model = model
        self.names: list[tuple[str, nn.Module]] = []
        """``(name, module)`` under each name, as ``model.named_modules(remove_duplicate=False)`` orders them."""
        self.wrappers: list[Wrapper] = []
        """The kinds of the wrappers that were passed by."""
        self.others: list[nn.Module] = []
        """The modules that were passed by: wrappers, and the containers of adapters' tensors."""
        self._visit("", model)
        first: dict[int, tuple[str, nn.Module]] = {}
        for named in self.names:
            first.setdefault(id(named[1]), named)
        self.modules = list(first.values())
        """``(name, module)`` for each module under its first name."""
        self.weights = [
            (join(owner_path(path, module), module.lora_label), module)
            for path, module in self.modules
            if isinstance(module, AdaptedWeight)
        ]
        """``(name, weight)`` for every adapted layer or parameter."""

    def _visit(self, name: str, module: nn.Module) -> None:
        children = module._modules
        wrapper = wrapper_of(module) if children else None
        if wrapper is not None:
            self.wrappers.append(wrapper)
            self.others.append(module)
            self._visit(name, children[wrapper.child])  # type: ignore[arg-type]
            return
        self.names.append((name, module))
        for key, child in children.items():
            if isinstance(child, (AdapterTensors, BaseParameters)):
                self.others.append(child)
            elif child is not None:
                self._visit(f"{name}.{key}" if name else key, child)

    def adapters(self, name: str | None = None) -> Iterator[tuple[str, Adapter, AdaptedWeight]]:
        """``(name, adapter, weight)`` for the adapters of weights and of blocks of rows: all, or those of a name."""
        for owner_name, weight, site in sites_in(self.modules):
            for adapter in site.lora_adapters.values():
                if adapter.held and name in (None, adapter.name):
                    yield join(owner_name, site.lora_label), adapter, weight

    def everything(self) -> list[nn.Module]:
        """All modules, with those that were passed by."""
        return self.others + [module for _, module in self.modules]

    def parameters(self) -> list[nn.Parameter]:
        """All parameters as they are bound now, one that modules share once for each of them."""
        return [p for module in self.everything() for p in module._parameters.values() if p is not None]


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """``(name, parameter)`` for all parameters but those of adapters, each under all of its names."""
    return [(join(name, key), held) for name, module in Tree(model).names for key, held in own_parameters(module)]


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """``(name, parameter)`` for a module's own parameters, with those of them that have adapters."""
    for holder in (module, *module._modules.values()):
        if holder is module or isinstance(holder, BaseParameters):
            for key, parameter in holder._parameters.items():
                if parameter is not None:
                    yield key, parameter


class Wrapper(NamedTuple):
    """A class of wrappers; it is looked for only where its package is in use."""

    package: str
    name: str
    child: str
    """The submodule that is wrapped."""
    replicas: Callable[[Any], Any] | None = None
    """For wrappers that reduce gradients: the process group of the ranks that each hold the whole model, if they do."""
    fixed: str = ""
    """What the wrapper would not do with parameters that come later; empty for one that does not mind."""


NOT_REDUCED = "would not reduce the gradients of new parameters"

WRAPPERS: list[Wrapper] = [
    Wrapper("torch.nn.parallel", "DistributedDataParallel", "module", lambda ddp: ddp.process_group, NOT_REDUCED),
    Wrapper("torch.nn.parallel", "DataParallel", "module"),
    Wrapper("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    Wrapper(
        "torch.optim.swa_utils",
        "AveragedModel",
        "module",
        fixed="would not average new parameters with those of the same place in the model",
    ),
    Wrapper(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"
    ),
    Wrapper("lightning.fabric.wrappers", "_FabricModule", "_forward_module"),
]
"""Names in a model have no part for these. Engines enter theirs."""


def wrapper_of(module: nn.Module) -> Wrapper | None:
    """What kind of wrapper a module is; None for any other module."""
    for wrapper in WRAPPERS:
        if wrapper.child not in module._modules:
            continue
        known = getattr(sys.modules.get(wrapper.package), wrapper.name, None)
        if known is not None and isinstance(module, known):
            return wrapper
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, FSDP, a compiled module or any other wrapper."""
    wrapper = wrapper_of(model)
    return model if wrapper is None else unwrap(getattr(model, wrapper.child))


def replica_group(model: nn.Module) -> Any:
    """The process group of the ranks among which a wrapper keeps copies of the whole model; None if there is none."""
    wrapper = wrapper_of(model)
    if wrapper is None:
        return None
    return wrapper.replicas(model) if wrapper.replicas is not None else replica_group(getattr(model, wrapper.child))


def is_spare_replica(model: nn.Module) -> bool:
    """Whether the first rank has a copy of the whole model, too, so that files are its business."""
    group = replica_group(model)
    return group is not None and torch.distributed.get_rank(group) > 0


def adapted_weights(model: nn.Module) -> list[tuple[str, AdaptedWeight]]:
    """``(name, weight)`` for every adapted layer or parameter of a model, each once, under its first name."""
    return Tree(model).weights


def adapters_of(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, Adapter, AdaptedWeight]]:
    """``(name, adapter, weight)`` for the adapters of a model, as `Tree.adapters` gives them."""
    return Tree(model).adapters(name)


def sites_in(modules: Named) -> Iterator[tuple[str, AdaptedWeight, AdapterSite]]:
    """``(name of its owner, weight, site)`` for the adapted weights and the blocks of their rows."""
    for path, module in modules:
        if isinstance(module, AdaptedWeight):
            for site in module.adapter_sites():
                yield owner_path(path, module), module, site


def owner_path(path: str, weight: AdaptedWeight) -> str:
    """The path of the user's own module that the weight belongs to."""
    return path if not weight.nesting else ".".join(path.split(".")[: -weight.nesting])

"""Modules that wrap another one, as engines put them around a model and around parts of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


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


_NOT_REDUCED = "would not reduce the gradients of new parameters"

WRAPPERS = (
    Wrapper(
        "torch.nn.parallel", "DistributedDataParallel", "module", lambda wrapper: wrapper.process_group, _NOT_REDUCED
    ),
    Wrapper("torch.nn.parallel", "DataParallel", "module"),
    Wrapper("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    Wrapper(
        "torch.optim.swa_utils", "AveragedModel", "module",
        fixed="would not average new parameters with those of the same place in the model",
    ),
    Wrapper("torch.distributed.fsdp", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    Wrapper(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"
    ),
    Wrapper(
        "deepspeed", "DeepSpeedEngine", "module",
        lambda engine: None if engine.zero_optimization_partition_weights() else engine.data_parallel_group,
        _NOT_REDUCED,
    ),
    Wrapper("lightning.fabric.wrappers", "_FabricModule", "_forward_module"),
)  # fmt: skip
"""Names in a model have no part for these."""

_CHILDREN = frozenset(wrapper.child for wrapper in WRAPPERS)


def wrapper_of(module: nn.Module) -> Wrapper | None:
    """What kind of wrapper a module is; None for any other module."""
    if _CHILDREN.isdisjoint(module._modules):  # nearly all of them
        return None
    for wrapper in WRAPPERS:
        known = getattr(sys.modules.get(wrapper.package), wrapper.name, None)
        if known is not None and isinstance(module, known):
            return wrapper
    return None


def wrapped(module: nn.Module) -> nn.Module | None:
    """The module that this one wraps; None if it is no wrapper."""
    wrapper = wrapper_of(module)
    return None if wrapper is None else module._modules[wrapper.child]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, FSDP, a compiled module or any other wrapper."""
    inner = wrapped(model)
    return model if inner is None else unwrap(inner)


def replica_group(model: nn.Module) -> Any:
    """The process group of the ranks among which a wrapper keeps copies of the whole model; None if there is none."""
    wrapper = wrapper_of(model)
    if wrapper is None:
        return None
    if wrapper.replicas is not None:
        return wrapper.replicas(model)
    inner = wrapped(model)
    assert inner is not None
    return replica_group(inner)


def is_spare_replica(model: nn.Module) -> bool:
    """Whether the first rank has a copy of the whole model, too, so that files are its business."""
    group = replica_group(model)
    return group is not None and torch.distributed.get_rank(group) > 0

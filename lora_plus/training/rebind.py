"""Keeping an optimizer bound to a model whose parameters are exchanged for others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lora_plus.model.state import State


@contextmanager
def rebind_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[torch.optim.Optimizer]:
    """Keep an optimizer valid over a ``with`` block that replaces the model's parameters.

    ``fully_shard``, ``parallelize_module``, ``to_empty`` and ``load_state_dict(assign=True)`` replace parameters. An
    optimizer that was built before would keep the old ones and train nothing. After the block it gets the new
    parameters, matched by module and name. Groups, their settings and schedulers stay. If the block raises, nothing is
    rebound.

    Examples:
        >>> optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3)
        >>> with rebind_optimizer(optimizer, model):
        ...     for block in model.blocks:
        ...         fully_shard(block)
        ...     fully_shard(model)

    Args:
        optimizer: a torch optimizer without state; if it has state, build a new one and load the state.
        model: the model that has all its parameters; it is changed in place.

    Raises:
        ValueError: before the block, if the optimizer has state, wraps another optimizer, or holds a parameter that is
            not in the model; after it, if a parameter's module or name is gone. The groups are then as they were.
    """
    _check_fresh(optimizer)
    State(model)  # shards again what a forward left whole
    places = {id(p): (module, key) for module in model.modules() for key, p in module._parameters.items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[*group["params"]] for group in optimizer.param_groups]
    strange = sum(id(parameter) not in places for parameters in groups for parameter in parameters)
    if strange:
        raise ValueError(
            f"the optimizer holds {strange} parameters that are not the model's; build it from the model's parameters"
        )
    yield optimizer
    State(model)  # shards again what a forward left whole
    there = {id(module) for module in model.modules()}
    now = {old: module._parameters.get(key) for old, (module, key) in places.items() if id(module) in there}
    bound = [[now.get(id(old)) for old in parameters] for parameters in groups]
    gone = [names[id(old)] for parameters in groups for old in parameters if now.get(id(old)) is None]
    if gone:
        raise ValueError(f"the model no longer has the parameters {gone}; build a new optimizer")
    for group, live in zip(optimizer.param_groups, bound, strict=True):
        group["params"] = live


def _check_fresh(optimizer: torch.optim.Optimizer) -> None:
    """Raise if the optimizer has more that goes with its parameters than its groups."""
    kind = type(optimizer).__name__
    if optimizer.state:
        raise ValueError(
            f"the {kind} has state, which cannot be moved to other parameters; build a new one, and load the state by "
            "names (set_optimizer_state_dict of torch.distributed)"
        )
    inner = [type(value).__name__ for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]
    if inner:
        raise ValueError(f"the {kind} wraps the {inner[0]}, which has groups of its own; rebind before it is wrapped")

"""Running a model on trial: with copies of what is given to it, and with everything as it was afterwards."""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_plus.tensors.random_state import random_state


def copied(value: Any, copies: dict[int, Tensor]) -> Any:
    """The same with tensors of their own, so that nothing reaches what is the user's."""

    def copy_of(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:  # one tensor given twice stays one: attention to itself is told by that
            copies[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return copies[id(tensor)]

    return map_tensors(value, copy_of)


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Modes, gradients, buffers, rows that ``max_norm`` rescales, and random states, as they were before.

    The random states are those of Python, of numpy, and torch's of the CPU and of all devices of the accelerator.
    """
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    # an optimizer that steps as gradients arrive must not
    hooks = [(parameter, parameter._post_accumulate_grad_hooks) for parameter in model.parameters()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    rescaled = [
        (parameter, parameter.detach().clone())
        for module in model.modules()
        if getattr(module, "max_norm", None) is not None
        for parameter in module._parameters.values()
        if parameter is not None
    ]
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    python_state = random.getstate()
    bring_back = random_state()
    for parameter, _ in gradients:
        parameter.grad = None
        if parameter._post_accumulate_grad_hooks is not None:
            parameter._post_accumulate_grad_hooks = OrderedDict()
    copies: dict[int, Tensor] = {}
    for module, own in buffers:
        module._buffers.update({name: copied(buffer, copies) for name, buffer in own.items()})
    try:
        yield
    finally:
        bring_back()
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for module, own in buffers:
            module._buffers.clear()
            module._buffers.update(own)
        for parameter, values in rescaled:
            if not torch.equal(parameter.detach(), values):
                with torch.no_grad():
                    parameter.copy_(values)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for parameter, own_hooks in hooks:
            if own_hooks is not None:
                parameter._post_accumulate_grad_hooks = own_hooks
        for module, training in modes:
            module.training = training


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same, changed in every tensor: inside mappings, lists, tuples and dataclasses, which are made anew."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):
        twin = copy.copy(value)
        for name, item in value.items():
            twin[name] = map_tensors(item, change)
        return twin
    if isinstance(value, (list, tuple)):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        same = copy.copy(value)
        for own in dataclasses.fields(value):
            object.__setattr__(same, own.name, map_tensors(getattr(value, own.name), change))
        return same
    return value

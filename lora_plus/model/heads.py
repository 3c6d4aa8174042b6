"""Several adapters that train the same in full: each has tensors of its own, and those of the active one are bound.

A parameter stays what its adapter trains, bound or not, so that an optimizer of one adapter never changes another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_plus.tensors.distributed import fill, is_dtensor, whole

from .state import EXCHANGE, Need, State, require
from .train_also import Head, Trained, Unit, units_in


def _exchange(state: State, adapters: Iterable[str], dropped: Sequence[Head]) -> None:
    heads, names = list[Head](), dict.fromkeys(adapters)
    gone = {(id(head.record), head.adapter) for head in dropped}
    for unit, record in units_in(state):
        here = [name for name in names if name in record.held]
        if len(here) > 1:
            raise ValueError(f"{unit.name!r} is trained in full with each of the adapters {here}; use one at a time")
        own = record.home if (id(record), record.home) in gone else None
        wanted = here[0] if here else own
        heads += [Head(unit, record, wanted)] if wanted != record.shown else []
    in_place = state.storage.fixed and not state.storage.flat and all(map(_is_in_place, heads))
    for unit, _, _ in () if in_place else heads[:1]:  # an engine or a wrapper would go on with what is bound
        require(state, f"exchanging what adapters train of {unit.name!r}", Need.UNSHARDED | Need.UNWRAPPED)
    (_write if in_place else _bind)(state, heads)


EXCHANGE.append(_exchange)


def _bind(state: State, heads: Iterable[Head]) -> None:
    """Put the tensors of these in the places of those that are bound, under all names that these have in the model."""
    new: dict[int, Tensor] = {}
    for unit, record, adapter in heads:
        bound = record.held[record.shown] = unit.tensors()
        new |= {id(tensor): _moved(record.held[adapter][name], tensor) for name, tensor in bound.items()}
        record.shown = adapter
    for module in state.everything() if new else ():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if id(tensor) in new:
                setattr(module, name, new[id(tensor)])  # recurrent layers keep a list of their weights besides
        for name, value in module.__dict__.items():  # and so do modules of users, whose forward may read that
            module.__dict__[name] = _exchanged(value, new, set())


def _exchanged(value: Any, new: Mapping[int, Tensor], seen: set[int]) -> Any:
    """The same with new tensors, by the ids of those in whose places they are; lists and dicts stay what they are."""
    if isinstance(value, Tensor):
        return new.get(id(value), value)
    if not isinstance(value, (dict, list, tuple)) or id(value) in seen:
        return value
    seen.add(id(value))
    keys = list(value) if isinstance(value, dict) else range(len(value))
    changed = {key: each for key in keys if (each := _exchanged(value[key], new, seen)) is not value[key]}
    if not isinstance(value, tuple):
        for key, each in changed.items():
            value[key] = each
    elif changed:
        items = [changed.get(key, each) for key, each in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _moved(tensor: Tensor, bound: Tensor) -> Tensor:
    """A tensor where the bound one is, and in its dtype, as the model may have been moved; a parameter stays itself."""
    if not isinstance(tensor, nn.Parameter):
        return tensor.to(bound.device, bound.dtype)
    nn.ParameterList([tensor]).to(bound.device, bound.dtype)  # with its gradient
    return tensor


class _Written(dict[str, Tensor]):
    """Values that were in the bound tensors of a sharded model, which stay the same for its engine."""


def _is_in_place(head: Head) -> bool:
    """Whether no other adapter has had the tensors that are bound: its optimizer would step with their gradients."""
    _, record, adapter = head
    before = {name for name, tensors in record.held.items() if isinstance(tensors, _Written)}
    return adapter is None or {*before, record.shown} <= {None, adapter}


def _write(state: State, heads: Iterable[Head]) -> None:
    """Let the tensors that are bound show other values, the original ones or those of an adapter."""
    for unit, record, adapter in heads:
        bound, values = unit.tensors(), record.held[adapter]
        held = _Written((name, whole(tensor).clone()) for name, tensor in bound.items())
        trains = any(p.requires_grad for _, own, _ in state.adapters(adapter or "") for _, p in own.parameters())
        for name, tensor in bound.items():
            fill(tensor, values[name])
            if isinstance(tensor, nn.Parameter):
                held[name] = nn.Parameter(held[name], requires_grad=False)
                tensor.grad = None  # no optimizer shall step with that of what was shown before
                tensor.requires_grad_(trains and tensor.is_floating_point())
        record.held[record.shown], record.shown = held, adapter
        record.home = adapter or record.home


# ---- the original values, inside of a block --------------------------------------------------------------------------


@dataclass
class _Aside:
    """What is put aside while tensors show other values; there are none outside of a block."""

    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """The tensors, each with the values that it gets back."""
    spares: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the original values that were shown before and not changed: a large head takes long to copy."""

    def __bool__(self) -> bool:
        return bool(self.values)

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self.values, "spares": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, values=[])
        for tensor, held in state["values"]:  # the block that shows the original values is not a copy's
            show_again(tensor, held)


@contextmanager
def originals(trained: Iterable[tuple[Unit, Trained]]) -> Iterator[None]:
    """Copies of the original values, in the tensors that are bound, for the length of a ``with`` block."""
    records = [(unit, record) for unit, record in trained if not record.aside and record.shown is not None]
    # by tensor: one that has several names, or several owners, is exchanged once
    held: dict[int, tuple[Tensor, Tensor]] = {}
    shown: list[tuple[Trained, str, Tensor, Tensor, int]] = []
    try:
        for unit, record in records:
            record.aside = record.aside if isinstance(record.aside, _Aside) else _Aside()
            tensors = unit.tensors()
            for name, tensor in tensors.items():
                if id(tensor) not in held:
                    values, spare = record.held[None][name].detach(), record.aside.spares.pop(name, None)
                    held[id(tensor)] = tensor, show_copy(tensor, values, spare)
                    if not (is_dtensor(tensor) or tensor.is_inference()):
                        shown.append((record, name, tensor, tensor.data, tensor._version))
            record.aside.values = [held[id(tensor)] for tensor in tensors.values()]
        yield
    finally:
        for record, name, tensor, copy, version in shown:
            if (tensor._version, tensor.data_ptr()) == (version, copy.data_ptr()):
                record.aside.spares[name] = copy
        for tensor, own in held.values():
            show_again(tensor, own)
        for _, record in records:
            record.aside.values = []


def show_copy(tensor: Tensor, values: Tensor, spare: Tensor | None = None) -> Tensor:
    """Let a tensor, which may be a DTensor, show a copy of whole values; returns those that `show_again` needs.

    ``spare`` is such a copy from before, which is taken where it has the tensor's dtype and device.
    """
    if not is_dtensor(tensor):
        held = tensor.data
        if spare is None or (spare.device, spare.dtype) != (tensor.device, tensor.dtype):
            spare = values.to(tensor.device, tensor.dtype, copy=True)  # statistics or an optimizer may change it
        tensor.data = spare
        return held
    held = tensor.detach().clone()  # engines read the memory that a shard had at first
    fill(tensor, values)
    return held


@torch.no_grad()
def show_again(tensor: Tensor, held: Tensor) -> None:
    """Undo `show_copy`."""
    if is_dtensor(tensor):
        tensor.copy_(held)
    else:
        tensor.data = held

"""Modules and parameters trained in full together with an adapter (``train_also``): which they are, and what they were.

Each adapter has its own tensors of what it trains in full. The first one has the base's; those of a further one, and
the original ones, are bound in the model when it is their turn (`heads.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_plus.layers.freezing import set_requires_grad
from lora_plus.text import join

from .places import NamedModule
from .storage import Storage
from .tree import Tree, own_parameters


class Unit(NamedModule):
    """What can be trained in full: a module, or one of its own parameters."""

    def modules(self) -> list[nn.Module]:
        """The modules that are trained in full; none where it is a parameter."""
        return [] if self.parameter else list(self.module.modules())

    def tensors(self) -> dict[str, Any]:
        """The state that is bound now, by its names inside the module; that of a parameter is empty."""
        if self.parameter:
            return {"": dict(own_parameters(self.module))[self.parameter]}
        return self.module.state_dict(keep_vars=True)

    def record(self) -> Any:
        """The `Trained` that is noted of it; None if no adapter trains it."""
        return self.module.__dict__.get(_MARK, {}).get(self.parameter)


def find_units(found: Mapping[int, NamedModule]) -> list[Unit]:
    """All that can be trained in full: modules, and then their parameters."""
    modules = [Unit(*each) for each in found.values()]
    own = [(unit, name) for unit in modules for name, _ in own_parameters(unit.module)]
    return modules + [Unit(unit.module, [join(each, name) for each in unit.names], name) for unit, name in own]


@dataclass
class Trained:
    """Kept on the module object itself, so that it goes where the module goes."""

    shown: str | None
    """The adapter whose tensors are bound; None for the original ones."""
    home: str | None
    """The adapter that has the base's own tensors; None where these are the original ones again."""
    held: dict[str | None, dict[str, Tensor]]
    """By adapter its tensors, and by None the original ones; the entry of those that are bound does not count."""
    aside: Any = None
    """While the bound tensors show the original values: what gives them back their own."""


_MARK = "_lora_trained"
"""On a module: a `Trained` by the name of the module's parameter, or by an empty name for the whole module."""


class Head(NamedTuple):
    """What one adapter trains in full of a unit; without an adapter, what the unit was before."""

    unit: Unit
    record: Trained
    adapter: str | None

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, bound or not."""
        return self.unit.tensors() if self.record.shown == self.adapter else self.record.held[self.adapter]

    def parameters(self) -> list[nn.Parameter]:
        """Those of its tensors that can be trained."""
        whole = self.record.shown == self.adapter and not self.unit.parameter  # the state of a sharded one has others
        tensors = self.unit.module.parameters() if whole else self.tensors().values()
        return [each for each in tensors if isinstance(each, nn.Parameter) and each.is_floating_point()]


def units_in(tree: Tree) -> Iterator[tuple[Unit, Trained]]:
    """What is trained in full in a model, with what is noted of it."""
    for name, module in tree.modules:
        for parameter, record in module.__dict__.get(_MARK, {}).items():
            yield Unit(module, [join(name, parameter)], parameter), record


def mark_trained(unit: Unit, adapter: str, storage: Storage) -> None:
    """Note that an adapter trains something in full, from the original values on."""
    record = unit.record()
    tensors = unit.tensors() if record is None else Head(unit, record, None).tensors()
    with storage.gathered(tensors.values()), torch.inference_mode(False):  # one made there could have no gradient
        copies: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for name in copies:
        if isinstance(tensors[name], nn.Parameter):
            copies[name] = nn.Parameter(copies[name], requires_grad=False)
    if record is None:
        record = Trained(adapter, adapter, {None: copies})
        unit.module.__dict__.setdefault(_MARK, {})[unit.parameter] = record
    record.held[adapter] = copies


def unmark_trained(units: Iterable[Unit]) -> None:
    """Forget that these are trained in full."""
    for unit in units:
        del unit.module.__dict__[_MARK][unit.parameter]
        if not unit.module.__dict__[_MARK]:
            del unit.module.__dict__[_MARK]


def train_heads(tree: Tree, heads: Iterable[Head], wanted: bool) -> None:
    """Set ``requires_grad`` of what is trained in full."""
    parameters = {id(parameter): parameter for head in heads for parameter in head.parameters()}
    set_requires_grad((module for _, module in tree.modules if parameters), wanted, parameters)
    for parameter in parameters.values():  # those that are not bound
        parameter.requires_grad_(wanted)


def drop_heads(tree: Tree, heads: Iterable[Head], storage: Storage) -> None:
    """Forget what adapters train in full; the base's own tensors have their original values again, bit for bit."""
    for head in heads:
        unit, record, adapter = head
        if record.home == adapter:
            own, original = head.tensors(), Head(unit, record, None).tensors()
            storage.write((tensor, original[name]) for name, tensor in own.items())
            record.held[None], record.home = own, None
            record.shown = None if record.shown == adapter else record.shown
            train_heads(tree, [Head(unit, record, None)], False)
        del record.held[adapter]
        if not record.held.keys() - {None}:
            unmark_trained([unit])

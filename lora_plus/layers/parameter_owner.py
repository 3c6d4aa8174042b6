"""Modules whose parameters have adapters (attention, LSTM, experts): the attribute gives W + s B A to whoever reads it.

``nn.MultiheadAttention`` hands ``in_proj_weight`` to a function, an ``nn.LSTM`` hands its weights to a kernel, stacked
experts are bare parameters. There is no layer to call, so the update is a dense matrix, made anew whenever the
attribute is read. The module keeps its identity, its state-dict keys and its code; its class becomes one on which the
adapted attribute is a property, and the parameter itself moves into a `LoRAParameter` inside the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .calls import Calls
from .class_swap import SwappedModule, derived_class, shallow_copy, swap_class
from .parameter import LoRAParameter
from .site import BaseParameters, Holders

if TYPE_CHECKING:
    from typing_extensions import Self

READING = Calls()
"""The calls of owners that run in this thread, and what each has read."""

HOLDERS = "lora_parameters"
"""The submodule of an owner that has a `LoRAParameter` for each adapted parameter, by the parameter's name."""

BASE = "_checkpoint_wrapped_module"
"""The submodule of an owner that has its adapted parameters themselves.

Torch leaves this part out of a parameter's name where it compares names with keys of a state dict, as it must for its
own checkpoint wrappers (``torch.distributed.checkpoint.state_dict``). So the parameter's name is its key there.
"""

_STAYS = "{!r} has adapters, so it cannot be deleted or parametrized; call merge_and_unload or remove_lora first"


class LoRAOwner(SwappedModule):
    """A module some of whose own parameters have adapters; comes before the module's class among the bases."""

    @classmethod
    def class_body(cls, base_class: type[Any], names: tuple[str, ...]) -> dict[str, Any]:
        return {name: _effective(name) for name in names} | {"__doc__": base_class.__doc__, "adapted_names": names}

    def take_out(self) -> None:
        for name, holder in parameter_holders(self).items():
            self._parameters[name] = holder.weight
        del self._modules[HOLDERS], self._modules[BASE]

    def drop_everywhere(self, adapter: str) -> None:
        holders = parameter_holders(self)
        for holder in holders.values():
            if adapter in holder.adapter_names():
                holder.delete_adapter(adapter)
        rest = tuple(name for name, holder in holders.items() if holder.adapter_names())
        if not rest:
            self.restore()
            return
        for name in holders.keys() - set(rest):
            self._parameters[name] = holders[name].weight
            del self._modules[HOLDERS]._modules[name]  # type: ignore[union-attr]
            del self._modules[BASE]._parameters[name]  # type: ignore[union-attr]
        if len(rest) < len(holders):
            swap_class(self, lambda swapped: owner_class(swapped, rest))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            f"{type(self).__name__} is the class of one adapted {self.base_class.__name__}, and cannot make another "
            f"(slicing one tries to); construct a {self.base_class.__name__}"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # code that reads a weight many times, once for each expert say, gets the same tensor for the length of a call
        outer = READING.begin(self, {_keeper: _keeper()})
        try:
            return super().__call__(*args, **kwargs)
        finally:
            READING.end(outer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with torch.no_grad():  # recurrent layers read here, and keep, the weights that they compute with
            return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # fully_shard makes shards again of what a module has when it is saved; that would come after this
        for hook in self._modules[BASE]._state_dict_pre_hooks.values():  # type: ignore[union-attr]
            hook(self._modules[BASE], prefix, keep_vars)
        with _in_place(self):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        for hook in self._modules[BASE]._load_state_dict_pre_hooks.values():  # type: ignore[union-attr]
            hook(*args)
        with _in_place(self, merged=False):  # those report that they are merged
            super()._load_from_state_dict(*args)

    def _fqn_modifiers(self) -> dict[str, str]:
        """By adapted parameter, the submodule that has it: torch's checkpoints follow names by reading attributes."""
        return dict.fromkeys(self.adapted_names, BASE)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ever; a parameter given to an adapted name becomes the base of its adapters."""
        if name not in self.adapted_names:
            self._check_places()
            super().register_parameter(name, param)
            return
        if self._parameters.get(name) is not None:  # it is in its old place for a moment, as in loading
            self._parameters[name] = param
            return
        holder = parameter_holders(self)[name]
        if param is None or param.shape != holder.weight.shape or holder.lora_merge is not None:
            raise ValueError(
                f"{name!r} has adapters, so it can only be replaced by a parameter of its shape "
                f"{tuple(holder.weight.shape)} while it is not merged; call remove_lora(model) first"
            )
        holder.weight_slot().bind(param)

    def __delattr__(self, name: str) -> None:
        if name in self.adapted_names:
            raise ValueError(_STAYS.format(name))
        super().__delattr__(name)

    def _check_places(self) -> None:
        for name in self.adapted_names:
            if name not in self._parameters:  # as the older torch.nn.utils.weight_norm takes it out
                self._parameters[name] = None
                raise ValueError(_STAYS.format(name))

    def __copy__(self) -> Self:
        copied = shallow_copy(self, (HOLDERS, BASE))
        for holder in parameter_holders(copied).values():
            holder.__dict__["base"] = copied._modules[BASE]
            holder.own_adapters()
            holder.__setstate__(holder.__dict__)
        return copied


OWNERS: dict[type[nn.Module], type[LoRAOwner]] = {nn.Module: LoRAOwner}
"""Module class -> what a module of it, or of a subclass that has no entry, becomes."""


def parameter_holders(module: nn.Module) -> dict[str, LoRAParameter]:
    """The adapted parameters of a module, by their names."""
    container = module._modules.get(HOLDERS) if isinstance(module, LoRAOwner) else None
    return {} if container is None else dict(container._modules)  # type: ignore[arg-type]


def raw_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters without their adapters, by name."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    return own | {name: holder.weight for name, holder in parameter_holders(module).items()}


def adopt_parameter(owner: nn.Module, name: str, layout: str, label: str, of: str | None = None) -> LoRAParameter:
    """The `LoRAParameter` of an owner's parameter, which is made, still without adapters, if it is not there."""
    holders = parameter_holders(owner)
    if name not in holders:
        parameter = owner._parameters[name]
        assert parameter is not None
        swap_class(owner, lambda swapped: owner_class(swapped, (*holders, name)))
        container = owner._modules.setdefault(HOLDERS, Holders())
        assert container is not None
        base = owner._modules.setdefault(BASE, BaseParameters())
        assert isinstance(base, BaseParameters)
        base.register_parameter(name, parameter)
        holders[name] = LoRAParameter(base, name, layout, label, of)
        holders[name].train(owner.training)
        container._modules[name] = holders[name]
        owner._parameters[name] = None  # which keeps its place among the keys
    assert holders[name].layout == layout
    return holders[name]


@contextmanager
def _in_place(owner: LoRAOwner, *, merged: bool = True) -> Iterator[None]:
    """The adapted parameters back among the owner's own, with those that are merged or without."""
    holders = {name: holder for name, holder in parameter_holders(owner).items() if merged or not holder.lora_merge}
    for name, holder in holders.items():
        owner._parameters[name] = holder.weight
    try:
        yield
    finally:
        for name, holder in holders.items():
            holder.weight_slot().bind(owner._parameters[name])  # type: ignore[arg-type]  # another one after assign=True
            owner._parameters[name] = None


def owner_class(swapped: Any, names: tuple[str, ...]) -> type[LoRAOwner]:
    """The class of a module, of this class or without adapters, in which these parameters are adapted."""
    plain = swapped.base_class if issubclass(swapped, LoRAOwner) else swapped
    return derived_class(next(OWNERS[parent] for parent in plain.__mro__ if parent in OWNERS), plain, names)


def _effective(name: str) -> property:
    def read(owner: LoRAOwner) -> Tensor:
        holder: Any = owner._modules[HOLDERS]._modules[name]  # type: ignore[union-attr]
        # torch.func.functional_call and fully_shard put what shall be computed with where the parameter was
        base, known = owner._parameters.get(name), READING.noted(owner)
        # a checkpoint that began since computes again without the call
        if known is None or known[_keeper] != _keeper():
            return holder(base)  # type: ignore[no-any-return]
        state, adapters = (name, torch.is_grad_enabled()), holder.acting()
        read_before = known.get(state)
        if read_before is None or read_before[0] is not base or read_before[1] is not adapters:
            read_before = known[state] = base, adapters, holder(base)
        return read_before[2]  # type: ignore[no-any-return]

    return property(read, doc=f"The parameter {name!r} with its adapters in it.")


def _keeper() -> Any:
    """The hooks that get what autograd keeps for backward here, such as those of a checkpoint; None for none."""
    return None if torch.compiler.is_compiling() else _TOP_HOOKS(False)


_TOP_HOOKS: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: object()
)  # a torch that does not tell shares no reading


_STATED = (name for name in dir(LoRAOwner) if not name.startswith("__"))
OWN_NAMES = frozenset((HOLDERS, BASE, *_STATED)) - set(dir(nn.Module))
"""What a module must not have for itself in order to become an owner."""

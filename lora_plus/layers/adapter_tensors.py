"""The container that holds one tensor of each adapter, and which names an adapter can have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class AdapterTensors(nn.Module):
    """One parameter for each adapter, by the adapter's name: what ``layer.lora_A`` and ``layer.lora_B`` are.

    Leaner than ``nn.ParameterDict``, whose construction would be half the time of an injection.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        # a tool that moves a module's parameters in and out does so around its forward, which is not called here
        if name == "forward" and any(p is not None and p.is_meta for p in self._parameters.values()):
            raise ValueError(
                "an adapter cannot be offloaded; offload the model first and inject or load the adapter then, or call "
                "merge_and_unload(model) before"
            )
        super().__setattr__(name, value)

    def __getitem__(self, adapter: str) -> nn.Parameter:
        return self._parameters[adapter]  # type: ignore[return-value]

    def __setitem__(self, adapter: str, parameter: nn.Parameter) -> None:
        self._parameters[adapter] = parameter

    def __delitem__(self, adapter: str) -> None:
        del self._parameters[adapter]

    def __contains__(self, adapter: object) -> bool:
        return adapter in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {tuple(self[name].shape)}" for name in self)


def rename_held(container: AdapterTensors, old: str, new: str) -> None:
    """Hold an adapter's parameter, the same object at the same place in the order, under another name."""
    held = list(container._parameters.items())
    container._parameters.clear()
    container._parameters.update((new if name == old else name, parameter) for name, parameter in held)


class BaseParameters(nn.Module):
    """The adapted parameters of a module themselves, under the names that they had there.

    Who owns them saves and loads them, and who holds their adapters moves them (`parameters`).
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


def check_adapter_name(name: object, what: str = "an adapter") -> None:
    """Raise if an adapter, or a block of rows, cannot have this name: it becomes a part of its parameters' names."""
    if not isinstance(name, str):
        raise TypeError(f"{what}'s name must be a str, got {name!r}")
    if not name or "." in name:
        raise ValueError(f"{what}'s name must not be empty or contain a dot, got {name!r}")
    if hasattr(_NAME_PROBE, name):
        raise ValueError(
            f"the name {name!r} of {what} is an attribute of nn.Module, which holds its parameters; choose another name"
        )


_NAME_PROBE = nn.Module()

"""One adapter of one weight: its settings and its tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_plus.tensors.matrix import joined_rows
from lora_plus.tensors.merged_weight import Summand
from lora_plus.tensors.variant import SUBTRACTED, VARIANTS, AdapterSpec, adapter_tensor_specs

from .fused_kernels import keep_out_of_fused_kernels


class AdapterTensors(nn.Module):
    """One parameter for each adapter, by the adapter's name: what ``layer.lora_A`` and ``layer.lora_B`` are.

    Leaner than ``nn.ParameterDict``, and than any module: the dozen tables of its hooks, which would take more memory
    than the factors of a small layer and a fifth of the time of an injection, are made when they are asked for.
    """

    def __init__(self) -> None:
        self.__dict__.update(training=True, _parameters={}, _buffers={}, _modules={}, _non_persistent_buffers_set=set())

    def __getattr__(self, name: str) -> Any:
        if name not in _NEW.__dict__:
            return super().__getattr__(name)
        return self.__dict__.setdefault(name, copy.copy(_NEW.__dict__[name]))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

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

    def __contains__(self, adapter: object) -> bool:
        return adapter in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def rename(self, old: str, new: str) -> None:
        """Hold an adapter's parameter, the same object at the same place in the order, under another name."""
        held = list(self._parameters.items())
        self._parameters.clear()
        self._parameters.update((new if name == old else name, parameter) for name, parameter in held)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {tuple(self[name].shape)}" for name in self)


_NEW = nn.Module()
"""What a container has, and does not hold itself until it is asked for it."""
keep_out_of_fused_kernels(_NEW)


@dataclass(eq=False)
class Adapter:
    """One adapter of a weight, or of a block of its rows.

    Its tensors are read from the module's containers whenever they are needed: ``fully_shard`` and
    ``torch.func.functional_call`` put other tensors in the place of the parameters.
    """

    name: str
    spec: AdapterSpec
    modules: Mapping[str, Any] = field(repr=False)
    """The submodules of the module that has the adapter; among them the containers of its tensors."""
    roles: Mapping[str, str] = field(repr=False)
    """By container, what its tensor is to the optimizer, where that is not what the variant states."""
    strength: float = 1.0
    """The factor that its scale has while it is active."""
    held: ClassVar[bool] = True
    """Whether its tensors are its own; an adapter that follows another one computes with those of that."""

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.spec.scale * self.strength

    def tensors(self) -> dict[str, nn.Parameter]:
        """Its parameters by the name of their container: lora_A, lora_B, those of its variant and its start."""
        stated = adapter_tensor_specs(self.spec.variant)
        held = [(name, self.modules[name]._parameters) for name in stated if name in self.modules]
        return {name: parameters[self.name] for name, parameters in held if self.name in parameters}

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """``(role, parameter)`` for all its parameters: what tells an optimizer's groups apart, and never names."""
        stated = adapter_tensor_specs(self.spec.variant)
        for name, parameter in self.tensors().items():
            yield self.roles.get(name, stated[name].role), parameter

    def factors(self) -> tuple[Tensor, Tensor]:
        """A ``(r, in)`` and B ``(out, r)`` of its whole update; with a start taken out of it, 2 r each."""
        if SUBTRACTED[0] in self.modules:
            return whole_factors(self.tensors())
        return self.modules["lora_A"]._parameters[self.name], self.modules["lora_B"]._parameters[self.name]

    def is_trained(self, container: str) -> bool:
        """Whether training changes its tensor in this container: its variant or its start can hold it fixed."""
        return container not in SUBTRACTED and container not in VARIANTS[self.spec.variant].frozen

    def set_trainable(self, trainable: bool) -> None:
        """Put it into training, but for what is held fixed, or take it out."""
        for container, parameter in self.tensors().items():
            parameter.requires_grad_(trainable and self.is_trained(container))

    def exchange(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Bind other parameters as its own, by their containers; the ones that it had are left as they are."""
        for container, parameter in parameters.items():
            self.modules[container]._parameters[self.name] = parameter

    def as_saved(
        self, gather: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    ) -> tuple[AdapterSpec, dict[str, Tensor]]:
        """Its settings and tensors as a file holds them: with no start to take out, then of rank 2 r at the same scale.

        ``gather`` gives the whole tensors where they are not whole on this rank.
        """
        tensors = gather(self.tensors())
        if SUBTRACTED[0] not in tensors:
            return self.spec, dict(tensors)
        A, B = whole_factors(tensors)
        rest = {name: tensor for name, tensor in tensors.items() if name not in SUBTRACTED}
        return self.spec.at_rank(A.shape[-2]), {**rest, "lora_A": A, "lora_B": B}

    def forget_start(self) -> None:
        """Take nothing out of its update any more."""
        for container in SUBTRACTED:
            if container in self.modules:
                self.modules[container]._parameters.pop(self.name, None)

    def unweighted(self) -> Adapter:
        """The same adapter with the strength 1."""
        return self if self.strength == 1.0 else replace(self, strength=1.0)


class RowsAdapter:
    """The adapters of one name on several blocks of a weight's rows, as one adapter of the whole weight.

    They are plain sums, without tensors besides A and B, and alike in their settings but for r and alpha.
    """

    def __init__(self, blocks: Sequence[tuple[int, Adapter]], rows: int) -> None:
        self.blocks, self.rows = tuple(blocks), rows  # the first row and the adapter of each; how many rows in all

    @property
    def name(self) -> str:
        """The name that they have."""
        return self.blocks[0][1].name

    @property
    def spec(self) -> AdapterSpec:
        """The settings of the first of them."""
        return self.blocks[0][1].spec

    @property
    def strength(self) -> float:
        """The factor that all their scales have."""
        return self.blocks[0][1].strength

    @strength.setter
    def strength(self, strength: float) -> None:
        for _, adapter in self.blocks:
            adapter.strength = strength

    @property
    def scale(self) -> float:
        """The factor of B A; B has the scales of the blocks in it."""
        return self.strength

    def tensors(self) -> dict[str, nn.Parameter]:
        """None that are of the whole weight."""
        return {}

    def factors(self) -> tuple[Tensor, Tensor]:
        """A of all blocks one after the other ``(sum of r, in)``, and B ``(out, sum of r)``, block-structured."""
        blocks = [(row, *adapter.factors(), adapter.spec.scale) for row, adapter in self.blocks]
        return joined_rows(blocks, self.rows)

    def unweighted(self) -> RowsAdapter:
        """The same adapters with the strength 1."""
        return RowsAdapter([(row, adapter.unweighted()) for row, adapter in self.blocks], self.rows)


ActiveAdapter = Adapter | RowsAdapter
"""What takes part in a forward."""


def summands(adapters: Sequence[ActiveAdapter]) -> list[Summand]:
    """Adapters of one weight, as merging takes them."""
    return [Summand(each.spec.variant, *each.factors(), each.scale, each.tensors()) for each in adapters]


def whole_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`Adapter.factors` from the adapter's tensors by the name of their container."""
    A, B = tensors["lora_A"], tensors["lora_B"]
    if SUBTRACTED[0] not in tensors:
        return A, B
    A0, B0 = (tensors[name] for name in SUBTRACTED)
    return torch.cat([A, A0], dim=-2), torch.cat([B, -B0], dim=-1)


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

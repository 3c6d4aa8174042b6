"""What holds the adapters of one matrix: their settings and their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_plus.tensors.distributed import fill
from lora_plus.tensors.variant import SCALINGS, STARTS, VARIANTS, AdapterSpec, adapter_tensor_specs

from .adapter_tensors import AdapterTensors, rename_held


def whole_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`AdapterSite.factors` from the adapter's tensors by the name of their container."""
    A, B = tensors["lora_A"], tensors["lora_B"]
    if STARTS[0] not in tensors:
        return A, B
    A0, B0 = (tensors[name] for name in STARTS)
    return torch.cat([A, A0], dim=-2), torch.cat([B, -B0], dim=-1)


def _with_gradients(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in ``torch.inference_mode``, which can have no gradient."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


class AdapterSite(nn.Module):
    """The adapters of one matrix, a whole weight or some rows of one, by the name of the adapter."""

    roles: ClassVar[dict[str, str]] = {}
    """By container, what its tensors are to the optimizer, where that is not what their variant states."""

    lora_label: str = ""
    """The name of the matrix inside the module that it belongs to; empty where it is that module's one weight."""
    lora_A: AdapterTensors
    lora_B: AdapterTensors
    lora_specs: dict[str, AdapterSpec]
    """The settings of each adapter, by its name."""

    def add_adapter(self, name: str, spec: AdapterSpec, tensors: dict[str, Tensor], *, trainable: bool = True) -> None:
        """Take in an adapter with these tensors."""
        assert name not in self.lora_specs
        for container, tensor in tensors.items():
            if container not in self._modules:
                self._modules[container] = AdapterTensors()
            trained = trainable and self.is_trained(container, spec)
            self._container(container)[name] = nn.Parameter(_with_gradients(tensor), requires_grad=trained)
        self.lora_specs[name] = spec

    @staticmethod
    def is_trained(container: str, spec: AdapterSpec) -> bool:
        """Whether training an adapter with these settings changes its tensor in this container."""
        return container not in STARTS and container not in VARIANTS[spec.variant].frozen

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter."""
        for container in self.adapter_tensors(name):
            del self._container(container)[name]
        del self.lora_specs[name]

    def rename_adapter(self, old: str, new: str) -> None:
        """Call an adapter by another name; its parameters and its place in the order stay."""
        for container in self.adapter_tensors(old):
            rename_held(self._container(container), old, new)
        self.lora_specs = {new if name == old else name: spec for name, spec in self.lora_specs.items()}

    def adapter_tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter by the name of their container: lora_A, lora_B, ..."""
        present = [(name, held._parameters) for name, held in self.tensor_containers()]
        return {name: held[adapter] for name, held in present if adapter in held}  # type: ignore[misc]

    def tensor_containers(self) -> list[tuple[str, AdapterTensors]]:
        """The containers of the adapters' tensors, with their names."""
        return [(name, child) for name, child in self._modules.items() if isinstance(child, AdapterTensors)]

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A ``(r, in)`` and B ``(out, r)`` of the adapter's whole update; with a start taken out of it, 2 r each."""
        return whole_factors(self.adapter_tensors(adapter))

    def set_trainable(self, adapter: str, trainable: bool) -> None:
        """Put an adapter into training, but for what its variant or its start holds fixed, or take it out."""
        for container, parameter in self.adapter_tensors(adapter).items():
            parameter.requires_grad_(trainable and self.is_trained(container, self.lora_specs[adapter]))

    def freeze_adapters(self) -> None:
        """Take the tensors of all adapters out of training."""
        for _, container in self.tensor_containers():
            for parameter in container._parameters.values():
                assert parameter is not None
                parameter.requires_grad_(False)

    def plain(
        self, adapter: str, gathered: Mapping[str, Tensor] | None = None
    ) -> tuple[AdapterSpec, dict[str, Tensor]]:
        """The adapter as one that has no start to take out: the same update, then of rank 2 r, and the same scale.

        ``gathered`` are its tensors where the parameters are not whole on this rank.
        """
        spec, tensors = self.lora_specs[adapter], gathered or self.adapter_tensors(adapter)
        if STARTS[0] not in tensors:
            return spec, dict(tensors)
        A, B = whole_factors(tensors)
        rest = {name: tensor for name, tensor in tensors.items() if name not in STARTS}
        r = A.shape[-2]
        alpha = spec.scale / SCALINGS[spec.scaling](1.0, r)
        return replace(spec, r=r, alpha=alpha), {**rest, "lora_A": A, "lora_B": B}

    def forget_start(self, adapter: str) -> None:
        """Take nothing out of the adapter's update any more."""
        for container in STARTS:
            if container in self._modules and adapter in self._container(container):
                del self._container(container)[adapter]

    def exchange_tensors(self, adapter: str, tensors: Mapping[str, nn.Parameter]) -> None:
        """Bind other parameters as those of an adapter; the ones that it had are left as they are."""
        for container, parameter in tensors.items():
            self._container(container)[adapter] = parameter

    def check_refill(self, adapter: str, tensors: Mapping[str, Tensor], init: object) -> None:
        """Raise if an adapter lacks a container of these tensors, which this init has made."""
        if not tensors.keys() <= self.adapter_tensors(adapter).keys():
            raise ValueError(f"init {init!r} needs tensors that the adapter {adapter!r} does not have; inject with it")

    def refill(self, adapter: str, tensors: Mapping[str, Tensor]) -> None:
        """Write whole values into the tensors of an adapter, in place; those that are not given become zero."""
        for name, parameter in self.adapter_tensors(adapter).items():
            fill(parameter, tensors[name] if name in tensors else torch.zeros(parameter.shape))

    def lora_parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """``(adapter, role, parameter)`` for every adapter parameter of this matrix.

        Freezing, optimizer groups, saving and deleting go by this, never by names.
        """
        for adapter in self.lora_specs:
            for container, parameter in self.adapter_tensors(adapter).items():
                yield adapter, self.role_of(adapter, container), parameter

    def role_of(self, adapter: str, container: str) -> str:
        """What an adapter's tensor in this container is to the optimizer."""
        if container in self.roles:
            return self.roles[container]
        return adapter_tensor_specs(self.lora_specs[adapter].variant)[container].role

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: r={spec.r}, alpha={spec.alpha:g}" for name, spec in self.lora_specs.items())
        base = super().extra_repr()
        return f"{base}, lora=({adapters})" if base else f"lora=({adapters})"

    def _container(self, name: str) -> AdapterTensors:
        container = self._modules[name]
        assert isinstance(container, AdapterTensors)
        return container


class RowBlock(AdapterSite):
    """Adapters of the rows ``start:stop``, out of ``total``, of a weight's matrix view: one of several projections."""

    def __init__(self, label: str, start: int, stop: int, total: int) -> None:
        super().__init__()
        self.lora_label, self.start, self.stop, self.total = label, start, stop, total
        self.lora_specs = {}

    def extra_repr(self) -> str:
        return f"rows={self.start}:{self.stop}, {super().extra_repr()}"

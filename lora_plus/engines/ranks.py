"""Copies of a model on several ranks: what the engine keeps equal, and whether they are equal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from lora_plus.tensors.distributed import is_dtensor
from lora_plus.text import some
from lora_plus.training.engine_checks import ENGINE_CHECKS


class _Engine(NamedTuple):
    """A wrapper that reduces gradients over ranks: of just those parameters that it found when it was made."""

    module: str
    """Where its class is; looked up among the modules that are loaded, never imported."""
    name: str
    reduced: Callable[[Any], Iterable[Tensor]]
    """The parameters whose gradients a wrapper of this kind reduces."""
    advice: str

    @property
    def kind(self) -> Any:
        """Its class; nothing is an instance while its module is not loaded."""
        return getattr(sys.modules.get(self.module), self.name, ())


def _in_buckets(ddp: Any) -> Iterator[Tensor]:
    for bucket in ddp.reducer._get_zeros_like_grad_buckets():
        yield from bucket.parameters()
    yield from ddp._delay_all_reduce_params  # reduced on their own, not in a bucket


_DDP = _Engine(
    "torch.nn.parallel", "DistributedDataParallel", _in_buckets,
    "add adapters, and choose what is trainable, before DistributedDataParallel wraps the model, or wrap it anew",
)  # fmt: skip
_ENGINES = (
    _DDP,
    _Engine(
        "torch.distributed.fsdp", "FSDPModule", lambda fsdp: filter(is_dtensor, fsdp.parameters()),
        "add adapters before the model is sharded, and call fully_shard on the root, too, after its parts",
    ),
    _Engine(
        "torch.distributed.fsdp", "FullyShardedDataParallel",
        lambda fsdp: () if fsdp._handle is None else fsdp._handle.flat_param._params or (),
        "add adapters before the model is wrapped in FullyShardedDataParallel, and wrap the whole of it",
    ),
)  # fmt: skip


def unreduced(model: nn.Module) -> list[str]:
    """What is wrong where an engine in the model leaves trainable parameters out."""
    found = [(engine, module) for module in model.modules() for engine in _ENGINES if isinstance(module, engine.kind)]
    known = {id(parameter) for engine, module in found for parameter in engine.reduced(module)}
    names = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if not found or not names:
        return []
    return [f"{some(names)} would drift apart between ranks: their gradients are not reduced; {found[0][0].advice}"]


Replicas = dict[Any, dict[str, Tensor]]
"""By process group, the trainable tensors that must be equal on all of its ranks, by name."""


def replicas(model: nn.Module) -> Replicas:
    """What must be equal on which ranks: under DDP, and where parameters lie on a device mesh.

    The groups depend on how the model is wrapped and sharded alone, so that they are the same on all their ranks. A
    plain parameter beside sharded ones must be equal on all ranks of the mesh.
    """
    found: Replicas = {module.process_group: {} for module in model.modules() if isinstance(module, _DDP.kind)}
    for parameter in model.parameters():
        for group, _ in _placed(parameter):
            found.setdefault(group, {})
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.is_meta:
            continue
        held: Any = parameter.detach()
        if is_dtensor(held):
            equal_over = [group for group, placement in _placed(held) if placement.is_replicate()]
            held = held.to_local()
        else:
            equal_over = [*found]
        for group in equal_over:
            found[group][name] = held
    return found


def _placed(tensor: Any) -> Iterator[tuple[Any, Any]]:
    """For each dimension of a DTensor's mesh, the process group of this rank and how the tensor lies there."""
    if is_dtensor(tensor):
        for dimension, placement in enumerate(tensor.placements):
            yield tensor.device_mesh.get_group(dimension), placement


def found_on_all_ranks(model: nn.Module, findings: list[str]) -> list[str]:
    """What all ranks have found, parameters that are not reduced, and replicas that are not equal."""
    findings = [*findings, *unreduced(model)]
    different: list[str] = []
    for group, tensors in replicas(model).items():
        findings, names = told_by_all(group, findings, tensors)
        different += names
    if different:
        findings.append(
            f"{some(different)} differ between ranks, so each rank would train its own copy: load or draw the same "
            "values on all ranks before wrapping or sharding"
        )
    return findings


ENGINE_CHECKS.append(found_on_all_ranks)


def told_by_all(group: Any, findings: Sequence[str], tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """The findings of all ranks of a group, each once, and the names of the tensors that are not the same on all.

    A collective: every rank of the group gets the same answer.
    """
    told: list[Any] = [None] * distributed.get_world_size(group)
    sums = {name: checksum(tensor) for name, tensor in tensors.items()}
    distributed.all_gather_object(told, (list(findings), sums), group=group)
    names = dict.fromkeys(chain.from_iterable(own for _, own in told))
    different = [name for name in names if len({own.get(name) for _, own in told}) > 1]
    return list(dict.fromkeys(chain.from_iterable(own for own, _ in told))), different


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> int:
    """The sum of the bits of all elements, read as integers: exact, so in any order and on any device the same."""
    size = min(tensor.element_size(), max(_INTEGERS))
    return int(tensor.contiguous().view(_INTEGERS[size]).sum(dtype=torch.int64))

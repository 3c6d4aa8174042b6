"""Parameters that are not whole on this rank: how an engine holds them, gathering them, and writing into them."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lora_plus.errors import check_model
from lora_plus.tensors.distributed import fill, is_dtensor, whole

Result = TypeVar("Result")


@contextmanager
def whole_parameters(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules with their own DTensors gathered, as parameters of the same names, for the length of a block."""
    sharded = [
        (part._parameters, name, parameter)
        for part in modules
        for name, parameter in part._parameters.items()
        if parameter is not None and is_dtensor(parameter)
    ]
    for held, name, parameter in sharded:
        held[name] = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for held, name, parameter in sharded:
            held[name] = parameter


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


class Shards:
    """How the parameters of a model are held: those of this class are whole on this rank.

    Its methods with tensors are for parameters and buffers of the model. Gathering is done by all ranks together.
    """

    engine: ClassVar[str] = ""
    """What has sharded the parameters; empty if nothing has."""
    flat: ClassVar[bool] = False
    """Whether parameters are flattened or empty outside of a forward, so that their shapes say nothing."""
    fixed: bool = False
    """Whether the engine is in charge of just the parameters that it found, so that others would be left alone."""
    copied: bool = False
    """Whether the engine trains copies, so that other values in the parameters would be lost at its next step."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]) -> None:
        self.model, self.parameters = model, parameters

    def shape(self, tensor: Tensor) -> torch.Size:
        """The shape of the whole tensor."""
        return tensor.shape

    @contextmanager
    def outlined(self) -> Iterator[None]:
        """All parameters in their whole shapes for the length of a block; those that are empty have no values there."""
        yield

    @contextmanager
    def gathered(self, tensors: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
        """These tensors in their whole shapes for the length of a block, as plain tensors or as DTensors.

        With ``write`` what all ranks alike write into them stays.
        """
        yield

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named tensors, gathered and detached."""
        with self.gathered(tensors.values()):
            return {name: whole(tensor).clone() if self.flat else whole(tensor) for name, tensor in tensors.items()}

    def groups(self) -> list[Any]:
        """Process groups whose product is the ranks that hold the model together."""
        return []

    def on_one_rank(self, action: Callable[[], None]) -> None:
        """Run something on one of the ranks that hold the model together; all return, or raise its error, after it."""
        first = all(torch.distributed.get_rank(group) == 0 for group in self.groups())
        self.on_every_rank(action if first else lambda: None)

    def on_every_rank(self, action: Callable[[], Result]) -> Result:
        """Run something on each rank that holds the model; where it fails on one, all raise that error."""
        own = None
        try:
            result = action()
        except BaseException as error:
            own = error
        told = None if own is None else _transportable(own)
        for group in self.groups():
            heard: list[BaseException | None] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(heard, told, group=group)
            told = next((error for error in heard if error is not None), None)
        if own is not None:
            raise own
        if told is not None:
            raise told
        return result


def _transportable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class DTensorShards(Shards):
    """``fully_shard`` and tensor parallelism: each parameter knows its mesh and its whole shape."""

    engine = "fully_shard or tensor parallelism"
    fixed = True

    def groups(self) -> list[Any]:
        meshes: list[Any] = [p.device_mesh for p in self.parameters if is_dtensor(p)]  # type: ignore[attr-defined]
        mesh = max(meshes, key=lambda mesh: mesh.size())  # that of a part of the model can be a part of it
        return [mesh.get_group(dimension) for dimension in range(mesh.ndim)]


class FSDP1Shards(Shards):
    """``FullyShardedDataParallel``: parameters are flat slices of the one parameter of their unit."""

    engine = "FullyShardedDataParallel"
    flat = fixed = True

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]) -> None:
        super().__init__(model, parameters)
        from torch.distributed.fsdp import FullyShardedDataParallel

        self._fsdp = FullyShardedDataParallel
        self._units: dict[int, FullyShardedDataParallel] = {}
        self._shapes: dict[int, torch.Size] = {}
        for unit in self._fsdp.fsdp_modules(model):
            flat = unit._handle.flat_param if unit._handle is not None else None
            if flat is not None and flat._params is not None:
                self._units |= {id(parameter): unit for parameter in flat._params}
                self._shapes |= {id(p): shape for p, shape in zip(flat._params, flat._shapes, strict=True)}

    def shape(self, tensor: Tensor) -> torch.Size:
        return self._shapes.get(id(tensor), tensor.shape)

    @contextmanager
    def gathered(self, tensors: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
        self._fsdp.fsdp_modules(self.model, root_only=True)  # or a unit gathered before a forward takes itself for one
        units = {id(unit): unit for tensor in tensors if (unit := self._units.get(id(tensor))) is not None}
        with ExitStack() as stack:
            for unit in units.values():
                stack.enter_context(self._fsdp.summon_full_params(unit, recurse=False, writeback=write))
            yield

    def groups(self) -> list[Any]:
        return [self._fsdp.fsdp_modules(self.model)[0].process_group]


@contextmanager
def _empty_ones_kept(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Those of the tensors that have no values on this rank; what they show is the same after the block."""
    empty = [(tensor, tensor.data) for tensor in tensors if _is_empty(tensor)]
    try:
        yield [tensor for tensor, _ in empty]
    finally:
        for tensor, shown in empty:
            tensor.data = shown


def _is_empty(tensor: Any) -> bool:
    return hasattr(tensor, "ds_status") and tensor.ds_status.name == "NOT_AVAILABLE"


class ZeROShards(Shards):
    """DeepSpeed's ZeRO-1 and 2: parameters are whole; their copies in full precision, which are trained, are not."""

    copied = True


class ZeRO3Shards(Shards):
    """DeepSpeed's ZeRO-3: parameters are empty, but for the length of their module's forward and backward.

    A model is so before an engine takes it over, if it was built under ``zero.Init``.
    """

    engine = "DeepSpeed ZeRO-3"
    flat = True

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]) -> None:
        super().__init__(model, parameters)
        # an engine numbers modules, and trains copies in full precision
        self.fixed = self.copied = any("ds_id" in module.__dict__ for module in model.modules())

    def shape(self, tensor: Tensor) -> torch.Size:
        return torch.Size(getattr(tensor, "ds_shape", tensor.shape))

    @contextmanager
    def outlined(self) -> Iterator[None]:
        init = sys.modules["deepspeed"].zero.partition_parameters
        init.shutdown_init_context()  # inside of zero.Init every new tensor would be of its dtype
        try:
            with _empty_ones_kept(self.parameters) as empty:
                for parameter in empty:
                    parameter.data = parameter.data.new_empty(1).expand(self.shape(parameter))  # takes no memory
                yield
        finally:
            init.restore_init_context()

    @contextmanager
    def gathered(self, tensors: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
        # what a caller has gathered already must not be gathered again
        partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id") and (write or _is_empty(tensor))]
        gather = sys.modules["deepspeed"].zero.GatheredParameters(partitioned, modifier_rank=0 if write else None)
        with _empty_ones_kept(partitioned), gather:
            yield

    def groups(self) -> list[Any]:
        partitioned: Any = next(p for p in self.parameters if hasattr(p, "ds_id"))
        return [partitioned.ds_process_group]


_ENGINES: dict[str, type[Shards]] = {
    "_fsdp_flattened": FSDP1Shards,
    "ds_id": ZeRO3Shards,
    "_hp_mapping": ZeROShards,
    "device_mesh": DTensorShards,
}
"""By the attribute that an engine's parameters have, how it holds them."""


def reshard(model: nn.Module) -> None:
    """Make shards again of the parameters that ``fully_shard`` left whole after a forward, as it does with the root's.

    What is written into shards while others hold the whole values would not be seen.
    """
    check_model(model)
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # importing it takes longer than importing this library
    resharding: Any = getattr(fsdp, "FSDPModule", ())
    for module in model.modules():
        if isinstance(module, resharding):
            module.reshard()


def shards_of(model: nn.Module) -> Shards:
    """How the parameters of a model are held; they are resharded first."""
    reshard(model)
    parameters = [p for module in model.modules() for p in module._parameters.values() if p is not None]
    found = (kind for mark, kind in _ENGINES.items() if any(hasattr(p, mark) for p in parameters))
    return next(found, Shards)(model, parameters)

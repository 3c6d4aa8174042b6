"""How the parameters of a model are held: whole on this rank, or as an engine that shards them says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, ClassVar, TypeVar

from torch import Tensor

from lora_plus.tensors.distributed import fill, whole

from .tree import Tree

if TYPE_CHECKING:
    from lora_plus.layers.merge_state import Merge, Tensors
    from lora_plus.layers.weight import AdaptedWeight

Result = TypeVar("Result")


class Storage:
    """How the parameters of a model are held. This one: every tensor is whole on this rank.

    Engines override the methods (`lora_plus.engines`), which take parameters and buffers of the model. Of a sharded
    model all ranks call a method together.
    """

    engine: ClassVar[str] = ""
    """What has taken the parameters over; empty if nothing has."""
    sharded: ClassVar[bool] = False
    """Whether this rank has only a part of the parameters."""
    flat: ClassVar[bool] = False
    """Whether parameters are flattened or empty outside of a forward, so that their shapes say nothing."""
    fixed: bool = False
    """Whether the engine manages just the parameters that it found, so that it would leave others alone."""
    copied: bool = False
    """Whether the engine trains copies, so that its next step overwrites what is written into the parameters."""

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return tuple(tensor.shape)

    @contextmanager
    def outlined(self) -> Iterator[None]:
        """For the length of a block all parameters have their whole shapes; those that are empty have no values."""
        yield

    def gathered(self, tensors: Iterable[Tensor], *, write: bool = False) -> AbstractContextManager[None]:
        """For the length of a block these tensors have their whole shapes, as plain tensors or as DTensors.

        With ``write`` the values that all ranks alike write into them stay.
        """
        return nullcontext()

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named tensors, whole and detached."""
        with self.gathered(tensors.values()):
            return {name: whole(tensor).clone() if self.flat else whole(tensor) for name, tensor in tensors.items()}

    def write(self, values: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Write whole values into tensors: ``(tensor, values)``."""
        values = list(values)
        with self.gathered([tensor for tensor, _ in values], write=True):
            for tensor, new in values:
                fill(tensor, new)

    def settle(self) -> None:
        """Shard again what the engine left whole after a forward, as whoever writes into the shards must."""

    @contextmanager
    def exposed(self, weight: AdaptedWeight) -> Iterator[None]:
        """For the length of a block the parameters of a weight and its adapters are plain tensors, to compute with."""
        yield

    def bound(self, merge: Merge, adapters: Tensors) -> Merge:
        """The merged state of a weight as this storage exchanges it; ``adapters`` are the tensors merged into it."""
        return merge

    def on_one_rank(self, action: Callable[[], None]) -> None:
        """Run something on one of the ranks that hold the model together; all return, or raise its error, after it."""
        action()

    def on_every_rank(self, action: Callable[[], Result]) -> Result:
        """Run something on each rank that holds the model; where it fails on one, all raise that error."""
        return action()


FINDERS: dict[str, Callable[[Tree], Storage | None]] = {}
"""By package, how an engine of it holds a model's parameters; None where none does. Only loaded packages are asked; the
first one that knows the model decides."""


def storage_of(tree: Tree) -> Storage:
    """How the parameters of a model are held, as settled as `Storage.settle` makes them."""
    found = (find(tree) for package, find in FINDERS.items() if package in sys.modules)
    return next(filter(None, found), None) or Storage()

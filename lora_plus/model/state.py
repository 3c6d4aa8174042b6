"""What an operation needs of a model's state, and what the operation then walks over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Flag, auto

from torch import nn
from torch.nn.parameter import is_lazy

from lora_plus.layers.adapter import check_adapter_name
from lora_plus.layers.class_swap import SwappedModule

from .storage import storage_of
from .train_also import Head, units_in
from .tree import Tree


class State(Tree):
    """A model as an operation finds it: its modules, and how its parameters are held."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.storage = storage_of(self)

    def trained(self, adapter: str | None = None) -> Iterator[Head]:
        """What is trained in full, with one adapter or with any; what several train comes once for each."""
        for unit, record in units_in(self):
            yield from (Head(unit, record, name) for name in record.held if name and adapter in (None, name))


class Need(Flag):
    """What an operation can need of a model; `NEEDS` says what each is."""

    UNSHARDED = auto()
    UNWRAPPED = auto()
    INITIALISED = auto()
    WHOLE = auto()
    UNCOPIED = auto()
    ADAPTED = auto()
    UNDISABLED = auto()
    UNGROUPED = auto()
    UNMERGED = auto()
    EXCHANGEABLE = auto()
    TRAINED = auto()
    HIDEABLE = auto()
    RESTORABLE = auto()
    UNFOLLOWED = auto()
    ENABLED = UNDISABLED | UNGROUPED
    CHANGEABLE = ENABLED | UNMERGED
    GROWABLE = UNSHARDED | UNWRAPPED | INITIALISED | CHANGEABLE


def require(
    model: nn.Module | State,
    doing: str,
    needs: Need = Need(0),  # noqa: B008 - flags do not change
    *,
    adapters: Sequence[str] = (),
    new: str | None = None,
    instead: str = "",
    taken: str = "choose another name, or call delete_adapter first",
) -> State:
    """The model's state, if it is as an operation needs it.

    Args:
        model: the model, or its state where that is known.
        doing: the operation, as a message says it: ``"merging"``.
        needs: what it needs.
        adapters: adapters that the model must have; a KeyError if it has not.
        new: the name of an adapter to come, which must be free.
        instead: what a message offers besides its next step where an engine is in the way.
        taken: the next step where the new name is not free.
    """
    state = model if isinstance(model, State) else State(model)
    names = [*dict.fromkeys(name for _, weight in state.weights if adapters for name in weight.adapter_names())]
    if isinstance(adapters, str):
        raise TypeError(f"adapters must be a list of names, got {adapters!r}; write [{adapters!r}]")
    for name in adapters:
        if name not in names:
            there = f"it has {', '.join(map(repr, names))}" if names else "it has none; call inject_lora first"
            raise KeyError(f"the model has no adapter {name!r}: {there}")
    for need, (what, faults) in NEEDS.items():
        for fault in faults(state) if need in needs else ():
            raise ValueError(f"{doing} needs {what}: {fault}{instead if need in _OF_ENGINES else ''}")
    if new is not None:
        check_adapter_name(new)
        for path, _, _ in state.adapters(new):
            raise ValueError(f"the model has an adapter {new!r} already (on {path or 'itself'!r}); {taken}")
    return state


NEEDS: dict[Need, tuple[str, Callable[[State], Iterable[str]]]] = {
    Need.UNSHARDED: ("an unsharded model", lambda state: (
        f"this one is sharded by {storage.engine}, which manages just the parameters that it found; do it before the "
        "model is sharded"
        for storage in (state.storage,) if storage.fixed
    )),
    Need.UNWRAPPED: ("the plain model", lambda state: (
        f"this one is wrapped in {wrapper.name}, which {wrapper.fixed}; do it before the model is wrapped"
        for wrapper in state.wrappers if wrapper.fixed
    )),
    Need.INITIALISED: ("initialised parameters", lambda state: (
        f"those of {name!r} are not initialised; run a forward pass first"
        for name, module in state.modules
        if any(map(is_lazy, module._parameters.values()))  # type: ignore[arg-type]
    )),
    Need.WHOLE: ("whole parameters", lambda state: (
        f"those of this model are sharded by {storage.engine}; do it before the model is sharded"
        for storage in (state.storage,) if storage.flat
    )),
    Need.UNCOPIED: ("parameters that are trained themselves", lambda state: (
        f"{storage.engine} trains copies, so its next step would undo it; do it before the engine is made"
        for storage in (state.storage,) if storage.copied
    )),
    Need.ADAPTED: ("an adapter", lambda state: (
        "the model has none, and one injected inside the block would not be affected; call inject_lora before"
        for _ in [0] if not state.weights and not any(state.trained())
    )),
    Need.UNDISABLED: ("enabled adapters", lambda state: (
        "the adapters are disabled; leave the disabled(model) block first"
        for _, weight in state.weights if weight.lora_disabled
    )),
    Need.UNGROUPED: ("adapters for all samples", lambda state: (
        "each sample has an adapter of its own; leave the adapter_per_sample block first"
        for _, weight in state.weights if weight.lora_override is not None
    )),
    Need.UNMERGED: ("unmerged weights", lambda state: (
        f"the model is merged ({path!r} is); call unmerge_lora(model) first"
        for path, weight in state.weights if weight.lora_merge is not None
    )),
    Need.EXCHANGEABLE: ("the original values of modules trained in full", lambda state: (
        f"{unit.name!r} is trained in full and sharded by {state.storage.engine}; save the adapter and load it into "
        "the plain model"
        for unit, _, _ in state.trained() if state.storage.flat
    )),
    Need.TRAINED: ("the values of modules trained in full", lambda state: (
        f"{unit.name!r} shows its original values; leave the disabled(model) block first"
        for unit, record, _ in state.trained() if record.aside
    )),
    Need.HIDEABLE: ("the base's own weights", lambda state: (
        fault for _, weight in state.weights if (fault := weight.why_unmergeable())
    )),
    Need.RESTORABLE: ("layers that can be restored", lambda state: (
        f"{name or 'the model'!r} cannot be restored: {fault}"
        for name, module in state.modules
        if isinstance(module, SwappedModule) and (fault := module.why_unrestorable())
    )),
}  # fmt: skip
"""Each need as messages say it, and the faults of a model that does not meet it, with what to do."""


_OF_ENGINES = Need.UNSHARDED | Need.WHOLE | Need.UNCOPIED

EXCHANGE: list[Callable[[State, Iterable[str], Sequence[Head]], None]] = [lambda state, adapters, dropped: None]
"""The last one is called before other adapters take part, with their names: it binds what they train in full, and the
original of all else, or raises. What is about to be dropped shall have the base's own tensors bound."""

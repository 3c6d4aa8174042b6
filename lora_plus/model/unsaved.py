"""What is trained and belongs to no adapter, so that no file of an adapter holds it; and what must not be trained."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from lora_plus.errors import Problems, warn_user
from lora_plus.text import join, some

from .state import State
from .tree import own_parameters


@dataclass(frozen=True)
class Unsaved:
    """What is trainable in a model with adapters and is none of what they train. Without adapters all is empty."""

    parameters: dict[str, nn.Parameter]
    """Those that are in no adapter and in no module trained in full with one, each once, by name."""
    bases: list[str]
    """The names of those of them that adapters are added to."""
    fixed: dict[str, list[str]]
    """By adapter, the names of its tensors that its variant or its start holds fixed."""
    fixed_active: dict[str, list[str]]
    """The same where the adapter is active."""

    def wrong(self, adapter: str | None = None) -> list[str]:
        """What would make a file of the adapter, or of the active ones, wrong: lines that say what to do."""
        bases = [f"{some(self.bases)}: base weights under an adapter; call requires_grad_(False) on them"]
        fixed = self.fixed_active if adapter is None else {adapter: self.fixed.get(adapter, [])}
        return (bases if self.bases else []) + [
            f"{some(names)}: held fixed by the variant or the init of the adapter; call set_adapter(model, {name!r}, "
            "trainable=True)"
            for name, names in fixed.items()
            if names
        ]

    def check(self, what: str, adapter: str | None = None) -> None:
        """Raise, saying what was not done, if something is `wrong`."""
        lines = self.wrong(adapter)
        if lines:
            raise Problems(f"{what}: these are trainable and must be frozen", lines)

    def warn(self) -> None:
        """Warn of the parameters, naming them."""
        if self.parameters:
            warn_user(
                f"trained, but saved with no adapter: {some(list(self.parameters))}; name the modules in "
                "inject_lora(..., train_also=[...]), freeze them, or save them yourself"
            )


def unsaved(state: State, others: Collection[int] = ()) -> Unsaved:
    """Find what is trained and saved with no adapter; ``others`` are the ids of parameters that somebody else saves."""
    saved = {*others, *(id(parameter) for head in state.trained() for parameter in head.parameters())}
    trainable: list[tuple[str, nn.Parameter]] = []
    fixed: dict[str, list[str]] = {}
    fixed_active: dict[str, list[str]] = {}
    for path, module in state.modules:
        trainable += [(join(path, name), own) for name, own in own_parameters(module) if own.requires_grad]
    for path, adapter, weight in state.adapters():
        for name in [container for container in adapter.modules if not adapter.is_trained(container)]:
            tensor = adapter.tensors().get(name)
            if tensor is not None and tensor.requires_grad:
                for found in (fixed, fixed_active) if adapter.name in weight.active_names() else (fixed,):
                    found.setdefault(adapter.name, []).append(join(path, f"{name}.{adapter.name}"))
    once: dict[int, tuple[str, nn.Parameter]] = {}
    for name, own in trainable if state.weights else ():
        if id(own) not in saved:
            once.setdefault(id(own), (name, own))
    parameters = dict(once.values())
    weights = [weight for _, weight in state.weights] if parameters else []
    bases = {id(weight.weight) for weight in weights if weight.weight_slot() is not None}
    return Unsaved(parameters, [name for name, own in parameters.items() if id(own) in bases], fixed, fixed_active)


def check_saved(state: State, adapter: str, what: str) -> None:
    """Raise where the file of an adapter would be wrong, and warn of what it will lack."""
    beside = unsaved(state)
    beside.check(what, adapter)
    beside.warn()

"""The proof that each adapter of a model is live: it changes the output, in train and in eval, and gets gradients."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_plus.layers.adapter import Adapter
from lora_plus.layers.layer import LoRALayer
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.tensors.variant import VARIANTS
from lora_plus.tensors.weight_sum import WeightSum

from .dry_run import copied, left_as_it_was
from .state import Need, State, require
from .train_also import units_in
from .tree import unwrap

TRAIN_PASSES = 4
"""At most: layers that are skipped at random in training get another chance."""


def check_adapters(model: nn.Module, *inputs: Any, **keywords: Any) -> list[str]:
    """Run the model on these inputs, and raise unless every active adapter has an effect and gets a gradient.

    For the check, random values replace A and B, because at B = 0 an adapter has no effect and A no gradient. A nonzero
    gradient, in training and in evaluation mode, proves that the output depends on a tensor. Another pass without
    gradients shows that inference takes the same path. A module trained in full must get a gradient, too, and the
    forward must not read values of it that are kept outside its parameters.

    Afterwards the model, its gradients, buffers and modes and the random states of torch, Python and numpy are as they
    were. If the model's own forward changes anything else, such as parameters or a generator, that change stays.

    Args:
        model: the model with adapters, not merged and not sharded; a compiled model is run without compilation.
        *inputs: arguments of the model. They should reach all its parts.
        **keywords: keyword arguments of the model.

    Returns:
        The names of the layers and parameters whose adapters work.

    Raises:
        ValueError: naming each adapter that does not work, with the reason if it is known; or if there are no adapters
            or no inputs.
    """
    state = require(model, "checking adapters", Need.UNSHARDED | Need.WHOLE | Need.CHANGEABLE)
    model = unwrap(model)
    owners: Counter[int] = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    probes = []
    for name, adapter, weight in state.adapters():
        if adapter.name in weight.active_names() and adapter.held:  # memory on the meta device is no one's
            own = isinstance(weight, LoRALayer) and owners[id(weight.weight)] == 1 and not weight.weight.is_meta
            probes.append(_Probe(name, adapter, weight, own))
    _check_checkable(probes)
    trained = _Trained(state)
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad(), left_as_it_was(model), trained):
            stack.enter_context(context)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_random_adapters(probes))
        with _without_cudnn(model):
            modes = {"eval": _run(model.eval(), inputs, keywords, probes, trained)}
        for attempt in range(TRAIN_PASSES):
            train = _run(model.train(), inputs, keywords, probes, trained, seed=attempt)
            modes["train"] = modes["train"].joined(train) if "train" in modes else train
            if all(probe.fault(modes["train"]) is None for probe in probes):
                break
        with torch.no_grad():
            inference = _run(model.eval(), inputs, keywords, probes, trained)
        dead = {probe: faults for probe in probes if (faults := probe.faults(modes, inference))}
        unused = [*trained.read] or trained.unreached()
    if dead or unused:
        lines = [f"{probe.title()}, {fault}" for probe, faults in dead.items() for fault in faults]
        what = f"{len(dead)} of {len(probes)} adapters are not live:" if dead else "not all of it is live:"
        raise ValueError("\n  ".join([what, *lines, *unused]))
    return list(dict.fromkeys(probe.name for probe in probes))


@dataclass
class _Seen:
    """What one pass, or several, showed."""

    used: set[_Probe] = field(default_factory=set)
    """Probes whose A took part in an operation of the forward."""
    differentiable: set[_Probe] = field(default_factory=set)
    """Those of them where gradients were on."""
    read: set[_Probe] = field(default_factory=set)
    """Probes whose base weight took part anywhere but in their own layer."""
    gradients: dict[tuple[_Probe, str], str] = field(default_factory=dict)
    """For each tensor of a probe what its gradient was: one of `_GRADIENTS`."""

    def joined(self, other: _Seen) -> _Seen:
        """The best of both."""
        best = {key: min(grade, other.gradients[key], key=_GRADIENTS.index) for key, grade in self.gradients.items()}
        return _Seen(self.used | other.used, self.differentiable | other.differentiable, self.read | other.read, best)


_LIVE, _NOT_FINITE, _ZERO, _NONE = _GRADIENTS = ("live", "not finite", "zero", "none")


@dataclass(eq=False)
class _Probe:
    """An active adapter in one place."""

    name: str
    adapter: Adapter
    weight: AdaptedWeight
    own_weight: bool
    """Whether the weight is the layer's alone: others may read one that they share with it."""
    tensors: dict[str, nn.Parameter] = field(default_factory=dict)
    """The random ones, by the name of their container."""

    def title(self) -> str:
        """What a message calls it."""
        return repr(self.name) if self.adapter.name == "default" else f"{self.name!r}, adapter {self.adapter.name!r}"

    def faults(self, modes: Mapping[str, _Seen], inference: _Seen) -> list[str]:
        """In which modes the adapter is not live, and why; nothing if it is live in all."""
        modes_of: dict[str, list[str]] = {}
        for mode, seen in modes.items():
            fault = self.fault(seen)
            if fault is not None:
                modes_of.setdefault(fault, []).append(mode)
        if not modes_of and self not in inference.used:
            return ["in eval without gradients: it has no effect, although it has one with gradients on"]
        return [f"in {' and '.join(where)}: {fault}" for fault, where in modes_of.items()]

    def fault(self, seen: _Seen) -> str | None:
        """Why the adapter is not live by what was seen; None if it is."""
        grades = {name: seen.gradients[self, name] for name in self.tensors}
        worst = max(grades.values(), key=_GRADIENTS.index)
        instead = f"target the parameter '{self.name}.weight' instead"
        if worst == _LIVE:
            also = "its weight is also read outside of the layer, where the adapter has no effect until it is merged; "
            return also + instead if self in seen.read else None
        layer = isinstance(self.weight, LoRALayer)
        if self not in seen.used:
            if layer and "forward" in self.weight.__dict__:
                return "the forward assigned to it after the injection does not call the one in its __wrapped__"
            if layer and self in seen.read:
                return f"its weight is read, but the layer is not called; {instead}"
            read = f"; if its weight is read without a call, {instead}" if layer and not self.own_weight else ""
            return f"it is not called with these inputs; use inputs that reach it, or exclude it{read}"
        if self not in seen.differentiable:
            return (
                "it runs with gradients off, under torch.no_grad() or in checkpointing with use_reentrant=True on "
                "inputs that need no gradient; use use_reentrant=False, or call requires_grad_() on these inputs"
            )
        names = ", ".join(name for name, grade in grades.items() if grade == worst)
        reasons = {
            _NOT_FINITE: "with these inputs the gradient of {} is not finite",
            _ZERO: "with these inputs the gradient of {} is exactly zero, as for attention to a single position or an "
            "expert that gets no tokens; try other inputs",
            _NONE: "no gradient reaches {}: its output is detached, or the model's output does not depend on it",
        }
        return reasons[worst].format(names)


class _Trained:
    """What the active adapters train in full, which requires gradients inside of a ``with`` block."""

    def __init__(self, state: State) -> None:
        self.heads = [head for head in state.trained() if head.record.shown == head.adapter]
        bound = set(map(_memory, state.parameters()))
        self.aside = {
            _memory(tensor): f"{unit.name!r}, trained in full: the forward reads values of {adapter or 'the base'!r}, "
            "which the model keeps elsewhere than in its parameters; read the parameter itself there"
            for unit, record in units_in(state)
            for adapter, held in record.held.items()
            for tensor in (held.values() if adapter != record.shown else ())
            if tensor.numel() and _memory(tensor) not in bound
        }
        self.read: dict[str, None] = {}
        self.frozen = [p for head in self.heads for p in head.parameters() if not (p.requires_grad or p.is_inference())]

    def __enter__(self) -> None:
        nn.ParameterList(self.frozen).requires_grad_(True)

    def __exit__(self, *error: object) -> None:
        nn.ParameterList(self.frozen).requires_grad_(False)

    def unreached(self) -> list[str]:
        return [
            f"{head.unit.name!r}, trained in full: no gradient reaches it with these inputs; use inputs that reach it"
            for head in self.heads
            if all(parameter.grad is None for parameter in head.parameters())
        ]


def _check_checkable(probes: list[_Probe]) -> None:
    """Raise where no pass could show anything."""
    if not probes:
        raise ValueError("there is no active adapter to check; call inject_lora or set_adapter first")
    for probe in probes:
        offloaded = isinstance(probe.weight, LoRALayer) and probe.weight.lora_base_forward is not None
        if probe.weight.weight.is_meta and not offloaded:
            raise ValueError(f"the weight of {probe.name!r} has no values yet (meta device); load them first")
        if not probe.adapter.strength:
            raise ValueError(
                f"the factor of {probe.adapter.name!r} is 0, so it has no effect; leave it out in set_adapter"
            )


def _run(model: nn.Module, inputs: Any, keywords: Any, probes: list[_Probe], trained: _Trained, seed: int = 0) -> _Seen:
    """One pass, with a backward pass where gradients are on."""
    torch.manual_seed(seed)
    seen = _Seen()
    with _Watch(probes, seen, trained):
        try:
            copies: dict[int, Tensor] = {}
            outputs = model(*copied(inputs, copies), **copied(keywords, copies))
        except (TypeError, ValueError) as error:
            if inputs or keywords:
                raise
            own = "give the model's own inputs: check_adapters(model, inputs)"
            raise ValueError(f"the model's forward refused a call without inputs; {own}") from error
    found = list(_tensors(outputs))
    if not found:
        raise ValueError(f"no tensor was found in the model's output, a {type(outputs).__name__}; return tensors in it")
    roots = [tensor for tensor in found if tensor.requires_grad]
    if roots:
        # random weights, because sums of normalised outputs have no gradient
        torch.autograd.backward(roots, [torch.randn_like(root) for root in roots])
    for probe in probes:
        for name, tensor in probe.tensors.items():
            grade = _NONE
            if tensor.grad is not None:
                size = torch.linalg.vector_norm(tensor.grad.float())
                grade = _NOT_FINITE if not bool(size.isfinite()) else _LIVE if float(size) else _ZERO
            seen.gradients[probe, name] = grade
            tensor.grad = None
    return seen


@contextmanager
def _without_cudnn(model: nn.Module) -> Iterator[None]:
    """Torch's own kernels, if there are recurrent layers: those of cuDNN have no backward for these in eval mode."""
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = enabled and not any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


_OWN_STEP = "adapted_forward"


class _Watch(TorchDispatchMode):
    """Notes which tensors take part in operations; below autograd, so that no module or kernel behaves differently."""

    def __init__(self, probes: list[_Probe], seen: _Seen, trained: _Trained) -> None:
        super().__init__()
        self.seen, self.trained = seen, trained
        self.factors = {_memory(next(iter(probe.tensors.values()))): probe for probe in probes}
        self.weights: dict[int, list[_Probe]] = {}
        for probe in probes:
            if probe.own_weight:
                self.weights.setdefault(_memory(probe.weight.weight), []).append(probe)
        self.inside: bool | None = None
        """While a layer computes, whether gradients were on when it began; None outside of layers."""
        self.layers = {probe.weight for probe in probes if isinstance(probe.weight, LoRALayer)}

    def __enter__(self) -> Any:
        for layer in self.layers:
            layer.__dict__[_OWN_STEP] = self._noted(getattr(layer, _OWN_STEP))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for layer in self.layers:
            del layer.__dict__[_OWN_STEP]

    def _noted(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A layer's own computation, in which reading its weight is in order."""

        def noted(*args: Any, **kwargs: Any) -> Tensor:
            # in an autograd function gradients are off, and yet it is differentiable
            outside, self.inside = self.inside, torch.is_grad_enabled()
            try:
                return step(*args, **kwargs)
            finally:
                self.inside = outside

        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if WeightSum in types:
            return NotImplemented  # it makes the sum first, by operations that come here
        for tensor in _tensors((args, kwargs or {})):
            memory = _memory(tensor)
            if memory in self.factors:
                self.seen.used.add(self.factors[memory])
                if torch.is_grad_enabled() or self.inside:
                    self.seen.differentiable.add(self.factors[memory])
            if memory in self.trained.aside:
                self.trained.read[self.trained.aside[memory]] = None
            if self.inside is None:
                self.seen.read.update(self.weights.get(memory, ()))
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # kinds of tensor that have no storage of their own
        return -id(tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for own in dataclasses.fields(value):
            yield from _tensors(getattr(value, own.name))


@contextmanager
def _random_adapters(probes: list[_Probe]) -> Iterator[None]:
    """Random tensors in place of the adapters' own, which are not touched."""
    generator = torch.Generator().manual_seed(0)
    own = [(probe, probe.adapter.tensors()) for probe in probes]
    try:
        for probe, tensors in own:
            own_tensors = {each.name for each in VARIANTS[probe.adapter.spec.variant].tensors}
            for name, tensor in tensors.items():
                noise = 0.02 * torch.randn(tensor.shape, generator=generator, device="cpu")
                near = tensor.detach() if name in own_tensors else torch.zeros_like(tensor)
                probe.tensors[name] = nn.Parameter(near + noise.to(tensor.device, tensor.dtype))
            probe.adapter.exchange(probe.tensors)
        yield
    finally:
        for probe, tensors in own:
            probe.adapter.exchange(tensors)

"""An adapted model as plain tensors: the frozen state, the factors, and W + s B A by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import Conv1D
from parameter_cases import Experts
from torch import Tensor, nn

# ---- the models ------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding and a head with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Attention(nn.MultiheadAttention):
    """Self-attention of one input."""

    def __init__(self) -> None:
        super().__init__(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Recurrent(nn.LSTM):
    """The outputs of an LSTM."""

    def __init__(self) -> None:
        super().__init__(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class Batched(Experts):
    """Experts on two samples."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(Batched, self).forward(sample) for sample in x])


@dataclass(frozen=True)
class Spot:
    """Where an adapter can be inside a part of a model, and what its update changes there."""

    keys: tuple[str, ...]
    """The names of the weight."""
    order: str = "oi"
    """The axes of outputs and inputs in the weight; further ones belong to the inputs. ``e`` is a stack."""
    rows: tuple[int, int] | None = None
    in_weight: bool = False
    """Whether the weight is read by somebody else, so that a batch has one of it."""
    embedding: bool = False


@dataclass(frozen=True)
class Part:
    """A module with an input of its own."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of the input; two samples."""
    spots: dict[str, Spot]
    count: int = 0
    """How many indices there are; 0 for an input of numbers."""
    can_be_full: bool = False
    """Whether it can be trained in full."""
    loose: str = ""
    """A parameter that can be trained in full while others of the part have adapters."""


def _rows(index: int) -> Spot:
    return Spot(("in_proj_weight",), rows=(4 * index, 4 * index + 4), in_weight=True)


WEIGHT = {"": Spot(("weight",))}
PARTS = {
    "linear": Part(lambda: nn.Linear(4, 3), (2, 4), WEIGHT, can_be_full=True, loose="bias"),
    "bare": Part(lambda: nn.Linear(3, 5, bias=False), (2, 2, 3), WEIGHT, can_be_full=True),
    "embedding": Part(lambda: nn.Embedding(5, 4), (2, 3), {"": Spot(("weight",), "io", embedding=True)}, 5),
    "convolution": Part(lambda: nn.Conv1d(2, 4, 3, groups=2), (2, 2, 6), WEIGHT, loose="bias"),
    "gpt2": Part(lambda: Conv1D(3, 4), (2, 2, 4), {"": Spot(("weight",), "io")}),
    "attention": Part(Attention, (2, 3, 4), {"q": _rows(0), "k": _rows(1), "v": _rows(2),
                                             "out_proj": Spot(("out_proj.weight",), in_weight=True)},
                      loose="in_proj_bias"),
    "recurrent": Part(Recurrent, (2, 3, 3), {name: Spot((name,), in_weight=True)
                                             for name in ("weight_ih_l0", "weight_hh_l0")}, loose="bias_hh_l0"),
    "experts": Part(Batched, (2, 3, 4), {name: Spot((name,), "eoi", in_weight=True)
                                         for name in ("gate_up_proj", "down_proj")}),
    "tied": Part(Tied, (2, 3), {"embedding": Spot(("embedding.weight",), "io", embedding=True),
                                "head": Spot(("head.weight",))}, 5),
    "twice": Part(Twice, (2, 4), {"first": Spot(("first.weight", "second.weight"))}),
    "norm": Part(lambda: nn.LayerNorm(4), (2, 4), {}, can_be_full=True, loose="weight"),
    "batch": Part(lambda: nn.BatchNorm1d(4), (2, 4), {}, can_be_full=True),
}  # fmt: skip


class Forest(nn.Module):
    """Parts of a model, some of them nested, each run on an input of its own."""

    def __init__(self, kinds: Mapping[str, str]) -> None:
        super().__init__()
        for path, kind in kinds.items():
            *around, name = path.split(".")
            owner: nn.Module = self
            for step in around:
                if step not in owner._modules:
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            owner.add_module(name, PARTS[kind].make())

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {path: self.get_submodule(path)(x) for path, x in inputs.items()}


# ---- the reference ---------------------------------------------------------------------------------------------------


@dataclass
class Factors:
    """An adapter on one spot."""

    scale: float
    variant: str
    tensors: dict[str, Tensor]

    def trained(self) -> list[str]:
        frozen = {"lora_A0", "lora_B0"} | ({"lora_A"} if self.variant == "lora_fa" else set())
        return [name for name in self.tensors if name not in frozen]


@dataclass
class Adapter:
    spots: dict[str, Factors]
    full: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By part or parameter that is trained in full with it, its own values."""
    trainable: bool = True

    @property
    def dora(self) -> set[str]:
        return {spot for spot, held in self.spots.items() if held.variant == "dora"}


class Dense:
    """What a model with adapters must be.

    Args:
        model: a `Forest`, still without adapters.
        kinds: the part at each path.
    """

    def __init__(self, model: Forest, kinds: Mapping[str, str], seed: int) -> None:
        self.plain, self.kinds = copy.deepcopy(model), dict(kinds)
        self.flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        self.keys = list(model.state_dict())
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        generator = torch.Generator().manual_seed(seed)
        self.inputs = {
            path: torch.randint(PARTS[kind].count, PARTS[kind].shape, generator=generator)
            if PARTS[kind].count
            else torch.randn(PARTS[kind].shape, generator=generator, dtype=torch.float64)
            for path, kind in kinds.items()
        }
        self.spots = {
            f"{path}.{label}" if label else path: Spot(
                tuple(f"{path}.{key}" for key in spot.keys), spot.order, spot.rows, spot.in_weight, spot.embedding
            )
            for path, kind in kinds.items()
            for label, spot in PARTS[kind].spots.items()
        }
        self.adapters: dict[str, Adapter] = {}
        self.active: dict[str, float] = {}

    def part_of(self, spot: str) -> str:
        return next(path for path in self.kinds if spot == path or spot.startswith(f"{path}."))

    def units(self) -> list[str]:
        """What can be trained in full: parts and parameters."""
        kinds = self.kinds.items()
        loose = [f"{path}.{PARTS[kind].loose}" for path, kind in kinds if PARTS[kind].loose]
        return [path for path, kind in kinds if PARTS[kind].can_be_full] + loose

    def full(self) -> set[str]:
        """What is trained in full."""
        return {path for adapter in self.adapters.values() for path in adapter.full}

    def tensors_of(self, path: str) -> dict[str, Tensor]:
        return {name: value for name, value in self.state.items() if name == path or name.startswith(f"{path}.")}

    def heads(self, names: Iterable[str]) -> dict[str, str]:
        """By what is trained in full by one of these adapters, that adapter."""
        return {path: name for name in names if name in self.adapters for path in self.adapters[name].full}

    def agree(self, names: Iterable[str]) -> bool:
        """Whether no two of these adapters train the same in full."""
        units = [path for name in names for path in self.adapters[name].full]
        return len(units) == len(set(units))

    def with_heads(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The state with what these adapters train in full."""
        heads = self.heads(names).items()
        return self.state | {key: v for path, name in heads for key, v in self.adapters[name].full[path].items()}

    def keep(self, values: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """Note values of the state with what these adapters train in full."""
        owners = {key: (name, path) for path, name in self.heads(names).items() for key in self.tensors_of(path)}
        for key, value in values.items():
            if key in owners:
                name, path = owners[key]
                self.adapters[name].full[path][key] = value
            else:
                self.state[key] = value

    def weights(self, strengths: Mapping[str, float], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state with these adapters in the weights; DoRA rescales before others are added."""
        weights = dict(state)
        for spot, at in self.spots.items():
            here = [name for name in strengths if name in self.adapters and spot in self.adapters[name].spots]
            for name in sorted(here, key=lambda name: spot not in self.adapters[name].dora):
                held = self.adapters[name].spots[spot]
                changed = add(weights[at.keys[0]], at, held, strengths[name])
                weights |= dict.fromkeys(at.keys, changed)
        return weights

    def run(self, weights: Mapping[str, Tensor], training: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The outputs, and the buffers afterwards."""
        self.plain.train(training)
        buffers = {name for name, _ in self.plain.named_buffers()}
        given = {name: value.clone() if name in buffers else value for name, value in weights.items()}
        outputs = torch.func.functional_call(self.plain, given, (self.inputs,), tie_weights=False)
        return outputs, {name: given[name] for name in buffers}

    def update(self, name: str) -> dict[str, Tensor]:
        """What an adapter changes, by weight."""
        changed = self.weights({name: 1.0}, self.state)
        return {key: value - self.state[key] for key, value in changed.items()}

    def flags_now(self, names: Iterable[str]) -> dict[str, bool]:
        """The ``requires_grad`` of what is bound where the base's parameters were, with these adapters in force."""
        if not self.adapters:
            return dict(self.flags)
        heads = [path for path, name in self.heads(names).items() if self.adapters[name].trainable]
        trained = {name for path in heads for name in self.tensors_of(path)}
        return {name: name in trained for name in self.flags}


def add(weight: Tensor, at: Spot, held: Factors, strength: float = 1.0) -> Tensor:
    """W + s B A in the stored layout, or DoRA's."""
    swapped = {"io": (0, 1)}.get(at.order)
    turned = weight.transpose(*swapped) if swapped else weight
    matrix = turned if at.order.startswith("e") else turned.flatten(1)
    delta = _product(held.tensors["lora_B"], held.tensors["lora_A"])
    if "lora_A0" in held.tensors:
        delta = delta - _product(held.tensors["lora_B0"], held.tensors["lora_A0"])
    if at.rows is None:
        matrix = matrix + held.scale * strength * delta
    else:
        matrix = matrix.index_add(0, torch.arange(*at.rows), held.scale * strength * delta)
    if held.variant == "dora":
        norm = matrix.detach().square().sum(-1).sqrt()
        matrix = matrix * (held.tensors["lora_magnitude"] / norm).unsqueeze(-1)
    matrix = matrix.reshape(turned.shape)
    return matrix.transpose(*swapped) if swapped else matrix


def _product(B: Tensor, A: Tensor) -> Tensor:
    return torch.einsum("...or,...ri->...oi", B, A)


def loss(outputs: Mapping[str, Tensor]) -> Tensor:
    """A number that depends on every output, with gradients that stay small."""
    return torch.stack([output.sin().sum() for output in outputs.values()]).sum()


# ---- all that a refused call must leave as it was --------------------------------------------------------------------


def snapshot(model: nn.Module) -> tuple[Any, list[Any]]:
    """Everything that a model is made of, in a form that can be compared, and what must live for that."""
    alive: list[Any] = []
    modules = model.named_modules(remove_duplicate=False)
    parts = [(name, id(module), type(module), _frozen(vars(module), alive)) for name, module in modules]
    return (parts, torch.get_rng_state().numpy().tobytes()), alive


_MADE_ANEW = {"_flat_weights", "_flat_weight_refs"}
"""What torch keeps of a recurrent layer's weights from one forward to the next."""


def _frozen(value: Any, alive: list[Any]) -> Any:
    if isinstance(value, Tensor):
        alive.append(value)
        return id(value), value.requires_grad, value.dtype, value.detach().cpu().numpy().tobytes()
    if isinstance(value, Mapping):
        return type(value), [(key, _frozen(inner, alive)) for key, inner in value.items() if key not in _MADE_ANEW]
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), [_frozen(inner, alive) for inner in _ordered(value)]
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    alive.append(value)
    inner = {} if isinstance(value, (nn.Module, type)) or callable(value) else getattr(value, "__dict__", {})
    return id(value), type(value), [(key, _frozen(held, alive)) for key, held in inner.items()]


def _ordered(values: Iterable[Any]) -> list[Any]:
    return sorted(values, key=repr) if isinstance(values, (set, frozenset)) else list(values)


def difference(before: Any, after: Any, where: str = "") -> str:
    """The first thing in which two snapshots differ; empty if they are equal."""
    if type(before) is type(after) and isinstance(before, (list, tuple)) and len(before) == len(after):
        named = (f"{where}/{one[0] if isinstance(one, tuple) and one else n}" for n, one in enumerate(before))
        found = (difference(one, other, name) for name, one, other in zip(named, before, after, strict=True))
        return next((text for text in found if text), "")
    return "" if before == after else f"{where}: {before!r:.200} != {after!r:.200}"

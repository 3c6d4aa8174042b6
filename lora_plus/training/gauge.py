"""Whether a larger ratio may help: what the optimizer's steps of A and B take off the loss, and other measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_plus.errors import check_count
from lora_plus.layers.adapter import Adapter
from lora_plus.model.state import Need, require
from lora_plus.model.tree import adapters_of, unwrap
from lora_plus.tensors.distributed import is_dtensor
from lora_plus.tensors.matrix import accumulation_dtype
from lora_plus.text import aligned

if TYPE_CHECKING:
    from typing_extensions import Self


_FEWEST = 10
"""Steps, at least, for a verdict: with B = 0, the first ones are B's alone."""


def work_share(work_A: float, work_B: float) -> float:
    """``w = log2(W_A / W_B)``: above zero where A does more of the work than B.

    A factor whose steps did not lower the loss did no work: the share is then infinite, or NaN where neither did any.
    """
    if work_A > 0 and work_B > 0:
        return math.log2(work_A / work_B)
    return math.inf if work_A > 0 else -math.inf if work_B > 0 else math.nan


@dataclass(frozen=True)
class GaugeRow:
    """The figures of one adapter on one layer. Norms are Frobenius norms. Means are taken over the measured steps."""

    name: str
    """Name of the layer, parameter or block of rows in the model."""
    adapter: str
    """The name of the adapter."""
    work_A: float
    """``W_A``: the mean of ``-<g, dA>``, which is how much a step of A lowers the loss, to first order, with the
    optimizer's gradient ``g`` and its change ``dA``."""
    work_B: float
    """``W_B``: the same for B."""
    growth_A: float
    """``||A|| / ||A_0||``, with A_0 at the start of the gauge."""
    update: float
    """``||s B A||``; with a subtracted start (PiSSA, MiLoRA, OLoRA) ``||s (B A - B0 A0)||``."""
    effective_rank: float
    """``(sum s_i^2)^2 / sum s_i^4`` over the singular values of the update: from 1, where one direction dominates, to
    its rank."""
    gradient_A: float
    """The mean of ``||g||`` for A."""
    gradient_B: float
    """The mean of ``||g||`` for B."""
    saturation_B: float
    """``1 - ||B - B_0|| / sum of ||dB||``: 0 if B moves in one direction, near 1 if its steps cancel each other."""

    @property
    def work_share(self) -> float:
        """``w = log2(W_A / W_B)`` of this layer."""
        return work_share(self.work_A, self.work_B)


COLUMNS: dict[str, tuple[str, Callable[[GaugeRow], float]]] = {
    "w": ("+.2f", lambda row: row.work_share),
    "growth of A": (".2f", lambda row: row.growth_A),
    "|sBA|": (".3g", lambda row: row.update),
    "eff. rank": (".1f", lambda row: row.effective_rank),
    "|grad A|": (".2g", lambda row: row.gradient_A),
    "|grad B|": (".2g", lambda row: row.gradient_B),
    "saturation of B": (".2f", lambda row: row.saturation_B),
}


@dataclass(frozen=True)
class GaugeReport:
    """The result of a `LoRAPlusGauge`. ``str()`` of it is a table and the verdict."""

    rows: list[GaugeRow]
    """A row for each adapter on each layer."""
    steps: int
    """Number of measured steps."""

    @property
    def work_share(self) -> float:
        """``w = log2(W_A / W_B)`` of all layers together, with the work of each factor summed over them."""
        return work_share(sum(row.work_A for row in self.rows), sum(row.work_B for row in self.rows))

    @property
    def verdict(self) -> str:
        """Whether w suggests a larger ratio; the documentation says how often that was right."""
        if self.steps < _FEWEST:
            return f"no verdict: {self.steps} steps are too few; measure {_FEWEST} or more"
        if math.isnan(self.work_share):
            return "no verdict: no step of A or B lowered the loss; lower the learning rate"
        if self.work_share > 0:
            return "A does most of the work: a larger ratio may help, with lr_mode='geometric'"
        return "B does at least as much as A: a larger ratio will probably not help"

    def __str__(self) -> str:
        cells = [("layer", "adapter", *COLUMNS)] + [
            (row.name or "(model)", row.adapter, *(format(get(row), style) for style, get in COLUMNS.values()))
            for row in self.rows
        ]
        return "\n".join([*aligned(cells), f"w = {self.work_share:+.2f} over {self.steps} steps; {self.verdict}"])


class LoRAPlusGauge:
    """Measures an optimizer's steps, to show whether a larger ratio of B's rate to A's may help.

    It changes nothing: it copies A and B before a step, and compares after it. Gradients are read after the step, so
    after clipping or unscaling. Weight decay counts as part of a step. Steps with non-finite figures, embedding
    adapters, and layers whose A and B are not both in the optimizer are left out. Optimizers that evaluate their
    closure several times (LBFGS) are measured wrongly.

    Examples:
        >>> with LoRAPlusGauge(model, optimizer) as gauge:
        ...     train(model, optimizer)
        >>> print(gauge.report())

    Args:
        model: the model with adapters; wrapped (DDP, compiled) or not, but not sharded.
        optimizer: the optimizer of the adapters.
        every: measure one step in this many, to save time.

    Raises:
        ValueError: if the optimizer has both A and B of no layer, or if they are sharded.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, every: int = 1) -> None:
        check_count("every", every)
        require(model, "measuring A and B", Need.WHOLE)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._pairs = [pair for pair in _pairs(unwrap(model)) if {id(pair.A), id(pair.B)} <= held]
        if not self._pairs:
            raise ValueError(
                "the optimizer holds both A and B of no layer of this model; build it with "
                "create_loraplus_optimizer(model, ...), not under DeepSpeed"
            )
        for pair in self._pairs:
            if is_dtensor(pair.A):
                raise ValueError(f"the adapter of {pair.name!r} is sharded, which the gauge cannot measure")
        self._optimizer, self._every = optimizer, every
        self._handles: list[Any] = []
        self._tallies: list[_Tally] = []

    def start(self) -> None:
        """Start measuring; figures of an earlier start are dropped."""
        if self._handles:
            raise RuntimeError("the gauge is measuring already; call stop() first")
        devices = list(dict.fromkeys(pair.A.device for pair in self._pairs))
        self._tallies = [_Tally([pair for pair in self._pairs if pair.A.device == device]) for device in devices]
        self._seen = 0
        before, after = self._optimizer.register_step_pre_hook, self._optimizer.register_step_post_hook
        self._handles = [before(self._before), after(self._after)]

    def stop(self) -> None:
        """Remove the hooks from the optimizer; the figures stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def report(self) -> GaugeReport:
        """The figures so far, with the current A and B."""
        steps = max((int(tally.steps) for tally in self._tallies), default=0)
        if not steps:
            raise ValueError("the gauge has measured no step; call start() before training, or train inside its block")
        rows = {key: row for tally in self._tallies for key, row in tally.rows(self._seen).items()}
        return GaugeReport([rows[id(pair)] for pair in self._pairs], steps)

    def _before(self, *_: object) -> None:
        for tally in self._tallies if self._seen % self._every == 0 else ():
            tally.before()

    def _after(self, *_: object) -> None:
        for tally in self._tallies if self._seen % self._every == 0 else ():
            tally.after()
        self._seen += 1


class _Pair(NamedTuple):
    """A and B of one adapter on one layer."""

    name: str
    adapter: Adapter
    A: nn.Parameter
    """``(..., r, in)``"""
    B: nn.Parameter
    """``(..., out, r)``"""


def _pairs(model: nn.Module) -> Iterator[_Pair]:
    for name, adapter, _ in adapters_of(model):
        roles = dict(adapter.parameters())
        if {"A", "B"} <= roles.keys():
            yield _Pair(name, adapter, roles["A"], roles["B"])


class _Tally:
    """Running sums over the pairs of one device; nothing in it waits for the device."""

    def __init__(self, pairs: list[_Pair]) -> None:
        self._pairs = pairs
        self._parameters: list[Tensor] = [parameter for pair in pairs for parameter in (pair.A, pair.B)]
        dtype = accumulation_dtype(*(parameter.dtype for parameter in self._parameters))
        self._moved = [torch.empty_like(parameter, dtype=dtype) for parameter in self._parameters]
        self._start = [(float(torch.linalg.vector_norm(pair.A.detach())), pair.B.detach().clone()) for pair in pairs]
        self._sums = torch.zeros(3, len(self._parameters), dtype=dtype, device=pairs[0].A.device)
        self.steps = self._sums.new_zeros(())
        """How many have been measured."""

    @torch.no_grad()
    def before(self) -> None:
        torch._foreach_copy_(self._moved, self._parameters)

    @torch.no_grad()
    def after(self) -> None:
        torch._foreach_sub_(self._moved, self._parameters)  # type: ignore[arg-type]  # minus the step
        gradients = [
            torch.zeros_like(moved) if parameter.grad is None else parameter.grad.to(moved.dtype)
            for parameter, moved in zip(self._parameters, self._moved, strict=True)
        ]
        pairs = zip(self._moved, gradients, strict=True)
        work = [torch.vdot(moved.flatten(), gradient.flatten()) for moved, gradient in pairs]
        parts = work, torch._foreach_norm(gradients), torch._foreach_norm(self._moved)
        figures = torch.stack([torch.stack(part) for part in parts])
        finite = figures.isfinite().all()
        self._sums += torch.where(finite, figures, 0.0)
        self.steps += finite

    def rows(self, seen: int) -> dict[int, GaugeRow]:
        """The figures by the id of the pair, after ``seen`` steps of which some were measured."""
        work, gradient, moved = (self._sums.double() / self.steps).unflatten(1, (-1, 2)).tolist()
        rows = {}
        for n, (pair, (start_A, start_B)) in enumerate(zip(self._pairs, self._start, strict=True)):
            A, B = (factor.detach().double() for factor in pair.adapter.factors())
            core = B.mT @ B @ (A @ A.mT)  # (..., r, r): its eigenvalues are the squared singular values of B A
            first, second = float(core.diagonal(dim1=-2, dim2=-1).sum()), float((core * core.mT).sum())
            path = moved[n][1] * seen
            rows[id(pair)] = GaugeRow(
                name=pair.name,
                adapter=pair.adapter.name,
                work_A=work[n][0],
                work_B=work[n][1],
                growth_A=_ratio(float(torch.linalg.vector_norm(pair.A.detach().double())), start_A),
                update=abs(pair.adapter.spec.scale) * math.sqrt(max(first, 0.0)),
                effective_rank=_ratio(first**2, second),
                gradient_A=gradient[n][0],
                gradient_B=gradient[n][1],
                saturation_B=1 - _ratio(float(torch.linalg.vector_norm(pair.B.detach().double() - start_B)), path),
            )
        return rows


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan

"""Whether a larger ratio may help here: figures of A and B from the gradients and the optimizer's steps."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_plus.layers.adapter import whole_factors
from lora_plus.model.inject import check_whole
from lora_plus.model.tree import adapters_of, unwrap
from lora_plus.tensors.matrix import accumulation_dtype
from lora_plus.text import aligned

if TYPE_CHECKING:
    from typing_extensions import Self


class HitRate(NamedTuple):
    """How often a verdict was right."""

    right: int
    out_of: int


MEASURED = {"no": HitRate(10, 14), "yes": HitRate(17, 26)}
"""Of the verdicts on the held-out settings of ``benchmarks/results/gauge.md``, all read at a tuned learning rate."""


_FEWEST = 10
"""Steps, at least, for a verdict: with B = 0, the first ones are B's alone."""

_YES = "A does most of the work; a larger ratio may help, at the same geometric-mean rate (lr_mode='geometric')"
_NO = "B does at least as much of the work as A; raising the ratio will probably not help here"


def work_share(work_A: float, work_B: float) -> float:
    """``w = log2(W_A / W_B)``: above zero where A does more of the work than B.

    A factor whose steps did not lower the loss did no work: the share is then infinite, or NaN where neither did any.
    """
    if work_A > 0 and work_B > 0:
        return math.log2(work_A / work_B)
    return math.inf if work_A > 0 else -math.inf if work_B > 0 else math.nan


@dataclass(frozen=True)
class GaugeRow:
    """The figures of one adapter on one layer. Norms are Frobenius norms; means are over the measured steps."""

    name: str
    """The name in the model of the layer, parameter or block of rows."""
    adapter: str
    work_A: float
    """``W_A``, the mean of ``-<g, dA>``: what a step of A takes off the loss to first order, from the gradient ``g``
    that the optimizer saw and the change ``dA`` that it made."""
    work_B: float
    """``W_B``, the same for B."""
    growth_A: float
    """``||A|| / ||A_0||``, with A_0 at the start of the gauge."""
    update: float
    """``||s B A||``; with a start that is taken out again (PiSSA and the like) ``||s (B A - B0 A0)||``."""
    effective_rank: float
    """``(sum s_i^2)^2 / sum s_i^4`` over the singular values of the update: from 1, where one direction dominates, to
    its rank."""
    gradient_A: float
    """Mean of ``||g||``."""
    gradient_B: float
    """Mean of ``||g||``."""
    saturation_B: float
    """``1 - ||B - B_0|| / sum of ||dB||``: 0 while B goes straight on, near 1 where its steps cancel each other."""

    @property
    def work_share(self) -> float:
        """``w = log2(W_A / W_B)`` of this layer."""
        return work_share(self.work_A, self.work_B)


_COLUMNS: dict[str, tuple[str, Callable[[GaugeRow], float]]] = {
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
    """What a `LoRAPlusGauge` has measured. ``str()`` of it is a table and the verdict."""

    rows: list[GaugeRow]
    steps: int
    """The optimizer's steps that the means are over."""

    @property
    def work_share(self) -> float:
        """``w = log2(W_A / W_B)`` of all layers together, with the work of each factor summed over them."""
        return work_share(sum(row.work_A for row in self.rows), sum(row.work_B for row in self.rows))

    @property
    def verdict(self) -> str:
        """Whether a larger ratio may help, in words, with how often the same words were right in the benchmark."""
        w = self.work_share
        if self.steps < _FEWEST:
            return f"No verdict: {self.steps} steps are too few to tell; measure {_FEWEST} or more."
        if math.isnan(w):
            return "No verdict: neither A's nor B's steps lowered the loss. Lower the learning rate, or measure longer."
        said, words = ("yes", _YES) if w > 0 else ("no", _NO)
        right, out_of = MEASURED[said]
        helped = MEASURED["yes"].right + MEASURED["no"].out_of - MEASURED["no"].right
        judged = sum(rate.out_of for rate in MEASURED.values())
        return (
            f"w = {w:+.2f}: {words}. A heuristic: right in {right} of the {out_of} held-out small settings in which it "
            f"said so; a larger ratio helped in {helped} of all {judged}. It was judged at tuned learning rates, so "
            "read it at one."
        )

    def __str__(self) -> str:
        cells = [("layer", "adapter", *_COLUMNS)] + [
            (row.name or "(model)", row.adapter, *(format(get(row), style) for style, get in _COLUMNS.values()))
            for row in self.rows
        ]
        return "\n".join([*aligned(cells), f"{self.steps} steps. {self.verdict}"])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the table, a bar for each layer and figure, into a file of any type that matplotlib writes.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("drawing a gauge needs matplotlib; run: pip install matplotlib") from error
        figure = Figure(figsize=(2.2 * len(_COLUMNS) + 2, 0.2 * len(self.rows) + 1.5), layout="constrained")
        places = range(len(self.rows))
        for panel, (title, (_, get)) in zip(
            figure.subplots(1, len(_COLUMNS), sharey=True), _COLUMNS.items(), strict=True
        ):
            figures = [get(row) for row in self.rows]
            panel.barh(places, [value if math.isfinite(value) else 0.0 for value in figures])
            panel.set_title(title, fontsize=9)
            panel.set_yticks(places, [f"{row.name or '(model)'} {row.adapter}" for row in self.rows], fontsize=7)
        panel.invert_yaxis()  # once for all: they share the axis
        figure.suptitle(f"w = {self.work_share:+.2f} over all layers, {self.steps} steps", fontsize=9)
        figure.savefig(path, dpi=120)


class LoRAPlusGauge:
    """Watches an optimizer's steps, to tell whether a larger ratio of B's rate to A's may help.

    It needs no activations and changes nothing: before a step it copies A and B, after it compares. The gradients are
    read after the step too, so they are the ones that a closure, clipping or a gradient scaler left for it; an
    optimizer that evaluates its closure several times (LBFGS) or overwrites gradients is not measured rightly. Steps in
    which a figure is not finite are passed over. Weight decay is part of a step, as what the optimizer did.

    Embedding adapters are left out, since the ratio does not set their rates, and so are layers of which the optimizer
    does not hold both A and B.

    Example:
        >>> with LoRAPlusGauge(model, optimizer) as gauge:
        ...     train(model, optimizer)
        >>> print(gauge.report())
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, every: int = 1) -> None:
        """Nothing is measured before `start`, or the ``with`` block.

        Args:
            model: the model with adapters; wrapped (DDP, compiled) or not, but not sharded.
            optimizer: the one that trains them.
            every: measure the first of this many steps, to save time.

        Raises:
            ValueError: if the optimizer holds both A and B of no layer, if they are sharded, or ``every`` is below 1.
        """
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        check_whole(model, "measuring A and B")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._pairs = [pair for pair in _pairs(unwrap(model)) if {id(pair.A), id(pair.B)} <= held]
        if not self._pairs:
            raise ValueError(
                "the optimizer holds both A and B of no layer of this model, and the gauge compares the two; build it "
                "with create_loraplus_optimizer(model, ...), and give the gauge that very model. (DeepSpeed's "
                "optimizers hold flat copies and cannot be measured.)"
            )
        for pair in self._pairs:
            if hasattr(pair.A, "full_tensor"):
                raise ValueError(f"the adapter of {pair.name!r} is sharded, which the gauge cannot measure")
        self._optimizer, self._every = optimizer, every
        self._handles: list[Any] = []
        self._tallies: list[_Tally] = []

    def start(self) -> None:
        """Measure from here on; figures of an earlier start are dropped.

        Raises:
            RuntimeError: if it is measuring already.
        """
        if self._handles:
            raise RuntimeError("the gauge is measuring already; call stop() first")
        devices = list(dict.fromkeys(pair.A.device for pair in self._pairs))
        self._tallies = [_Tally([pair for pair in self._pairs if pair.A.device == device]) for device in devices]
        self._seen = 0
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before),
            self._optimizer.register_step_post_hook(self._after),
        ]

    def stop(self) -> None:
        """Take the hooks off the optimizer; what was measured stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def report(self) -> GaugeReport:
        """The figures so far, with A and B as they are at this moment.

        Raises:
            ValueError: if no step has been measured.
        """
        steps = max((int(tally.steps) for tally in self._tallies), default=0)
        if not steps:
            raise ValueError("the gauge has measured no step; call start() before training, or train inside its block")
        rows = {pair: row for tally in self._tallies for pair, row in tally.rows(self._seen).items()}
        return GaugeReport([rows[pair.name, pair.adapter] for pair in self._pairs], steps)

    def _before(self, *_: object) -> None:
        if self._seen % self._every == 0:
            for tally in self._tallies:
                tally.before()

    def _after(self, *_: object) -> None:
        if self._seen % self._every == 0:
            for tally in self._tallies:
                tally.after()
        self._seen += 1


class _Pair(NamedTuple):
    """A and B of one adapter on one layer."""

    name: str
    adapter: str
    A: nn.Parameter
    """``(..., r, in)``"""
    B: nn.Parameter
    """``(..., out, r)``"""
    scale: float
    tensors: dict[str, nn.Parameter]
    """All that the adapter has there, by the name of their container."""


def _pairs(model: nn.Module) -> Iterator[_Pair]:
    for name, adapter, _ in adapters_of(model):
        roles = dict(adapter.parameters())
        if {"A", "B"} <= roles.keys():
            yield _Pair(name, adapter.name, roles["A"], roles["B"], adapter.spec.scale, adapter.tensors())


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
        work = [
            torch.vdot(moved.flatten(), gradient.flatten())
            for moved, gradient in zip(self._moved, gradients, strict=True)
        ]
        figures = torch.stack(
            [torch.stack(part) for part in (work, torch._foreach_norm(gradients), torch._foreach_norm(self._moved))]
        )
        finite = figures.isfinite().all()
        self._sums += torch.where(finite, figures, 0.0)
        self.steps += finite

    def rows(self, seen: int) -> dict[tuple[str, str], GaugeRow]:
        """The figures by name and adapter, after ``seen`` steps of which some were measured."""
        work, gradient, moved = (self._sums.double() / self.steps).unflatten(1, (-1, 2)).tolist()
        rows = {}
        for n, (pair, (start_A, start_B)) in enumerate(zip(self._pairs, self._start, strict=True)):
            A, B = (factor.detach().double() for factor in whole_factors(pair.tensors))
            core = B.mT @ B @ (A @ A.mT)  # (..., r, r): its eigenvalues are the squared singular values of B A
            first, second = float(core.diagonal(dim1=-2, dim2=-1).sum()), float((core * core.mT).sum())
            path = moved[n][1] * seen
            rows[pair.name, pair.adapter] = GaugeRow(
                name=pair.name,
                adapter=pair.adapter,
                work_A=work[n][0],
                work_B=work[n][1],
                growth_A=_ratio(float(torch.linalg.vector_norm(pair.A.detach().double())), start_A),
                update=abs(pair.scale) * math.sqrt(max(first, 0.0)),
                effective_rank=_ratio(first**2, second),
                gradient_A=gradient[n][0],
                gradient_B=gradient[n][1],
                saturation_B=1 - _ratio(float(torch.linalg.vector_norm(pair.B.detach().double() - start_B)), path),
            )
        return rows


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan

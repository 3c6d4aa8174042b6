"""The settings that are compared in a sweep, their training, and what came of them."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lora_plus.text import aligned


@dataclass(frozen=True)
class Candidate:
    """The settings of one run of a sweep; all other settings are the same for all runs."""

    lr: float
    """Learning rate, as in `loraplus_param_groups`."""
    lr_ratio: float = 4.0
    """Learning rate of B over that of A."""
    r: int = 8
    """Rank, on all layers."""
    alpha: float = 16
    """Numerator of the scaling."""
    seed: int = 0
    """Seed of the adapter's initial values."""
    name: str = ""
    """Name of its adapter; if empty, it is made from the settings that differ, such as ``r8 lr1e-3 x4``."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if hasattr(value, "item"):  # a number of NumPy or a tensor, which JSON does not have
                object.__setattr__(self, setting.name, value.item())


def grid(
    *,
    lr: float | Sequence[float],
    lr_ratio: float | Sequence[float] = 4.0,
    r: int | Sequence[int] = 8,
    alpha: float | Sequence[float] = 16,
    seed: int | Sequence[int] = 0,
) -> list[Candidate]:
    """A list with a candidate for each combination of these values; the last ones vary fastest.

    Each value is a number, or several in a sequence, a NumPy array or a tensor.

    Examples:
        >>> len(grid(lr=[1e-4, 3e-4], lr_ratio=[1, 4, 16], seed=range(2)))
        12
    """
    given: tuple[Any, ...] = (lr, lr_ratio, r, alpha, seed)
    plain = [value.tolist() if hasattr(value, "tolist") else value for value in given]
    axes = [value if isinstance(value, Sequence) else (value,) for value in plain]
    return [Candidate(*settings) for settings in itertools.product(*axes)]


_LABELS: dict[str, Callable[[Candidate], str]] = {
    "r": lambda each: f"r{each.r}",
    "alpha": lambda each: f"alpha{_undotted(each.alpha)}",
    "lr": lambda each: f"lr{_undotted(each.lr)}",
    "lr_ratio": lambda each: f"x{_undotted(each.lr_ratio)}",
    "seed": lambda each: f"seed{each.seed}",
}
"""By the setting, the part of a name that says it."""


def named(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, with names for those that have none: their rate, and what else differs between them."""
    for candidate in candidates:
        if not isinstance(candidate, Candidate):
            raise TypeError(f"a candidate must be a Candidate, got a {type(candidate).__name__}; see grid(...)")
    differ = [key for key in _LABELS if key == "lr" or len({getattr(each, key) for each in candidates}) > 1]
    taken = {each.name for each in candidates}
    result = []
    for candidate in candidates:
        name = candidate.name or " ".join(_LABELS[key](candidate) for key in differ)
        if not candidate.name:
            free = (label for n in itertools.count(1) if (label := f"{name} ({n})" if n > 1 else name) not in taken)
            taken.add(name := next(free))
        result.append(replace(candidate, name=name))
    return result


def _undotted(number: float) -> str:
    """A number without a decimal point, which the name of an adapter cannot have: ``15e-4``."""
    if not isinstance(number, (int, float)) or not math.isfinite(number):
        return "?"  # which is refused later, by name
    sign, digits, exponent = Decimal(repr(float(number))).normalize().as_tuple()
    text = "-" * sign + "".join(map(str, digits))
    assert isinstance(exponent, int)
    return text + "0" * exponent if 0 <= exponent < 4 else f"{text}e{exponent}"


@dataclass(frozen=True)
class SweepRow:
    """The result of one candidate."""

    candidate: Candidate
    """Its settings."""
    loss: float
    """The loss that it is ranked by: the mean loss of the evaluation after its last step; without an evaluation, the
    mean of the training losses of the last fifth of its steps."""
    losses: tuple[float, ...]
    """Its training loss in each step, before the update."""
    stopped: str
    """Why it was trained no further: ``"diverged"``, ``"halved"``, or empty if it was trained to the end."""
    evaluated: bool = False
    """Whether ``loss`` is that of an evaluation."""

    @property
    def lowest(self) -> float:
        """The lowest of its training losses, or NaN without any."""
        return min((loss for loss in self.losses if math.isfinite(loss)), default=math.nan)

    @property
    def rank(self) -> tuple[bool, int, float]:
        """What the rows are sorted by: not diverged, then trained for longer, then of lower loss."""
        return self.stopped == "diverged", -len(self.losses), self.loss if math.isfinite(self.loss) else math.inf


@dataclass
class Run:
    """One candidate in training."""

    candidate: Candidate
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer | None
    """None once it is trained no further."""
    schedule: LambdaLR | None
    losses: list[float] = field(default_factory=list)
    evaluated: float | None = None
    """The mean loss of an evaluation after the last step."""
    stopped: str = ""

    def step(self, loss: float, max_norm: float | None) -> None:
        """Update the adapter by its gradients, or stop if the loss or the gradients are not finite."""
        assert self.optimizer is not None
        norm = nn.utils.clip_grad_norm_(self.parameters, math.inf if max_norm is None else max_norm)
        self.losses.append(loss)
        self.evaluated = None
        if not (math.isfinite(loss) and bool(norm.isfinite())):
            self.stop("diverged")
            return
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def stop(self, why: str) -> None:
        """Leave the adapter as it is from here on."""
        self.stopped, self.optimizer, self.schedule = why, None, None
        self.clear()
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def row(self) -> SweepRow:
        last = self.losses[-max(1, len(self.losses) // 5) :]
        mean = sum(last) / len(last) if last else math.nan
        loss = mean if self.evaluated is None else self.evaluated
        return SweepRow(self.candidate, loss, tuple(self.losses), self.stopped, self.evaluated is not None)


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep. ``str()`` of it is a table, with a warning if the best is at an edge of the grid."""

    rows: list[SweepRow]
    """The candidates, the best first."""

    @property
    def best(self) -> SweepRow:
        """The best candidate's row; raises a ValueError if all diverged."""
        if self.rows[0].stopped == "diverged":
            raise ValueError("all candidates diverged; try lower rates")
        return self.rows[0]

    @property
    def loss_words(self) -> str:
        """What ``loss`` is in these rows."""
        kinds = {row.evaluated for row in self.rows if row.stopped != "diverged"}
        words = {True: "validation loss", False: "training loss, mean of the last fifth of the steps"}
        return " or ".join(words[kind] for kind in sorted(kinds)) or "loss"

    def edges(self) -> list[str]:
        """At which ends of what was tried the best candidate lies, so that a better one may lie beyond."""
        if self.rows[0].stopped == "diverged":
            return []
        found = []
        for setting in ("lr", "lr_ratio", "r", "alpha"):
            tried, best = {getattr(row.candidate, setting) for row in self.rows}, getattr(self.best.candidate, setting)
            for end, of in (("lowest", min), ("highest", max)):
                if len(tried) > 1 and best == of(tried):
                    found.append(f"the best {setting}, {best:g}, is the {end} that was tried")
        return found

    def _lines(self) -> tuple[list[str], list[list[Any]]]:
        """Names of columns, and the rows' values."""
        settings = [setting.name for setting in fields(Candidate) if setting.name != "name"]
        head = ["name", *settings, "loss", "lowest", "steps", "stopped"]
        return head, [
            [row.candidate.name, *(getattr(row.candidate, setting) for setting in settings), row.loss, row.lowest,
             len(row.losses), row.stopped]
            for row in self.rows
        ]  # fmt: skip

    def to_csv(self) -> str:
        """The table as comma-separated values, with the numbers in full."""
        text = io.StringIO()
        head, lines = self._lines()
        csv.writer(text, lineterminator="\n").writerows([head, *lines])
        return text.getvalue()

    def to_json(self) -> str:
        """The rows as a list of objects, each with its training losses; what is not finite is ``null``."""
        head, lines = self._lines()
        rows = [
            {**dict(zip(head, line, strict=True)), "losses": row.losses}
            for line, row in zip(lines, self.rows, strict=True)
        ]
        return json.dumps(_finite(rows), indent=1)

    def __str__(self) -> str:
        head, lines = self._lines()
        shown = {"loss": "{:.4g}", "lowest": "{:.4g}", "lr": "{:g}", "lr_ratio": "{:g}", "alpha": "{:g}"}
        forms = [shown.get(column, "{}") for column in head]
        cells = [[form.format(value) for form, value in zip(forms, line, strict=True)] for line in lines]
        notes = [f"warning: {edge}; a better one may lie beyond" for edge in self.edges()]
        return "\n".join([*aligned([head, *cells]), f"loss: {self.loss_words}", *notes])


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

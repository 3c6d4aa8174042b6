"""A sweep in one call: candidates trained side by side, halved on the way, and the best one kept."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

from torch import nn

from lora_plus.layers.adapter import check_adapter_name
from lora_plus.model.inject import remove_lora
from lora_plus.model.patterns import Pattern

from .candidates import Candidate, SweepResult
from .side_by_side import Loss, Sweep

Report = Callable[[int, Mapping[str, float]], None]
"""Called after each step with its number, from 1, and the training losses by the name of the candidate."""


def sweep(
    model: nn.Module,
    targets: Pattern | Sequence[Pattern],
    candidates: Sequence[Candidate],
    loss: Loss,
    batches: Iterable[Any],
    *,
    validation: Iterable[Any] | None = None,
    halving: Mapping[int, float] | None = None,
    report: Report | None = None,
    adapter: str | None = "default",
    **settings: Any,
) -> SweepResult:
    """Train all candidates side by side on the same batches, and keep the best one's adapter in the model.

    Each candidate's training is, to rounding, what it would be in a run of its own; see `Sweep`.

    Example:
        >>> import torch
        >>> from lora_plus import adapter_names
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> data = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(5)]
        >>> candidates = [Candidate(lr=lr, lr_ratio=ratio, r=2) for lr in (1e-3, 1e-2) for ratio in (1, 4)]
        >>> squares = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> result = sweep(model, ["0"], candidates, squares, data, report=lambda step, losses: None)
        >>> len(result.rows), adapter_names(model)
        (4, ['default'])

    Args:
        model, targets, candidates, loss: as in `Sweep`.
        batches: the batches to train on, one a step.
        validation: batches to rank the candidates by, gone through again at every halving; None for the training
            losses.
        halving: ``{step: fraction}``: after this step only the best fraction of those that are left is trained on
            (successive halving, Jamieson & Talwalkar 2016, arXiv:1502.07943).
        report: called after every step; None for a line on stderr, if that is a terminal.
        adapter: the name that the best adapter gets, the others being deleted; None keeps all, under their own names.
        settings: the keywords of `Sweep` and of `inject_lora`.

    Returns:
        The candidates in the order of their losses. If all of them diverged, the model is left without adapters.

    Raises:
        ValueError: as `Sweep`, or if there are no batches. After any exception the model is left without adapters.
    """
    if adapter is not None:
        check_adapter_name(adapter)
    report = _line(batches, len(candidates)) if report is None else report
    running = Sweep(model, targets, candidates, loss, **settings)
    try:
        step = 0
        for step, batch in enumerate(batches, 1):
            report(step, running.step(batch))
            if step in (halving or {}):
                if validation is not None:
                    running.evaluate(validation)
                running.keep_best((halving or {})[step])
            if not running.names:
                break
        if not step:
            raise ValueError("there are no batches to train on; an iterator may have been used up before")
        if validation is not None:
            running.evaluate(validation)
        return running.finish(adapter)
    except BaseException:
        remove_lora(model)
        raise


def _line(batches: Iterable[Any], candidates: int) -> Report:
    """A report that rewrites one line on stderr, if that is a terminal."""
    total = f"/{len(batches)}" if isinstance(batches, Sized) else ""

    def report(step: int, losses: Mapping[str, float]) -> None:
        best = min(losses, key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf)
        text = f"step {step}{total}, {len(losses)} of {candidates} in training, lowest {losses[best]:.4g} ({best})"
        sys.stderr.write(f"{text:<100}\r")

    return report if sys.stderr.isatty() else lambda step, losses: None

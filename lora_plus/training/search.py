"""A sweep: adapters of one frozen model trained side by side, each with its own optimizer, and the best one kept."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lora_plus.errors import check_count, check_number
from lora_plus.layers.adapter import check_adapter_name
from lora_plus.layers.layer import LoRALayer
from lora_plus.model.adapters import adapter_names, delete_adapter, rename_adapter, set_adapter
from lora_plus.model.dry_run import left_as_it_was
from lora_plus.model.inject import inject_lora, remove_lora
from lora_plus.model.patterns import Pattern
from lora_plus.model.per_sample import adapter_per_sample
from lora_plus.model.tree import adapted_weights
from lora_plus.text import some

from .candidates import Candidate, Run, SweepResult, named
from .groups import LrMode, create_loraplus_optimizer
from .shared_batch import check_losses, check_statistics, repeated_samples

Loss = Callable[[nn.Module, Any], Tensor]
"""``(model, batch) -> (samples,)``: a loss for each sample of the batch."""

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
    """Train all candidates side by side on the same batches, as in a `Sweep`, and keep the best one's adapter.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> data = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(5)]
        >>> candidates = grid(lr=[1e-3, 1e-2], lr_ratio=[1, 4], r=2)
        >>> squares = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> result = sweep(model, ["0"], candidates, squares, data)
        >>> len(result.rows)
        4

    Args:
        model: as in `Sweep`.
        targets: as in `Sweep`.
        candidates: as in `Sweep`.
        loss: as in `Sweep`.
        batches: the training batches, one per step.
        validation: batches to rank the candidates by, at every halving and at the end; None for the training losses.
        halving: ``{step: fraction}``: after this step only the best fraction of the remaining candidates goes on
            (successive halving, Jamieson & Talwalkar 2016, arXiv:1502.07943).
        report: called after every step; None for a line on stderr, if that is a terminal.
        adapter: the name for the best adapter; the others are deleted. None keeps all, under their own names.
        settings: the keywords of `Sweep` and of `inject_lora`.

    Returns:
        The candidates in the order of their losses. If all diverged, the model has no adapters afterwards.

    Raises:
        ValueError: as `Sweep`, or if there are no batches. After any exception the model has no adapters.
    """
    if adapter is not None:
        check_adapter_name(adapter)
    report = _line(batches, len(candidates)) if report is None else report
    halving = halving or {}
    running = Sweep(model, targets, candidates, loss, **settings)
    try:
        step = 0
        for step, batch in enumerate(batches, 1):
            report(step, running.step(batch))
            if step in halving:
                if validation is not None:
                    running.evaluate(validation)
                running.keep_best(halving[step])
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


class Sweep:
    """Trains candidates side by side, one step at a time.

    All see the same batch: its samples are repeated for each candidate and go through the frozen model together, each
    with its candidate's adapter (`adapter_per_sample`). Each candidate has its own optimizer and mean loss, so it
    trains as it would alone; only random numbers of the forward (dropout) differ. A candidate whose loss or gradient is
    not finite is stopped before the update.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> candidates = [Candidate(lr=1e-3, name="low"), Candidate(lr=1e-2, name="high")]
        >>> running = Sweep(model, ["0"], candidates, lambda model, x: model(x).square().mean(1))
        >>> list(running.step(torch.randn(8, 4)))
        ['low', 'high']
        >>> result = running.finish()

    Args:
        model: a model without adapters; it gets one for each candidate.
        targets: as in `inject_lora`.
        candidates: the settings to compare.
        loss: ``(model, batch) -> (samples,)``: the loss of each sample, which must depend on that sample alone. For a
            mean over tokens, multiply each sample's sum by the number of samples over that of tokens in the batch.
        optimizer: an optimizer's class, or a function ``(groups, lr=...)``, such as a ``functools.partial`` of one.
        lr_mode: as in `loraplus_param_groups`.
        weight_decay: as in `loraplus_param_groups`.
        embedding_lr: as in `loraplus_param_groups`.
        schedule: ``step -> factor`` of all rates, from step 0, as in ``LambdaLR``.
        max_norm: the norm to clip each candidate's gradient to.
        together: how many candidates are computed at once; None for all. Fewer need less memory for activations.
        settings: the other keywords of `inject_lora`, except ``train_also``.

    Raises:
        TypeError, ValueError: if candidates, settings or the model do not fit. The model is then as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Pattern | Sequence[Pattern],
        candidates: Sequence[Candidate],
        loss: Loss,
        *,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        lr_mode: LrMode = "A",
        weight_decay: float = 0.0,
        embedding_lr: float | None = None,
        schedule: Callable[[int], float] | None = None,
        max_norm: float | None = None,
        together: int | None = None,
        **settings: Any,
    ) -> None:
        candidates = named(candidates)
        _check(model, [each.name for each in candidates], together, settings)
        self.model = model
        self._loss, self._max_norm, self._together = loss, max_norm, together or len(candidates)
        self._runs: dict[str, Run] = {}
        try:
            for candidate in candidates:
                inject_lora(
                    model, targets, r=candidate.r, alpha=candidate.alpha, adapter=candidate.name,
                    generator=torch.Generator().manual_seed(candidate.seed), **settings,
                )  # fmt: skip
                _check_places(model)
                # the one just injected is the only trainable one
                made = create_loraplus_optimizer(
                    model, optimizer, lr=candidate.lr, lr_ratio=candidate.lr_ratio, lr_mode=lr_mode,
                    weight_decay=weight_decay, embedding_lr=embedding_lr,
                )  # fmt: skip
                parameters = [parameter for group in made.param_groups for parameter in group["params"]]
                rates = None if schedule is None else LambdaLR(made, schedule)
                self._runs[candidate.name] = Run(candidate, parameters, made, rates)
        except BaseException:
            remove_lora(model)
            raise
        for run in self._runs.values():
            for parameter in run.parameters:
                parameter.requires_grad_()

    @property
    def names(self) -> list[str]:
        """The candidates that are in training."""
        return [name for name, run in self._runs.items() if run.optimizer is not None]

    def step(self, batch: Any) -> dict[str, float]:
        """Train each candidate on a batch, and return the losses before the update, by the name of the candidate.

        Args:
            batch: tensors with the samples as their first dimension (or no dimension), inside any mappings, sequences
                and dataclasses. What is not a tensor is given to the loss function as it is.

        Raises:
            ValueError: if no candidate is in training, or the batch or its losses are not one for each sample.
        """
        if not self.names:
            raise ValueError("no candidate is in training: all diverged or were stopped")
        for name in self.names:
            self._runs[name].clear()
        losses, _ = self._losses(batch, train=True)
        for name, loss in losses.items():
            self._runs[name].step(loss, self._max_norm)
        return losses

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """The mean loss over the samples of these batches, by the name of the candidate, in evaluation mode.

        Until the next step the candidates in training are ranked by it.
        """
        sums, size = dict.fromkeys(self.names, 0.0), 0
        with left_as_it_was(self.model), torch.no_grad():
            self.model.eval()
            for batch in batches:
                means, samples = self._losses(batch, train=False)
                sums = {name: total + samples * means[name] for name, total in sums.items()}
                size += samples
        if sums and not size:
            raise ValueError("there are no batches to evaluate on; an iterator may have been used up before")
        losses = {name: total / size for name, total in sums.items()}
        for name, loss in losses.items():
            self._runs[name].evaluated = loss
        return losses

    def keep_best(self, fraction: float) -> None:
        """Train only the best of the candidates on: this fraction of those in training, rounded up."""
        check_number("the fraction of candidates to keep", fraction, "above 0 and at most 1")
        ranked = sorted(self.names, key=lambda name: self._runs[name].row().rank)
        for name in ranked[math.ceil(fraction * len(ranked)) :]:
            self._runs[name].stop("halved")

    def result(self) -> SweepResult:
        """What came of the candidates up to here."""
        return SweepResult(sorted((run.row() for run in self._runs.values()), key=lambda row: row.rank))

    def finish(self, adapter: str | None = "default") -> SweepResult:
        """End the training with the best adapter as the active and trainable one, and return `result`.

        ``adapter`` is the name that it gets, the others being deleted; None keeps all, under their own names. If all
        candidates diverged and only the best is to be kept, the model is left without adapters.
        """
        if adapter is not None:
            check_adapter_name(adapter)
        result = self.result()
        best = result.rows[0]
        if adapter is None:
            set_adapter(self.model, best.candidate.name, trainable=True)
        elif best.stopped == "diverged":
            remove_lora(self.model)
        else:
            for row in result.rows[1:]:
                delete_adapter(self.model, row.candidate.name)
            if best.candidate.name != adapter:
                rename_adapter(self.model, best.candidate.name, adapter)
            set_adapter(self.model, adapter, trainable=True)
        for run in self._runs.values():
            run.clear()
            run.optimizer = None
        return result

    def _losses(self, batch: Any, *, train: bool) -> tuple[dict[str, float], int]:
        """The mean losses of the candidates in training, after their backward if so, and the batch's size."""
        check_statistics(self.model)
        found: dict[str, float] = {}
        names, size = self.names, 0
        for start in range(0, len(names), self._together):
            part = names[start : start + self._together]
            size, repeated = repeated_samples(batch, len(part))
            with adapter_per_sample(self.model, [name for name in part for _ in range(size)]):
                losses = self._loss(self.model, repeated)
                check_losses(losses, len(part) * size)
                means = losses.reshape(len(part), size).mean(1)
                if train:  # a loss that is not finite has no part in the gradients of the others
                    means.sum().backward()
            found |= zip(part, means.tolist(), strict=True)
        return found, size


def _check(model: nn.Module, names: Sequence[str], together: int | None, settings: Mapping[str, Any]) -> None:
    if not names:
        raise ValueError("there are no candidates; give a list of Candidate, or a grid(...)")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"candidates must have different names, got {twice} more than once")
    if adapter_names(model):
        raise ValueError(
            f"a sweep starts from a model without adapters, and this one has {adapter_names(model)}; call "
            "merge_and_unload(model) or remove_lora(model)"
        )
    if settings.get("train_also"):
        raise ValueError("train_also: a module trained in full would be one for all candidates; make it a target")
    if together is not None:
        check_count("together", together)


def _check_places(model: nn.Module) -> None:
    """Raise where a batch has one weight for all its samples, so that they cannot have different adapters."""
    if shared := some([name for name, weight in adapted_weights(model) if not isinstance(weight, LoRALayer)], 1):
        why = "adapted in the weight (as in attention, LSTM), which a sweep cannot train side by side"
        raise ValueError(f"{shared}: {why}; exclude it, or run one training per candidate")

"""A sweep is its candidates' separate runs: same losses, same adapters, one frozen model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sweep_support import CANDIDATES, MLP, RATES, TASKS, Task, close, name_of, points, separate_run, silent, squares
from torch import Tensor, nn

from lora_plus import inject_lora, load_adapter, save_adapter
from lora_plus.files import adapter_state_dict
from lora_plus.model import active_adapters, adapter_names
from lora_plus.training import Candidate, Sweep, sweep

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"variant": "dora"},
    "schedule and clipping": {"schedule": lambda step: 1 / (1 + step), "max_norm": 0.05, "scaling": "rslora"},
    "pissa": {"init": "pissa"},
}


@pytest.mark.parametrize("together", [None, 3, 1])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_sweep_is_its_separate_runs(task: Task, options: dict[str, Any], together: int | None) -> None:
    if "init" in options:
        task = replace(task, targets=[name for name in task.targets if name not in ("tokens", "4")])
    model = task.model()
    result = sweep(
        model, task.targets, CANDIDATES, task.loss, task.batches(), report=silent, adapter=None, together=together,
        **RATES, **options,
    )  # fmt: skip
    rows = {row.candidate.name: row for row in result.rows}
    finals = set()
    for n, candidate in enumerate(CANDIDATES):
        losses, tensors = separate_run(task, candidate, **options)
        row = rows[name_of(n)]
        close(list(row.losses), losses)
        close(adapter_state_dict(model, adapter=name_of(n)), tensors)
        close(row.loss, sum(losses[-4:]) / 4)
        assert row.lowest == min(row.losses) and row.stopped == "" and row.candidate.lr == candidate.lr
        assert losses[-1] != losses[0]
        finals.add(round(losses[-1], 8))
    assert len(finals) == (3 if "init" in options else 4)  # PiSSA draws nothing, so the seed makes no difference
    assert [row.loss for row in result.rows] == sorted(row.loss for row in result.rows)


def test_the_same_again_bit_for_bit() -> None:
    once, again = (sweep(MLP.model(), MLP.targets, CANDIDATES, squares, MLP.batches(), report=silent) for _ in range(2))
    assert once == again and str(once) == str(again)


def test_dropout_is_drawn_for_each_candidate() -> None:
    same = [Candidate(lr=1e-2, r=2, name=name) for name in ("a", "b")]
    result = sweep(MLP.model(), MLP.targets, same, squares, MLP.batches(3), report=silent, dropout=0.5)
    assert result.rows[0].losses[0] == result.rows[1].losses[0]  # B is zero at the start
    assert result.rows[0].losses[-1] != result.rows[1].losses[-1]


def test_the_best_adapter_stays_and_is_saved_and_loaded(tmp_path: Any) -> None:
    model = MLP.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = sweep(model, MLP.targets, CANDIDATES, squares, MLP.batches(), report=silent, **RATES)
    assert adapter_names(model) == active_adapters(model) == ["default"]
    _, tensors = separate_run(
        MLP, next(c for n, c in enumerate(CANDIDATES) if name_of(n) == result.best.candidate.name)
    )
    close(adapter_state_dict(model), tensors)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{layer}.lora_{matrix}.default" for layer in MLP.targets for matrix in "AB"}
    save_adapter(model, tmp_path / "best.safetensors")
    fresh = load_adapter(MLP.model(), tmp_path / "best.safetensors")
    x, _ = points(0)
    assert torch.equal(fresh(x), model(x))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def poisoned(where: str, at: int, seen: list[int]) -> Callable[[nn.Module, Any], Tensor]:
    """A loss that is not finite in the third step for the second candidate's samples, or that has such a gradient."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(len(batch[0]))
        losses = squares(model, batch)
        if len(seen) != at:
            return losses
        before, bad, after = losses[:5], losses[5:10], losses[10:]
        ways = {
            "loss": lambda: bad / 0,
            "nan": lambda: bad * math.nan,
            "gradient": lambda: bad + (bad - bad.detach()).sqrt(),  # of zero, where the slope is infinite
        }
        return torch.cat([before, ways[where](), after])

    return loss


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("where", ["loss", "nan", "gradient"])
def test_a_candidate_that_diverges_stops_and_harms_no_other(where: str, variant: str) -> None:
    model, seen = MLP.model(), list[int]()
    batches = MLP.batches(8)
    result = sweep(
        model, MLP.targets, CANDIDATES, poisoned(where, 3, seen), batches, report=silent, adapter=None,
        variant=variant, **RATES,
    )  # fmt: skip
    assert seen == [20] * 3 + [15] * 5  # its samples are no longer computed
    rows = {row.candidate.name: row for row in result.rows}
    assert result.rows[-1].candidate.name == name_of(1) and rows[name_of(1)].stopped == "diverged"
    assert len(rows[name_of(1)].losses) == 3
    for n, candidate in enumerate(CANDIDATES):
        losses, tensors = separate_run(MLP, candidate, 2 if n == 1 else 8, variant=variant)
        close(adapter_state_dict(model, adapter=name_of(n)), tensors)  # the last state before the bad step
        close(list(rows[name_of(n)].losses)[:2], losses[:2])


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_weights_that_are_not_finite_stay_in_their_candidate(task: Task) -> None:
    model = task.model()
    running = Sweep(model, task.targets, CANDIDATES, task.loss, **RATES)
    batches = task.batches(6)
    for n, batch in enumerate(batches):
        if n == 2:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith(f"lora_B.{name_of(2)}"):
                        parameter.fill_(math.inf)
        losses = running.step(batch)
        assert [name for name in losses if not math.isfinite(losses[name])] == ([name_of(2)] if n == 2 else [])
    assert running.names == [name_of(n) for n in (0, 1, 3)]
    for n in (0, 1, 3):
        close(adapter_state_dict(model, adapter=name_of(n)), separate_run(task, CANDIDATES[n], 6)[1])


def test_rates_that_are_far_too_high_diverge() -> None:
    model = MLP.model().float()
    wild = [Candidate(lr=1e30, r=2), Candidate(lr=1e-2, r=2), Candidate(lr=1e25, r=2)]
    batches = [(x.float(), y.float()) for x, y in MLP.batches(10)]
    result = sweep(model, ["4"], wild, squares, batches, report=silent, adapter=None)
    assert [row.stopped for row in result.rows] == ["", "diverged", "diverged"]
    assert result.best.candidate.lr == 1e-2
    for name in adapter_names(model):
        assert all(tensor.isfinite().all() for tensor in adapter_state_dict(model, adapter=name).values())


def test_if_all_diverge_the_model_is_as_before_and_the_table_says_so() -> None:
    model = MLP.model().float()
    batches = [(x.float(), y.float()) for x, y in MLP.batches(10)]
    result = sweep(model, ["4"], [Candidate(lr=1e30, r=2)], squares, batches, validation=batches, report=silent)
    assert adapter_names(model) == [] and "diverged" in str(result)
    with pytest.raises(ValueError, match="all candidates diverged; try lower rates"):
        _ = result.best


@pytest.mark.parametrize("validated", [False, True])
def test_halving_trains_the_best_on(validated: bool) -> None:
    model = MLP.model()
    validation = MLP.batches(30)[20:] if validated else None
    result = sweep(
        model, MLP.targets, CANDIDATES, squares, MLP.batches(), validation=validation, halving={5: 0.5, 10: 0.3},
        report=silent, adapter=None, **RATES,
    )  # fmt: skip
    assert [(len(row.losses), row.stopped) for row in result.rows] == [
        (20, ""), (10, "halved"), (5, "halved"), (5, "halved")
    ]  # fmt: skip

    def scores(steps: int) -> dict[str, float]:
        """Of separate runs of so many steps."""
        found = {}
        for n, candidate in enumerate(CANDIDATES):
            losses, tensors = separate_run(MLP, candidate, steps)
            if validation is None:
                found[name_of(n)] = sum(losses[-max(1, steps // 5) :]) / max(1, steps // 5)
                continue
            trained = inject_lora(MLP.model(), MLP.targets, r=candidate.r, alpha=candidate.alpha)
            trained.load_state_dict({f"{name}.default": tensor for name, tensor in tensors.items()}, strict=False)
            with torch.no_grad():
                found[name_of(n)] = torch.cat([squares(trained, batch) for batch in validation]).mean().item()
        return found

    after_5, after_10, after_20 = scores(5), scores(10), scores(20)
    ranked = sorted(after_5, key=after_5.__getitem__)
    left = sorted(ranked[:2], key=after_10.__getitem__)
    assert [row.candidate.name for row in result.rows] == [*left, *ranked[2:]]
    close([row.loss for row in result.rows], [after_20[left[0]], after_10[left[1]], *(after_5[n] for n in ranked[2:])])


def test_evaluation_is_in_evaluation_mode_and_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    running = Sweep(model, ["0"], CANDIDATES, squares, dropout=0.5)
    running.step(points(0))
    state = torch.get_rng_state()
    once, again = (running.evaluate([points(1, 2), points(2, 7)]) for _ in range(2))
    assert once == again and torch.equal(torch.get_rng_state(), state) and model[1].training
    both = tuple(map(torch.cat, zip(points(1, 2), points(2, 7), strict=True)))
    close(once, running.evaluate([both]))
    running.step(points(3))
    assert running.result().rows[0].loss == running.result().rows[0].losses[-1]  # the evaluation is out of date


def test_a_failed_step_changes_nothing() -> None:
    calls: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return squares(model, batch)[: 1 if len(calls) == 2 else None]

    model = MLP.model()
    running = Sweep(model, MLP.targets, CANDIDATES, loss, together=2, **RATES)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="must return a loss for each"):
        running.step(points(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    running.step(points(0))
    close(adapter_state_dict(model, adapter="one"), separate_run(MLP, CANDIDATES[0], 1)[1])

"""The runs of which the documentation shows pictures: their loss, their form, and that they can be repeated."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pictured_runs
import pytest
import torch
import torch.nn.functional as F
from tasks import Classifier, Setting, Split, Task, divided
from torch import nn

from examples.demo.answers import IGNORED
from lora_plus.training import Candidate, GaugeRow, SweepResult, SweepRow

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "pictures.json"


def answers(*sizes: int) -> Task:
    """Sequences of four tokens with three classes, of which one to three are counted."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, 6, generator=generator)
    labels = x[..., :3].argmax(-1)
    labels[torch.arange(4) > torch.arange(64)[:, None] % 3] = IGNORED
    torch.manual_seed(0)
    body = nn.Sequential(OrderedDict(q=nn.Linear(6, 8), bent=nn.Tanh(), v=nn.Linear(8, 8)))
    return Task(Classifier(body, nn.Linear(8, 3)).requires_grad_(False), *divided((x,), labels, 16, 0))


def test_the_loss_of_an_answer_is_the_mean_over_its_own_tokens() -> None:
    task = answers()
    batch = Split(task.train.inputs, task.train.labels)
    losses = pictured_runs.answer_losses(task.start, batch)
    for n, (x, labels) in enumerate(zip(batch.inputs[0], batch.labels, strict=True)):
        counted = labels != IGNORED
        assert losses[n].item() == pytest.approx(F.cross_entropy(task.start(x)[counted], labels[counted]).item(), 1e-5)


def test_a_sweep_and_a_gauge_are_kept_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictured_runs, "PHONEMES", Setting(answers, (), ["q", "v"], (), "Tiny.", batch=8))
    rows = [SweepRow(Candidate(**row.pop("candidate")), **row) for row in json.loads(json.dumps(pictured_runs.swept()))]
    assert {(row.candidate.lr, row.candidate.lr_ratio) for row in rows} == {
        (lr, ratio) for lr in pictured_runs.RATES for ratio in pictured_runs.RATIOS
    }
    steps = sorted(len(row.losses) for row in rows)
    assert steps == [10] * 12 + [pictured_runs.STEPS] * 12 and SweepResult(rows).best.evaluated
    report = pictured_runs.gauged()
    assert report["steps"] == pictured_runs.GAUGED_STEPS
    assert [GaugeRow(**row).name for row in report["rows"]] == ["body.q", "body.v"]


def test_numbers_are_kept_to_six_digits() -> None:
    assert pictured_runs.short({"a": (1 / 3, 2, "b", [1e-9 / 7])}) == {"a": [0.333333, 2, "b", [1.42857e-10]]}


@pytest.mark.slow
def test_the_published_gauge_can_be_repeated() -> None:
    published = json.loads(RESULTS.read_text())["gauge"]
    again = pictured_runs.gauged()
    for ours, theirs in zip(again["rows"], published["rows"], strict=True):
        assert ours["name"] == theirs["name"]
        for figure in ("growth_A", "update", "gradient_A", "gradient_B"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=0.02)

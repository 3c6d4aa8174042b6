"""What a sweep refuses, what it reports on the way, and its table and heat map."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from sweep_support import CANDIDATES, MLP, close, name_of, points, silent, squares
from torch import Tensor, nn

from lora_plus import inject_lora
from lora_plus.model import adapter_names
from lora_plus.training import Candidate, Sweep, SweepResult, grid, sweep
from lora_plus.training.plots import plot_sweep


class Normed(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 2), nn.BatchNorm1d(2, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


@pytest.mark.parametrize("settings", [{}, {"track_running_stats": False}], ids=str)
def test_statistics_of_the_batch_are_refused(settings: dict[str, Any]) -> None:
    model = Normed(**settings).double()
    model.train(not settings)
    with pytest.raises(ValueError, match=r"'norm' \(BatchNorm1d\) takes the statistics of the whole batch, .*\.eval"):
        sweep(model, ["layer"], CANDIDATES, squares, MLP.batches(1), report=silent)
    assert adapter_names(model) == []
    sweep(Normed().double().eval(), ["layer"], [Candidate(lr=1e-2, r=1)], squares, MLP.batches(1), report=silent)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)


TWICE = [Candidate(lr=1e-3, name="a"), Candidate(lr=1e-2, name="a")]
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no candidates": ({"candidates": []}, ValueError, "there are no candidates; give a list of Candidate"),
    "one name twice": ({"candidates": TWICE}, ValueError, r"got \['a'\] more than once"),
    "a rate": ({"candidates": [*CANDIDATES, Candidate(lr=-1)]}, ValueError, "lr must be finite and positive, got -1"),
    "a rank": ({"candidates": [*CANDIDATES, Candidate(lr=1, r=0)]}, ValueError, "r must be"),
    "a name": ({"candidates": [Candidate(lr=1, name="a.b")]}, ValueError, "must not be empty or contain a dot"),
    "the best's name": ({"adapter": "a.b"}, ValueError, "must not be empty or contain a dot"),
    "a head": ({"train_also": ["4"]}, ValueError, "train_also: a module trained in full would be one for all"),
    "a target": ({"targets": ["nope"]}, ValueError, "nope"),
    "a setting": ({"rank": 3}, TypeError, "rank"),
    "together": ({"together": 0}, ValueError, "together must be positive, got 0"),
    "no batches": ({"batches": iter(())}, ValueError, "there are no batches to train on"),
    "no validation": ({"validation": iter(())}, ValueError, "there are no batches to evaluate on"),
    "a mean": ({"loss": lambda m, b: squares(m, b).mean()}, ValueError, r"each of the 20 samples.* got \(\)"),
    "a number": ({"loss": lambda m, b: 1.0}, ValueError, "got float"),
    "no samples": ({"batches": [3]}, ValueError, "got first dimensions of no tensor"),
    "two sizes": ({"batches": [(torch.ones(3, 6), torch.ones(4, 2))]}, ValueError, r"first dimensions of \[3, 4\]"),
    "a fraction": ({"halving": {1: 0.0}}, ValueError, "must be above 0 and at most 1, got 0"),
    "in the weight": ({"model": Attention(), "targets": ["attn"]}, ValueError, "is adapted in the weight"),
}


@pytest.mark.parametrize(("changes", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_swept_is_refused_and_the_model_is_as_before(
    changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    given: dict[str, Any] = {
        "model": MLP.model(), "targets": MLP.targets, "candidates": CANDIDATES, "loss": squares,
        "batches": MLP.batches(2), "report": silent, **changes,
    }  # fmt: skip
    model, kinds = given["model"], [type(module) for module in given["model"].modules()]
    with pytest.raises(error, match=text):
        sweep(**given)
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_with_adapters_is_refused_and_keeps_them() -> None:
    model = inject_lora(MLP.model(), MLP.targets, adapter="mine")
    with pytest.raises(ValueError, match=r"without adapters, and this one has \['mine'\]; call merge_and_unload"):
        sweep(model, MLP.targets, CANDIDATES, squares, MLP.batches(1), report=silent)
    assert adapter_names(model) == ["mine"]


def test_a_step_without_candidates_is_an_error() -> None:
    running = Sweep(MLP.model(), MLP.targets, CANDIDATES, squares)
    running.step(points(0))
    running.finish()
    with pytest.raises(ValueError, match="no candidate is in training"):
        running.step(points(0))


def test_a_grid_is_all_combinations() -> None:
    made = grid(lr=[1e-3, 1e-2], lr_ratio=(1, 4, 16), r=2, seed=range(2))
    assert len(made) == 12 and len(set(made)) == 12
    assert made[1] == Candidate(lr=1e-3, lr_ratio=1, r=2, alpha=16, seed=1)


def test_the_report_and_the_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seen: list[tuple[int, list[str]]] = []
    names = [name_of(n) for n in range(4)]
    sweep(
        MLP.model(), MLP.targets, CANDIDATES, squares, MLP.batches(3), halving={2: 0.25},
        report=lambda step, losses: seen.append((step, list(losses))),
    )  # fmt: skip
    assert seen[:2] == [(1, names), (2, names)] and len(seen[2][1]) == 1
    sweep(MLP.model(), MLP.targets, CANDIDATES, squares, MLP.batches(3))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sweep(MLP.model(), MLP.targets, CANDIDATES, squares, MLP.batches(3))
    assert "step 3/3, 4 of 4 in training, lowest" in capsys.readouterr().err


def test_the_table_has_a_line_for_each_candidate() -> None:
    result = sweep(MLP.model(), MLP.targets, CANDIDATES, squares, MLP.batches(2), report=silent)
    head, *lines = str(result).splitlines()
    assert head.split() == ["name", "lr", "lr_ratio", "r", "alpha", "seed", "loss", "lowest", "steps", "stopped"]
    best = result.best
    assert lines[0].split() == [
        best.candidate.name, *(f"{getattr(best.candidate, name):g}" for name in head.split()[1:6]),
        f"{best.loss:.4g}", f"{best.lowest:.4g}", "2",
    ]  # fmt: skip
    assert len(lines) == 4


def test_the_heat_map_shows_means_over_seeds_and_leaves_diverged_cells_empty(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    shown: list[Any] = []
    own = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axes, cells, **how: shown.append(cells) or own(axes, cells, **how))
    candidates = grid(lr=[1e-3, 1e-2], lr_ratio=[1, 4, 16], r=[2, 4], seed=[0, 1])
    result = sweep(MLP.model(), MLP.targets, candidates, squares, MLP.batches(2), report=silent)
    bad = next(row for row in result.rows if row.candidate == replace(candidates[0], name="candidate_0"))
    rows = [replace(row, stopped="diverged") if row is bad else row for row in result.rows]
    plot_sweep(SweepResult(rows), tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000
    assert len(shown) == 2 and math.isnan(shown[0][0][0])
    losses = {row.candidate.name: row.loss for row in result.rows}
    for n, cell in [(2, shown[1][0][0]), (4, shown[0][0][1]), (22, shown[1][1][2])]:
        assert candidates[n].seed == 0
        close(cell, (losses[f"candidate_{n}"] + losses[f"candidate_{n + 1}"]) / 2)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = sweep(MLP.model(), MLP.targets, CANDIDATES, squares, MLP.batches(1), report=silent)
    with pytest.raises(ImportError, match="drawing needs matplotlib; run: pip install matplotlib"):
        plot_sweep(result, "map.png")

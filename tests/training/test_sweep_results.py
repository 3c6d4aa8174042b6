"""What a sweep refuses, what it reports on the way, and its table and heat map."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from drawn import drawn, map_of, panels, texts
from sweep_support import CANDIDATES, MLP, name_of, points, silent, squares
from torch import Tensor, nn

from lora_plus import inject_lora
from lora_plus.model import adapter_names
from lora_plus.training import Candidate, Sweep, SweepResult, SweepRow, grid, plot_sweep, plot_sweep_curves, sweep
from lora_plus.training.candidates import named
from lora_plus.training.drawing import rounded


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
    "a dict": ({"candidates": [{"lr": 1e-3}]}, TypeError, r"must be a Candidate, got a dict; see grid\(...\)"),
    "a number that is none": ({"candidates": [Candidate(lr=math.nan)]}, ValueError, "lr must be finite and positive"),
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
    "in the weight": (
        {"model": Attention(), "targets": ["attn"]},
        ValueError,
        r"^'attn.out_proj' and 1 more: adapted in the weight \(as in attention, LSTM\), which a sweep cannot "
        "train side by side; exclude it, or run one training per candidate$",
    ),
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


def test_a_name_says_the_rate_and_what_differs() -> None:
    made = named(grid(lr=[1e-3, 0.0015], lr_ratio=[1, 4], r=[2, 16], alpha=16.0))
    assert [each.name for each in made[:3]] == ["r2 lr1e-3 x1", "r16 lr1e-3 x1", "r2 lr1e-3 x4"]
    assert made[-1].name == "r16 lr15e-4 x4"
    assert [each.name for each in named(grid(lr=[20, 0.5, 1e5], seed=3))] == ["lr20", "lr5e-1", "lr1e5"]
    twice = named([Candidate(lr=1e-3), Candidate(lr=1e-3), Candidate(lr=1e-3, name="lr1e-3 (2)")])
    assert [each.name for each in twice] == ["lr1e-3", "lr1e-3 (3)", "lr1e-3 (2)"]


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_the_values_of_a_grid_may_be_an_array(library: str) -> None:
    array = getattr(pytest.importorskip(library), {"torch": "tensor", "numpy": "array"}[library])
    assert grid(lr=array([0.5, 0.25]), r=array([2, 4])) == grid(lr=[0.5, 0.25], r=[2, 4])
    assert type(grid(lr=array(0.5), r=array([2]))[0].r) is int


def test_the_table_has_a_line_for_each_candidate_and_says_what_the_loss_is() -> None:
    result = sweep(MLP.model(), MLP.targets, CANDIDATES, squares, MLP.batches(2), report=silent)
    head, *lines = str(result).splitlines()
    assert head.split() == ["name", "lr", "lr_ratio", "r", "alpha", "seed", "loss", "lowest", "steps", "stopped"]
    best = result.best
    assert lines[0].split() == [
        *best.candidate.name.split(), *(f"{getattr(best.candidate, name):g}" for name in head.split()[1:6]),
        f"{best.loss:.4g}", f"{best.lowest:.4g}", "2",
    ]  # fmt: skip
    assert lines[4] == "loss: training loss, mean of the last fifth of the steps"
    judged = sweep(
        MLP.model(), MLP.targets, CANDIDATES, squares, MLP.batches(2), validation=MLP.batches(1), report=silent
    )
    assert "loss: validation loss" in str(judged)


def rows(*losses: float, lrs: tuple[float, ...] = (1e-3, 1e-2, 1e-1)) -> SweepResult:
    made = [
        SweepRow(Candidate(lr=lr, name=f"{lr}"), loss, (loss,) * 3, "") for lr, loss in zip(lrs, losses, strict=True)
    ]
    return SweepResult(sorted(made, key=lambda row: row.loss))


def test_a_best_candidate_at_an_end_of_what_was_tried_is_warned_of() -> None:
    assert rows(2, 1, 3).edges() == [] and "warning" not in str(rows(2, 1, 3))
    assert rows(1, 2, 3).edges() == ["the best lr, 0.001, is the lowest that was tried"]
    assert str(rows(3, 2, 1)).endswith(
        "warning: the best lr, 0.1, is the highest that was tried; a better one may lie beyond"
    )
    assert rows(1, lrs=(1e-3,)).edges() == []


def test_csv_and_json_have_the_numbers_in_full(tmp_path: Any) -> None:
    result = sweep(MLP.model(), MLP.targets, CANDIDATES, squares, MLP.batches(3), report=silent)
    read = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert [float(line["loss"]) for line in read] == [row.loss for row in result.rows]
    assert [line["name"] for line in read] == [row.candidate.name for row in result.rows]
    plain = json.loads(result.to_json())
    assert [each["losses"] for each in plain] == [list(row.losses) for row in result.rows]
    assert plain[0]["lr"] == result.best.candidate.lr and set(read[0]) | {"losses"} == set(plain[0])
    bad = replace(result.rows[0], loss=math.nan, losses=(1.0, math.inf))
    assert json.loads(SweepResult([bad]).to_json())[0]["loss"] is None


def test_the_heat_map_ranks_means_over_seeds_and_leaves_diverged_cells_empty(tmp_path: Any) -> None:
    candidates = named(grid(lr=[1e-3, 1e-2], lr_ratio=[1, 4, 16], r=[2, 4], seed=[0, 1]))
    result = sweep(MLP.model(), MLP.targets, candidates, squares, MLP.batches(2), report=silent)
    made = [
        replace(
            row, stopped={candidates[0].name: "diverged", candidates[1].name: "diverged"}.get(row.candidate.name, "")
        )
        for row in result.rows
    ]
    figure = drawn(plot_sweep, SweepResult(made), into=tmp_path)
    losses = {row.candidate.name: row.loss for row in result.rows}
    means = {n: (losses[candidates[n].name] + losses[candidates[n + 1].name]) / 2 for n in range(2, 24, 2)}
    # r varies fastest but for the seed: panel, row and column of each pair of seeds
    places = {n: (n // 2 % 2, f"{candidates[n].lr:g}", f"{candidates[n].lr_ratio}") for n in means}
    maps = [map_of(panel) for panel in panels(figure).values()]
    assert [*panels(figure)] == ["r = 2, alpha = 16", "r = 4, alpha = 16"]
    assert [len(cells) for cells in maps] == [5, 6]
    ranks = {n: maps[panel][row, column] for n, (panel, row, column) in places.items()}
    assert sorted(ranks.values()) == [*range(1, 12)]
    assert sorted(ranks, key=ranks.__getitem__) == sorted(means, key=means.__getitem__)
    written = [text for panel in panels(figure).values() for text in texts(panel)]
    assert sorted(written, key=float) == sorted((rounded(mean, 3) for mean in means.values()), key=float)
    best = candidates[min(means, key=means.__getitem__)]
    above = " ".join(figure.get_suptitle().split())
    assert above.startswith(f"Best: lr = {best.lr:g}, lr_ratio = {best.lr_ratio}, r = {best.r}, alpha = 16 ")
    assert above.endswith("; empty: diverged, or not tried")
    plot_sweep(SweepResult(made), tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_halved_candidates_are_behind_the_others_and_hatched(tmp_path: Any) -> None:
    result = rows(1.0, 2.0, 3.0)
    halved = [replace(result.rows[0], stopped="halved", losses=(1.0,)), *result.rows[1:]]
    figure = drawn(plot_sweep, SweepResult(sorted(halved, key=lambda row: row.rank)), into=tmp_path)
    (panel,) = panels(figure).values()
    framed = {(each.get_hatch() or "", each.get_edgecolor()[:3]): each.get_xy() for each in panel.patches}
    assert framed == {("////", (0.4, 0.4, 0.4)): (0, 0), ("", (1, 0, 0)): (0, 1)}
    assert "hatched: stopped early" in figure.get_suptitle()


def test_a_sweep_of_diverged_candidates_alone_has_empty_cells(tmp_path: Any) -> None:
    made = [replace(row, stopped="diverged", loss=math.nan) for row in rows(1.0, 2.0, 3.0).rows]
    figure = drawn(plot_sweep, SweepResult(made), into=tmp_path)
    assert [map_of(panel) for panel in panels(figure).values()] == [{}]
    assert figure.get_suptitle().startswith("All candidates diverged\n")


@pytest.mark.parametrize("ranks", [1, 7])
def test_panels_go_on_in_another_line_and_the_lowest_name_their_ratios(ranks: int, tmp_path: Any) -> None:
    candidates = named(grid(lr=[1e-3, 1e-2], r=range(1, ranks + 1)))
    made = [SweepRow(each, each.r + each.lr, (1.0,), "") for each in candidates]
    figure = drawn(plot_sweep, SweepResult(made), into=tmp_path)
    drawn_panels = [*panels(figure).values()]
    assert len(drawn_panels) == ranks and figure.get_figwidth() < 12
    lowest = {panel.get_subplotspec().colspan.start: panel for panel in drawn_panels}  # the last of each column
    named_panels = [panel for panel in drawn_panels if panel.get_xlabel()]
    assert sorted(map(id, named_panels)) == sorted(map(id, lowest.values()))
    assert all(panel.xaxis.get_major_ticks()[0].label1.get_visible() for panel in named_panels)


def test_the_best_curves_have_a_name_each_however_many_there_are(tmp_path: Any) -> None:
    candidates = named(grid(lr=[n * 1e-3 for n in range(1, 41)]))
    made = [SweepRow(each, each.lr, (2.0, 1.0 + each.lr), "") for each in candidates]
    (panel,) = drawn(plot_sweep_curves, SweepResult(made), into=tmp_path).axes
    assert [list(line.get_ydata()) for line in panel.lines] == [list(row.losses) for row in made]
    named_lines = [text.get_text() for text in panel.get_legend().get_texts()]
    assert named_lines == [each.name for each in candidates[:8]]
    assert panel.get_legend().get_title().get_text() == "best first; 32 more in grey"
    plot_sweep_curves(SweepResult(made), tmp_path / "curves.png")  # a longer legend left no room for the axes
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = sweep(MLP.model(), MLP.targets, CANDIDATES, squares, MLP.batches(1), report=silent)
    for plot in (plot_sweep, plot_sweep_curves):
        with pytest.raises(ImportError, match=r"drawing needs matplotlib >= 3\.8, which is not installed; run: pip"):
            plot(result, "map.png")


def test_a_name_in_a_picture_is_no_formula(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    row = SweepRow(Candidate(lr=1e-3, name="$x_{$"), 1.0, (2.0, 1.0), "")
    plot_sweep_curves(SweepResult([row]), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_a_candidate_has_plain_numbers(library: str) -> None:
    array = getattr(pytest.importorskip(library), {"torch": "tensor", "numpy": "array"}[library])
    candidate = Candidate(lr=array([1.5])[0], r=array([4])[0])
    assert (type(candidate.lr), type(candidate.r)) == (float, int)
    assert [each.name for each in named([candidate])] == ["lr15e-1"]
    assert '"lr": 1.5' in SweepResult([SweepRow(candidate, 1.0, (1.0,), "")]).to_json()

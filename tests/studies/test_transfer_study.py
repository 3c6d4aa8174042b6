"""The study of transferred rates: its arithmetic, its runs and its page, on a toy that is cut short."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import ranks
from ranks import POINTS, Record, Run
from subjects import SUBJECTS, Rates, Subject


def test_the_grid_follows_the_rule_so_that_a_transferred_rate_stays_in_its_place() -> None:
    for source, target in itertools.permutations(POINTS, 2):
        assert ranks.transferred_octave(source, 1.5, target) == pytest.approx(1.5, abs=1e-12)
        moved = ranks.same_octave(source, 1.5, target)
        assert target.rate(0.01, moved) == pytest.approx(source.rate(0.01, 1.5))


def test_a_parabola_is_found_again_and_an_end_is_said() -> None:
    best = ranks.best_of({octave: 2 + 0.1 * (octave - 0.3) ** 2 for octave in range(-3, 4)})
    assert (best.octave, best.loss, best.at_end) == (pytest.approx(0.3), pytest.approx(2), False)
    assert ranks.best_of({0: 1.0, 1: 2.0, 2: 3.0}) == ranks.Best(0, 1.0, True)
    assert ranks.loss_at({0: 1.0, 1: 2.0, 2: 4.0}, 1.5) == 3 and ranks.loss_at({0: 1.0, 1: 2.0}, 5.0) == 2


def test_a_toy_learns_with_an_adapter_and_follows_the_seed() -> None:
    toy = SUBJECTS["toy"].load(True)
    rates = Rates(8, 16.0, 8e-3, 1.0)
    assert toy.run(rates, 3) == toy.run(rates, 3) < toy.run(Rates(8, 16.0, 1e-6, 1.0), 3)


def test_runs_are_kept_and_a_grid_is_extended_at_its_ends(tmp_path: Path) -> None:
    counted: list[float] = []

    def loss(rates: Rates, seed: int) -> float:
        counted.append(rates.g)
        kept = math.log2(rates.g**2 * rates.alpha) / 2
        return 1 + 0.01 * (kept - 4) ** 2 + 0.001 * seed

    subject, path = Subject("A parabola.", 2.0, loss), tmp_path / "runs.jsonl"
    for _ in range(2):
        ranks.do("parabola", subject, POINTS, [0, 1], 1.0, path)
    # the least is beyond the grid's end at 3: two octaves more for each setting
    assert len(counted) == len(POINTS) * 2 * (len(ranks.OCTAVES) + 2) == len(ranks.read(path))
    page = "\n".join(ranks.section("parabola", subject, ranks.read(path), POINTS, 1.0))
    assert "| 8/√r | 8 | -0.25 | -0.25 | -0.25 |" in page and "end of the grid" not in page
    assert "| all | transferred | 1.000 | 1.000 |" in page


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = Record(Run("toy", POINTS[3], -2, 1), 0.25, 1.5)
    path = tmp_path / "runs.jsonl"
    ranks.do("toy", Subject("", 1.0, lambda rates, seed: 0.25), POINTS[:1], [0], 1.0, path)
    assert ranks.read(path)[0].loss == 0.25 and ranks.mean_losses([record], "toy", POINTS[3]) == {-2: 0.25}

"""What `benchmarks/full.py` counts of a training step, against a count by hand."""

from __future__ import annotations

import argparse
from pathlib import Path

import full
import pytest
import torch
from measuring import count
from report import Shown
from torch import Tensor, nn

import lora_plus

ROWS, FLOAT = 2, 4
"""Inputs of a batch, and bytes of a number."""


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def held(model: nn.Module) -> full.Held:
    x = torch.randn(ROWS, 8)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return full.held(model, lambda model: model(x).square().mean(), torch.optim.AdamW(trained))


WHOLE = FLOAT * (8 * 16 + 16 + 16 * 4 + 4)
FACTORS = FLOAT * 2 * (8 + 16 + 16 + 4)
"""A and B of both layers at r = 2."""


def test_full_training_holds_the_model_four_times_and_its_activations() -> None:
    found = held(net())
    assert (found.parameters, found.gradients) == (WHOLE, WHOLE)
    assert found.state == 2 * WHOLE + 4 * FLOAT  # and the number of steps of each of four parameters
    assert found.activations == FLOAT * ROWS * (8 + 16 + 4)  # the input, the ReLU's output, the output that is squared
    assert found.peak >= 4 * WHOLE


def test_lora_holds_the_model_once_and_its_factors_four_times() -> None:
    found = held(lora_plus.inject_lora(net(), "all-linear", r=2))
    assert (found.parameters, found.gradients) == (WHOLE + FACTORS, FACTORS)
    assert found.state == 2 * FACTORS + 4 * FLOAT
    assert found.activations == FLOAT * ROWS * (8 + 16 + 4 + 2 + 2)  # A x of both layers, too
    assert WHOLE + 4 * FACTORS <= found.peak < held(net()).peak


def test_the_adapters_of_a_half_precision_base_are_counted_in_float32() -> None:
    x = torch.randn(ROWS, 8).bfloat16()
    model = lora_plus.inject_lora(net().bfloat16(), "all-linear", r=2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = full.held(model, lambda model: model(x).float().square().mean(), torch.optim.AdamW(trained))
    assert (found.parameters, found.gradients) == (WHOLE // 2 + FACTORS, FACTORS)


def test_bytes_just_below_the_next_unit_are_written_out() -> None:
    assert [str(count(n * 2**20)) for n in (0.5, 999, 1020, 1024)] == ["512 KiB", "999 MiB", "1,020 MiB", "1 GiB"]


def test_a_tied_weight_is_counted_once() -> None:
    model = net()
    model.append(nn.Linear(4, 16, bias=False))
    model.append(nn.Linear(16, 4, bias=False))
    model[4].weight = model[2].weight
    assert full.size(model.parameters()) == WHOLE + FLOAT * 4 * 16


@pytest.mark.slow
def test_a_comparison_has_each_way_of_training_and_goes_into_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        return model(tokens).square().mean()

    def make(options: argparse.Namespace) -> nn.Module:
        return nn.Sequential(nn.Embedding(7, 8), net())

    monkeypatch.setitem(full.SUBJECTS, "tiny", full.Subject(make, ("1.0", "1.2"), 7, loss))
    options = argparse.Namespace(device="cpu", tokens=(1, ROWS), r=[1, 2], short=True, rounds=2, clock="cpu")
    rows = full.compare("tiny", "float32", options)
    assert [row[0] for row in rows] == ["full", "LoRA, r = 1", "LoRA, r = 2"]
    whole, small, large = (dict(zip(full.COLUMNS, row, strict=True)) for row in rows)
    size = WHOLE + FLOAT * 7 * 8
    assert whole["estimate"] == count(4 * size) and large["estimate"] == count(size + 4 * FACTORS)
    assert size < whole["checkpoint"].median < size + 1000  # type: ignore[union-attr]
    assert FACTORS < large["checkpoint"].median < FACTORS + 2000  # type: ignore[union-attr]
    assert small["gradients"] == count(FACTORS / 2)
    pytest.importorskip("matplotlib")
    (tmp_path / "savings.md").write_text("Before.\n\n| old |\n|---|\n\nAfter.\n")
    full.write([Shown("tiny, float32", full.COLUMNS, rows, ("peak",))], tmp_path)
    lines = (tmp_path / "savings.md").read_text().splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("Before.", "After.", 4 + 2 + len(rows))
    assert all(line.startswith("| tiny, float32 | ") for line in lines[4:7])
    assert "</svg>" in (tmp_path / "savings.svg").read_text()

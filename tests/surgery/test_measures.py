"""Figures told from the factors are those of the dense updates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import CASES, Case
from parameter_cases import PARAMETER_CASES, ParameterCase
from torch import Tensor, nn

import lora_plus
from lora_plus.files.save import describe
from lora_plus.files.saved_adapter import SavedAdapter, SavedLayer
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.model.state import State
from lora_plus.surgery.measures import diff_saved, measure
from lora_plus.tensors.low_rank import singular_values
from lora_plus.tensors.variant import AdapterSpec


def layer(A: Tensor, B: Tensor, scale: float = 1.0, **settings: Any) -> SavedLayer:
    r = A.shape[-2]
    given = {"r": r, "alpha": r * scale, "scaling": "standard", "variant": "lora", "dropout": 0.0, **settings}
    base = BaseLayer("Linear", "o i -> o i", (B.shape[-2], A.shape[-1]))
    return SavedLayer(base, AdapterSpec(**given), {"lora_A": A, "lora_B": B})


def dense(each: SavedLayer) -> Tensor:
    return each.spec.scale * torch.einsum("...or,...ri->...oi", each.tensors["lora_B"], each.tensors["lora_A"])


@pytest.mark.parametrize("case", [*CASES, *PARAMETER_CASES], ids=lambda case: case.name)
def test_equal_those_of_the_dense_update(case: Case | ParameterCase) -> None:
    for name, each in describe(State(case.adapted()), "default").layers.items():
        figures = measure(name, each)
        values = torch.linalg.svdvals(dense(each)).square()
        shares = values / values.sum(-1, keepdim=True)
        entropy = -(shares * shares.clamp(min=1e-300).log()).sum(-1)
        assert figures.norm == pytest.approx(float(dense(each).norm()), rel=1e-12)
        spectrum = values.reshape(-1, values.shape[-1]).mean(0).sqrt()[: len(figures.singular_values)].tolist()
        assert figures.singular_values == pytest.approx(spectrum, rel=1e-10, abs=1e-12)
        assert len(figures.singular_values) == min(each.spec.r, *dense(each).shape[-2:])
        assert figures.largest_share == pytest.approx(float(shares.amax(-1).mean()), rel=1e-10)
        assert figures.effective_rank == pytest.approx(float(entropy.exp().mean()), rel=1e-10)
        assert (figures.r, figures.scale, figures.kind) == (each.spec.r, each.spec.scale, each.base.kind)


def test_singular_values_of_a_diagonal_are_its_entries() -> None:
    values = torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64)
    A, B = torch.eye(3, 7, dtype=torch.float64), torch.eye(4, 3, dtype=torch.float64) * values
    torch.testing.assert_close(singular_values(A, B), values, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("values", "rank", "share"), [([2, 2, 2, 2], 4, 0.25), ([3, 0, 0], 1, 1), ([1, 1, 0], 2, 0.5)])
def test_effective_rank_by_hand(values: list[float], rank: float, share: float) -> None:
    r = len(values)
    figures = measure("a", layer(torch.eye(r, 6), torch.eye(5, r) * torch.tensor(values), scale=3.0))
    assert figures.effective_rank == pytest.approx(rank, rel=1e-12)
    assert figures.largest_share == pytest.approx(share, rel=1e-12)
    assert figures.norm == pytest.approx(3 * math.sqrt(sum(value**2 for value in values)), rel=1e-12)


def test_an_update_of_zero_has_no_spectrum() -> None:
    figures = measure("a", layer(torch.ones(2, 3), torch.zeros(4, 2)))
    assert (figures.norm, figures.largest_share, figures.effective_rank) == (0, None, None)


def test_of_a_stack_only_those_count_that_have_an_update() -> None:
    A, B = torch.eye(2).expand(2, 2, 2).clone(), torch.eye(2).expand(2, 2, 2).clone()
    B[1] = 0
    assert measure("a", layer(A, B)).effective_rank == pytest.approx(2)


# ---- differences -----------------------------------------------------------------------------------------------------


def two(**changes: Any) -> tuple[SavedAdapter, SavedAdapter]:
    found = []
    for seed, options in ((0, {}), (1, changes)):
        generator = torch.Generator().manual_seed(seed)
        r = options.get("r", 3)
        A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((r, 6), (5, r)))
        found.append(SavedAdapter({"a": layer(A, B, scale=1.5 + seed)}, {}))
    return found[0], found[1]


@pytest.mark.parametrize("r", [1, 3, 9])
def test_a_difference_is_that_of_the_dense_updates(r: int) -> None:
    a, b = two(r=r)
    (found,) = diff_saved(a, b).layers
    ours, theirs = dense(a.layers["a"]), dense(b.layers["a"])
    assert found.relative == pytest.approx(float((ours - theirs).norm() / ours.norm()), rel=1e-12)
    assert found.settings["alpha"] == (4.5, 2.5 * r)
    assert ("r" in found.settings) == (r != 3)


def test_a_small_difference_is_not_lost_to_cancellation() -> None:
    a, _ = two()
    b = SavedAdapter(
        {"a": layer(a.layers["a"].tensors["lora_A"], a.layers["a"].tensors["lora_B"] * (1 + 1e-9), 1.5)}, {}
    )
    assert diff_saved(a, b).layers[0].relative == pytest.approx(1e-9, rel=1e-5)


def test_the_same_update_from_other_factors_is_zero_up_to_rounding() -> None:
    a, _ = two()
    A, B = a.layers["a"].tensors["lora_A"], a.layers["a"].tensors["lora_B"]
    mix = torch.randn(3, 3, dtype=torch.float64)
    b = SavedAdapter({"a": layer(mix @ A, B @ mix.inverse(), 1.5)}, {})
    assert diff_saved(a, b).layers[0].relative == pytest.approx(0, abs=1e-13)


def test_equal_adapters_differ_in_nothing() -> None:
    model = lora_plus.inject_lora(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), ["0"], train_also=["1"])
    with torch.no_grad():
        model[0].lora_B["default"].normal_()
    found = diff_saved(describe(State(model), "default"), describe(State(model), "default"))
    assert found.equal
    assert found.layers[0].relative == 0


def test_what_only_one_has_and_what_belongs_elsewhere_is_told() -> None:
    a, b = two()
    a.layers["only a"], b.layers["only b"] = a.layers["a"], b.layers["a"]
    a.layers["other"], b.layers["other"] = (
        layer(torch.ones(1, 2), torch.ones(2, 1)),
        layer(torch.ones(1, 2), torch.ones(3, 1)),
    )
    a.trained["head"] = {"weight": torch.tensor([3.0, 4.0]), "bias": torch.ones(2), "same": torch.ones(1)}
    b.trained["head"] = {"weight": torch.tensor([3.0, 4.5]), "bias": torch.ones(3), "same": torch.ones(1)}
    found = diff_saved(a, b)
    assert (found.only_a, found.only_b) == (["only a"], ["only b"])
    assert {each.name: each.relative is None for each in found.layers} == {"a": False, "other": True}
    assert found.trained == {"head.weight": pytest.approx(0.1), "head.bias": None}
    assert not found.equal


def test_a_difference_from_zero_is_infinite() -> None:
    zero = SavedAdapter({"a": layer(torch.ones(1, 6), torch.zeros(5, 1))}, {})
    assert diff_saved(zero, two()[1]).layers[0].relative == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.complex64, torch.int64, torch.bool])
def test_what_is_trained_in_full_is_compared_in_its_dtype(dtype: torch.dtype) -> None:
    values = torch.tensor([3.0, 4.0]).to(dtype)
    last = {torch.complex64: torch.tensor([3, 4j]), torch.bool: torch.tensor([True, False])}
    other = last.get(dtype, torch.tensor([3.0, 9.0])).to(dtype)
    wanted = {torch.complex64: 32**0.5 / 5, torch.bool: 0.5**0.5}.get(dtype, 1.0)
    a, b = (SavedAdapter({}, {"head": {"weight": each}}) for each in (values, other))
    assert diff_saved(a, b).trained == {"head.weight": pytest.approx(wanted, rel=1e-12)}
    assert diff_saved(a, a).equal


def test_a_value_that_is_no_number_is_equal_to_itself() -> None:
    one = SavedAdapter({}, {"head": {"weight": torch.tensor(complex(math.nan, 1), dtype=torch.complex64)}})
    assert diff_saved(one, one).equal


def test_magnitudes_are_compared() -> None:
    a, b = two()
    a.layers["a"].tensors["lora_magnitude"], b.layers["a"].tensors["lora_magnitude"] = (
        torch.ones(5),
        1.25 * torch.ones(5),
    )
    assert diff_saved(a, b).layers[0].magnitude == pytest.approx(0.25, rel=1e-12)

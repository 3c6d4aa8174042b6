"""Combined and resized adapters: the laws of their updates on every case of both tables, and what is refused."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_support
import pytest
import torch
from torch import Tensor, nn
from update_cases import (
    BY_NAME,
    SUBJECTS,
    Subject,
    changes,
    close,
    every_subject,
    least_error,
    randomise,
    snapshot,
    some_subjects,
    updates,
)

import lora_plus
from lora_plus.files import adapter_state_dict
from lora_plus.model import adapter_names
from lora_plus.surgery import combine_adapters, methods
from lora_plus.tensors import low_rank

WEIGHTS = [0.5, -2.0]


def weighted(model: nn.Module) -> dict[str, Tensor]:
    """The sum of the updates of a and b with these weights, by place."""
    a, b = updates(model, "a"), updates(model, "b")
    return {name: WEIGHTS[0] * a[name] + WEIGHTS[1] * b[name] for name in a}


# ---- the sum ---------------------------------------------------------------------------------------------------------


@every_subject
def test_the_sum_is_what_both_adapters_do_together(subject: Subject) -> None:
    model = subject.adapted()
    lora_plus.set_adapter(model, ["a", "b"])
    wanted = subject.run(model)
    report = combine_adapters(model, ["a", "b"])
    close(subject.run(model), wanted)
    ranks = {row.name: 0 for row in lora_plus.lora_summary(model).rows}
    for row in lora_plus.lora_summary(model).rows:
        ranks[row.name] += row.r if row.adapter in ("a", "b") else 0
        assert row.scale == 1 or row.adapter != "combined"
    assert report.ranks == ranks and set(report.errors.values()) == {0.0}


@every_subject
def test_the_weighted_sum_is_the_sum_of_the_weights_changes(subject: Subject) -> None:
    model = subject.adapted()
    before = {name: adapter_state_dict(model, adapter=name) for name in "ab"}
    before = {name: {key: tensor.clone() for key, tensor in state.items()} for name, state in before.items()}
    separate = changes(model, ["a"]), changes(model, ["b"])
    combine_adapters(model, ["a", "b"], weights=WEIGHTS, adapter="c")
    wanted = {name: WEIGHTS[0] * one + WEIGHTS[1] * separate[1][name] for name, one in separate[0].items()}
    close(changes(model, ["c"]), wanted)
    for name, state in before.items():
        now = adapter_state_dict(model, adapter=name)
        assert state.keys() == now.keys() and all(torch.equal(now[key], tensor) for key, tensor in state.items())


def test_the_sum_is_exact_to_the_rounding_of_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100))
    for name in "ab":
        lora_plus.inject_lora(model, ["0"], r=16, adapter=name)
    wanted = weighted(randomise(model).double())["0"]
    model.float()
    combine_adapters(model, ["a", "b"], weights=WEIGHTS)
    state = adapter_state_dict(model, adapter="combined")
    update = state["0.lora_B"].double() @ state["0.lora_A"].double()
    assert (update - wanted).norm() < 1e-7 * wanted.norm()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_bfloat16_adapters_give_a_float32_one() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    for name in "ab":
        lora_plus.inject_lora(model, ["0"], r=2, adapter=name, dtype=torch.bfloat16)
    randomise(model)
    wanted = {name: tensor.float() for name, tensor in weighted(copy.deepcopy(model).double()).items()}
    for method in ({}, {"method": "svd", "r": 4}):
        combine_adapters(model, ["a", "b"], weights=WEIGHTS, **method)
        assert updates(model, "combined")["0"].dtype == torch.float32
        close(updates(model, "combined"), wanted, 1e-5)
        lora_plus.delete_adapter(model, "combined")


def test_a_layer_that_only_one_has_counts_as_zero_in_the_other() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2)).double()
    lora_plus.inject_lora(model, ["0", "1"], r=2, adapter="a")
    lora_plus.inject_lora(model, ["1", "2"], r=1, adapter="b")
    a, b = updates(randomise(model), "a"), updates(model, "b")
    assert combine_adapters(model, ["b", "a"], weights=[3, -1]).ranks == {"0": 2, "1": 3, "2": 1}
    close(updates(model, "combined"), {"0": -a["0"], "1": 3 * b["1"] - a["1"], "2": 3 * b["2"]})
    ties = {"method": "ties", "r": 3, "density": 1.0}
    combine_adapters(model, ["b", "a"], adapter="ties", weights=[3, -1], **ties)
    close([updates(model, "ties")[name] for name in "02"], [-a["0"], 3 * b["2"]])


@pytest.mark.parametrize("trainable", [False, True])
def test_the_new_adapter_is_the_active_one_and_the_others_are_frozen(trainable: bool) -> None:
    model = BY_NAME["linear"].adapted()
    model.layer.lora_adapters["a"].spec = lora_plus.tensors.variant.AdapterSpec(r=3, alpha=5, dropout=0.5)
    combine_adapters(model, ["a"], adapter="c", trainable=trainable)
    assert adapter_names(model) == ["a", "b", "c"] and model.layer.active_names() == ["c"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == ({"layer.lora_A.c", "layer.lora_B.c"} if trainable else set())
    assert model.layer.lora_adapters["c"].spec == lora_plus.tensors.variant.AdapterSpec(r=3, alpha=3)
    factors = {container: tensors["c"] for container, tensors in model.layer.named_children()}
    assert all(factor.data_ptr() != model.layer.lora_A["a"].data_ptr() for factor in factors.values())


# ---- lower rank ------------------------------------------------------------------------------------------------------


@every_subject
def test_svd_is_exact_at_full_rank_and_the_best_below(subject: Subject) -> None:
    model = subject.adapted()
    wanted = weighted(model)
    report = combine_adapters(model, ["a", "b"], weights=WEIGHTS, method="svd", r=99, adapter="full")
    close(updates(model, "full"), wanted)
    assert max(report.errors.values()) < 1e-14
    assert all(rank <= min(wanted[name].shape[-2:]) for name, rank in report.ranks.items())
    report = combine_adapters(model, ["a", "b"], weights=WEIGHTS, method="svd", r=1, adapter="low")
    for name, update in updates(model, "low").items():
        assert report.ranks[name] == 1
        best = least_error(wanted[name], 1)
        assert report.errors[name] == pytest.approx(best, rel=1e-10, abs=1e-14)
        assert float((update - wanted[name]).norm() / wanted[name].norm()) == pytest.approx(best, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (3, 40, 20)])
@pytest.mark.parametrize("r", [1, 8, 30])
def test_the_randomized_decomposition_is_nearly_the_best(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], r: int
) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)  # noise: the slowest decay there is
    best = least_error(matrix, r)
    monkeypatch.setattr(low_rank, "_EXACT", 0)
    state = torch.get_rng_state()
    fit, again = low_rank.truncated(matrix, r), low_rank.truncated(matrix, r)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(fit.A, again.A) and torch.equal(fit.B, again.B)
    assert fit.error == pytest.approx(float((fit.B @ fit.A - matrix).norm() / matrix.norm()), abs=1e-14)
    assert best - 1e-14 <= fit.error <= 1.02 * best + 1e-14
    low = torch.randn(*shape[:-1], 4, dtype=torch.float64) @ torch.randn(4, shape[-1], dtype=torch.float64)
    assert low_rank.truncated(low, 4).error < 1e-13


def test_an_update_of_zero_and_columns_of_zeros_stay_zero_to_the_bit() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=0)).double()
    for name in "ab":
        lora_plus.inject_lora(model, ["0"], r=3, adapter=name)
    randomise(model)
    with torch.no_grad():
        for name in "ab":
            model[0].lora_A[name][:, 0] = 0
    for options in ({"method": "svd", "r": 2}, {"method": "ties", "r": 2, "density": 0.9}):
        combine_adapters(model, ["a", "b"], **options)
        assert not updates(model, "combined")["0"][:, 0].any() and updates(model, "combined")["0"][:, 1:].all()
        lora_plus.delete_adapter(model, "combined")
        report = combine_adapters(model, ["a"], weights=[0], **options)
        assert not updates(model, "combined")["0"].any() and report.errors == {"0": 0.0}
        lora_plus.delete_adapter(model, "combined")


# ---- sparse methods, beside literal ones -----------------------------------------------------------------------------


def literal_trim(matrix: Tensor, density: float) -> Tensor:
    entries = sorted(((abs(v), i) for i, v in enumerate(matrix.flatten().tolist())), reverse=True)
    kept = {i for _, i in entries[: max(1, round(density * len(entries)))]}
    values = [v if i in kept else 0.0 for i, v in enumerate(matrix.flatten().tolist())]
    return torch.tensor(values, dtype=matrix.dtype).reshape(matrix.shape)


def literal_elect(matrices: list[Tensor]) -> Tensor:
    """The elect-sign and disjoint-mean steps of TIES, entry by entry."""
    joined = []
    for values in zip(*(matrix.flatten().tolist() for matrix in matrices), strict=True):
        total = sum(values)
        agreeing = [value for value in values if value * total > 0]
        joined.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(joined, dtype=matrices[0].dtype).reshape(matrices[0].shape)


def literal_drop(matrix: Tensor, density: float, generator: torch.Generator) -> Tensor:
    drawn = torch.empty(matrix.numel(), dtype=matrix.dtype).uniform_(-0.5, 0.5, generator=generator).tolist()
    entries = zip(drawn, matrix.flatten().tolist(), strict=True)
    values = [v / density if u + 0.5 < density else 0.0 for u, v in entries]
    return torch.tensor(values, dtype=matrix.dtype).reshape(matrix.shape)


@pytest.mark.parametrize(
    ("subject", "density"), [*((subject, 0.4) for subject in SUBJECTS), (BY_NAME["experts"], 0.01)], ids=repr
)
def test_ties_is_the_literal_algorithm(subject: Subject, density: float) -> None:
    model = subject.adapted()
    a, b = updates(model, "a"), updates(model, "b")
    options = {"method": "ties", "weights": WEIGHTS, "density": density}
    combine_adapters(model, ["a", "b"], r=99, **options)
    wanted = {
        name: literal_elect([literal_trim(WEIGHTS[0] * a[name], density), literal_trim(WEIGHTS[1] * b[name], density)])
        for name in a
    }
    close(updates(model, "combined"), wanted)
    report = combine_adapters(model, ["a", "b"], r=1, adapter="low", **options)
    for name, matrix in wanted.items():
        assert report.errors[name] == pytest.approx(least_error(matrix, 1), rel=1e-10, abs=1e-13)


@pytest.mark.parametrize(
    ("subject", "method"),
    [*((subject, "dare") for subject in SUBJECTS), *((subject, "dare_ties") for subject in SUBJECTS[::4])],
    ids=repr,
)
def test_dare_is_the_literal_algorithm(subject: Subject, method: str) -> None:
    model = subject.adapted()
    a, b = updates(model, "a"), updates(model, "b")
    state, generator = torch.get_rng_state(), torch.Generator().manual_seed(3)
    options = {"method": method, "weights": WEIGHTS, "density": 0.6, "r": 99}
    combine_adapters(model, ["a", "b"], generator=generator, **options)
    assert torch.equal(state, torch.get_rng_state())
    generator.manual_seed(3)
    join: Callable[[list[Tensor]], Tensor] = sum if method == "dare" else literal_elect  # type: ignore[assignment]
    wanted = {
        name: join([literal_drop(w * d[name], 0.6, generator) for w, d in zip(WEIGHTS, (a, b), strict=True)])
        for name in combine_adapters(model, ["a", "b"], adapter="order").ranks
    }
    close(updates(model, "combined"), wanted)


def test_dare_keeps_the_expected_update() -> None:
    matrix = torch.ones(300, 300, dtype=torch.float64)
    options = methods.Options(density=0.3, generator=torch.Generator().manual_seed(0))
    dropped = methods._dropped(matrix, options)
    assert set(dropped.flatten().tolist()) == {0.0, 1 / 0.3}
    assert abs(float(dropped.mean()) - 1) < 5 * (0.7 / 0.3 / matrix.numel()) ** 0.5


def test_ties_of_two_signs_by_hand() -> None:
    one, other = torch.tensor([[4.0, -3.0, 0.5, 2.0]]), torch.tensor([[2.0, 1.0, -5.0, -2.0]])
    half = methods.Options(density=0.5)
    assert methods._trimmed(one, half).tolist() == [[4.0, -3.0, 0.0, 0.0]]
    assert methods._elected([one, other]).tolist() == [[3.0, -3.0, -5.0, 0.0]]


# ---- files -----------------------------------------------------------------------------------------------------------

SPARSE = {"r": 2, "density": 0.5}
METHODS: dict[str, Any] = {"sum": {}, "svd": {"r": 2}, "ties": SPARSE, "dare": SPARSE, "dare_ties": SPARSE}


def test_every_method_is_tested() -> None:
    assert METHODS.keys() == methods.METHODS.keys()


@pytest.mark.parametrize("subject", SUBJECTS, ids=repr)
def test_a_saved_combination_loads_with_the_same_output(subject: Subject, tmp_path: Path) -> None:
    model = subject.adapted()
    for method, options in METHODS.items() if subject.name == "linear" else [("svd", METHODS["svd"])]:
        path = tmp_path / f"{method}.safetensors"
        combine_adapters(model, ["a", "b"], adapter=method, method=method, **options)
        lora_plus.save_adapter(model, path, adapter=method)
        fresh = lora_plus.load_adapter(subject.model().eval(), path)
        assert all(map(torch.equal, subject.run(fresh), subject.run(model)))


@pytest.mark.peers
@pytest.mark.parametrize("method", METHODS)
def test_peft_opens_a_combination(method: str, tmp_path: Path) -> None:
    model = peft_support.net()
    lora_plus.inject_lora(model, ["embed", "q", "xq", "conv", "fc"], r=3, adapter="a", rank_pattern={"conv": 2})
    lora_plus.inject_lora(model, ["q", "conv", peft_support.V], r=2, alpha=3, scaling="rslora", adapter="b")
    randomise(model)
    combine_adapters(model, ["a", "b"], weights=WEIGHTS, method=method, **METHODS[method])
    lora_plus.save_adapter(model, tmp_path / "peft", adapter="combined")
    theirs = peft_support.opened_by_peft(peft_support.net(), tmp_path / "peft")
    close(theirs(peft_support.TOKENS), model(peft_support.TOKENS), 1e-11)
    assert (model(peft_support.TOKENS) - peft_support.net()(peft_support.TOKENS)).abs().max() > 1e-3


# ---- what is refused -------------------------------------------------------------------------------------------------


def net(**changes: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    for name, options in {"a": {}, "b": {"r": 1}, **changes}.items():
        lora_plus.inject_lora(model, ["0"], **{"r": 2, "adapter": name, **options})
    return randomise(model)


def spoiled(value: float) -> nn.Module:
    model = net()
    with torch.no_grad():
        model[0].lora_B["b"][0, 0] = value
    return model


HEAD = "adapters ['a', 'b'] cannot be combined; the model is unchanged:\n  "
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"adapters": ["a", "x"]}, KeyError, '"the model has no adapter \'x\': it has \'a\', \'b\'"'),
    ({"adapters": "a"}, TypeError, "adapters must be a list of names, got 'a'"),
    ({"adapters": []}, ValueError, "adapters must be one name or more, each once, got []"),
    ({"adapters": ["a", "a"]}, ValueError, "adapters must be one name or more, each once, got ['a', 'a']"),
    ({"weights": [1]}, ValueError, "weights must be one for each of the 2 adapters, got 1"),
    ({"weights": [1, "2"]}, TypeError, "the weight of 'b' must be a number, got '2'"),
    ({"weights": [1, float("nan")]}, ValueError, "the weight of 'b' must be finite, got nan"),
    ({"adapter": "a"}, ValueError,
     "the model has an adapter 'a' already (on '0'); choose another name, or call delete_adapter first"),
    ({"adapter": "a.b"}, ValueError, "an adapter's name must not be empty or contain a dot, got 'a.b'"),
    ({"method": "mean"}, ValueError,
     "unknown method 'mean'; choose one of ['sum', 'svd', 'ties', 'dare', 'dare_ties']"),
    ({"r": 4}, ValueError, "r has no effect with method 'sum'; leave it out, or choose one of ['svd', 'ties', 'dare', "
     "'dare_ties']"),
    ({"method": "ties", "r": 4, "density": 0.5, "generator": torch.Generator()}, ValueError,
     "generator has no effect with method 'ties'; leave it out, or choose one of ['dare', 'dare_ties']"),
    ({"method": "svd"}, ValueError, "method 'svd' needs r"),
    ({"method": "dare", "r": 2}, ValueError, "method 'dare' needs density"),
    ({"method": "svd", "r": 0}, ValueError, "r must be positive, got 0"),
    ({"method": "svd", "r": 2.0}, TypeError, "r must be an int, got 2.0"),
    ({"method": "ties", "r": 2, "density": 0}, ValueError, "density must be above 0 and at most 1, got 0"),
    ({"method": "ties", "r": 2, "density": "1"}, TypeError, "density must be a number, got '1'"),
    ({"weights": [1, 1e38]}, ValueError, HEAD + "'0': its update is too large for its dtype to be computed with"),
    ({"weights": [1, 1e38], "method": "svd", "r": 2}, ValueError,
     HEAD + "'0': its update is too large for its dtype to be computed with"),
    ({"model": lambda: spoiled(float("inf"))}, ValueError, HEAD + "'0': 'b' has values that are not finite"),
    ({"model": lambda: net().to("meta")}, ValueError,
     HEAD + "'0': 'a' has no values (meta device); load them first\n"
     "  '0': 'b' has no values (meta device); load them first"),
    ({"model": lambda: net(b={"variant": "dora"})}, ValueError,
     HEAD + "'0': 'b' is of the variant 'dora', which rescales the weight and cannot be added"),
    ({"model": lambda: net(a={"train_also": ["1"]})}, ValueError,
     HEAD + "'1' is trained in full with 'a', and such values cannot be added; use adapters without train_also"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED, ids=itertools.count())
def test_what_cannot_be_combined_is_refused_and_changes_nothing(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"model": net, "adapters": ["a", "b"], **arguments}
    model = arguments.pop("model")()
    before = snapshot(model)
    with pytest.raises(error, match=rf"^{re.escape(message)}$"):
        combine_adapters(model, arguments.pop("adapters"), **arguments)
    assert snapshot(model) == before


def test_merged_and_disabled_models_are_refused() -> None:
    model = net()
    lora_plus.merge_lora(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"the model is merged \('0' is\); call unmerge_lora\(model\) first"):
        combine_adapters(model, ["a", "b"])
    assert snapshot(model) == before
    lora_plus.unmerge_lora(model)
    with lora_plus.disabled(model), pytest.raises(ValueError, match=r"leave the disabled\(model\) block first"):
        combine_adapters(model, ["a", "b"])


@some_subjects
def test_autocast_does_not_reach_the_arithmetic(subject: Subject) -> None:
    plain, cast = subject.adapted(torch.float32), subject.adapted(torch.float32)
    for method in ("svd", "ties"):
        combine_adapters(plain, ["a", "b"], adapter=method, method=method, **METHODS[method])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            combine_adapters(cast, ["a", "b"], adapter=method, method=method, **METHODS[method])
        one, other = updates(plain, method), updates(cast, method)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_report_in_words() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lora_plus.inject_lora(model, ["0"], r=2, adapter="a")
    lora_plus.inject_lora(model, ["0", "1"], r=1, adapter="b")
    randomise(model)
    assert str(combine_adapters(model, ["a", "b"])) == "adapter 'combined': 2 layers, rank 1 to 3"
    report = combine_adapters(model, ["a", "b"], adapter="c", method="svd", r=1)
    worst = f"{report.errors['0']:.2g}"
    assert str(report) == (
        f"adapter 'c': 2 layers, rank 1\nrelative error of the update: {worst} in the median layer, {worst} in '0'"
    )

"""The adapter of a tuned model: exact where the change has that rank, the best one otherwise, and what is refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from update_cases import (
    BY_NAME,
    DORA,
    EVERYTHING,
    Subject,
    close,
    every_subject,
    least_error,
    randomise,
    snapshot,
    some_subjects,
    updates,
)

import lora_plus
from lora_plus.surgery import CombineReport, extract_adapter


def tuned_by(subject: Subject, **changes: Any) -> nn.Module:
    """The plain model with an update of low rank in each of its places."""
    return lora_plus.merge_and_unload(randomise(subject.inject(subject.model(), **changes))).eval()


@pytest.mark.parametrize("subject", EVERYTHING, ids=repr)
def test_an_update_of_that_rank_is_extracted_exactly(subject: Subject) -> None:
    tuned, model = tuned_by(subject), subject.model().eval()
    base = subject.run(subject.model().eval())
    r = 99 if subject in DORA else subject.settings["r"]  # a rescaling has the full rank
    report = extract_adapter(model, tuned, r=r, **subject.selection)
    close(subject.run(model), subject.run(tuned), 1e-11)
    assert any((one - other).abs().max() > 1e-3 for one, other in zip(base, subject.run(model), strict=True))
    assert max(report.errors.values()) < 1e-13 and report.ignored == []
    assert not any(parameter.requires_grad for parameter in model.parameters())


@some_subjects
def test_a_state_dict_serves_as_a_model_does(subject: Subject) -> None:
    tuned, states = tuned_by(subject), []
    for given in (tuned, tuned.state_dict()):
        model = subject.model()
        extract_adapter(model, given, r=2, **subject.selection)
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@every_subject
def test_a_lower_rank_is_the_best_one(subject: Subject) -> None:
    tuned, model = randomise_weights(subject.model()), subject.model()
    report = extract_adapter(model, tuned, r=1, **subject.selection, adapter="low")
    extract_adapter(model, tuned, r=99, **subject.selection, adapter="full")
    whole = updates(model, "full")
    for name, update in updates(model, "low").items():
        best = least_error(whole[name], 1)
        assert report.ranks[name] == 1
        assert report.errors[name] == pytest.approx(best, rel=1e-10, abs=1e-13)
        assert float((update - whole[name]).norm() / whole[name].norm()) == pytest.approx(best, rel=1e-10, abs=1e-13)
    lora_plus.set_adapter(model, "full")
    merged = lora_plus.merge_and_unload(model).state_dict()
    wanted = tuned.state_dict()
    for key in wanted.keys() - set(report.ignored):
        close(merged[key], wanted[key])


def randomise_weights(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def test_everything_else_that_differs_is_named() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict(
            {
                "attn": nn.MultiheadAttention(4, 2),
                "a": nn.Linear(4, 4),
                "b": nn.Linear(4, 4, bias=False),
                "norm": nn.BatchNorm1d(4),
            }
        )

    model, tuned = make(), randomise_weights(make())
    with torch.no_grad():
        tuned["b"].weight.copy_(model["b"].weight)
        tuned["norm"].num_batches_tracked += 1
        tuned["attn"].in_proj_weight[4:8] = model["attn"].in_proj_weight[4:8]
    extra = {**tuned.state_dict(), "head.weight": torch.zeros(2, 2), "note": "text"}
    report = extract_adapter(model, extra, targets=["attn.q", "a"], r=2, adapter="x")
    assert report.ignored == [
        "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias", "a.bias",
        "norm.weight", "norm.bias", "norm.num_batches_tracked", "head.weight",
    ]  # fmt: skip
    median = sorted(report.errors.values())[1]
    assert str(report).splitlines() == [
        "adapter 'x': 2 layers, rank 2",
        f"relative error of the update: {median:.2g} in the median layer, {median:.2g} in "
        f"{max(report.errors, key=report.errors.__getitem__)!r}",
        f"not in it, though they differ: {', '.join(map(repr, report.ignored))}",
    ]
    many = CombineReport("x", {"a": 1}, {"a": 0.0}, [f"t{i}" for i in range(12)])
    assert str(many).endswith("'t8', 't9' and 2 more")
    report = extract_adapter(
        make(), {name: extra[name] for name in ("attn.in_proj_weight", "a.weight")}, targets=["a", "attn.in_proj"], r=2
    )
    assert report.ignored == [] and report.errors["attn.k"] == 0.0


def test_the_rules_of_selection_are_those_of_an_injection() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)).double()
    tuned = randomise_weights(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)).double())
    report = extract_adapter(
        model, tuned, targets="all-linear", exclude=["1"], rank_pattern={"2": 1}, r=4, trainable=True
    )
    assert report.ranks == {"0": 4, "2": 1}
    assert report.ignored == ["0.bias", "1.weight", "1.bias", "2.bias"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"0.lora_A.default", "0.lora_B.default", "2.lora_A.default", "2.lora_B.default"}
    with pytest.raises(ValueError, match="target 'nope' matches no module or parameter"):
        extract_adapter(model, tuned, targets=["nope"], r=4, adapter="other")


def test_half_precision_models_are_compared_in_float32() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 32)).to(torch.bfloat16)
    tuned = nn.Sequential(nn.Linear(32, 32))
    update = torch.randn(32, 2) @ torch.randn(2, 32) / 100
    with torch.no_grad():
        tuned[0].weight.copy_(base[0].weight.float() + update)
    assert extract_adapter(base, tuned, targets=["0"], r=2).errors["0"] < 1e-5
    close(updates(base, "default")["0"], update, 1e-5)
    assert base[0].lora_A["default"].dtype == torch.float32


def test_a_merged_model_is_a_tuned_one() -> None:
    subject = BY_NAME["attention"]
    model, tuned = subject.model().eval(), randomise(subject.inject(subject.model())).eval()
    lora_plus.merge_lora(tuned)
    report = extract_adapter(model, tuned, r=2, **subject.selection)
    close(subject.run(model), subject.run(tuned))
    assert report.ignored == []


def test_adapters_that_the_model_has_do_not_count() -> None:
    subject = BY_NAME["linear"]
    model = randomise(subject.inject(subject.model(), adapter="a"))
    extract_adapter(model, tuned_by(subject, r=2), r=2, **subject.selection)
    close(subject.run(model), subject.run(tuned_by(subject, r=2)))
    assert model.layer.active_names() == ["default"]


def two(width: int = 3, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))


def adapted() -> nn.Module:
    return lora_plus.inject_lora(two(), ["0"], r=1, adapter="a")


HEAD = "no adapter can be extracted; the model is unchanged:\n  "
REFUSED: list[tuple[Callable[[], nn.Module], Callable[[], Any], type[Exception], str]] = [
    (two, two, ValueError, HEAD + "the tuned model is equal to this one in all targets"),
    (two, lambda: {"model.0.weight": torch.zeros(3, 4)}, ValueError,
     HEAD + "'0.weight' is not in the tuned model (did you mean 'model.0.weight'?)\n"
     "  '1.weight' is not in the tuned model (did you mean 'model.0.weight'?)"),
    (two, lambda: two(5), ValueError,
     HEAD + "'0.weight' has shape (5, 4) in the tuned model, (3, 4) here\n"
     "  '1.weight' has shape (2, 5) in the tuned model, (2, 3) here"),
    (two, lambda: {**two().state_dict(), "0.weight": torch.zeros(3, 4, dtype=torch.int8)}, ValueError,
     HEAD + "'0.weight' of the tuned model is torch.int8, expected plain numbers"),
    (two, lambda: {**two().state_dict(), "1.weight": torch.full((2, 3), float("nan"))}, ValueError,
     HEAD + "'1.weight' of the tuned model has values that are not finite"),
    (lambda: two().to("meta"), two, ValueError,
     HEAD + "'0.weight' of this model has no values (meta device); load them first\n"
     "  '1.weight' of this model has no values (meta device); load them first"),
    (two, adapted, ValueError, "the tuned model has adapters ('0' has) that are not merged; merge them first"),
    (two, lambda: [1], TypeError, "tuned must be a module or a state dict, got list"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "tuned", "error", "message"), REFUSED, ids=itertools.count())
def test_what_cannot_be_extracted_is_refused_and_changes_nothing(
    make: Callable[[], nn.Module], tuned: Callable[[], Any], error: type[Exception], message: str
) -> None:
    model, given = make(), tuned()
    before = snapshot(model)
    with pytest.raises(error, match=rf"^{re.escape(message)}$"):
        extract_adapter(model, given, targets=["0", "1"], r=2)
    assert snapshot(model) == before


def test_merged_models_and_names_that_are_taken_are_refused() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="the model has an adapter 'a' already"):
        extract_adapter(model, randomise_weights(two()), targets=["0"], r=2, adapter="a")
    lora_plus.merge_lora(model)
    with pytest.raises(ValueError, match="the model is merged"):
        extract_adapter(model, randomise_weights(two()), targets=["0"], r=2)

"""An adapter of another rank: the same update where it can be, the nearest otherwise, and what is refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from update_cases import (
    BY_NAME,
    DORA,
    SUBJECTS,
    Subject,
    close,
    every_subject,
    least_error,
    randomise,
    snapshot,
    updates,
)

import lora_plus
from lora_plus.files import adapter_state_dict
from lora_plus.surgery import resize_adapter


@pytest.mark.parametrize("subject", SUBJECTS + DORA, ids=repr)
def test_a_higher_rank_keeps_the_update_and_can_learn(subject: Subject) -> None:
    model = randomise(subject.inject(subject.model()))
    wanted, before, active = subject.run(model.eval()), updates(model, "default"), lora_plus.lora_summary(model).rows
    report = resize_adapter(model, r=9)
    assert set(report.ranks.values()) == {9} and set(report.errors.values()) == {0.0}
    close(updates(model, "default"), before)
    close(subject.run(model), wanted)
    for old, new in zip(active, lora_plus.lora_summary(model).rows, strict=True):
        assert new.scale == pytest.approx(old.scale, rel=1e-15) and new.r == 9 and new.note.count("inactive") == 0
        state = adapter_state_dict(model)
        A, B = state[f"{new.name}.lora_A"], state[f"{new.name}.lora_B"]
        rows, columns = A[..., old.r :, :], B[..., old.r :]
        if new.layer == "Embedding":
            assert not rows.any() and columns.all()
        else:
            assert not columns.any() and rows.any(dim=-1).all() and rows.abs().max() <= A.shape[-1] ** -0.5
    sum(leaf.square().sum() for leaf in subject.run(model)).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None and parameter.grad.any() for parameter in trained)


@every_subject
def test_a_lower_rank_is_the_best_one(subject: Subject) -> None:
    model = randomise(subject.inject(subject.model(), rank_pattern=None, r=3))
    wanted = updates(model, "default")
    report = resize_adapter(model, r=1)
    for name, update in updates(model, "default").items():
        best = least_error(wanted[name], 1)
        assert report.ranks[name] == 1
        assert report.errors[name] == pytest.approx(best, rel=1e-10, abs=1e-14)
        assert float((update - wanted[name]).norm() / wanted[name].norm()) == pytest.approx(best, rel=1e-10, abs=1e-14)


def test_resizing_below_the_rank_but_above_the_full_one_is_exact() -> None:
    model = randomise(BY_NAME["linear-high-rank"].inject(BY_NAME["linear-high-rank"].model(), adapter="a"))
    wanted = updates(model, "a")
    assert resize_adapter(model, adapter="a", r=5).errors["layer"] < 1e-14
    assert model.layer.lora_A["a"].shape == (5, 3) and model.layer.lora_B["a"].shape == (2, 5)
    close(updates(model, "a"), wanted)


def test_resizing_leaves_the_rest_alone() -> None:
    model = BY_NAME["fused-linear"].adapted()  # a has rank 2 on q and 1 on v, b is the active one
    kept = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if ".v." not in name}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    resize_adapter(model, adapter="a", r=2, generator=torch.Generator().manual_seed(0))
    now = model.state_dict(keep_vars=True)
    assert all(now[name] is tensor for name, tensor in kept.items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: tensor.dtype for name, tensor in now.items()} == dtypes
    assert model.part.active_names() == ["b"] and torch.equal(torch.get_rng_state(), state)


def net(value: float | None = None) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    for name in "ab":
        lora_plus.inject_lora(model, ["0"], r=2, adapter=name)
    randomise(model)
    if value is not None:
        with torch.no_grad():
            model[0].lora_B["b"][0, 0] = value
    return model


def test_merged_and_disabled_models_are_refused() -> None:
    model = net()
    lora_plus.merge_lora(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"the model is merged \('0' is\); call unmerge_lora\(model\) first"):
        resize_adapter(model, adapter="a", r=5)
    assert snapshot(model) == before
    lora_plus.unmerge_lora(model)
    with lora_plus.disabled(model), pytest.raises(ValueError, match=r"leave the disabled\(model\) block first"):
        resize_adapter(model, adapter="a", r=5)


@pytest.mark.parametrize(
    ("value", "arguments", "error", "message"),
    [
        (None, {"r": 0}, ValueError, "r must be positive, got 0"),
        (None, {"r": True}, TypeError, "r must be an int, got True"),
        (None, {"r": 3, "adapter": "x"}, KeyError, "\"the model has no adapter 'x': it has 'a', 'b'\""),
        (float("nan"), {"r": 3, "adapter": "b"}, ValueError,
         "adapter 'b' cannot be resized; it is unchanged:\n  '0' has values that are not finite"),
        (1e38, {"r": 1, "adapter": "b"}, ValueError,
         "adapter 'b' cannot be resized; it is unchanged:\n  '0': its update is too large for its dtype to be computed "
         "with"),
    ],
    ids=["zero", "bool", "name", "nan", "overflow"],
)  # fmt: skip
def test_what_cannot_be_resized_is_refused_and_changes_nothing(
    value: float | None, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = net(value)
    with torch.no_grad():
        model[0].lora_A["b"].mul_(100)
    ids = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    spec, text = model[0].lora_adapters["b"].spec, repr(model)
    with pytest.raises(error, match=rf"^{re.escape(message)}$"):
        resize_adapter(model, **arguments)
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == ids
    assert model[0].lora_adapters["b"].spec == spec and repr(model) == text


@pytest.mark.parametrize("variant", ["lora", "lora_fa", "dora"])
@pytest.mark.parametrize("layer", [nn.Linear(10, 6), nn.Embedding(10, 6)], ids=["linear", "embedding"])
def test_an_adapter_that_has_learnt_nothing_can_still_learn_at_a_lower_rank(layer: nn.Module, variant: Any) -> None:
    model = lora_plus.inject_lora(nn.Sequential(copy.deepcopy(layer)), [type(layer)], r=4, variant=variant)
    x = torch.arange(10) if isinstance(layer, nn.Embedding) else torch.randn(3, 10)
    before = model(x)
    resize_adapter(model, r=2)
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    factors = [*model[0].lora_A.parameters(), *model[0].lora_B.parameters()]  # type: ignore[operator]
    assert any(factor.grad is not None and factor.grad.any() for factor in factors)

"""`transfer_lr`: closed forms, the identities it rests on, and what a step moves at every rank."""

from __future__ import annotations

import doctest
import inspect
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from lora_plus import create_loraplus_optimizer, inject_lora, loraplus_param_groups, transfer_lr
from lora_plus.training.transfer import BEST_OVER_LORA

Settings = Mapping[str, Any]


@pytest.mark.parametrize(
    ("tuned", "wanted", "factor"),
    [
        ({}, {}, 1.0),
        ({"lr_ratio": 1}, {"lr_ratio": 16}, 1 / 4),
        ({"lr_ratio": 1}, {"lr_ratio": 16, "lr_mode": "geometric"}, 1.0),
        ({"lr_ratio": 1}, {"lr_ratio": 16, "lr_mode": "B"}, 4.0),
        ({"lr_ratio": 4, "lr_mode": "B"}, {"lr_ratio": 9, "lr_mode": "A"}, 1 / 6),
        ({}, {"alpha": 64}, 1 / 2),  # alpha times 4 is a ratio of 4
        ({}, {"alpha": -64}, 1 / 2),
        ({}, {"r": 128}, 1.0),  # arXiv:2602.06204: alpha / r
        ({"scaling": "rslora"}, {"scaling": "rslora", "r": 128}, 16**-0.25),
        ({"r": 2, "alpha": 4}, {"r": 32, "alpha": 64}, 16**-0.5),  # a fixed scale of 2
        ({}, {"init": "pissa"}, 0.1),
        ({"init": "milora"}, {"init": "olora"}, 3.2 / 18.2),
        ({"init": "gradient"}, {"init": "kaiming", "alpha": 64}, 18.2 / 2),
        ({"init": "gaussian"}, {"init": "gaussian", "alpha": 64}, 1 / 2),
        ({"variant": "dora", "lr_ratio": 1}, {"variant": "dora", "lr_ratio": 4}, 1 / 2),
        ({"init": "kaiming_B", "lr_ratio": 1}, {"init": "kaiming_B", "alpha": 64, "lr_ratio": 4}, 1 / 4),
        ({"init": "kaiming_B", "lr_ratio": 1}, {"init": "kaiming_B", "alpha": 64, "lr_ratio": 4, "lr_mode": "B"}, 1.0),
        ({"method": "full"}, {"alpha": 32, "lr_ratio": 1}, 10.0),
        ({"method": "full"}, {"alpha": 32, "r": 64, "lr_ratio": 1}, 10.0),
        ({"method": "full"}, {"alpha": 8, "lr_ratio": 4}, 10.0),
        ({"method": "full"}, {"method": "full"}, 1.0),
    ],
)
def test_closed_forms(tuned: Settings, wanted: Settings, factor: float) -> None:
    assert transfer_lr(3e-4, tuned, wanted) == pytest.approx(factor * 3e-4, rel=1e-14)
    assert transfer_lr(transfer_lr(3e-4, tuned, wanted), wanted, tuned) == pytest.approx(3e-4, rel=1e-14)


@pytest.mark.parametrize("mode", ["A", "geometric", "B"])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0, 16.0])
def test_the_geometric_mean_stays_at_the_tuned_rate(mode: Any, ratio: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject_lora(model, ["0"], r=2)
    lr = transfer_lr(3e-4, {"lr_ratio": 1}, {"lr_ratio": ratio, "lr_mode": mode})
    groups = {g["name"]: g["lr"] for g in loraplus_param_groups(model, lr=lr, lr_ratio=ratio, lr_mode=mode)}
    assert math.sqrt(groups["lora_A"] * groups["lora_B"]) == pytest.approx(3e-4, rel=1e-14)
    assert ratio != 1 or lr == 3e-4


def net(settings: Settings, width: int = 12, rank: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)).double()
    keywords = {"r": rank, **{key: settings[key] for key in ("r", "alpha", "scaling", "init") if key in settings}}
    return inject_lora(model, ["0"], generator=torch.Generator().manual_seed(1), **keywords)


def optimizer_of(model: nn.Module, lr: float, settings: Settings) -> torch.optim.Adam:
    rates = {key: settings[key] for key in ("lr_ratio", "lr_mode") if key in settings}
    return create_loraplus_optimizer(model, torch.optim.Adam, lr=lr, **{"lr_ratio": 1, **rates}, eps=1e-30)


@pytest.mark.parametrize("mode", ["A", "geometric", "B"])
@pytest.mark.parametrize(
    ("tuned", "same"),
    [
        ({"r": 3, "lr_ratio": 1}, {"r": 3, "alpha": 64, "lr_ratio": 1}),
        # where it is A that starts at zero, a ratio of k is alpha / k, and both can change at once
        (
            {"r": 3, "init": "kaiming_B", "alpha": 4, "lr_ratio": 1},
            {"r": 3, "init": "kaiming_B", "alpha": 4, "lr_ratio": 1},
        ),
    ],
    ids=["B = 0", "A = 0"],
)
def test_alpha_times_k_at_its_rate_trains_as_a_ratio_of_k_at_its_own(
    tuned: Settings, same: Settings, mode: str
) -> None:
    wanted_too = {**tuned, "alpha": 16, "lr_ratio": 4, "lr_mode": mode}
    outputs = []
    for wanted in (same, wanted_too):
        model = net(wanted)
        optimizer = optimizer_of(model, transfer_lr(1e-2, tuned, wanted), wanted)
        x = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        for _ in range(30):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ratio", [1, 8])
@pytest.mark.parametrize("scaling", ["alpha / r", "alpha / sqrt(r)", "fixed"])
def test_what_a_step_moves_at_a_transferred_rate_is_the_same_at_every_rank(scaling: str, ratio: int) -> None:
    """s B dA x is flat over r, and s dB A x grows as sqrt(r s) does: arXiv:2602.06204, for one sample."""
    ranks, width, tuned = (4, 16, 64), 256, {"r": 4, "lr_ratio": 1}
    moved_A, moved_B = [], []
    for r in ranks:
        wanted = {
            "alpha / r": {"alpha": 16},
            "alpha / sqrt(r)": {"alpha": 8, "scaling": "rslora"},
            "fixed": {"alpha": 2 * r},
        }[scaling] | {"r": r, "lr_ratio": ratio}
        model = net(wanted, width)
        optimizer = optimizer_of(model, transfer_lr(2e-5, tuned, wanted), wanted)
        layer: Any = model[0]
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        x = torch.randn(1, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        for _ in range(3):
            A0, B0 = A.detach().clone(), B.detach().clone()
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
        scale = layer.lora_adapters["default"].spec.scale
        moved_A.append(float((scale * B0 @ (A.detach() - A0) @ x.T).norm()))
        moved_B.append(float((scale * (B.detach() - B0) @ A0 @ x.T).norm()))
    r_s = {"alpha / r": 0.0, "alpha / sqrt(r)": 0.5, "fixed": 1.0}[scaling]
    assert exponent(ranks, moved_A) == pytest.approx(0, abs=0.02)
    assert exponent(ranks, moved_B) == pytest.approx(r_s / 2, abs=0.15)


def exponent(ranks: tuple[int, ...], values: list[float]) -> float:
    return math.log(values[-1] / values[0]) / math.log(ranks[-1] / ranks[0])


@pytest.mark.parametrize(
    ("tuned", "wanted", "message"),
    [
        ({"rank": 8}, {}, r"unexpected keyword argument of transfer_lr's tuned: 'rank' \(did you mean r\?\)"),
        ({}, {"r": 2.0}, "r must be an int, got 2.0"),
        ({}, {"alpha": 0}, "alpha must be finite and not zero"),
        ({"lr_ratio": 1}, {"lr_ratio": -1}, "lr_ratio must be finite and positive, got -1"),
        (
            {"lr_ratio": 1},
            {"lr_ratio": 1, "lr_mode": "C"},
            r"unknown lr_mode 'C'; choose one of \['A', 'B', 'geometric'\]",
        ),
        ({}, {"scaling": "none"}, "unknown scaling 'none'"),
        ({}, {"variant": "dora"}, r"no factor is known between the variants \['dora', 'lora'\]"),
        ({"variant": "lora_fa"}, {"variant": "lora_fa"}, "variant 'lora_fa' freezes it"),
        ({}, {"init": "kaiming_B"}, r"no factor is known between the inits \['kaiming', 'kaiming_B'\]"),
        ({"init": "pissa"}, {"init": "pissa", "r": 4, "alpha": 16, "scaling": "rslora"}, "with init 'pissa'"),
        ({"init": "pissa"}, {"init": "pissa", "r": 16}, "no rule for another r or scale"),
        ({"init": "kaiming_B"}, {"init": "kaiming_B", "alpha": 8}, "no rule for another r or scale"),
        (
            {"init": "kaiming_B", "lr_ratio": 1},
            {"init": "kaiming_B", "alpha": 8, "lr_ratio": 4},
            "no rule for another r or scale",
        ),
        (
            {"init": "kaiming_B", "lr_ratio": 1},
            {"init": "kaiming_B", "r": 4, "lr_ratio": 4},
            "no rule for another r or scale",
        ),
        ({"method": "full", "r": 8}, {}, "full fine-tuning has no r; leave that out of tuned"),
        ({}, {"lr_ratio": 4}, r"tuned has no lr_ratio, .* name it \(1 is plain LoRA"),
        ({"lr_ratio": 4, "r": 16}, {"r": 8}, "wanted has no lr_ratio"),
        ({"lr_mode": "B"}, {}, "tuned has no lr_ratio"),
        ({"method": "full"}, {"alpha": 32}, "wanted has no lr_ratio"),
        ({"method": "adalora"}, {}, "unknown method 'adalora' in tuned; choose 'lora' or 'full'"),
        (
            {"method": "full"},
            {"init": "gaussian", "lr_ratio": 1},
            r"no factor is known between the inits \['gaussian', 'kaiming'\]",
        ),
    ],
)
def test_what_is_refused(tuned: Settings, wanted: Settings, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        transfer_lr(1e-3, tuned, wanted)
    assert len(str(caught.value)) <= 160


@pytest.mark.parametrize("lr", [0.0, math.nan, -1.0])
def test_a_rate_is_finite_and_positive(lr: float) -> None:
    with pytest.raises(ValueError, match="lr must be finite and positive"):
        transfer_lr(lr, {}, {})


def test_its_factors_are_of_starts_that_there_are() -> None:
    for init in BEST_OVER_LORA.keys() - {"gradient"}:
        inject_lora(nn.Sequential(nn.Linear(6, 6)), ["0"], r=2, init=init)


def test_the_examples_in_its_docstring_run() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(transfer_lr, globs={"transfer_lr": transfer_lr})
    assert example.examples and ">>>" in (inspect.getdoc(transfer_lr) or "")
    assert doctest.DocTestRunner().run(example).failed == 0

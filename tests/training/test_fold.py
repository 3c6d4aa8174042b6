"""A ratio folded into alpha: the same function, the same training as with two rates."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, randomise
from files_support import assert_same_tensors, bits, snapshot
from torch import Tensor, nn

import lora_plus
from lora_plus import create_loraplus_optimizer, inject_lora
from lora_plus.files import adapter_state_dict
from lora_plus.model.tree import adapters_of
from lora_plus.surgery import combine_adapters, resize_adapter
from lora_plus.training import fold_lr_ratio

FOLDABLE = [case for case in CASES if not isinstance(case.layer(), nn.Embedding)]


@pytest.fixture(params=FOLDABLE, ids=lambda case: case.name)
def foldable(request: pytest.FixtureRequest) -> Case:
    return request.param


# ---- the function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "factor"), [("adam", 16.0), ("sgd", 4.0)])
def test_a_fold_by_a_power_of_two_changes_no_bit(foldable: Case, rule: str, factor: float, tmp_path: Path) -> None:
    plain, folded = foldable.adapted(torch.float32), foldable.adapted(torch.float32)
    x = foldable.input(torch.float32)
    fold_lr_ratio(folded, 16, rule=rule)
    B, kept = plain.layer.lora_B["default"], folded.layer.lora_B["default"]
    assert torch.equal(kept * factor, B) and not torch.equal(kept, B)
    spec, wanted = folded.layer.lora_adapters["default"].spec, plain.layer.lora_adapters["default"].spec
    assert (spec.alpha, spec.scale) == (factor * wanted.alpha, factor * wanted.scale)
    assert torch.equal(folded(x), plain(x))
    with lora_plus.merged(plain), lora_plus.merged(folded):
        assert torch.equal(folded.layer.weight, plain.layer.weight)
    lora_plus.save_adapter(folded, tmp_path / "folded.safetensors")
    loaded = lora_plus.load_adapter(foldable.model(torch.float32), tmp_path / "folded.safetensors")
    assert torch.equal(loaded(x), plain(x)) and loaded.layer.lora_adapters["default"].spec == spec
    fold_lr_ratio(folded, 1 / 16, rule=rule)
    assert (
        torch.equal(kept, B) and folded.layer.lora_adapters["default"].spec == plain.layer.lora_adapters["default"].spec
    )


@pytest.mark.parametrize("init", ["pissa", "milora", "olora"])
def test_what_is_taken_out_of_the_update_is_folded_with_it(init: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5)).double()
    lora_plus.inject_lora(model, ["0"], r=2, init=init, dtype=torch.float64)  # type: ignore[arg-type]
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        model[0].lora_B["default"].add_(0.3)
    before = model(x)
    fold_lr_ratio(model, 16)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("ratio", [0.3, 3.0, 10.0])
def test_any_other_fold_is_the_same_up_to_rounding(foldable: Case, ratio: float) -> None:
    plain, folded = foldable.adapted(), foldable.adapted()
    x = foldable.input()
    fold_lr_ratio(folded, ratio)
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-12, atol=1e-12)
    with lora_plus.merged(plain), lora_plus.merged(folded):
        torch.testing.assert_close(folded.layer.weight, plain.layer.weight, rtol=1e-12, atol=1e-12)
    fold_lr_ratio(folded, 1 / ratio)
    one, other = adapter_state_dict(folded), adapter_state_dict(plain)
    torch.testing.assert_close(one, other, rtol=1e-15, atol=0)


def test_the_whole_state_comes_back() -> None:
    model = mixed()
    before = snapshot(model)
    fold_lr_ratio(model, 8)
    assert snapshot(model) != before
    fold_lr_ratio(model, 1 / 8)
    assert snapshot(model) == before


# ---- the training ----------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Adapters of every sort: beside a layer, in a weight, on blocks of rows, DoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.c_attn = nn.Linear(4, 12)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.dora = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.c_attn(self.embed(tokens)).chunk(3, -1)
        return self.dora(torch.tanh(self.attn(q, k, v, need_weights=False)[0]))


def mixed(seed: int = 0, targets: Any = ("c_attn.q", "c_attn.v", "attn.q", "attn.out_proj")) -> nn.Module:
    torch.manual_seed(seed)
    model = Mixed().double()
    inject_lora(model, list(targets), r=2, alpha=3, fused={"c_attn": ["q", "k", "v"]})
    return randomise(model)


def with_dora(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(inject_lora(Mixed().double(), ["c_attn", "dora"], r=2, alpha=3, variant="dora"))


def with_embedding(seed: int = 0) -> nn.Module:
    return mixed(seed, ["embed", "c_attn.q"])


MODELS = {"mixed": mixed, "dora": with_dora, "embedding": with_embedding}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20, seed: int = 4, clip: float = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        optimizer.zero_grad()
        tokens = torch.randint(7, (5, 3), generator=generator)
        (model(tokens) - 1).square().mean().backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()


def adam(groups: Any, **settings: Any) -> torch.optim.Optimizer:
    # an epsilon of zero would give 0 / 0 where there is no gradient
    return torch.optim.AdamW(groups, **{"eps": 1e-300, "weight_decay": 0.0, **settings})


def sgd(groups: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.9, **settings)


def one_rate(model: nn.Module, make: Callable[..., torch.optim.Optimizer], **settings: Any) -> torch.optim.Optimizer:
    return make([p for p in model.parameters() if p.requires_grad], lr=1e-2, **settings)


def two_rates(model: nn.Module, make: Callable[..., torch.optim.Optimizer], **settings: Any) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model, make, lr=1e-2, lr_ratio=16, **settings)


RULES = {"adam": adam, "sgd": sgd}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("start", MODELS.values(), ids=MODELS.keys())
def test_one_rate_on_a_folded_adapter_is_two_rates(start: Callable[..., nn.Module], rule: str) -> None:
    plus, folded, plain = start(), start(), start()
    train(plus, two_rates(plus, RULES[rule]))
    fold_lr_ratio(folded, 16, rule=rule)
    train(folded, one_rate(folded, RULES[rule]))
    train(plain, one_rate(plain, RULES[rule]))
    fold_lr_ratio(folded, 1 / 16, rule=rule)
    wanted, got, other = (adapter_state_dict(model) for model in (plus, folded, plain))
    assert_same_tensors(got, wanted)
    assert any(not torch.equal(other[name], wanted[name]) for name in wanted)


def test_training_goes_on_from_a_file_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    through, stopped = mixed(), mixed()
    for model in (through, stopped):
        fold_lr_ratio(model, 4, rule="sgd")
        train(model, one_rate(model, torch.optim.SGD), seed=1)
    lora_plus.save_adapter(stopped, tmp_path / "a.safetensors")
    lora_plus.remove_lora(stopped)
    lora_plus.load_adapter(stopped, tmp_path / "a.safetensors", trainable=True)
    for model in (through, stopped):
        train(model, one_rate(model, torch.optim.SGD), seed=2)
    assert_same_tensors(adapter_state_dict(stopped), adapter_state_dict(through))


def difference(clip: float = 0.0, **settings: float) -> float:
    """How far folded training ends from training with two rates, relative to the way that A and B go."""
    start, plus, folded = mixed(), mixed(), mixed()
    train(plus, two_rates(plus, adam, **settings), clip=clip)
    fold_lr_ratio(folded, 16)
    train(folded, one_rate(folded, adam, **settings), clip=clip)
    fold_lr_ratio(folded, 1 / 16)
    tensors = [torch.cat([t.flatten() for t in adapter_state_dict(m).values()]) for m in (start, plus, folded)]
    return float((tensors[2] - tensors[1]).norm() / (tensors[1] - tensors[0]).norm())


@pytest.mark.parametrize(
    ("settings", "measured"),
    [({}, 0.0), ({"eps": 1e-8}, 8.7e-6), ({"weight_decay": 0.1}, 0.17), ({"clip": 0.05}, 0.14)],
    ids=["nothing", "epsilon", "decay", "clipping"],
)
def test_epsilon_decay_and_clipping_break_the_identity(settings: dict[str, float], measured: float) -> None:
    assert measured / 3 <= difference(**settings) <= measured * 3


@pytest.mark.parametrize("name", ["linear", "linear-rslora", "linear-dora", "conv1d-gpt2", "conv2d-groups"])
def test_a_folder_for_peft_holds_the_folded_adapter(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    plain, folded = case.adapted(), case.adapted()
    fold_lr_ratio(folded, 4)
    lora_plus.save_adapter(folded, tmp_path / "folded")
    loaded = lora_plus.load_adapter(case.model(), tmp_path / "folded")
    assert torch.equal(loaded(case.input()), plain(case.input()))
    assert loaded.layer.lora_adapters["default"].spec.alpha == 4 * plain.layer.lora_adapters["default"].spec.alpha


# ---- other operations on a folded adapter ----------------------------------------------------------------------------


def test_adapters_made_of_a_folded_one_are_those_made_of_the_plain_one() -> None:
    x = torch.arange(15).reshape(5, 3) % 7
    plain, folded = mixed(), mixed()
    fold_lr_ratio(folded, 8)
    for model in (plain, folded):
        combine_adapters(model, ["default"], weights=[0.5], adapter="halved")
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-12, atol=1e-12)
    assert_same_tensors(adapter_state_dict(folded, adapter="halved"), adapter_state_dict(plain, adapter="halved"))


@pytest.mark.parametrize("r", [1, 2, 3])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_a_resized_adapter_keeps_its_scale(r: int, scaling: str) -> None:
    plain = randomise(inject_lora(nn.Linear(5, 4).double(), "", r=2, alpha=3, scaling=scaling))
    folded = copy.deepcopy(plain)
    fold_lr_ratio(folded, 8)
    for model in (plain, folded):
        resize_adapter(model, r=r, generator=torch.Generator().manual_seed(0))
    spec, wanted = folded.lora_adapters["default"].spec, plain.lora_adapters["default"].spec
    assert (spec.scale, spec.alpha) == pytest.approx((8 * wanted.scale, 8 * wanted.alpha))
    x = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-12, atol=1e-12)


def test_copies_stay_folded_and_other_adapters_are_left_alone() -> None:
    model = mixed()
    inject_lora(model, ["c_attn.k"], r=1, adapter="other", fused={"c_attn": ["q", "k", "v"]})
    fold_lr_ratio(model, 4)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        alphas = {adapter.name: adapter.spec.alpha for _, adapter, _ in adapters_of(same)}
        assert alphas == {"default": 12, "other": 16}


# ---- what is refused -------------------------------------------------------------------------------------------------


def refusals() -> dict[str, tuple[nn.Module, dict[str, Any], type[Exception], str]]:
    merged, embedding = mixed(), mixed(targets=["embed"])
    lora_plus.merge_lora(merged)
    return {
        "ratio": (mixed(), {"lr_ratio": 0}, ValueError, "lr_ratio must be finite and positive, got 0"),
        "text": (mixed(), {"lr_ratio": "4"}, TypeError, "lr_ratio must be a number, got '4'"),
        "rule": (mixed(), {"rule": "lbfgs"}, ValueError, r"unknown rule 'lbfgs'; choose one of \['adam', 'sgd'\]"),
        "name": (mixed(), {"adapter": "x"}, KeyError, "the model has no adapter 'x'"),
        "large": (mixed(), {"lr_ratio": 1e39}, ValueError, "give a scale of 1.5e[+]39, which float32 cannot hold"),
        "merged": (merged, {}, ValueError, r"folding a ratio needs unmerged weights: the model is merged"),
        "embedding": (embedding, {}, ValueError, "adapter 'default' is on embeddings only, whose factors learn at one"),
    }


@pytest.mark.parametrize("name", ["ratio", "text", "rule", "name", "large", "merged", "embedding"])
def test_what_cannot_be_folded_is_refused_and_changes_nothing(name: str) -> None:
    model, settings, error, text = refusals()[name]
    before = snapshot(model)
    with pytest.raises(error, match=text):
        fold_lr_ratio(model, **{"lr_ratio": 4, **settings})
    assert snapshot(model) == before


def test_disabled_models_are_refused() -> None:
    model = mixed()
    with lora_plus.disabled(model), pytest.raises(ValueError, match="the adapters are disabled"):
        fold_lr_ratio(model, 4)


def test_a_fold_by_a_power_of_two_is_exact_in_half_precision_too() -> None:
    model = randomise(inject_lora(nn.Linear(6, 5), "", r=2, dtype=torch.bfloat16))
    before = bits(model.lora_B["default"])
    fold_lr_ratio(model, 4)
    assert bits(model.lora_B["default"]) != before
    fold_lr_ratio(model, 1 / 4)
    assert bits(model.lora_B["default"]) == before

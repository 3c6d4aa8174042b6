"""What adapters train in full belongs to them as A and B do: each has its own, under every operation."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from dense_reference import difference, snapshot
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import lora_plus as lp
from lora_plus.files import adapter_state_dict

TOKENS = torch.arange(12).reshape(3, 4) % 7


class Net(nn.Module):
    """Layers to adapt, and what can be trained in full: a head with statistics, an LSTM, norms, a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
        self.gain = nn.Parameter(torch.ones(4))
        self.read = {"gains": [(1, self.gain)]}

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        [(_, gain)] = self.read["gains"]
        x = self.norm(self.lstm(self.q(x).tanh() + self.v(x))[0]).mean(1) * gain
        return self.out(self.head(x))


TRAINED: dict[str, list[str]] = {
    "a head": ["head"],
    "parts of a head": ["head.1", "head.2"],
    "a norm and a recurrent layer": ["norm", "lstm"],
    "the bias of an adapted layer": ["q.bias"],
    "parameters": ["v.weight", "norm.bias", "lstm.bias_hh_l0"],
    "a parameter that the forward finds in a list": ["gain"],
    "one of a tied pair": ["out"],
    "both of a tied pair": ["embed", "out"],
    "a tied parameter": ["embed.weight"],
}


def base() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


def with_head(model: Net, adapter: str, names: list[str], **settings: Any) -> Net:
    generator = torch.Generator().manual_seed(ord(adapter))
    return lp.inject_lora(model, ["q"], r=2, train_also=names, adapter=adapter, generator=generator, **settings)


def optimizer_of(model: nn.Module, adapter: str, **settings: Any) -> torch.optim.Optimizer:
    return lp.create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.05, adapter=adapter, **settings)


def backward(model: Net, adapter: str, names: list[str]) -> None:
    model.train()
    model.head.train("head" in names or "head.1" in names)  # or its statistics are the base's
    (model(TOKENS) * torch.linspace(-1, 1 + ord(adapter), 7, dtype=torch.float64)).square().sum().backward()


def alone(adapter: str, names: list[str], steps: int = 2) -> tuple[Net, torch.optim.Optimizer]:
    """A model that had this adapter only, and was trained."""
    model = with_head(base(), adapter, names)
    optimizer = optimizer_of(model, adapter)
    for _ in range(steps):
        backward(model, adapter, names)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), optimizer


def both(names: list[str], steps: int = 2) -> tuple[Net, dict[str, torch.optim.Optimizer]]:
    """The same with two adapters, trained in turns."""
    model, optimizers = base(), {}
    for adapter in "ab":
        with_head(model, adapter, names)
        optimizers[adapter] = optimizer_of(model, adapter)
    for _ in range(steps):
        for adapter, optimizer in optimizers.items():
            lp.set_adapter(model, adapter, trainable=True)
            backward(model, adapter, names)
            optimizer.step()
            optimizer.zero_grad()
    return model.eval(), optimizers


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def same_as_alone(model: Net, adapter: str, names: list[str]) -> None:
    reference, _ = alone(adapter, names)
    same(model(TOKENS), reference(TOKENS))
    got, wanted = (adapter_state_dict(each, adapter=adapter) for each in (model, reference))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in got)


@pytest.fixture(params=TRAINED)
def names(request: pytest.FixtureRequest) -> list[str]:
    return TRAINED[request.param]


def test_two_adapters_train_in_turns_as_each_does_alone(names: list[str]) -> None:
    model, _ = both(names)
    state = model.state_dict()
    for adapter in "abba":
        lp.set_adapter(model, adapter)
        same_as_alone(model, adapter, names)
    assert model.state_dict().keys() == state.keys()
    outputs = [alone(adapter, names)[0](TOKENS) for adapter in "ab"]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


def test_an_optimizer_steps_its_own_adapter_whichever_is_active(names: list[str]) -> None:
    model, optimizers = both(names, steps=1)
    for adapter in "ab":  # gradients of both are there before either steps
        lp.set_adapter(model, adapter, trainable=True)
        backward(model, adapter, names)
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    for adapter in "ab":
        lp.set_adapter(model, adapter)
        same_as_alone(model, adapter, names)


def test_without_an_active_head_the_base_is_there_bit_for_bit(names: list[str]) -> None:
    plain = base().requires_grad_(False)
    model, _ = both(names)
    lp.inject_lora(model, ["v" if "v.weight" not in names else "q"], r=1, adapter="none")  # B is zero
    assert torch.equal(model(TOKENS), plain(TOKENS))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" not in n)
    lp.set_adapter(model, "a")
    with lp.disabled(model):
        assert torch.equal(model(TOKENS), plain(TOKENS))
    same_as_alone(model, "a", names)
    lp.delete_adapter(model, "a")
    assert torch.equal(model(TOKENS), plain(TOKENS))
    lp.rename_adapter(model, "b", "c")
    lp.set_adapter(model, "c")
    same(model(TOKENS), alone("b", names)[0](TOKENS))


@pytest.mark.parametrize("active", ["a", "b", "none"])
@pytest.mark.parametrize("deleted", ["", "a", "b"])
def test_removing_brings_back_the_base_and_its_own_parameters(names: list[str], active: str, deleted: str) -> None:
    model = base()
    model.norm.bias.requires_grad_(False)
    (before, _), _alive = snapshot(model)
    own = dict(model.named_parameters())
    with_head(model, "a", names)
    assert all(parameter is own[name] for name, parameter in model.named_parameters() if "lora" not in name)
    with_head(model, "b", names)
    lp.add_adapter(model, "none", like="a")
    with torch.no_grad():
        for adapter in "ab":
            lp.set_adapter(model, adapter, trainable=True)
            [p.add_(1) for p in model.parameters() if p.requires_grad]
    lp.set_adapter(model, active, trainable=active != "a")
    if deleted:
        lp.delete_adapter(model, deleted)
    lp.remove_lora(model)
    assert difference(before, snapshot(model)[0][0]) == ""


def test_merging_shows_what_the_merged_adapter_trains(names: list[str]) -> None:
    model, _ = both(names)
    lp.set_adapter(model, "a")
    with lp.merged(model, adapters=["b"]):
        same(model(TOKENS), alone("b", names)[0](TOKENS))
        twin = copy.deepcopy(model)
    same_as_alone(model, "a", names)
    lp.unmerge_lora(twin)
    same(twin(TOKENS), alone("a", names)[0](TOKENS))
    kept = lp.merge_and_unload(copy.deepcopy(model), adapters=["b"])
    same(kept(TOKENS), alone("b", names)[0](TOKENS))
    assert not [key for module in kept.modules() for key in module.__dict__ if "lora" in key]
    assert all(parameter.requires_grad for parameter in kept.parameters())


def test_files_of_several_adapters_load_one_after_the_other(names: list[str], tmp_path: Path) -> None:
    model, _ = both(names)
    for adapter in "ab":
        lp.save_adapter(model, tmp_path / f"{adapter}.safetensors", adapter=adapter)
        lp.save_adapter(alone(adapter, names)[0], tmp_path / "alone.safetensors", adapter=adapter)
        assert (tmp_path / "alone.safetensors").read_bytes() == (tmp_path / f"{adapter}.safetensors").read_bytes()
    loaded = base()
    for adapter in "ab":
        lp.load_adapter(loaded, tmp_path / f"{adapter}.safetensors", adapter=adapter)
    for adapter in "ab":
        lp.set_adapter(loaded, adapter)
        same_as_alone(loaded, adapter, names)
    lp.load_adapter(loaded, tmp_path / "a.safetensors", adapter="b", replace=True)
    same(loaded(TOKENS), alone("a", names)[0](TOKENS))
    lp.set_adapter(loaded, "a")
    lp.load_adapter(loaded, tmp_path / "b.safetensors", adapter="b", replace=True)  # while another one is active
    same_as_alone(loaded, "a", names)
    lp.set_adapter(loaded, "b")
    same_as_alone(loaded, "b", names)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def test_a_file_with_two_values_of_one_tensor_is_refused(tmp_path: Path) -> None:
    model = base()
    model.out.weight = nn.Parameter(model.out.weight.detach().clone())
    with_head(model, "a", ["embed", "out"])
    lp.save_adapter(model, tmp_path / "a.safetensors", adapter="a")
    assert torch.equal(lp.load_adapter(base(), tmp_path / "a.safetensors")(TOKENS), model(TOKENS))
    with torch.no_grad():
        model.out.weight += 1
    lp.save_adapter(model, tmp_path / "a.safetensors", adapter="a")
    plain = base()
    before, _alive = snapshot(plain)
    with pytest.raises(ValueError, match="'embed' and 'out' differ in a tensor that is one and the same in this model"):
        lp.load_adapter(plain, tmp_path / "a.safetensors")
    assert difference(before, snapshot(plain)[0]) == ""


ADAPTED: dict[str, Callable[[Net], Any]] = {
    "rows": lambda model: lp.inject_lora(model, [], train_rows={"embed": [1]}),
    "the tied layer's rows": lambda model: lp.inject_lora(model, [], train_rows={"out": [1]}),
    "A and B": lambda model: lp.inject_lora(model, ["embed"]),
}


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("way", ADAPTED)
def test_a_file_that_trains_in_full_what_the_model_adapts_says_so(way: str, replace: bool, tmp_path: Path) -> None:
    lp.save_adapter(with_head(base(), "a", ["embed"]), tmp_path / "a.safetensors", adapter="a")
    model = ADAPTED[way](base())
    before, _alive = snapshot(model)
    wanted = "'embed' is trained in full, but in the model it has the adapter 'default'; call delete_adapter first"
    with pytest.raises(ValueError, match=wanted):
        lp.load_adapter(model, tmp_path / "a.safetensors", adapter="default" if replace else "a", replace=replace)
    assert difference(before, snapshot(model)[0]) == ""
    lp.delete_adapter(model, "default")
    lp.load_adapter(model, tmp_path / "a.safetensors", replace=replace)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_heads_of_its_own(way: str, names: list[str]) -> None:
    model, _ = both(names)
    with lp.disabled(model):
        twin = COPIES[way](model)
    lp.set_adapter(twin, "a")
    same(twin(TOKENS), alone("a", names)[0](TOKENS))
    with torch.no_grad():
        [parameter.zero_() for parameter in twin.parameters()]
    same_as_alone(model, "b", names)
    lp.set_adapter(model, "a")
    same_as_alone(model, "a", names)


def test_a_head_that_is_not_bound_follows_the_model_to_another_dtype_with_its_gradient(names: list[str]) -> None:
    model, _ = both(names)
    lp.set_adapter(model, "a", trainable=True)
    backward(model, "a", [])  # which leaves the statistics alone
    model.eval()
    lp.set_adapter(model, "b")
    lp.set_adapter(model.float(), "a")
    wanted = alone("a", names)[0].float()
    torch.testing.assert_close(model(TOKENS), wanted(TOKENS))
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_groups_hold_what_an_inactive_adapter_trains(names: list[str]) -> None:
    model, optimizers = both(names)
    held = {adapter: {id(p) for g in each.param_groups for p in g["params"]} for adapter, each in optimizers.items()}
    lp.set_adapter(model, "a", trainable=True)
    lp.set_adapter(model, "none" if "none" in model.state_dict() else "b")
    groups = lp.loraplus_param_groups(model, lr=0.1, adapter="a")
    assert {id(p) for group in groups for p in group["params"]} == held["a"]
    assert not held["a"] & held["b"]
    decayed = {id(p): g["weight_decay"] for g in optimizers["a"].param_groups for p in g["params"]}
    assert all(decayed[id(p)] == g["weight_decay"] for g in groups for p in g["params"])


# ---- what cannot be --------------------------------------------------------------------------------------------------


def two() -> Net:
    return with_head(with_head(base(), "a", ["head"]), "b", ["head"])


REFUSED: dict[str, tuple[Callable[[Net], Any], str]] = {
    "both active": (
        lambda model: lp.set_adapter(model, ["a", "b"]),
        "'head' is trained in full with each of the adapters ['a', 'b']; use one at a time",
    ),
    "both merged": (
        lambda model: lp.merge_lora(model, adapters=["a", "b"]),
        "'head' is trained in full with each of the adapters ['a', 'b']; use one at a time",
    ),
    "both in a batch": (
        lambda model: lp.adapter_per_sample(model, ["a", "b"]).__enter__(),
        "'head' is trained in full with the adapter 'a', and a batch has only one 'head'; run the samples of each",
    ),
    "one in a batch": (
        lambda model: lp.adapter_per_sample(model, ["b", None]).__enter__(),
        "'head' is trained in full with the adapter 'b', and a batch has only one 'head'; run the samples of each",
    ),
    "an inactive one in a batch": (
        lambda model: lp.adapter_per_sample(model, ["a", "a"]).__enter__(),
        "and a batch has only one 'head'; choose one of the batch before, with set_adapter: 'b' is active",
    ),
    "wrapped": (
        lambda model: lp.set_adapter(AveragedModel(model), "a"),
        "exchanging what adapters train of 'head' needs the plain model: this one is wrapped in AveragedModel",
    ),
    "a part of it": (
        lambda model: with_head(model, "c", ["head.0"]),
        "train_also: 'head.0' has a tensor of 'head', which the adapter 'b' trains in full; name the same for both",
    ),
    "a parameter of it": (
        lambda model: with_head(model, "c", ["head.0.bias"]),
        "train_also: 'head.0.bias' has a tensor of 'head', which the adapter 'b' trains in full; name the same for",
    ),
    "what is around it": (lambda model: lp.inject_lora(model, ["v"], adapter="c", train_also=[""]), "'v' is both a"),
    "an adapter in it": (
        lambda model: lp.inject_lora(model, ["head.0"], adapter="c"),
        "'head.0' cannot be adapted: 'head' is trained in full with the adapter 'b'; leave it out, or call",
    ),
    "an adapted weight": (
        lambda model: lp.inject_lora(model, ["v"], adapter="c", train_also=["q.weight"]),
        "train_also: 'q.weight' is an adapted weight, or contains or is tied to one; omit it",
    ),
    "tied to an adapted weight": (
        lambda model: lp.inject_lora(model, ["embed"], adapter="c", train_also=["out"]),
        "train_also: 'out' is an adapted weight, or contains or is tied to one",
    ),
    "a target": (
        lambda model: lp.inject_lora(model, ["v"], adapter="c", train_also=["v.weight"]),
        "'v' is both a target and trained by train_also or train_rows; add it to exclude",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_changes_nothing(case: str) -> None:
    model, (call, text) = two(), REFUSED[case]
    before, _alive = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(text)):
        call(model)
    assert difference(before, snapshot(model)[0]) == ""


@pytest.mark.parametrize(("names", "other"), [(["embed"], "out"), (["out"], "embed")])
def test_modules_with_one_weight_are_trained_together(names: list[str], other: str) -> None:
    model = with_head(base(), "a", ["embed", "out"])
    before, _alive = snapshot(model)
    with pytest.raises(ValueError, match=f"{names[0]!r} has a tensor of {other!r}, which the adapter 'a' trains in"):
        with_head(model, "b", names)
    assert difference(before, snapshot(model)[0]) == ""
    assert with_head(model, "b", [*names, other]).embed.weight.requires_grad


def test_a_batch_whose_samples_all_have_the_active_head_is_computed() -> None:
    model, _ = both(["head"])
    lp.add_adapter(model, "plain", like="a")
    randomise(model)
    lp.set_adapter(model, "a")
    wanted = model(TOKENS)
    with lp.adapter_per_sample(model, ["a"] * 3):
        same(model(TOKENS), wanted)
    lp.set_adapter(model, "plain")
    with lp.adapter_per_sample(model, ["plain", None, "plain"]):
        model(TOKENS)


def test_patterns_of_parameters() -> None:
    def trained(*patterns: Any) -> set[str]:
        model = lp.inject_lora(base(), ["q"], train_also=patterns)
        return {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}

    biases = {name for name, _ in base().named_parameters() if name.endswith(".bias")}
    assert trained("bias") == trained("*.bias") == trained(re.compile(r".*\.bias")) == biases
    assert trained("*bias*") == {name for name, _ in base().named_parameters() if "bias" in name}
    assert trained("q.bias") == {"q.bias"}
    assert trained("head", "head.0.bias", "head.1") == {
        n for n, _ in base().named_parameters() if n.startswith("head.")
    }
    assert trained(lambda name, module: name.endswith("norm.bias")) == {"norm.bias"}
    linear = lp.inject_lora(base(), "all-linear", train_also=["v.weight"])
    assert not isinstance(linear.v, lp.LoRALinear) and isinstance(linear.q, lp.LoRALinear)

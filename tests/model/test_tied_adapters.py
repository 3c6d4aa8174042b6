"""One A and B for all layers that read a tied weight: the explicit weight, and everything that works on adapters."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from safetensors import safe_open
from safetensors.torch import save_file
from test_ties import Experts, Language, Twins, tokens, twins_input
from torch import Tensor, nn

import lora_plus as lp
from lora_plus.files import adapter_state_dict
from lora_plus.surgery import combine_adapters, resize_adapter
from lora_plus.training import fold_lr_ratio, reset_lora_parameters

F64 = torch.float64


class Convolutions(nn.Module):
    """Two grouped convolutions that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv1d(4, 4, 3, padding=1, groups=2, dtype=F64) for _ in range(2))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Translator(nn.Module):
    """Three readers: the embeddings of two languages, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(9, 4, dtype=F64), nn.Embedding(9, 4, padding_idx=0, dtype=F64)
        self.head = nn.Linear(4, 9, bias=False, dtype=F64)
        self.target.weight = self.head.weight = self.source.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.source(x)) + self.target(x.flip(-1)))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], list[str], str, list[str]]] = {
    "an embedding, and its head": (Language, tokens, ["embed", "mid"], "embed", ["head"]),
    "a head, and its embedding": (Language, tokens, ["head"], "head", ["embed"]),
    "both named": (Language, tokens, ["head", "embed"], "embed", ["head"]),
    "two linear layers": (Twins, twins_input, ["b"], "b", ["a"]),
    "two convolutions": (Convolutions, lambda: torch.randn(2, 4, 5, dtype=F64), ["a"], "a", ["b"]),
    "three readers": (Translator, lambda: 1 + torch.randint(8, (2, 5)), ["target"], "target", ["source", "head"]),
}


class Tied:
    """A case with an adapter whose B is not zero."""

    def __init__(self, case: str, **settings: Any) -> None:
        make, make_input, self.targets, self.leader, self.followers = CASES[case]
        torch.manual_seed(0)
        self.base, self.x = make(), make_input()
        self.model = lp.inject_lora(copy.deepcopy(self.base), self.targets, **({"r": 2, "tied": "both"} | settings))
        randomise(self.model, size=1.0)

    def explicit(self, model: nn.Module | None = None) -> nn.Module:
        """The base with W + s B A as the one weight of all its readers; further adapted layers get their own."""
        plain = copy.deepcopy(self.base)
        for name, module in (model or self.model).named_modules():
            for adapter in getattr(module, "lora_adapters", {}).values():
                if adapter.held:
                    weight = plain.get_submodule(name).weight
                    weight.data.copy_(module.effective_weight([adapter]))
        return plain


@pytest.fixture(params=CASES)
def tied(request: pytest.FixtureRequest) -> Tied:
    return Tied(request.param)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def weights(model: nn.Module, case: Tied) -> list[nn.Parameter]:
    return [model.get_submodule(name).weight for name in (case.leader, *case.followers)]


def is_tied(model: nn.Module, case: Tied) -> bool:
    return len({id(weight) for weight in weights(model, case)}) == 1


def test_all_readers_compute_with_the_explicit_weight(tied: Tied) -> None:
    close(tied.model(tied.x), tied.explicit()(tied.x))
    assert (tied.model(tied.x) - tied.base(tied.x)).abs().max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_the_model_starts_where_it_was_and_the_adapter_is_there_once(case: str) -> None:
    tied = Tied(case)
    model = lp.inject_lora(copy.deepcopy(tied.base), tied.targets, r=2, tied="both")
    assert torch.equal(model(tied.x), tied.base(tied.x))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    leaders = {tied.leader, *tied.targets} - {*tied.followers}
    assert trained == {f"{name}.lora_{part}.default" for name in leaders for part in "AB"}
    assert model.state_dict().keys() == tied.base.state_dict().keys() | trained
    groups = lp.loraplus_param_groups(model, lr=1e-3)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    (row,) = (row for row in lp.lora_summary(model).rows if row.name == tied.leader)
    assert row.note == f"one A and B with {', '.join(map(repr, tied.followers))}, tied"
    rows = {row.name: row for row in lp.lora_summary(model).rows}
    assert rows.keys() == leaders | {*tied.followers}
    for name in tied.followers:
        assert rows[name].note == "has those of a layer with the same weight" and rows[name].parameters == 0
    named = lp.inject_lora(copy.deepcopy(tied.base), [tied.leader], r=2)
    (row,) = lp.lora_summary(named).rows
    assert row.note == f"not on {', '.join(repr(f'{name}.weight') for name in tied.followers)}, tied to it"


def test_gradients_are_those_of_the_explicit_weight(tied: Tied) -> None:
    leader = tied.model.get_submodule(tied.leader)
    A, B = (each.detach().double().requires_grad_() for each in leader.lora_adapters["default"].factors())
    tied.model.double()(tied.x).square().sum().backward()
    plain = tied.explicit()
    plain(tied.x).square().sum().backward()
    matrix = leader.matrix_of(type("Weight", (), {"weight": weights(plain, tied)[0].grad})())
    scale = leader.lora_adapters["default"].scale
    own = dict(tied.model.named_parameters())
    close(own[f"{tied.leader}.lora_A.default"].grad, scale * B.T @ matrix)
    close(own[f"{tied.leader}.lora_B.default"].grad, scale * matrix @ A.T)


@pytest.mark.filterwarnings("error")
def test_merging_keeps_the_tie_and_unmerging_gives_the_bits_back(tied: Tied) -> None:
    model, y = tied.model, tied.model(tied.x).detach()
    own = weights(model, tied)[0]
    bits = own.detach().clone()
    report = lp.merge_lora(model)
    assert report.untied == [] and {tied.leader, *tied.followers} <= {*report.layers}
    assert is_tied(model, tied) and weights(model, tied)[0] is not own
    close(model.eval()(tied.x), y)
    lp.unmerge_lora(model)
    assert all(weight is own for weight in weights(model, tied)) and torch.equal(own, bits)
    assert torch.equal(model(tied.x), y)
    with lp.merged(model):
        assert is_tied(model, tied)
    lp.merge_and_unload(model)
    assert is_tied(model, tied) and type(model.get_submodule(tied.leader)) is type(tied.base.get_submodule(tied.leader))
    close(model(tied.x), y)
    assert torch.equal(own, bits)


def test_a_reader_with_a_further_adapter_is_untied_by_merging() -> None:
    tied = Tied("an embedding, and its head")
    randomise(lp.inject_lora(tied.model, ["head"], r=1, adapter="more"), seed=3)
    lp.set_adapter(tied.model, ["default", "more"])
    y = tied.model(tied.x).detach()
    with pytest.warns(UserWarning, match="is shared with"):
        report = lp.merge_lora(tied.model)
    assert [path for path, _ in report.untied] == ["embed", "head"]
    close(tied.model.eval()(tied.x), y)


def test_removing_deleting_and_disabling_reach_all_readers(tied: Tied) -> None:
    model, base = tied.model, tied.base(tied.x)
    y = model(tied.x)
    with lp.disabled(model):
        assert torch.equal(model(tied.x), base)
    assert torch.equal(model(tied.x), y)
    deleted = copy.deepcopy(model)
    lp.delete_adapter(deleted, "default")
    for plain in (deleted, lp.remove_lora(model)):
        assert torch.equal(plain(tied.x), base) and is_tied(plain, tied)
        assert [type(module) for module in plain.modules()] == [type(module) for module in tied.base.modules()]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_follow_their_own(tied: Tied, way: Callable[[nn.Module], nn.Module]) -> None:
    y = tied.model(tied.x)
    copied = way(tied.model)
    with torch.no_grad():
        for parameter in tied.model.parameters():
            parameter.zero_()
    assert torch.equal(copied(tied.x), y) and is_tied(copied, tied)
    randomise(copied, seed=9)
    assert not torch.allclose(copied(tied.x), y)
    fresh = lp.inject_lora(copy.deepcopy(tied.base), tied.targets, r=2, tied="both")
    fresh.load_state_dict(copied.state_dict())
    assert torch.equal(fresh(tied.x), copied(tied.x))


def test_a_shallow_copy_of_a_follower_computes_the_same() -> None:
    tied = Tied("an embedding, and its head")
    head = copy.copy(tied.model.head)
    x = torch.randn(3, 4, dtype=F64)
    assert torch.equal(head(x), tied.model.head(x))
    lp.rename_adapter(tied.model, "default", "new")
    assert tied.model.head.active_names() == ["new"] and torch.equal(head.weight, tied.model.head.weight)


def test_names_factors_and_choosing_hold_for_all_readers(tied: Tied) -> None:
    model, y = tied.model, tied.model(tied.x)
    lp.rename_adapter(model, "default", "one")
    assert torch.equal(model(tied.x), y)
    lp.add_adapter(model, "two", like="one")
    assert torch.equal(model(tied.x), tied.base(tied.x))
    randomise(model, seed=4)
    lp.set_adapter(model, "one")
    y = model(tied.x)
    lp.set_adapter(model, {"two": 0.5})
    assert not torch.allclose(model(tied.x), y)
    half = model(tied.x)
    with lp.merged(model.eval()):
        close(model(tied.x), half)
        assert is_tied(model, tied)
    with lp.merged(model, adapters=["one"]):  # at the factor 1
        close(model(tied.x), y)
    lp.set_adapter(model, "one")
    close(model(tied.x), y)
    combine_adapters(model, ["one", "two"], adapter="sum")
    y = model(tied.x)
    lp.set_adapter(model, ["one", "two"])
    torch.testing.assert_close(model(tied.x), y, rtol=1e-4, atol=1e-4)


def test_values_that_are_changed_are_changed_for_all_readers(tied: Tied) -> None:
    model, y = tied.model, tied.model(tied.x).detach()
    resize_adapter(model, r=4)
    torch.testing.assert_close(model(tied.x), y, rtol=1e-5, atol=1e-5)
    close(model(tied.x), tied.explicit()(tied.x))
    if not isinstance(model.get_submodule(tied.leader), nn.Embedding):
        fold_lr_ratio(model, 4)
        torch.testing.assert_close(model(tied.x), y, rtol=1e-5, atol=1e-5)
    reset_lora_parameters(model)
    close(model(tied.x), tied.base(tied.x))


def test_check_adapters_takes_them(tied: Tied) -> None:
    found = lp.check_adapters(tied.model, tied.x)
    assert {*found} == {tied.leader, *tied.targets} - {*tied.followers}


def test_samples_with_adapters_of_their_own() -> None:
    tied = Tied("an embedding, and its head")
    lp.add_adapter(tied.model, "two")
    randomise(tied.model, seed=4)
    expected = []
    for name, row in zip(["two", "default"], tied.x, strict=True):
        lp.set_adapter(tied.model, name)
        expected.append(tied.model(row[None]))
    with lp.adapter_per_sample(tied.model, ["two", "default"]):
        close(tied.model(tied.x), torch.cat(expected))


def test_training_moves_one_update(tied: Tied) -> None:
    optimizer = lp.create_loraplus_optimizer(tied.model, torch.optim.SGD, lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        tied.model(tied.x).square().mean().backward()
        optimizer.step()
    close(tied.model(tied.x), tied.explicit()(tied.x))


@pytest.mark.slow
def test_a_compiled_model_is_one_graph() -> None:
    tied = Tied("an embedding, and its head")
    y = tied.model(tied.x)
    close(torch.compile(tied.model, fullgraph=True, backend="eager")(tied.x), y)


def test_dora_on_two_layers_of_one_kind_has_one_magnitude() -> None:
    tied = Tied("two linear layers", variant="dora")
    y = tied.explicit()(tied.x)
    close(tied.model(tied.x), y)
    with lp.merged(tied.model.eval()):
        close(tied.model(tied.x), y)


@pytest.mark.parametrize("init", ["pissa", "gaussian"])
def test_inits_from_the_weight_start_where_the_base_is(init: Any) -> None:
    for case in CASES:
        tied = Tied(case)
        model = lp.inject_lora(copy.deepcopy(tied.base), tied.targets, r=1, tied="both", init=init)
        close(model(tied.x), tied.base(tied.x))
        randomise(model, size=1.0)
        close(model(tied.x), tied.explicit(model)(tied.x))


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("case", CASES)
def test_the_file_says_it_and_gives_it_back(case: str, init: Any, tmp_path: Path) -> None:
    tied = Tied(case, r=1, init=init)
    lp.save_adapter(tied.model, tmp_path / "a.safetensors")
    loaded = lp.load_adapter(copy.deepcopy(tied.base), tmp_path / "a.safetensors", trainable=True)
    close(loaded(tied.x), tied.model(tied.x))
    lp.save_adapter(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert adapter_state_dict(loaded).keys() == {
        name.removesuffix(".default") for name, _ in loaded.named_parameters() if name.endswith(".default")
    }
    with lp.merged(loaded.eval()):
        assert is_tied(loaded, tied)
    if init == "kaiming":
        randomise(loaded, seed=8)
        lp.load_adapter(loaded, tmp_path / "a.safetensors", replace=True)
        close(loaded(tied.x), tied.model(tied.x))


def untied(model: nn.Module) -> nn.Module:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


def test_a_file_names_the_readers_that_have_the_adapter_still(tmp_path: Path) -> None:
    tied = Tied("an embedding, and its head")
    lp.remove_lora(tied.model.head)
    tied.model.head.requires_grad_(False)
    lp.save_adapter(tied.model, tmp_path / "a.safetensors")
    loaded = lp.load_adapter(copy.deepcopy(tied.base), tmp_path / "a.safetensors")
    assert torch.equal(loaded(tied.x), tied.model(tied.x)) and type(loaded.head) is nn.Linear


class Renamed(nn.Module):
    """The model inside of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Language()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_names_are_mapped_for_all_readers(tmp_path: Path) -> None:
    tied = Tied("an embedding, and its head")
    lp.save_adapter(tied.model, tmp_path / "a.safetensors")
    model = Renamed()
    model.body.load_state_dict(tied.base.state_dict())
    lp.load_adapter(model, tmp_path / "a.safetensors", names={"": "body"})
    close(model(tied.x), tied.model(tied.x))
    assert lp.lora_summary(model).rows[0].note == "one A and B with 'body.head', tied"
    lp.save_adapter(model, tmp_path / "b.safetensors")
    lp.load_adapter(copy.deepcopy(tied.base), tmp_path / "b.safetensors", names={"body": ""})


def test_a_file_for_tied_layers_does_not_fit_where_they_are_not_tied(tmp_path: Path) -> None:
    tied = Tied("a head, and its embedding")
    lp.save_adapter(tied.model, tmp_path / "a.safetensors")
    line = r"'head' cannot be adapted: it is Linear whose weight is not tied to that of 'embed' in this model; tie them"
    with pytest.raises(ValueError, match=line):
        lp.load_adapter(untied(copy.deepcopy(tied.base)), tmp_path / "a.safetensors")
    gone = nn.ModuleDict({"head": nn.Linear(4, 9)})
    with pytest.raises(ValueError, match="it is Linear tied to embed in the file, which the model does not have"):
        lp.load_adapter(gone, tmp_path / "a.safetensors")


@pytest.mark.parametrize("file_is_tied", [False, True])
def test_values_replace_those_of_an_adapter_on_the_same_readers_only(file_is_tied: bool, tmp_path: Path) -> None:
    tied = Tied("a head, and its embedding")
    named = randomise(lp.inject_lora(copy.deepcopy(tied.base), tied.targets, r=2), seed=5)
    source, model = (tied.model, named) if file_is_tied else (named, tied.model)
    lp.save_adapter(source, tmp_path / "a.safetensors")
    y = model(tied.x)
    with pytest.raises(ValueError, match="'head' has no adapter 'default' in the model"):
        lp.load_adapter(model, tmp_path / "a.safetensors", replace=True)
    assert torch.equal(model(tied.x), y)


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The file with another document."""
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["lora_plus"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(document["layers"])
    save_file(tensors, path, {"lora_plus": json.dumps(document)})
    return path


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a number": (lambda layers: layers["embed"].update(tied=3), "facts"),
    "a list": (lambda layers: layers["embed"].update(tied=["head"]), "facts"),
    "another kind": (lambda layers: layers["embed"].update(tied={"head": "Conv2d"}), "facts"),
    "a kind of a list": (lambda layers: layers["embed"].update(tied={"head": ["Linear"]}), "facts"),
    "no such layer": (lambda layers: layers["embed"].update(tied={"x": "Linear"}), "which the model does not have"),
    "another layer": (lambda layers: layers["embed"].update(tied={"mid": "Linear"}), "of its own there"),
    "itself": (lambda layers: layers["embed"].update(tied={"embed": "Embedding"}), "an adapter of its own there"),
    "one of the file's own": (lambda layers: layers["mid"].update(tied={"embed": "Embedding"}), "of its own there"),
    "none": (lambda layers: layers["embed"].update(tied={}), "facts"),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_what_a_file_says_of_ties_is_checked(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    tied = Tied("an embedding, and its head")
    lp.save_adapter(tied.model, tmp_path / "a.safetensors")
    edited(tmp_path / "a.safetensors", change)
    model = copy.deepcopy(tied.base)
    with pytest.raises(ValueError, match=message):
        lp.load_adapter(model, tmp_path / "a.safetensors")
    assert not any("lora_" in name for name, _ in model.named_parameters()) and is_tied(model, tied)


# ---- what cannot be --------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """A layer, and a parameter that is tied to its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.raw = nn.Linear(4, 4), nn.Module()
        self.raw.matrix = self.q.weight


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "another word": (Language, {"targets": ["head"], "tied": "all"}, "unknown tied 'all'; choose one of"),
    "nothing tied": (Language, {"targets": ["mid"]}, "no selected weight is tied to another one, so tied='both'"),
    "excluded": (
        Language, {"targets": ["head"], "exclude": ["embed"]}, "'head' is tied to 'embed', which exclude takes out"
    ),
    "in full": (
        Language, {"targets": ["head"], "train_also": ["embed"]}, "'head' is tied to 'embed', which train_also trains"
    ),
    "two ranks": (
        Language, {"targets": ["head", "embed"], "rank_pattern": {"head": 3}},
        "'head' and 'embed' are tied and get one adapter, of one r and alpha",
    ),
    "DoRA": (Language, {"targets": ["head"], "variant": "dora"}, "variant 'dora' acts on rows, which are columns for"),
    "a parameter": (Reader, {"targets": ["q"]}, "'q' is tied to 'raw.matrix', and not all are layers; use"),
    "rows": (
        Twins, {"targets": ["a.x"], "fused": {"a": ["x", "y"]}}, "'a.x' is tied to 'b.weight', and not all are layers"
    ),
    "other parameters": (Experts, {"targets": ["a"]}, "'a.weight' is tied to 'b.weight', and not all are layers"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_have_one_adapter_is_refused(
    make: Callable[[], nn.Module], settings: dict[str, Any], message: str
) -> None:
    model = make()
    before, state = {name: type(module) for name, module in model.named_modules()}, torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        lp.inject_lora(model, **({"r": 2, "tied": "both"} | settings))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(state, torch.get_rng_state())


PARTS_CHANGED: dict[str, Callable[[nn.Module], object]] = {
    "removed": lp.remove_lora,
    "unloaded": lp.merge_and_unload,
    "deleted": lambda part: lp.delete_adapter(part, "default"),
    "renamed": lambda part: lp.rename_adapter(part, "default", "other"),
}


@pytest.mark.parametrize("tie", [{"targets": ["embed"], "r": 2, "tied": "both"}, {"train_rows": {"embed": [1, 2]}}])
@pytest.mark.parametrize("change", PARTS_CHANGED.values(), ids=PARTS_CHANGED.keys())
def test_a_part_whose_adapter_others_follow_is_not_changed_alone(
    change: Callable[[nn.Module], object], tie: dict[str, Any]
) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model.head.weight = model.embed.weight
    x = torch.randn(2, 4)
    plain = model.head(x)
    randomise(lp.inject_lora(model, **({"targets": []} | tie)))
    before, adapted = [*model.state_dict()], model.head(x)
    wanted = "it shares the adapter 'default' with a Linear layer outside of this part of the model; call it on the"
    with pytest.raises(ValueError, match=wanted):
        change(model.embed)
    assert [*model.state_dict()] == before and torch.equal(model.head(x), adapted)
    change(nn.ModuleList([model.embed, model.head]))
    lp.remove_lora(model)
    assert type(model.head) is nn.Linear and (change is lp.merge_and_unload or torch.equal(model.head(x), plain))


@pytest.mark.parametrize("tie", [{"targets": ["embed"], "r": 2, "tied": "both"}, {"train_rows": {"embed": [1, 2]}}])
def test_a_layer_whose_leader_is_gone_says_so(tie: dict[str, Any]) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model.head.weight = model.embed.weight
    x = torch.randn(2, 4)
    plain = model.head(x)
    lp.inject_lora(model, **({"targets": []} | tie))
    lp.rename_adapter(model.head, "default", "other")
    with pytest.raises(ValueError, match=r"tied to this one has lost it.*; call remove_lora on the whole model"):
        model.head(x)
    lp.remove_lora(model)
    assert torch.equal(model.head(x), plain) and type(model.head) is nn.Linear

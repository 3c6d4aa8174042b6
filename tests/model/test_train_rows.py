"""Rows of embeddings and heads that are trained by their ids (``train_rows``)."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_plus
from lora_plus import inject_lora, load_adapter, merge_lora, merged, remove_lora, save_adapter, unmerge_lora
from lora_plus.files import read_adapter
from lora_plus.model import active_adapters, adapter_names
from lora_plus.surgery import resize_adapter
from lora_plus.training import reset_lora_parameters

F64 = torch.float64
IDS = [7, 2, 8]


class Language(nn.Module):
    """An embedding, a layer, and a head, tied or not."""

    def __init__(self, tied: bool = True, bias: bool = False, dtype: torch.dtype = F64, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mid = nn.Embedding(9, 4, dtype=dtype, **options), nn.Linear(4, 4, dtype=dtype)
        self.head = nn.Linear(4, 9, bias=bias, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.embed(tokens))))


CASES: dict[str, tuple[Callable[[], Language], dict[str, list[int]]]] = {
    "tied": (Language, {"embed": IDS}),
    "tied, by the head's name": (lambda: Language(bias=True), {"head": IDS}),
    "tied, by both names": (Language, {"head": IDS, "embed": IDS}),
    "the embedding alone": (lambda: Language(tied=False), {"embed": IDS}),
    "the head alone": (lambda: Language(tied=False, bias=True), {"head": IDS}),
    "both, untied": (lambda: Language(tied=False), {"embed": IDS, "head": [0, 3]}),
    "with a norm": (lambda: Language(tied=False, max_norm=1.0), {"embed": IDS}),
}
"""What makes a model, and the rows."""

TOKENS = torch.tensor([[7, 1, 2, 0, 5], [4, 8, 3, 6, 7]])


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A model with rows, and an ordinary adapter beside them, none of which is at its start."""
    make, rows = CASES[request.param]
    model = moved(inject_lora(make(), ["mid"], r=2, train_rows=rows))
    model.of_case = make, rows
    return model


def moved(model: nn.Module) -> nn.Module:
    """The model with other numbers in what is trained."""
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def ids_of(model: Any, parameter: str) -> tuple[str, list[int]] | None:
    """The layer and the ids that a parameter of this name is of; None for any other parameter."""
    layer, container, _ = parameter.split(".")
    return (layer, [*model.get_submodule(layer).lora_adapters["default"].ids]) if container == "lora_rows" else None


def explicit(model: Any) -> dict[str, Tensor]:
    """The weights that the model is to compute with, by name: the rows are put into the base's."""
    state = {name: value.detach().clone() for name, value in base_of(model).items()}
    for name, parameter in trainable(model).items():
        if (found := ids_of(model, name)) is not None:
            layer, ids = found
            for each in ("embed", "head") if model.head.weight is model.embed.weight else (layer,):
                state[f"{each}.weight"][ids] = parameter.detach()
    lora = model.mid.lora_adapters["default"]
    A, B = lora.factors()
    state["mid.weight"] = state["mid.weight"] + lora.scale * (B @ A).detach()
    return state


def base_of(model: Any) -> dict[str, Tensor]:
    """The base's own parameters by name, a tied one under both."""
    layers = [(name, model.get_submodule(name)) for name in ("embed", "mid", "head")]
    return {f"{name}.{part}": p for name, layer in layers for part, p in layer._parameters.items() if p is not None}


def document(path: Path) -> dict[str, Any]:
    """What a native file says of its adapter."""
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["lora_plus"])
    return found


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_at_the_start_nothing_changes_to_the_bit(case: str) -> None:
    make, rows = CASES[case]
    for dtype in (F64, torch.bfloat16)[: 1 if "norm" in case else 2]:  # torch rounds rows that are too long in place
        model = make().to(dtype)
        before, base = model(TOKENS), {name: (p, p.clone()) for name, p in model.named_parameters()}
        inject_lora(model, [], train_rows=rows)
        assert torch.equal(model(TOKENS), before)
        named = dict(model.named_parameters())
        assert all(named[name] is p and torch.equal(p, copied) for name, (p, copied) in base.items())
        assert all(name.split(".")[1] == "lora_rows" for name in trainable(model))


def test_the_output_is_that_of_the_weights_with_these_rows(model: Any) -> None:
    plain, weights, y = model.of_case[0](), explicit(model), model(TOKENS)
    plain.load_state_dict(weights)
    close(y, plain(TOKENS))
    with merged(model), torch.no_grad():
        close(model(TOKENS), y)
        tied = plain.embed.weight is plain.head.weight
        assert (model.embed.weight is model.head.weight) == tied
        for name, value in weights.items():
            close(model.state_dict()[name], value)
    assert torch.equal(model(TOKENS), y)


def test_merging_keeps_the_tie_and_unmerging_the_bits(model: Any) -> None:
    before = base_of(model)
    copies = {name: p.clone() for name, p in before.items()}
    report = merge_lora(model)
    assert not report.untied
    unmerge_lora(model)
    assert all(base_of(model)[name] is p and torch.equal(p, copies[name]) for name, p in before.items())
    plain = lora_plus.merge_and_unload(copy.deepcopy(model))
    assert type(plain.embed) is nn.Embedding and type(plain.head) is nn.Linear
    assert (plain.embed.weight is plain.head.weight) == (model.embed.weight is model.head.weight)
    close(plain(TOKENS), model(TOKENS))


def test_only_these_rows_have_a_gradient_and_it_is_that_of_the_whole_weight(model: Any) -> None:
    weights = {name: value.requires_grad_() for name, value in explicit(model).items()}
    if model.head.weight is model.embed.weight:
        weights["head.weight"] = weights["embed.weight"]
    h = F.embedding(TOKENS, weights["embed.weight"])
    if (norm := model.embed.max_norm) is not None:
        long = h.norm(dim=-1, keepdim=True)
        h = torch.where(long > norm, h * norm / (long + 1e-7), h)
    h = torch.tanh(F.linear(h, weights["mid.weight"], weights["mid.bias"]))
    F.linear(h, weights["head.weight"], weights.get("head.bias")).square().sum().backward()
    model(TOKENS).square().sum().backward()
    for name, parameter in trainable(model).items():
        if (found := ids_of(model, name)) is not None:
            layer, ids = found
            close(parameter.grad, weights[f"{layer}.weight"].grad[ids])
    assert all(parameter.grad is None for parameter in base_of(model).values())


def test_an_optimizer_with_decay_moves_only_what_has_a_gradient() -> None:
    model = inject_lora(Language(tied=False), [], train_rows={"embed": IDS})
    optimizer = lora_plus.create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    (group,) = optimizer.param_groups
    assert (group["name"], group["lr"], group["weight_decay"]) == ("lora_rows", 0.1, 0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([[7, 1]])).square().sum().backward()
        optimizer.step()
    after = model.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert changed == ["embed.lora_rows.default"]
    rows = (after[changed[0]] != before[changed[0]]).any(dim=1)
    assert rows.tolist() == [True, False, False]  # of the ids 7, 2, 8


@pytest.mark.parametrize(
    "ids", [range(7, 9), {7: "new", 8: "new"}, torch.tensor([7, 8]), np.array([7, 8]), iter((7, 8))]
)
def test_ids_can_be_in_any_collection(ids: Any) -> None:
    model = inject_lora(Language(), [], train_rows={"embed": ids})
    assert model.embed.lora_adapters["default"].ids == (7, 8)


def test_all_linear_leaves_heads_with_rows_alone() -> None:
    model = inject_lora(Language(tied=False), "all-linear", r=2, train_rows={"embed": IDS, "head": IDS})
    assert sorted(trainable(model)) == [
        "embed.lora_rows.default", "head.lora_rows.default", "mid.lora_A.default", "mid.lora_B.default"
    ]  # fmt: skip


def test_a_rule_of_the_users_decays_rows() -> None:
    model = inject_lora(Language(), ["mid"], train_rows={"embed": IDS})
    rows = model.embed.lora_rows["default"]
    groups = lora_plus.loraplus_param_groups(model, lr=0.1, weight_decay=0.5, decayed=[rows])
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "lora_A_no_decay": 0.0, "lora_B_no_decay": 0.0, "lora_rows_decay": 0.5
    }  # fmt: skip
    assert sum(parameter is rows for group in groups for parameter in group["params"]) == 1


def test_removing_gives_back_the_plain_model(model: Any) -> None:
    plain = model.of_case[0]()
    merge_lora(model)
    remove_lora(model)
    assert {type(module) for module in model.modules()} == {Language, nn.Embedding, nn.Linear}
    assert list(model.state_dict()) == list(plain.state_dict()) and torch.equal(model(TOKENS), plain(TOKENS))
    assert (model.embed.weight is model.head.weight) == (plain.embed.weight is plain.head.weight)
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_native_file_has_the_rows_and_gives_them_back(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(model, path)
    loaded = load_adapter(model.of_case[0](), path)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    own, other = model.state_dict(), loaded.state_dict()
    assert list(own) == list(other) and all(torch.equal(own[name], other[name]) for name in own)
    save_adapter(loaded, tmp_path / "b.safetensors")
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with merged(model), torch.no_grad():
        save_adapter(model, tmp_path / "b.safetensors")
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    moved(lora_plus.set_adapter(loaded, "default", trainable=True) or loaded)
    held = {name: id(parameter) for name, parameter in loaded.named_parameters()}
    load_adapter(loaded, path, replace=True)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert held == {name: id(parameter) for name, parameter in loaded.named_parameters()}


def test_other_ids_are_not_loaded_in_place(tmp_path: Path) -> None:
    save_adapter(inject_lora(Language(), ["mid"], r=2, train_rows={"embed": IDS}), tmp_path / "a.safetensors")
    model = inject_lora(Language(), ["mid"], r=2, train_rows={"embed": [7, 2, 1]})
    with pytest.raises(ValueError, match=r"'embed': ids \[7, 2, 8\] in the file, \[7, 2, 1\] in the model"):
        load_adapter(model, tmp_path / "a.safetensors", replace=True)


def test_what_a_file_says_of_rows(tmp_path: Path) -> None:
    save_adapter(inject_lora(Language(), ["mid"], r=2, train_rows={"embed": IDS}), tmp_path / "a.safetensors")
    told = document(tmp_path / "a.safetensors")
    assert {"r": told["r"], "alpha": told["alpha"], "variant": told["variant"], **told["layers"]["embed"]} == {
        "kind": "Embedding", "layout": "n d -> d n", "shape": [9, 4], "ids": IDS, "tied": {"head": "Linear"},
        "r": 3, "alpha": 3, "variant": "lookup_rows",
    }  # fmt: skip
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "a.safetensors").items()}
    assert shapes == {"embed.lora_rows": (3, 4), "mid.lora_A": (2, 4), "mid.lora_B": (4, 2)}


def test_rows_are_those_of_the_file_whatever_the_base_has_there(tmp_path: Path) -> None:
    model = moved(inject_lora(Language(), ["mid"], r=2, train_rows={"embed": IDS}))
    save_adapter(model, tmp_path / "a.safetensors")
    other = Language()
    with torch.no_grad():
        other.embed.weight[IDS] = torch.randn(3, 4, dtype=F64)  # as resizing an embedding leaves new rows
    close(load_adapter(other, tmp_path / "a.safetensors")(TOKENS), model(TOKENS))
    with torch.no_grad():
        other.embed.weight[IDS] += 1
    close(other(TOKENS), model(TOKENS))


def test_other_names_than_those_of_the_file(tmp_path: Path) -> None:
    class Renamed(Language):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.lm_head = self.embed, self.head
            del self.embed, self.head

        def forward(self, tokens: Tensor) -> Tensor:
            return self.lm_head(torch.tanh(self.mid(self.tokens(tokens))))

    model = moved(inject_lora(Language(), ["mid"], r=2, train_rows={"embed": IDS}))
    save_adapter(model, tmp_path / "a.safetensors")
    names = {"embed": "tokens", "head": "lm_head"}
    assert torch.equal(load_adapter(Renamed(), tmp_path / "a.safetensors", names=names)(TOKENS), model(TOKENS))
    with pytest.raises(ValueError, match="'head'"):
        load_adapter(Renamed(), tmp_path / "a.safetensors", names={"embed": "tokens"})


BAD_FILES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no ids": (lambda layer: layer.pop("ids"), "'lookup_rows' is for ids of a whole Embedding or Linear|facts"),
    "ids that are no list": (lambda layer: layer.update(ids=5), "ids"),
    "ids that are texts": (lambda layer: layer.update(ids=["7", "2", "8"]), "ids"),
    "an id twice": (lambda layer: layer.update(ids=[7, 7, 8]), "ids"),
    "an id out of range": (lambda layer: layer.update(ids=[7, 2, 9]), "ids"),
    "fewer ids than rows": (lambda layer: layer.update(ids=[7, 2]), "rows have the settings|ids have r 2"),
    "the other variant": (lambda layer: layer.update(variant="rows"), "variant|settings"),
    "another scale": (lambda layer: layer.update(alpha=6), "scale|settings"),
    "ids of an ordinary adapter": (lambda layer: layer.update(variant="lora"), "missing"),
    "readers that are no names": (lambda layer: layer.update(tied=[1]), "tied"),
    "another reader": (lambda layer: layer.update(tied={"mid": "Linear"}), "tied"),
    "no reader": (lambda layer: layer.pop("tied"), "tied"),
    "ids of a block": (lambda layer: layer.update(rows=[0, 2], parameter="embed.weight"), "lookup_rows|facts"),
    "no ids and no reader": (lambda layer: [layer.pop("ids"), layer.pop("tied")], "'lookup_rows' is for ids"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_with_bad_rows_is_refused(case: str, tmp_path: Path) -> None:
    change, match = BAD_FILES[case]
    path = tmp_path / "a.safetensors"
    save_adapter(inject_lora(Language(), ["mid"], r=2, train_rows={"embed": IDS}), path)
    told = document(path)
    change(told["layers"]["embed"])
    save_file(load_file(path), path, {"lora_plus": json.dumps(told)})
    model = Language()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=match):
        load_adapter(model, path)
    assert list(model.state_dict()) == keys and type(model.embed) is nn.Embedding
    if "reader" not in case:
        with pytest.raises(ValueError, match=match):
            read_adapter(path)


def test_a_file_for_a_tied_head_is_refused_where_it_is_not_tied(tmp_path: Path) -> None:
    save_adapter(inject_lora(Language(), ["mid"], r=2, train_rows={"embed": IDS}), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"'head': 'Linear'.* in the file, .* in the model"):
        load_adapter(Language(tied=False), tmp_path / "a.safetensors")


# ---- several adapters ------------------------------------------------------------------------------------------------


def test_a_file_says_which_layers_have_the_rows_whatever_was_tied_since(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = moved(inject_lora(Language(tied=False), [], train_rows={"embed": IDS}))
    plain = Language(tied=False)
    model.head.weight = model.embed.weight
    plain.head.weight = nn.Parameter(plain.embed.weight.detach().clone())
    save_adapter(model, path)
    assert torch.equal(load_adapter(plain, path)(TOKENS), model(TOKENS))
    model = moved(inject_lora(Language(), [], train_rows={"embed": IDS}))
    wanted, model.head.weight = model(TOKENS), nn.Parameter(model.head.weight.detach().clone(), requires_grad=False)
    assert torch.equal(model(TOKENS), wanted)
    save_adapter(model, path)
    assert torch.equal(load_adapter(Language(), path)(TOKENS), wanted)
    with pytest.raises(ValueError, match="tied"):
        load_adapter(Language(tied=False), path)


def test_rows_go_with_their_adapter() -> None:
    model = moved(inject_lora(Language(), ["mid"], r=2, train_rows={"embed": IDS}, adapter="a"))
    base, a = Language()(TOKENS), model(TOKENS)
    moved(inject_lora(model, ["mid"], r=2, train_rows={"embed": [7, 0]}, adapter="b"))
    b = model(TOKENS)
    assert adapter_names(model) == ["a", "b"] and active_adapters(model) == ["b"]
    lora_plus.set_adapter(model, "a")
    close(model(TOKENS), a)
    lora_plus.set_adapter(model, {"a": 0.5, "b": 2.0})
    weight, (rows_a, rows_b) = model.embed.weight.detach().clone(), (model.embed.lora_rows[name] for name in "ab")
    weight[IDS] += 0.5 * (rows_a - model.embed.weight[IDS]).detach()
    weight[[7, 0]] += 2 * (rows_b - model.embed.weight[[7, 0]]).detach()
    close(model.embed(TOKENS), weight[TOKENS])
    x = torch.randn(3, 4, dtype=F64)
    close(model.head(x), x @ weight.T)
    lora_plus.set_adapter(model, "b")
    with lora_plus.disabled(model):
        assert torch.equal(model(TOKENS), base)
    lora_plus.rename_adapter(model, "a", "c")
    close(model(TOKENS), b)
    lora_plus.delete_adapter(model, "c")
    close(model(TOKENS), b)
    fresh = lora_plus.add_adapter(model, "d", like="b", r=4)
    assert torch.equal(fresh(TOKENS), base) and list(trainable(model)) == [
        "embed.lora_rows.d", "mid.lora_A.d", "mid.lora_B.d"
    ]  # fmt: skip
    lora_plus.delete_adapter(model, "d")
    lora_plus.delete_adapter(model, "b")
    assert type(model.embed) is nn.Embedding and type(model.head) is nn.Linear


@pytest.mark.parametrize("tied", [True, False])
def test_rows_for_each_sample(tied: bool) -> None:
    rows = {"embed": IDS} if tied else {"embed": IDS, "head": IDS}
    model = moved(inject_lora(Language(tied), ["mid"], r=2, train_rows=rows, adapter="a"))
    moved(inject_lora(model, ["mid"], r=2, train_rows={name: [7, 0] for name in rows}, adapter="b"))
    expected = []
    for name, tokens in zip(["a", None], TOKENS, strict=True):
        lora_plus.set_adapter(model, [] if name is None else name)
        expected.append(model(tokens[None])[0])
    for grad in (True, False):
        with torch.set_grad_enabled(grad), lora_plus.adapter_per_sample(model, ["a", None]):
            close(model(TOKENS), torch.stack(expected))
    lora_plus.set_adapter(model, "b")
    expected[1] = model(TOKENS[1:])[0]
    with torch.no_grad(), lora_plus.adapter_per_sample(model, ["a", "b"]):
        close(model(TOKENS), torch.stack(expected))
        model.embed.lora_rows["b"].add_(1)
        after = model(TOKENS)
        assert torch.equal(after[0], model(TOKENS)[0]) and not torch.allclose(after[1], expected[1])
    close(model(TOKENS[1:]), after[1:])


# ---- what else there is ----------------------------------------------------------------------------------------------


def test_copies_are_their_own(model: Any) -> None:
    del model.of_case
    for make in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        copied, y = make(model), model(TOKENS)
        assert torch.equal(copied(TOKENS), y)
        assert (copied.embed.weight is copied.head.weight) == (model.embed.weight is model.head.weight)
        moved(copied)
        assert not torch.equal(copied(TOKENS), y) and torch.equal(model(TOKENS), y)
        again = copied(TOKENS)
        moved(model)
        assert torch.equal(copied(TOKENS), again)
    for layer, x in ((model.embed, TOKENS), (model.head, torch.randn(3, 4, dtype=F64))):
        assert torch.equal(copy.copy(layer)(x), layer(x))


def test_a_checkpoint_has_the_rows_once(model: Any) -> None:
    make, rows = model.of_case
    names = [name for name in model.state_dict() if "lora_rows" in name]
    assert len(names) == (1 if model.embed.weight is model.head.weight else len(rows))
    other = inject_lora(make(), ["mid"], r=2, train_rows=rows)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS), model(TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tied", "both, untied"])
def test_compiled_whole(case: str) -> None:
    make, rows = CASES[case]
    model = moved(inject_lora(make(), ["mid"], r=2, train_rows=rows))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(TOKENS), model(TOKENS))
    compiled(TOKENS).square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    model.zero_grad()
    model(TOKENS).square().sum().backward()
    for name, parameter in trainable(model).items():
        close(parameter.grad, gradients[name])


def test_half_precision_rows_are_trained_in_float32() -> None:
    model = inject_lora(Language(dtype=torch.bfloat16), ["mid"], r=2, train_rows={"embed": IDS})
    assert model.embed.lora_rows["default"].dtype is torch.float32
    moved(model)
    exact = model.embed.weight.float()
    exact[IDS] = model.embed.lora_rows["default"].detach()
    assert torch.equal(lora_plus.merge_and_unload(copy.deepcopy(model)).embed.weight, exact.bfloat16())
    torch.testing.assert_close(model.embed(TOKENS).float(), exact[TOKENS], rtol=1e-2, atol=1e-2)


def test_checks_and_the_summary_know_rows() -> None:
    model = inject_lora(Language(), ["mid"], r=2, train_rows={"embed": IDS})
    assert lora_plus.check_adapters(model, TOKENS) == ["embed", "mid"]
    optimizer = lora_plus.create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.1)
    lora_plus.check_optimizer(optimizer, model)
    summary = lora_plus.lora_summary(model)
    told = {row.name: (row.r, row.parameters, row.note) for row in summary.rows}
    assert told["embed"] == (3, 12, "variant lookup_rows")
    assert told["head"] == (3, 0, "has those of a layer with the same weight; variant rows")
    assert summary.trainable == 12 + 16
    model = inject_lora(Language(tied=False), [], train_rows={"embed": [7]})
    with pytest.raises(ValueError, match="'embed', in eval and train: with these inputs the gradient of lora_rows is"):
        lora_plus.check_adapters(model, TOKENS[:1, 1:3])


ERRORS: dict[str, tuple[Callable[[], nn.Module], Mapping[str, Any], str]] = {
    "no ids": (Language, {"train_rows": {"embed": []}}, "'embed' - expected one id or more from 0 to 8, got []"),
    "an id out of range": (Language, {"train_rows": {"embed": [3, 9]}}, "from 0 to 8, got [3, 9]"),
    "a negative id": (Language, {"train_rows": {"embed": [-1]}}, "from 0 to 8, got [-1]"),
    "an id that is no int": (Language, {"train_rows": {"embed": [True]}}, "from 0 to 8, got [True]"),
    "an id twice": (Language, {"train_rows": {"embed": [3, 4, 3]}}, "expected each id once, got [3, 3]"),
    "the padding": (
        lambda: Language(padding_idx=0), {"train_rows": {"embed": [0, 1]}},
        "'embed' - id 0 is the padding_idx of 'embed', whose row is not trained; leave it out",
    ),
    "the padding of a tied embedding": (
        lambda: Language(padding_idx=0), {"train_rows": {"head": [0, 1]}},
        "'head' - id 0 is the padding_idx of 'embed', whose row is not trained; leave it out",
    ),
    "no such module": (Language, {"train_rows": {"embedd": [3]}}, "train_rows 'embedd' matches no module"),
    "no layer": (Language, {"train_rows": {"": [3]}}, "'' is Language, where an nn.Embedding or nn.Linear"),
    "other ids of the tied head": (
        Language, {"train_rows": {"embed": [3], "head": [4]}},
        "'head' and 'embed' share a weight, but not the ids; give both the same ids, or name one of them",
    ),
    "a target": (Language, {"targets": ["embed"], "train_rows": {"embed": [3]}},
                 "'embed' is both a target and trained by train_also or train_rows"),
    "a tied target": (
        Language, {"targets": ["head"], "train_rows": {"embed": [3]}},
        "'head' is both a target and trained by",
    ),
    "trained in full": (
        lambda: Language(tied=False), {"train_also": ["embed"], "train_rows": {"embed": [3]}},
        "'embed' and train_also both train 'embed'; choose one",
    ),
    "a mapping": (Language, {"train_rows": [3]}, "train_rows must be a mapping from pattern to ids, got [3]"),
    "a list of ids": (Language, {"train_rows": {"embed": 3}}, "train_rows['embed'] must be a list of ids, got 3"),
    "a tensor of one id": (
        Language, {"train_rows": {"embed": torch.tensor(3)}}, "train_rows['embed'] must be a list of ids, got 3",
    ),
    "no values": (lambda: Language().to("meta"), {"train_rows": {"embed": [3]}}, "no values on the meta device"),
    "as a variant": (Language, {"targets": ["mid"], "variant": "rows"}, "pass train_rows={name: ids} to inject_lora"),
    "nothing": (Language, {"train_rows": {}}, "no target given"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_is_said_and_changes_nothing(case: str) -> None:
    make, options, message = ERRORS[case]
    model = make()
    keys, types = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises((ValueError, TypeError)) as caught:
        inject_lora(model, **{"targets": [], **options})
    assert message in str(caught.value)
    assert keys == list(model.state_dict()) and types == [type(module) for module in model.modules()]


class Scaled(nn.Embedding):
    """As Gemma's."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * torch.tensor(6.7).to(self.weight.dtype)


class Shifted(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + 1


class Softened(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_an_embedding_that_scales_its_rows(dtype: torch.dtype, tmp_path: Path) -> None:
    def make() -> Any:
        model = Language(dtype=dtype)
        embed = Scaled(9, 4, dtype=dtype)
        embed.weight = model.head.weight
        model.embed = embed
        return model

    model = make()
    before = model(TOKENS)
    inject_lora(model, ["mid"], r=2, train_rows={"embed": IDS})
    assert torch.equal(model(TOKENS), before)
    moved(model)
    weight = model.embed.weight.detach().clone()
    weight[IDS] = model.embed.lora_rows["default"].detach().to(dtype)
    tolerance = {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    expected = F.embedding(TOKENS, weight) * torch.tensor(6.7).to(dtype)
    torch.testing.assert_close(model.embed(TOKENS), expected, rtol=tolerance, atol=tolerance)
    save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(load_adapter(make(), tmp_path / "a.safetensors")(TOKENS), model(TOKENS))
    plain = lora_plus.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(plain.embed.weight, weight, rtol=tolerance, atol=tolerance)
    assert plain.embed.weight is plain.head.weight and type(plain.embed) is Scaled


class Reader(nn.Module):
    """A parameter that is also an embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.weights = self.embed.weight


def test_layers_and_readers_that_cannot_have_rows() -> None:
    for layer in (Shifted(9, 4), Softened(4, 9)):
        with pytest.raises(ValueError, match="with a forward of its own that does not just scale its rows"):
            inject_lora(nn.Sequential(layer), [], train_rows={"0": [1]})
    with pytest.raises(ValueError, match=r"'embed' is tied to '', Reader, where an nn.Embedding or nn.Linear"):
        inject_lora(Reader(), [], train_rows={"embed": [1]})
    with pytest.raises(ValueError, match=r"'0' is Conv1d, where"):
        inject_lora(nn.Sequential(nn.Conv1d(3, 4, 2)), [], train_rows={"0": [1]})


# ---- sequences -------------------------------------------------------------------------------------------------------


class Sequence:
    """Random operations on a tied model with two adapters of rows and one that is LoRA on the head alone."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.draw, self.folder = random.Random(seed), folder
        torch.manual_seed(seed)
        self.model: Any = Language()
        self.base = self.model.embed.weight.detach().clone()
        self.ids: dict[str, list[int]] = {}
        self.active: dict[str, float] = {}
        self.merged: dict[str, float] | None = None
        self.saved: dict[str, list[int]] = {}

    def weights(self, active: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """Those of the embedding and of the head."""
        embed, head = self.base.clone(), torch.zeros_like(self.base)
        for name, factor in active.items():
            if name == "lora":
                adapter = self.model.head.lora_adapters["lora"]
                A, B = adapter.factors()
                head += factor * adapter.spec.scale * (B @ A).detach()
            else:
                rows = self.model.embed.lora_rows[name].detach()
                embed[self.ids[name]] += factor * (rows - self.base[self.ids[name]])
        return embed, embed + head

    def check(self) -> None:
        embed, head = self.weights(self.active if self.merged is None else self.merged)
        with torch.no_grad():
            close(self.model.embed(torch.arange(9)), embed)
            close(self.model.head(torch.eye(4, dtype=F64)), head.T)
            if self.model.embed.__class__ is not nn.Embedding:
                with lora_plus.disabled(self.model):
                    assert torch.equal(self.model.embed(torch.arange(9)), self.base)
                    assert self.model.embed.weight is self.model.head.weight

    def step(self) -> None:
        names = [*self.ids]
        operation = self.draw.choice(["inject", "set", "set", "write", "merge", "unmerge", "rename", "delete", "copy",
                                      "save", "load", "resize", "reset", "for good"])  # fmt: skip
        if self.merged is not None and operation not in ("rename", "copy", "save"):
            operation = "unmerge"
        free = next((name for name in "abc" if name not in names), None)
        some = self.draw.choice(names) if names else None
        if operation == "inject" and free is not None:
            if "lora" not in names and self.draw.random() < 0.3:
                inject_lora(self.model, ["head"], r=2, adapter="lora", init="gaussian")
                self.ids["lora"], self.active = [], {"lora": 1.0}
            else:
                self.ids[free] = self.draw.sample(range(9), self.draw.randint(1, 4))
                inject_lora(self.model, ["mid"], r=1, train_rows={"embed": self.ids[free]}, adapter=free)
                self.active = {free: 1.0}
        elif operation == "unmerge" and self.merged is not None:
            unmerge_lora(self.model)
            self.merged = None
            assert self.model.embed.weight is self.model.head.weight
        elif some is None:
            return
        elif operation == "set":
            chosen = self.draw.sample(names, self.draw.randint(1, len(names)))
            self.active = {name: self.draw.choice([1.0, 1.0, 0.5, -1.0]) for name in chosen}
            lora_plus.set_adapter(self.model, self.active)
        elif operation == "write":
            with torch.no_grad():
                held = self.model.head.lora_B if some == "lora" else self.model.embed.lora_rows
                held[some].add_(0.3 * torch.randn_like(held[some]))
        elif operation == "merge" and self.active:
            merge_lora(self.model)
            self.merged = dict(self.active)
            assert (self.model.embed.weight is self.model.head.weight) == ("lora" not in self.active)
        elif operation == "rename" and some != "lora" and free is not None:
            lora_plus.rename_adapter(self.model, some, free)
            for table in (self.ids, self.active, self.merged or {}):
                for name in [*table]:
                    table[free if name == some else name] = table.pop(name)  # type: ignore[attr-defined]
        elif operation == "delete":
            lora_plus.delete_adapter(self.model, some)
            del self.ids[some]
            self.active.pop(some, None)
        elif operation == "copy":
            self.model = self.draw.choice([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])(self.model)
        elif operation == "save" and some != "lora":
            save_adapter(self.model, self.folder / "a.safetensors", adapter=some)
            self.saved = {"ids": self.ids[some]}
        elif operation == "load" and self.saved and free is not None:
            load_adapter(self.model, self.folder / "a.safetensors", adapter=free)
            self.ids[free], self.active = self.saved["ids"], {free: 1.0}
        elif operation == "resize":
            resize_adapter(self.model, r=self.draw.randint(1, 3), adapter=some)
        elif operation == "reset":
            reset_lora_parameters(self.model, adapter=some)
            if some != "lora":
                close(self.model.embed.lora_rows[some], self.base[self.ids[some]])
        elif operation == "for good" and self.active and "lora" not in self.active:
            self.base, _ = self.weights(self.active)
            lora_plus.merge_and_unload(self.model)
            self.ids, self.active = {}, {}


def run_sequences(seeds: range, folder: Path) -> None:
    for seed in seeds:
        sequence = Sequence(seed, folder)
        for _ in range(25):
            sequence.step()
            sequence.check()
        if sequence.merged is not None:
            unmerge_lora(sequence.model)
        plain = remove_lora(sequence.model)
        assert torch.equal(plain.embed.weight, sequence.base) and plain.embed.weight is plain.head.weight


@pytest.mark.filterwarnings("ignore:the weight of '(head|embed)' is shared with")  # said of LoRA on one of the two
def test_short_sequences_of_operations(tmp_path: Path) -> None:
    run_sequences(range(4), tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the weight of '(head|embed)' is shared with")
def test_many_sequences_of_operations(tmp_path: Path) -> None:
    run_sequences(range(4, 200), tmp_path)

"""Several adapters on one base: adding, naming, choosing and weighting them."""

from __future__ import annotations

import copy
import math
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LORA_CASES, Case, Holder, randomise
from sites import adapter_sites
from torch import nn

import lora_plus
from lora_plus import add_adapter, inject_lora, rename_adapter, set_adapter
from lora_plus.files import adapter_state_dict
from lora_plus.model import active_adapters, adapter_names
from lora_plus.model.tree import adapters_of
from lora_plus.training import fold_lr_ratio


class Mixed(nn.Module):
    """A layer, row blocks, an adapted parameter and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.qkv(self.embed(tokens))
        return self.head(self.attn(x, x, x)[0])


TOKENS = torch.arange(8).reshape(2, 4)


def adapted(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    targets = ["embed", "qkv.q", "attn.q"]
    options = {"r": 2, "alpha": 3, "train_also": ["head"], "fused": {"qkv": ["q", "v"]}, **settings}
    return randomise(inject_lora(Mixed().double(), targets, adapter="a", **options)).eval()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


# ---- adding ----------------------------------------------------------------------------------------------------------


def test_an_added_adapter_is_on_the_same_places_with_the_same_settings() -> None:
    model = adapted(rank_pattern={"embed": 3}, alpha_pattern={"attn.q": 7}, scaling="rslora")
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert add_adapter(model, "b", like="a") is model
    rows = lora_plus.lora_summary(model).rows
    first, second = ([(row.name, row.r, row.alpha, row.scale) for row in rows if row.adapter == name] for name in "ab")
    assert first == second and len(first) == 3
    assert trainable(model) == {name for name, _ in model.named_parameters() if name.endswith(".b")}
    assert active_adapters(model) == ["b"] and adapter_names(model) == ["a", "b"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in values.items())
    assert not [row for row in lora_plus.lora_summary(model).trained if row[1] == "b"]


def test_an_added_adapter_is_what_an_injection_gives() -> None:
    def init(weight: torch.Tensor, r: int, generator: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(r, weight.shape[1], generator=generator), torch.randn(len(weight), r, generator=generator)

    model = Holder(nn.Linear(4, 4))
    inject_lora(model, ["layer"], r=2, dropout=0.1, adapter="a")
    other, twins = copy.deepcopy(model), [torch.Generator().manual_seed(3) for _ in range(2)]
    inject_lora(other, ["layer"], r=3, alpha=5, dropout=0.1, init=init, adapter="b", generator=twins[0])
    add_adapter(model, "b", like="a", r=3, alpha=5, init=init, generator=twins[1])
    assert [adapter.spec for _, adapter, _ in adapters_of(model)] == [
        adapter.spec for _, adapter, _ in adapters_of(other)
    ]
    assert trainable(model) == trainable(other)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in other.state_dict().items())
    half = add_adapter(model, "c", like="a", dtype=torch.bfloat16)
    assert add_adapter(half, "d", like="c").layer.lora_A["d"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"like": "nope"}, KeyError, "no adapter 'nope'"),
        ({"adapter": "a"}, ValueError, "has an adapter 'a' already"),
        ({"adapter": "x.y"}, ValueError, "contain a dot"),
        ({"r": 0}, ValueError, "r must be positive"),
        ({"init": "nope"}, ValueError, "unknown init"),
        ({"dtype": torch.int32}, TypeError, "floating-point"),
        ({"dropout": 0.5}, ValueError, r"(?s)'attn.q': dropout 0.5 has no input"),
        ({"variant": "dora"}, ValueError, r"(?s)'qkv.q': variant 'dora' .* rows of one"),
    ],
    ids=str,
)
def test_what_cannot_be_added_changes_nothing(settings: dict[str, Any], error: Any, text: str) -> None:
    model = adapted()
    before, flags = list(model.state_dict()), trainable(model)
    with pytest.raises(error, match=text):
        add_adapter(model, **{"adapter": "b", "like": "a", **settings})
    assert list(model.state_dict()) == before and trainable(model) == flags and active_adapters(model) == ["a"]


def test_the_thirtieth_adapter_costs_what_the_first_does() -> None:
    model = inject_lora(nn.Sequential(*[nn.Linear(4, 4) for _ in range(100)]), "all-linear", r=2)
    seconds = []
    for n in range(30):
        start = time.process_time()
        add_adapter(model, f"a{n}")
        seconds.append(time.process_time() - start)
    assert min(seconds[-8:]) < 3 * min(seconds[:8])


# ---- names -----------------------------------------------------------------------------------------------------------

ALLOWED = ["0", "1", "lora_A", "weight", "default", "q", "lora_blocks", "ünïcode", "with space", "Name-1_b", "rename"]
REFUSED = ["default.x", "", "train", "forward", "parameters"]


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("path", ["a.safetensors", "folder"])
def test_allowed_names_go_everywhere(name: str, path: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plain, x = copy.deepcopy(model), torch.randn(3, 4)
    randomise(inject_lora(model, ["0", "1"], r=2, adapter=name))
    y = model(x)
    fresh = inject_lora(copy.deepcopy(plain), ["0", "1"], r=2, adapter=name)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), y)
    lora_plus.save_adapter(model, tmp_path / path, adapter=name)
    loaded = lora_plus.load_adapter(copy.deepcopy(plain), tmp_path / path, adapter=name)
    assert torch.equal(loaded(x), y) and adapter_names(loaded) == [name]
    rename_adapter(model, name, "other name")
    assert torch.equal(model(x), y)
    rename_adapter(model, "other name", name)
    assert list(model.state_dict()) == list(fresh.state_dict())
    lora_plus.delete_adapter(model, name)
    assert type(model[0]) is nn.Linear and torch.equal(model(x), plain(x))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_names_are_refused_everywhere(name: str) -> None:
    model = inject_lora(nn.Sequential(nn.Linear(4, 4)), ["0"], r=2)
    keys = list(model.state_dict())
    for call in (
        lambda: inject_lora(model, ["0"], adapter=name),
        lambda: add_adapter(model, name),
        lambda: rename_adapter(model, "default", name),
    ):
        with pytest.raises(ValueError, match="name"):
            call()
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("merge", [False, True])
def test_renaming_changes_keys_and_nothing_else(merge: bool) -> None:
    model = adapted()
    randomise(add_adapter(model, "b", like="a"), seed=3)
    set_adapter(model, {"a": 0.5, "b": 1}, trainable=True)
    y, order = model(TOKENS), list(model.state_dict())
    if merge:
        lora_plus.merge_lora(model)
        merged_y = model(TOKENS)
    tensors, flags = [id(p) for p in model.parameters()], [p.requires_grad for p in model.parameters()]
    rename_adapter(model, "a", "new")
    assert [id(p) for p in model.parameters()] == tensors
    assert [p.requires_grad for p in model.parameters()] == flags
    assert adapter_names(model) == ["new", "b"] and active_adapters(model) == ["new", "b"]
    assert [row[1] for row in lora_plus.lora_summary(model).trained] == ["new"]
    if merge:
        assert torch.equal(model(TOKENS), merged_y)
        lora_plus.unmerge_lora(model)
    assert torch.equal(model(TOKENS), y)
    assert list(model.state_dict()) == [f"{k[:-2]}.new" if k.endswith(".a") else k for k in order]


def test_a_change_before_renaming_is_still_found_in_a_merged_model() -> None:
    model = adapted()
    lora_plus.merge_lora(model)
    with torch.no_grad():
        model.embed.lora_B["a"].add_(1)
    rename_adapter(model, "a", "b")
    with pytest.raises(ValueError, match="was changed while it was merged"):
        model(TOKENS)


@pytest.mark.parametrize(
    ("old", "new", "error", "text"),
    [("nope", "c", KeyError, "no adapter 'nope'"), ("a", "b", ValueError, "has an adapter 'b' already"),
     ("a", 3, TypeError, "must be a str")],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_renamed(old: str, new: Any, error: Any, text: str) -> None:
    model = add_adapter(adapted(), "b", like="a")
    with pytest.raises(error, match=text):
        rename_adapter(model, old, new)
    with lora_plus.disabled(model), pytest.raises(ValueError, match="are disabled"):
        rename_adapter(model, "a", "c")
    assert adapter_names(model) == ["a", "b"]


# ---- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LORA_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("factors", [{"a": 0.6, "b": -1.5}, {"b": 0}, {"a": 2}], ids=str)
def test_a_factor_is_one_of_the_scale(case: Case, factors: dict[str, float]) -> None:
    model, x = case.model(), case.input()
    for name, r in (("a", 3), ("b", 2)):
        inject_lora(model, ["layer"], **{**case.settings, "adapter": name, "r": r})
    randomise(model).eval()
    explicit = copy.deepcopy(model)
    with torch.no_grad():
        for name, factor in factors.items():
            explicit.layer.lora_B[name].mul_(factor)
    set_adapter(explicit, list(factors))
    wanted, plain = explicit(x), model(x)
    set_adapter(model, factors)
    close(model(x), wanted)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(copied(x), wanted)
    with lora_plus.merged(model):
        close(model(x), wanted)
    set_adapter(model, "b")
    assert torch.equal(model(x), plain)


def test_factors_hold_in_row_blocks_and_adapted_parameters_and_are_not_saved(tmp_path: Path) -> None:
    model = adapted()
    explicit = copy.deepcopy(model)
    with torch.no_grad():
        for _, site in adapter_sites(explicit):
            site.lora_B["a"].mul_(0.3)
    state = adapter_state_dict(model, adapter="a")
    lora_plus.save_adapter(model, tmp_path / "plain.safetensors", adapter="a")
    set_adapter(model, {"a": 0.3})
    close(model(TOKENS), explicit(TOKENS))
    with lora_plus.merged(model):
        close(model(TOKENS), explicit(TOKENS))
    lora_plus.save_adapter(model, tmp_path / "weighted.safetensors", adapter="a")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "weighted.safetensors").read_bytes()
    assert all(torch.equal(value, state[name]) for name, value in adapter_state_dict(model, adapter="a").items())
    assert all(row.note == "scale times 0.3" for row in lora_plus.lora_summary(model).rows)
    add_adapter(model, "b", like="a")
    set_adapter(model, {"a": 0.3, "b": 1})
    lora_plus.delete_adapter(model, "b")
    close(model(TOKENS), explicit(TOKENS))
    add_adapter(model, "b", like="a")
    assert {adapter.strength for _, adapter, _ in adapters_of(model)} == {1.0}


def test_merging_by_name_keeps_the_factor_of_what_is_active() -> None:
    model = randomise(inject_lora(Holder(nn.Linear(4, 4).double()), ["layer"], r=2, adapter="a"))
    randomise(inject_lora(model, ["layer"], r=2, adapter="b"))
    x = torch.randn(3, 4, dtype=torch.float64)
    set_adapter(model.eval(), {"a": 0.5, "b": 1})
    wanted = model(x)
    set_adapter(model, {"a": 0.5})
    with lora_plus.merged(model, adapters=["a", "b"]):
        close(model(x), wanted)


@pytest.mark.parametrize(
    ("factors", "error", "text"),
    [
        ({"a": math.nan}, ValueError, "must be finite, got nan"),
        ({"a": math.inf}, ValueError, "must be finite, got inf"),
        ({"a": "1"}, TypeError, "must be a number, got '1'"),
        ({"a": True}, TypeError, "must be a number, got True"),
        ({"dora": 0.5}, ValueError, "the factor of 'dora' must be 1, got 0.5: on 'layer' its variant 'dora' rescales"),
        ({"nope": 1}, KeyError, "nope"),
    ],
    ids=str,
)
def test_factors_that_make_no_sense(factors: dict[str, Any], error: Any, text: str) -> None:
    model = inject_lora(Holder(nn.Linear(4, 4)), ["layer"], r=2, adapter="dora", variant="dora")
    inject_lora(model, ["layer"], r=2, adapter="a")
    set_adapter(model, {"dora": 1, "a": 0.5})
    with pytest.raises(error, match=text):
        set_adapter(model, factors)
    assert active_adapters(model) == ["dora", "a"] and model.layer.lora_adapters["a"].strength == 0.5


def test_choosing_what_is_trained() -> None:
    model = add_adapter(adapted(), "b", like="a")
    of = {name: {key for key, _ in model.named_parameters() if key.endswith(f".{name}")} for name in "ab"}
    head = {"head.weight", "head.bias"}
    steps: list[tuple[Any, bool | None, set[str]]] = [
        ("a", None, of["b"]),
        ("a", True, of["a"] | head),
        (["a", "b"], True, of["a"] | of["b"] | head),
        ("b", True, of["b"]),
        (["b"], False, set()),
    ]
    for names, wanted, expected in steps:
        set_adapter(model, names, trainable=wanted)
        assert trainable(model) == expected
    lora_plus.remove_lora(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_module_trained_in_full_is_frozen_again_when_its_adapter_is_deleted() -> None:
    model = adapted()
    lora_plus.add_adapter(model, "b", like="a")
    lora_plus.set_adapter(model, ["a", "b"], trainable=True)
    lora_plus.delete_adapter(model, "a")
    assert trainable(model) == {name for name in dict(model.named_parameters()) if name.endswith(".b")}
    lora_plus.delete_adapter(model, "b")
    assert trainable(model) == set(dict(model.named_parameters()))


def test_another_factor_breaks_no_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = randomise(inject_lora(nn.Sequential(nn.Linear(6, 6)).double(), ["0"], r=2))
    counter, x = CompileCounter(), torch.randn(3, 6, dtype=torch.float64)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for factor in (1, 0.5, -0.25, 0.5, 1):
        set_adapter(model, {"default": factor})
        close(compiled(x), model(x))
    assert counter.frame_count <= 3
    torch._dynamo.reset()


def test_an_adapter_like_a_folded_one_has_its_alpha() -> None:
    model = adapted()
    fold_lr_ratio(model, 4, adapter="a")
    add_adapter(model, "b", like="a", generator=torch.Generator().manual_seed(3))
    rows = lora_plus.lora_summary(model).rows
    alphas, others = ({row.name: row.alpha for row in rows if row.adapter == name} for name in ("a", "b"))
    assert alphas == others != {}


def test_names_are_in_the_order_of_the_layers_and_then_of_time() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for name, layer in (("first", "1"), ("second", "0"), ("third", "1")):
        inject_lora(model, [layer], adapter=name)
    set_adapter(model, ["third", "first", "second"])
    assert adapter_names(model) == ["second", "first", "third"]
    assert active_adapters(model) == ["second", "third", "first"]


def test_deleting_an_adapter_gives_its_modules_trained_in_full_their_own_values_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    own = {name: tensor.clone() for name, tensor in model[1].state_dict().items()}
    lora_plus.inject_lora(model, ["0"], adapter="a", train_also=["1"])
    with torch.no_grad():
        model[1].weight.add_(1)
    lora_plus.inject_lora(model, ["0"], adapter="b")
    lora_plus.delete_adapter(model, "a")
    assert all(torch.equal(tensor, own[name]) for name, tensor in model[1].state_dict().items())
    assert not model[1].weight.requires_grad

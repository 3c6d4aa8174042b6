"""Weights and layers that a model holds more than once: shared parameters, aliases, plain lists, tying again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import randomise
from torch import nn

import lora_plus
from lora_plus import inject_lora, merge_and_unload, merge_lora, merged, remove_lora, unmerge_lora

F64 = torch.float64


class Twins(nn.Module):
    """Two layers that share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, dtype=F64), nn.Linear(4, 4, dtype=F64)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class Language(nn.Module):
    """An embedding whose weight is the head's too, with transformers' way of tying them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(9, 4, dtype=F64), nn.Linear(4, 4, dtype=F64), nn.Linear(4, 9)
        self.head.to(F64)
        self.tie_weights()

    def tie_weights(self) -> None:
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mid(self.embed(x))))


class Experts(nn.Module):
    """Two modules that share a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Bilinear(3, 4, 5, dtype=F64), nn.Bilinear(3, 4, 5, dtype=F64)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x[..., :3], x) * self.b(x[..., :3], x)


def twins_input() -> torch.Tensor:
    return torch.randn(3, 4, dtype=F64)


def tokens() -> torch.Tensor:
    return torch.randint(9, (2, 5))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], list[str]]] = {
    "both of two layers": (Twins, twins_input, ["a", "b"]),
    "one of two layers": (Twins, twins_input, ["a"]),
    "a tied head": (Language, tokens, ["head"]),
    "a tied embedding": (Language, tokens, ["embed"]),
    "a tied embedding and head": (Language, tokens, ["embed", "mid", "head"]),
    "a shared parameter": (Experts, twins_input, ["a"]),
}


@pytest.mark.parametrize("case", CASES)
def test_merging_one_of_two_that_share_never_changes_the_other_and_says_so(case: str) -> None:
    make, make_input, targets = CASES[case]
    torch.manual_seed(0)
    model, x = make(), make_input()
    shared = next(
        p for p in model.parameters() if sum(p is q for _, q in model.named_parameters(remove_duplicate=False)) > 1
    )
    bits = shared.detach().clone()
    randomise(inject_lora(model, targets, r=2), size=1.0)
    y = model(x).detach()
    with pytest.warns(UserWarning, match="is shared with .*: merging gives"):
        report = merge_lora(model)
    assert report.untied and torch.equal(shared, bits)
    torch.testing.assert_close(model.eval()(x), y, rtol=1e-12, atol=1e-12)
    unmerge_lora(model)
    tied = [p for _, p in model.named_parameters(remove_duplicate=False) if p is shared]
    assert len(tied) == 2 and torch.equal(shared, bits)
    with pytest.warns(UserWarning, match="is shared with"):
        merge_and_unload(model)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    assert torch.equal(shared, bits)


@pytest.mark.parametrize("case", CASES)
def test_injecting_and_removing_keep_the_tie(case: str) -> None:
    make, _, targets = CASES[case]
    model = make()
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    inject_lora(model, targets, r=2)
    assert {id(p) for n, p in model.named_parameters() if "lora_A" not in n and "lora_B" not in n} == set(names)
    remove_lora(model)
    assert {id(p): n for n, p in model.named_parameters(remove_duplicate=False)} == names


def test_all_linear_leaves_a_head_alone_that_is_tied_to_an_embedding() -> None:
    model = inject_lora(Language(), "all-linear")
    assert [row.name for row in lora_plus.lora_summary(model).rows] == ["mid"]


def test_tying_again_after_injecting_changes_nothing() -> None:
    model, x = Language(), tokens()
    y = randomise(inject_lora(model, ["head", "embed"], r=2))(x).detach()
    model.tie_weights()
    assert torch.equal(model(x), y) and model.head.weight is model.embed.weight


@pytest.mark.filterwarnings("ignore:the weight of:UserWarning")
def test_tying_again_while_merged_is_noticed_at_the_next_call() -> None:
    model, x = Language(), tokens()
    randomise(inject_lora(model, ["head"], r=2))
    merge_lora(model)
    model.eval().tie_weights()
    with pytest.raises(ValueError, match="the weight of this LoRALinear was replaced while it was merged"):
        model(x)
    unmerge_lora(model)
    assert model.head.weight is model.embed.weight
    model(x)


def test_a_parameter_tied_again_becomes_the_base_of_its_adapters() -> None:
    model, x = Experts(), twins_input()
    randomise(inject_lora(model, ["a"], r=2))
    y, other = model(x).detach(), nn.Parameter(model.b.weight.detach().clone())
    model.a.weight = model.b.weight = other
    assert torch.equal(model(x), y) and model.state_dict(keep_vars=True)["a.weight"] is other


def test_a_layer_under_two_names_has_one_adapter() -> None:
    layer = nn.Linear(4, 4, dtype=F64)
    model = nn.ModuleDict({"first": layer, "second": layer})
    inject_lora(model, ["second"], r=2)
    assert model["first"] is model["second"] is layer and len(lora_plus.lora_summary(model).rows) == 1
    x = twins_input()
    y = randomise(model)["first"](x).detach()
    with merged(model):  # one layer shares its weight with nobody
        torch.testing.assert_close(model["second"].eval()(x), y, rtol=1e-12, atol=1e-12)


class Listed(nn.Module):
    """Layers that are modules of the model and are called from a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.order = [self.second, self.first]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.order:
            x = layer(x)
        return x


def test_layers_called_from_a_plain_list_are_adapted_like_any() -> None:
    model, x = Listed(), torch.randn(2, 4)
    base = model(x)
    randomise(inject_lora(model, "all-linear", r=2))
    assert not torch.allclose(model(x), base)
    assert lora_plus.check_adapters(model, x) == ["first", "second"]


def test_layers_that_only_a_plain_list_holds_are_pointed_out() -> None:
    model = nn.Module()
    model.blocks = [nn.Linear(4, 4)]
    for targets in ("all-linear", ["blocks.0"]):
        with pytest.raises(ValueError, match=r"'blocks' holds modules in a plain list, make it an nn\.ModuleList"):
            inject_lora(model, targets)

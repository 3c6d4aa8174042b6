"""LoRA+ groups: every parameter once, exact rates, and the identities that define LoRA+."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_plus
from lora_plus import create_loraplus_optimizer, inject_lora, loraplus_param_groups, set_adapter
from lora_plus.training import split_loraplus_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.q = nn.Linear(6, 6)
        self.dora = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(tokens))
        return self.head(torch.tanh(self.q(x)) + self.dora(x))


def net() -> nn.Module:
    """An adapted embedding, linear and DoRA linear, with a norm and a head trained in full."""
    torch.manual_seed(0)
    model = inject_lora(Net().double(), ["embed", "q"], r=2, alpha=4, train_also=["norm", "head"])
    inject_lora(model, ["dora"], r=2, alpha=4, variant="dora", adapter="second")
    set_adapter(model, ["default", "second"], trainable=True)  # adding an adapter freezes the first one
    return model


def test_groups_by_role_with_rates_and_decay() -> None:
    model = net()
    groups = {
        g["name"]: g for g in loraplus_param_groups(model, lr=1e-3, lr_ratio=8, weight_decay=0.1, embedding_lr=1e-6)
    }
    names = {id(p): name for name, p in model.named_parameters()}
    found = {n: ([names[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for n, g in groups.items()}
    assert found == {
        "lora_A": (["q.lora_A.default", "dora.lora_A.second"], 1e-3, 0.1),
        "lora_B": (["q.lora_B.default", "dora.lora_B.second"], 8e-3, 0.1),
        "lora_embedding": (["embed.lora_A.default", "embed.lora_B.default"], 1e-6, 0.1),
        "lora_magnitude": (["dora.lora_magnitude.second"], 1e-3, 0.0),
        "other": (["head.weight"], 1e-3, 0.1),
        "other_no_decay": (["norm.weight", "norm.bias", "head.bias"], 1e-3, 0.0),
    }


def test_a_given_rule_says_what_is_decayed() -> None:
    model = inject_lora(Net(), ["embed", "q"], r=2, train_also=["head"])
    decayed = [p for name, p in model.named_parameters() if name.endswith(("embed.lora_A.default", "head.bias"))]
    groups = loraplus_param_groups(model, lr=1e-3, lr_ratio=8, weight_decay=0.1, decayed=decayed)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("lora_A_no_decay", 1e-3, 0.0),
        ("lora_B_no_decay", 8e-3, 0.0),
        ("lora_embedding", 1e-3, 0.1),
        ("lora_embedding_no_decay", 1e-3, 0.0),
        ("other", 1e-3, 0.1),
        ("other_no_decay", 1e-3, 0.0),
    ]
    dora = inject_lora(Net(), ["q"], variant="dora")
    groups = loraplus_param_groups(dora, lr=1e-3, weight_decay=0.1, decayed=dora.parameters())
    assert [(g["name"], g["weight_decay"]) for g in groups] == [
        ("lora_A", 0.1), ("lora_B", 0.1), ("lora_magnitude_decay", 0.1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "rate_A", "rate_B"), [("A", 1e-3, 16e-3), ("geometric", 0.25e-3, 4e-3), ("B", 1e-3 / 16, 1e-3)]
)
def test_lr_modes(mode: str, rate_A: float, rate_B: float) -> None:
    groups = {g["name"]: g for g in loraplus_param_groups(net(), lr=1e-3, lr_ratio=16, lr_mode=mode)}
    assert groups["lora_A"]["lr"] == pytest.approx(rate_A, rel=1e-15)
    assert groups["lora_B"]["lr"] == pytest.approx(rate_B, rel=1e-15)
    assert {groups[name]["lr"] for name in ("lora_embedding", "lora_magnitude", "other", "other_no_decay")} == {1e-3}


@pytest.mark.parametrize("mode", ["A", "geometric", "B"])
def test_ratio_one_is_one_rate_in_every_mode(mode: str) -> None:
    groups = loraplus_param_groups(net(), lr=3e-4, lr_ratio=1, lr_mode=mode)
    assert {g["lr"] for g in groups} == {3e-4}


def test_no_group_is_empty_and_frozen_parameters_are_in_none() -> None:
    model = inject_lora(nn.Sequential(nn.Linear(3, 3)), ["0"], r=1)
    model[0].lora_A["default"].requires_grad_(False)
    groups = loraplus_param_groups(model, lr=1e-3)
    assert [(g["name"], len(g["params"])) for g in groups] == [("lora_B", 1)]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": 0.0}, ValueError, "lr must be finite and positive, got 0.0"),
    ({"lr": float("nan")}, ValueError, "lr must be finite and positive, got nan"),
    ({"lr": "1e-3"}, TypeError, "lr must be a number, got '1e-3'"),
    ({"lr_ratio": 0}, ValueError, "lr_ratio must be finite and positive, got 0"),
    ({"lr_ratio": -4}, ValueError, "lr_ratio must be finite and positive, got -4"),
    ({"lr_ratio": math.inf}, ValueError, "lr_ratio must be finite and positive, got inf"),
    ({"lr_ratio": None}, TypeError, "lr_ratio must be a number, got None"),
    ({"lr_mode": "C"}, ValueError, r"unknown lr_mode 'C'; choose one of \['A', 'B', 'geometric'\]"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and at least 0, got -0.1"),
    ({"embedding_lr": 0.0}, ValueError, "embedding_lr must be finite and positive, got 0.0"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD, ids=str)
def test_bad_numbers(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        loraplus_param_groups(net(), **{"lr": 1e-3, **arguments})


def test_a_model_without_trainable_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has no LoRA adapter; call inject_lora"):
        loraplus_param_groups(nn.Linear(2, 2), lr=1e-3)
    model = inject_lora(nn.Linear(2, 2), "")
    with pytest.raises(ValueError, match="every adapter of the model is frozen"):
        loraplus_param_groups(model.requires_grad_(False), lr=1e-3)


def test_the_optimizer_has_the_rate_as_its_default_and_must_know_decay() -> None:
    optimizer = create_loraplus_optimizer(net(), torch.optim.AdamW, lr=2e-3, lr_ratio=4, betas=(0.8, 0.9))
    assert optimizer.defaults["lr"] == 2e-3
    assert {g["name"]: g["lr"] for g in optimizer.param_groups}["lora_B"] == 8e-3
    assert all(g["weight_decay"] == 0 and g["betas"] == (0.8, 0.9) for g in optimizer.param_groups)
    with pytest.raises(ValueError, match=r"Rprop has no weight decay, so weight_decay=0.1 would have no effect"):
        create_loraplus_optimizer(net(), torch.optim.Rprop, lr=1e-3, weight_decay=0.1)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw-loop": lambda groups, **kw: torch.optim.AdamW(groups, foreach=False, **kw),
    "adamw-foreach": lambda groups, **kw: torch.optim.AdamW(groups, foreach=True, **kw),
    "adamw-fused": lambda groups, **kw: torch.optim.AdamW(groups, fused=True, **kw),
    "sgd-momentum": lambda groups, **kw: torch.optim.SGD(groups, momentum=0.9, **kw),
}


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        tokens = torch.randint(7, (5, 4), generator=generator)
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_ratio_one_follows_plain_lora_bit_for_bit(make: Callable[..., torch.optim.Optimizer]) -> None:
    for dtype in (torch.float32, torch.float64):
        plain, plus = net().to(dtype), net().to(dtype)
        for weight_decay in (0.0, 0.1):
            trained = [p for p in plain.parameters() if p.requires_grad]
            flat = [p for p in trained if p.ndim < 2]
            groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
                      {"params": flat, "weight_decay": 0.0}]  # fmt: skip
            wanted = run(plain, make(groups, lr=1e-2))
            got = run(plus, create_loraplus_optimizer(
                plus, make, lr=1e-2, lr_ratio=1, weight_decay=weight_decay))  # fmt: skip
            assert all(torch.equal(wanted[name], got[name]) for name in wanted)
        other = run(net().to(dtype), create_loraplus_optimizer(plus := net().to(dtype), make, lr=1e-2, lr_ratio=2))
        assert not all(torch.equal(wanted[name], other[name]) for name in wanted)


def linear_problem(alpha: float) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(7, 5, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(5, 7, generator=generator, dtype=torch.float64))
    x = torch.randn(11, 7, generator=generator, dtype=torch.float64)
    y = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    return inject_lora(layer, "", r=3, alpha=alpha, generator=generator), x, y


def trajectory(alpha: float, make: Callable[..., torch.optim.Optimizer], ratio: float) -> torch.Tensor:
    model, x, y = linear_problem(alpha)
    optimizer = create_loraplus_optimizer(model, make, lr=1e-2, lr_ratio=ratio)
    updates = []
    for _ in range(60):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        updates.append(model.effective_weight(model.lora_active).detach())
    return torch.stack(updates)


@pytest.mark.parametrize(
    ("make", "power"),
    [
        # Adam divides a gradient by its own size; eps must not enter, and zero would give 0 / 0 for A's first step
        (lambda groups, **kw: torch.optim.AdamW(groups, eps=1e-300, **kw), 1.0),
        (torch.optim.SGD, 0.5),
    ],
    ids=["adam: alpha * ratio", "sgd: alpha * sqrt(ratio)"],
)
def test_a_ratio_equals_plain_lora_with_a_larger_alpha(
    make: Callable[..., torch.optim.Optimizer], power: float
) -> None:
    ratio = 16.0
    plus = trajectory(6.0, make, ratio)
    plain = trajectory(6.0 * ratio, make, 1.0) if power == 1.0 else sgd_by_hand(6.0, ratio)
    torch.testing.assert_close(plus, plain, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(plus, trajectory(6.0, make, 1.0), rtol=1e-3)


def sgd_by_hand(alpha: float, ratio: float) -> torch.Tensor:
    """Plain gradient descent by hand on W + s B A with s * sqrt(ratio) and one rate lr: B' = B / sqrt(ratio)."""
    model, x, y = linear_problem(alpha)
    W, A = model.weight.detach(), model.lora_A["default"].detach().clone()
    B, s = torch.zeros(5, 3, dtype=torch.float64), alpha / 3 * math.sqrt(ratio)
    updates = []
    for _ in range(60):
        residual = x @ (W + s * B @ A).T - y
        G = 2 / residual.numel() * residual.T @ x
        A, B = A - 1e-2 * s * B.T @ G, B - 1e-2 * s * G @ A.T
        updates.append(W + s * B @ A)
    return torch.stack(updates)


def scalar_run(optimizer_cls: Callable[..., torch.optim.Optimizer], **settings: float) -> list[tuple[float, float]]:
    """f = b * a with L = (f - 1)^2 / 2, a = 0.5, b = 0: the smallest LoRA there is."""
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    model = inject_lora(layer, "", r=1, alpha=1)
    A, B = model.lora_A["default"], model.lora_B["default"]
    nn.init.constant_(A, 0.5)
    optimizer = create_loraplus_optimizer(model, optimizer_cls, **settings)
    path = [(A.item(), B.item())]
    for _ in range(4):
        optimizer.zero_grad()
        ((model(torch.ones(1, dtype=torch.float64)) - 1).square() / 2).sum().backward()
        optimizer.step()
        path.append((A.item(), B.item()))
    return path


@pytest.mark.parametrize(
    ("make", "settings", "wanted"),
    [
        # by hand: t=1 g_b = a u = -.5; t=2 u = -.9, g_a = b u = -.18, g_b = -.45
        (torch.optim.SGD, {"lr": 0.1, "lr_ratio": 4.0},
         [(0.5, 0), (0.5, 0.2), (0.518, 0.38), (0.54852008, 0.546414752), (0.586784441569, 0.700061926366)]),
        (torch.optim.SGD, {"lr": 0.2, "lr_ratio": 4.0, "lr_mode": "geometric"},
         [(0.5, 0), (0.5, 0.2), (0.518, 0.38), (0.54852008, 0.546414752), (0.586784441569, 0.700061926366)]),
        (torch.optim.AdamW, {"lr": 0.1, "lr_ratio": 4.0},
         [(0.5, 0), (0.5, 0.399999992), (0.574413679069, 0.795250305077), (0.659982914598, 1.181869889047),
          (0.748391069058, 1.538647703757)]),
        (torch.optim.AdamW, {"lr": 0.1, "lr_ratio": 4.0, "weight_decay": 0.1},
         [(0.5, 0), (0.495, 0.399999992), (0.564463679077, 0.779008669052), (0.644356952494, 1.134914977991),
          (0.727483805358, 1.45254482819)]),
        (torch.optim.AdamW, {"lr": 0.1, "lr_ratio": 1.0, "weight_decay": 0.1},
         [(0.5, 0), (0.495, 0.099999998), (0.564463671288, 0.198795415412), (0.642333240963, 0.296781188916),
          (0.72435438841, 0.393999242198)]),
    ],
    ids=["sgd", "sgd-geometric", "adamw", "adamw-decay", "adamw-ratio-1-decay"],
)  # fmt: skip
def test_known_answers(make: Any, settings: dict[str, Any], wanted: list[tuple[float, float]]) -> None:
    for got, expected in zip(scalar_run(make, **settings), wanted, strict=True):
        assert got == pytest.approx(expected, abs=1e-11)


def test_split_keeps_every_group_s_own_rate_and_settings() -> None:
    model = inject_lora(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3)), ["0", "1"], train_also="2")
    A0, B0 = model[0].lora_A["default"], model[0].lora_B["default"]
    A1, B1 = model[1].lora_A["default"], model[1].lora_B["default"]
    groups = [
        {"params": [A0, B0], "lr": 1e-3, "weight_decay": 0.1, "name": "early"},
        {"params": iter([A1, B1, *model[2].parameters()]), "lr": 1e-2},
    ]
    kept = copy.copy(groups[0])
    split = split_loraplus_groups(groups, model, lr_ratio=4)
    assert [(g["name"], len(g["params"]), g["lr"], g.get("weight_decay")) for g in split] == [
        ("early", 1, 1e-3, 0.1), ("early.lora_B", 1, 4e-3, 0.1),
        ("group_1", 3, 1e-2, None), ("group_1.lora_B", 1, 4e-2, None),
    ]  # fmt: skip
    assert split[1]["params"][0] is B0 and split[3]["params"][0] is B1
    assert groups[0] == kept
    torch.optim.AdamW(split)
    geometric = split_loraplus_groups([{"params": list(model.parameters())[2:4], "lr": 1.0}], model, lr_ratio=4,
                                      lr_mode="geometric")  # fmt: skip
    assert [(g["name"], g["lr"]) for g in geometric] == [("group_0.lora_A", 0.5), ("group_0.lora_B", 2.0)]
    named = split_loraplus_groups([{"params": list(model.named_parameters()), "lr": 1e-3}], model, lr_ratio=2)
    assert [name for name, _ in named[1]["params"]] == ["0.lora_B.default", "1.lora_B.default"]


def test_split_refuses_what_would_have_no_effect() -> None:
    model = inject_lora(nn.Sequential(nn.Linear(3, 3)), ["0"])
    with pytest.raises(ValueError, match="group 0 has no 'lr'"):
        split_loraplus_groups([{"params": list(model.parameters())}], model, lr_ratio=4)
    with pytest.raises(ValueError, match="no group holds a B matrix of this model"):
        split_loraplus_groups([{"params": [model[0].weight], "lr": 1e-3}], model, lr_ratio=4)


def test_groups_of_a_compiled_or_wrapped_model_are_the_same() -> None:
    model = net()
    wrapped = nn.ModuleDict({"module": torch.compile(model, backend="eager")})
    flat = [id(p) for g in loraplus_param_groups(model, lr=1e-3) for p in g["params"]]
    assert [id(p) for g in loraplus_param_groups(wrapped, lr=1e-3) for p in g["params"]] == flat


def test_the_first_adam_step_moves_b_only_by_its_own_rate() -> None:
    model, x, y = linear_problem(6.0)
    A = model.lora_A["default"].detach().clone()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=8, eps=1e-300)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    assert torch.equal(model.lora_A["default"], A)
    step = model.lora_B["default"].abs()
    torch.testing.assert_close(step, torch.full_like(step, 8e-3), rtol=1e-12, atol=0)


def test_public_names_are_the_documented_ones() -> None:
    assert set(lora_plus.__all__) <= set(dir(lora_plus))


def test_adapters_that_are_trainable_but_not_active_are_refused() -> None:
    model = inject_lora(nn.Sequential(nn.Linear(4, 4)), ["0"], adapter="a")
    inject_lora(model, ["0"], adapter="b")
    lora_plus.set_adapter(model, "a")
    with pytest.raises(ValueError, match=r"the trainable adapters \['b'\] are not active and would get no gradient"):
        loraplus_param_groups(model, lr=1e-3)
    lora_plus.set_adapter(model, ["a", "b"])
    assert loraplus_param_groups(model, lr=1e-3)


def test_a_role_that_is_not_known_is_refused() -> None:
    plain = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    roles = [("x", "A", plain[0].weight), ("x", "lora_B", plain[1].weight)]
    match = (
        r"^unknown role 'lora_B' of the adapter 'x'; choose one of "
        r"\['A', 'B', 'B_bias', 'embedding_A', 'embedding_B', 'magnitude'"
    )
    with pytest.raises(ValueError, match=match):
        loraplus_param_groups(plain, lr=1e-3, roles=iter(roles))
    right = [("x", role.removeprefix("lora_"), parameter) for _, role, parameter in roles]
    optimizer = create_loraplus_optimizer(plain, torch.optim.AdamW, lr=1e-3, lr_ratio=4, roles=iter(right))
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"lora_A": 1e-3, "lora_B": 4e-3}
    lora_plus.check_optimizer(optimizer, plain, roles=iter(right))
    with pytest.raises(ValueError, match=match):
        lora_plus.check_optimizer(optimizer, plain, roles=iter(roles))


# ---- one adapter among several ---------------------------------------------------------------------------------------


def test_the_groups_of_each_adapter_are_together_those_of_all() -> None:
    model = net()
    settings = {"lr": 1e-3, "lr_ratio": 8, "weight_decay": 0.1}
    whole = {id(p): group["lr"] for group in loraplus_param_groups(model, **settings) for p in group["params"]}
    parts = [loraplus_param_groups(model, adapter=name, **settings) for name in ("default", "second")]
    assert [[group["name"] for group in groups] for groups in parts] == [
        ["lora_A", "lora_B", "lora_embedding", "other", "other_no_decay"],
        ["lora_A", "lora_B", "lora_magnitude"],
    ]
    found = [{id(p): group["lr"] for group in groups for p in group["params"]} for groups in parts]
    assert found[0] | found[1] == whole and not found[0].keys() & found[1].keys()


def test_an_optimizer_of_one_adapter_need_not_be_of_an_active_one() -> None:
    model = inject_lora(Net(), ["q"], r=2, adapter="a")
    inject_lora(model, ["q"], r=2, adapter="b")  # which freezes a
    with pytest.raises(ValueError, match="adapter 'a' is frozen"):
        loraplus_param_groups(model, lr=1e-3, adapter="a")
    for name, parameter in model.named_parameters():
        if name.endswith(".a"):
            parameter.requires_grad_()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=2, adapter="a")
    own = [parameter for name, parameter in model.named_parameters() if name.endswith(".a")]
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in own]
    with pytest.raises(KeyError, match="the model has no adapter 'c'"):
        loraplus_param_groups(model, lr=1e-3, adapter="c")

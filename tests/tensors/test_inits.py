"""How adapters start: each init's own law, and those of adapters that start from a part of the weight."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from cases import CASES, Case, explicit, randomise
from safetensors.torch import load_file
from torch import nn

import lora_plus as lp
from lora_plus.surgery import resize_adapter
from lora_plus.tensors.init import INITS, PRINCIPAL, InitName
from lora_plus.tensors.starts import milora, olora, pissa
from lora_plus.tensors.variant import SCALINGS, VARIANTS, Scaling, VariantName
from lora_plus.training import fold_lr_ratio, reset_lora_parameters

BY_NAME = {case.name: case for case in CASES}
KINDS = [BY_NAME[name] for name in ("linear", "linear-dora", "conv1d-gpt2", "embedding-padding", "conv2d-groups",
                                    "conv-transpose1d", "own-linear", "linear-rslora", "linear-fa")]  # fmt: skip


@pytest.fixture(params=KINDS, ids=lambda case: case.name)
def kind(request: pytest.FixtureRequest) -> Case:
    return request.param


def _weight(rows: int = 40, columns: int = 60) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64)


# ---- those that start at zero ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", sorted(INITS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_update_starts_at_zero_and_follows_the_generator(init: str, dtype: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Linear(16, 8)).to(dtype), torch.randn(4, 16).to(dtype)
    wanted, state = model(x), torch.get_rng_state()
    drawn = []
    for _ in range(2):
        adapted = lp.inject_lora(
            copy.deepcopy(model), ["0"], r=3, init=init, generator=torch.Generator().manual_seed(5)
        )
        assert torch.equal(adapted(x), wanted)
        drawn.append(list(adapted[0].lora_adapters["default"].tensors().values()))
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_gaussian_has_variance_one_over_in() -> None:
    A, B = INITS["gaussian"](torch.empty(3, 400), 50, torch.Generator().manual_seed(0))
    assert A.std().item() == pytest.approx(1 / 20, rel=0.02) and not B.any()


def test_kaiming_B_is_the_default_with_the_factors_exchanged() -> None:
    A, B = INITS["kaiming_B"](torch.empty(400, 30), 50, torch.Generator().manual_seed(0))
    assert not A.any() and B.abs().max() <= 1 / math.sqrt(50) and B.std() == pytest.approx(1 / math.sqrt(150), rel=0.02)


def test_an_embedding_starts_with_A_zero_and_B_standard_normal() -> None:
    model = lp.inject_lora(nn.Sequential(nn.Embedding(300, 200)), ["0"], r=50)
    A, B = model[0].lora_A["default"].detach(), model[0].lora_B["default"].detach()
    assert not A.any() and B.std().item() == pytest.approx(1, rel=0.02) and abs(float(B.mean())) < 0.02
    frozen = lp.inject_lora(nn.Sequential(nn.Embedding(30, 20)), ["0"], variant="lora_fa")[0]
    assert frozen.lora_A["default"].any() and not frozen.lora_B["default"].any()  # a frozen A of zeros would be inert
    chosen = lp.inject_lora(nn.Sequential(nn.Embedding(30, 20)), ["0"], init="gaussian")[0]
    assert chosen.lora_A["default"].any() and not chosen.lora_B["default"].any()


@pytest.mark.peers
@pytest.mark.parametrize("vocabulary", [1000, 30000])
@pytest.mark.parametrize(("embedding_lr", "share"), [(None, 5.75e-2), (1e-6, 6e-4)])
def test_the_rows_of_an_embedding_move_as_those_of_peft_do(
    vocabulary: int, embedding_lr: float | None, share: float
) -> None:
    """By this share of themselves in 100 steps at lr=1e-4, at every vocabulary, and only those that are looked up."""
    peft = pytest.importorskip("peft")
    from lora_plus.engines.peft import peft_roles

    moved = []
    tokens = torch.arange(500)
    for theirs in (False, True):
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Embedding(vocabulary, 256), nn.Linear(256, 8))
        if theirs:
            model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
        else:
            lp.inject_lora(model, ["0"], r=8, alpha=16)
        embed = model.base_model.model[0] if theirs else model[0]
        before = embed(torch.arange(1000)).detach()
        roles = list(peft_roles(model)) if theirs else []
        optimizer = lp.create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-4, embedding_lr=embedding_lr, roles=roles
        )
        for _ in range(100):
            optimizer.zero_grad()
            (model(tokens[None]) - 1).square().mean().backward()
            optimizer.step()
        change = (embed(torch.arange(1000)) - before).detach()
        assert change[:500].abs().sum(1).all() and not change[500:].any()
        moved.append(float(change[:500].norm() / before[:500].norm()))
    assert moved[0] == pytest.approx(share, rel=0.2) and moved[0] / moved[1] == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize(("r", "columns"), [(4, 9), (9, 9), (12, 9)])
def test_orthogonal_has_orthogonal_rows_or_columns_of_kaiming_s_size(r: int, columns: int) -> None:
    A, _ = INITS["orthogonal"](_weight(5, columns), r, torch.Generator().manual_seed(0))
    gram = A @ A.T if r <= columns else A.T @ A
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=A.dtype) * gram[0, 0], rtol=0, atol=1e-12)
    assert A.square().sum().item() == pytest.approx(r / 3)


def test_a_frozen_A_of_zeros_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="variant 'lora_fa' freezes A, and init 'kaiming_B' makes it zero"):
        lp.inject_lora(model, ["0"], init="kaiming_B", variant="lora_fa")
    assert type(model[0]) is nn.Linear


def test_an_init_function_that_returns_zeros_for_both_is_refused() -> None:
    """The gradient of each is a product with the other, so neither would ever move."""

    def zeros(weight: torch.Tensor, r: int, generator: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(r, weight.shape[1]), torch.zeros(weight.shape[0], r)

    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="returned A = 0 and B = 0, which no gradient moves"):
        lp.inject_lora(model, ["0"], init=zeros)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("init", ["pisa", None, 3, ["pissa"]])
def test_an_unknown_init_names_those_that_there_are(init: object) -> None:
    with pytest.raises(ValueError, match=r"unknown init .*choose one of \['gaussian', .*'pissa'\] or pass a function"):
        lp.inject_lora(nn.Sequential(nn.Linear(4, 4)), ["0"], init=init)  # type: ignore[arg-type]


# ---- LoRA-FA ---------------------------------------------------------------------------------------------------------


def test_lora_fa_trains_B_alone_and_keeps_no_input_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(128, 64, requires_grad=True)
    lp.inject_lora(model, ["0"], r=2, variant="lora_fa")
    A = model[0].lora_A["default"].detach().clone()
    groups = lp.loraplus_param_groups(model, lr=1e-2)
    assert [group["name"] for group in groups] == ["lora_B"]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    assert not any(t.shape == x.shape for t in kept)
    y.square().mean().backward()
    torch.optim.SGD(groups).step()
    assert torch.equal(model[0].lora_A["default"], A) and model[0].lora_B["default"].any()


def test_a_loaded_lora_fa_adapter_still_trains_B_alone(tmp_path: Path) -> None:
    model = randomise(lp.inject_lora(nn.Sequential(nn.Linear(6, 5)), ["0"], variant="lora_fa"))
    lp.save_adapter(model, tmp_path / "a.safetensors")
    fresh = lp.load_adapter(nn.Sequential(nn.Linear(6, 5)), tmp_path / "a.safetensors", trainable=True)
    assert [name for name, p in fresh.named_parameters() if p.requires_grad] == ["0.lora_B.default"]


# ---- those that start from a part of the weight ----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.25, -2.0])
@pytest.mark.parametrize("r", [1, 7, 40])
def test_pissa_and_milora_take_the_largest_and_smallest_singular_values(r: int, scale: float) -> None:
    weight = _weight()
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    for init, chosen in ((pissa, slice(0, r)), (milora, slice(40 - r, 40))):
        A, B = init(weight, r, scale)
        wanted = U[:, chosen] @ torch.diag(S[chosen]) @ Vh[chosen]
        torch.testing.assert_close(scale * B @ A, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(A @ A.T, torch.diag(S[chosen] / abs(scale)), rtol=0, atol=1e-11)
        torch.testing.assert_close(B.T @ B, A @ A.T, rtol=0, atol=1e-11)


def test_olora_takes_the_first_columns_of_the_qr_decomposition() -> None:
    weight = _weight()
    A, B = olora(weight, 40, 3.0)
    torch.testing.assert_close(B @ A, weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(B.T @ B, torch.eye(40, dtype=B.dtype), rtol=0, atol=1e-12)
    assert not A.tril(-1).any()


@pytest.mark.peers
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_starting_factors_are_peft_s(init: str) -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(12, 10))  # the dtype that PEFT takes here
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=init),
        autocast_adapter_dtype=False,
    )  # fmt: skip
    layer = theirs.base_model.model[0]
    ours = lp.inject_lora(copy.deepcopy(base), ["0"], r=3, alpha=5, init=init)[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    signs = (A * ours.lora_A["default"]).sum(1).sign()  # of singular vectors
    torch.testing.assert_close(signs[:, None] * ours.lora_A["default"], A, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(signs * ours.lora_B["default"], B, rtol=1e-5, atol=1e-6)
    # PEFT changes the base weight by what we take out of the update
    moved = ours.weight - 5 / 3 * ours.lora_B0["default"] @ ours.lora_A0["default"]
    torch.testing.assert_close(moved, layer.base_layer.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", sorted(PRINCIPAL))
def test_the_model_starts_where_it_was_and_the_base_is_left_alone(kind: Case, init: str) -> None:
    model, x = kind.model(), kind.input()
    before, wanted = copy.deepcopy(model.state_dict()), model(x)
    lp.inject_lora(model, ["layer"], **{**kind.settings, "init": init})
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    site = model.layer
    assert torch.equal(site.lora_A["default"], site.lora_A0["default"]) and site.lora_A["default"].any()
    assert not site.lora_A0["default"].requires_grad and not site.lora_B0["default"].requires_grad


@pytest.mark.parametrize("init", sorted(PRINCIPAL))
def test_forward_is_merged_is_the_explicit_weight(kind: Case, init: str, tmp_path: Path) -> None:
    model, x = kind.adapted(init=init), kind.input()
    wanted = explicit(model)(x)
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad(), lp.merged(model):
        torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(copy.deepcopy(model)(x), wanted, rtol=1e-12, atol=1e-12)
    lp.save_adapter(model, tmp_path / "a.safetensors")  # as the update that it is, of rank 2 r
    assert (
        load_file(tmp_path / "a.safetensors")["layer.lora_A"].shape[-2] == 2 * model.layer.lora_A["default"].shape[-2]
    )
    fresh = lp.load_adapter(kind.model(), tmp_path / "a.safetensors", trainable=True)
    torch.testing.assert_close(fresh(x), wanted, rtol=1e-12, atol=1e-12)
    assert fresh.layer.lora_adapters["default"].spec == model.layer.lora_adapters["default"].spec
    there = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for name, parameter in fresh.named_parameters():
        if "lora_" in name:
            own = there.pop(name)
            assert torch.equal(parameter, own) and parameter.requires_grad == own.requires_grad, name
    assert not there


@pytest.mark.parametrize("init", sorted(PRINCIPAL))
def test_training_moves_what_is_trained_and_nothing_else(kind: Case, init: str) -> None:
    model, x = lp.inject_lora(kind.model(), ["layer"], **{**kind.settings, "init": init}), kind.input()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = lp.create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    moved = {name.split(".")[1] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {"lora_A", "lora_B", "lora_magnitude"} & {name.split(".")[1] for name in before}
    assert moved == trained - ({"lora_A"} if kind.name == "linear-fa" else set())


@pytest.mark.peers
def test_a_pissa_adapter_opens_in_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, x = nn.Sequential(nn.Linear(12, 10)).double(), torch.randn(4, 12, dtype=torch.float64)
    model = randomise(lp.inject_lora(copy.deepcopy(base), ["0"], r=3, alpha=5, init="pissa"))
    lp.save_adapter(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a", autocast_adapter_dtype=False)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-12, atol=1e-12)


def test_blocks_of_rows_and_stacks_start_from_their_own_part() -> None:
    model, x = nn.ModuleDict({"qkv": nn.Linear(8, 24)}).double(), torch.randn(3, 8, dtype=torch.float64)
    wanted = model["qkv"](x)
    lp.inject_lora(model, ["qkv.q", "qkv.v"], fused={"qkv": ["q", "k", "v"]}, r=2, init="pissa")
    torch.testing.assert_close(model["qkv"](x), wanted, rtol=1e-12, atol=1e-12)
    randomise(model)
    adapter = model["qkv"].adapter_named("default")
    (A, B), scale = adapter.factors(), adapter.scale
    torch.testing.assert_close(model["qkv"](x), wanted + scale * x @ A.T @ B.T, rtol=1e-12, atol=1e-12)

    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    y = torch.randn(2, 3, 8, dtype=torch.float64)
    wanted = attention(y, y, y)[0]
    lp.inject_lora(attention, "all-linear", r=2, init="olora")
    torch.testing.assert_close(attention(y, y, y)[0], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("r", [2, 3, 6, 8])
def test_resizing_makes_a_plain_adapter_of_the_same_update(r: int) -> None:
    model, x = nn.Sequential(nn.Linear(12, 10)).double(), torch.randn(4, 12, dtype=torch.float64)
    randomise(lp.inject_lora(model, ["0"], r=3, init="pissa"))
    before = model(x)
    report = resize_adapter(model, r=r)
    assert list(dict(model[0].named_parameters())) == ["weight", "bias", "lora_A.default", "lora_B.default"]
    assert model[0].lora_A["default"].shape == (r, 12) and model[0].lora_A["default"].requires_grad
    if r >= 6:
        torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    else:
        assert 0 < report.errors["0"] < 1


def test_state_dicts_go_on_where_they_were() -> None:
    base, x = nn.Sequential(nn.Linear(12, 10)), torch.randn(4, 12)
    model = randomise(lp.inject_lora(copy.deepcopy(base), ["0"], r=3, init="pissa"))
    other = lp.inject_lora(copy.deepcopy(base), ["0"], r=3, init="pissa")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    reset_lora_parameters(other, init="pissa")
    torch.testing.assert_close(other(x), base(x))
    reset_lora_parameters(other)  # kaiming takes nothing out
    assert torch.equal(other(x), base(x))
    plain = lp.inject_lora(copy.deepcopy(base), ["0"], r=3)
    with pytest.raises(ValueError, match="init 'pissa' needs tensors that the adapter 'default' does not have"):
        reset_lora_parameters(plain, init="pissa")


def test_a_start_needs_the_weight_and_enough_directions() -> None:
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(ValueError, match="init 'pissa' starts from the weight, which has no values"):
        lp.inject_lora(empty, ["0"], r=2, init="pissa")
    with pytest.raises(ValueError, match="init 'olora' takes r=6 directions of a weight that has 5"):
        lp.inject_lora(nn.Sequential(nn.Linear(6, 5)), ["0"], r=6, init="olora")


@pytest.mark.parametrize("settings", [{"init": "pissa"}, {"variant": "lora_fa"}], ids=["pissa", "lora_fa"])
def test_choosing_what_is_trained_leaves_fixed_tensors_fixed(settings: dict[str, str]) -> None:
    model = lp.inject_lora(nn.Sequential(nn.Linear(12, 10)), ["0"], r=3, **settings)
    trained = [p.requires_grad for p in model.parameters()]
    lp.set_adapter(model, "default", trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    lp.set_adapter(model, "default", trainable=True)
    assert [p.requires_grad for p in model.parameters()] == trained


def test_check_adapters_and_compile_take_such_adapters() -> None:
    model, x = nn.Sequential(nn.Linear(12, 10)), torch.randn(4, 12)
    lp.inject_lora(model, ["0"], r=3, init="milora")
    assert lp.check_adapters(model, x) == ["0"]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("init", sorted(PRINCIPAL))
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_folding_a_ratio_in_does_not_change_what_is_computed(init: str, variant: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(12, 10)).double(), torch.randn(4, 12, dtype=torch.float64)
    randomise(lp.inject_lora(model, ["0"], r=3, alpha=5, init=init, variant=variant))
    before = model(x)
    fold_lr_ratio(model, 3)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    lp.save_adapter(model, tmp_path / "folded.safetensors")
    loaded = lp.load_adapter(lp.remove_lora(copy.deepcopy(model)), tmp_path / "folded.safetensors")
    torch.testing.assert_close(loaded(x), before, rtol=1e-12, atol=1e-12)
    resize_adapter(model, r=8)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_signatures_name_the_entries_of_the_tables() -> None:
    chosen = [name for name, variant in VARIANTS.items() if variant.factors]  # the others are made by train_rows
    tables = {InitName: (*INITS, *PRINCIPAL), Scaling: SCALINGS, VariantName: chosen}
    for names, table in tables.items():
        assert get_args(names) == tuple(table)

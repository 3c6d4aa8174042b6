"""Adapters that start along the gradient of the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import Case
from torch import Tensor, nn

import lora_plus as lp
from lora_plus.files import adapter_state_dict
from lora_plus.tensors import matrix as functional
from lora_plus.training import init_from_gradients


def _loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: (model(x) - 1).pow(3).mean()


def _projector(rows: Tensor) -> Tensor:
    return torch.linalg.pinv(rows) @ rows


def test_a_factor_spans_the_top_singular_vectors_and_nothing_else_changes(case: Case) -> None:
    model, x = case.model(), case.input()
    plain = copy.deepcopy(model)
    _loss(plain)(x).backward()
    wanted = model(x).detach()
    r = min(2, *functional.to_matrix(plain.layer.weight, "o ... -> o (...)").shape)
    lp.inject_lora(model, ["layer"], **{**case.settings, "r": r})
    flags = [p.requires_grad for p in model.parameters()]
    layer = model.layer
    A, B = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
    rows, zero, size = (B.T, A, float(B.square().sum()) / r) if B.any() else (A, B, 1 / 3)
    init_from_gradients(model, _loss(model), [x])
    G = functional.to_matrix(plain.layer.weight.grad, layer.layout)
    S, Vh = torch.linalg.svd(G if rows is A else G.T, full_matrices=False)[1:]
    torch.testing.assert_close(rows @ rows.T, size * torch.eye(r, dtype=A.dtype), rtol=0, atol=1e-12)
    if len(S) == r or S[r - 1] > 1.001 * S[r]:
        torch.testing.assert_close(_projector(rows), _projector(Vh[:r]), rtol=0, atol=1e-8)
    assert torch.equal(model(x), wanted) and not zero.any()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_several_batches_add_up() -> None:
    base, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(8, 6, dtype=torch.float64)
    whole, parts = (lp.inject_lora(copy.deepcopy(base), ["0"], r=2) for _ in "ab")
    init_from_gradients(whole, _loss(whole), [x])
    init_from_gradients(parts, _loss(parts), iter(x.split(2)))
    torch.testing.assert_close(
        _projector(whole[0].lora_A["default"].detach()), _projector(parts[0].lora_A["default"].detach())
    )


def test_the_first_step_of_B_moves_along_the_best_approximation_of_the_gradient() -> None:
    base, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(8, 6, dtype=torch.float64)
    model, plain = lp.inject_lora(copy.deepcopy(base), ["0"], r=2, alpha=2), copy.deepcopy(base)
    _loss(plain)(x).backward()
    U, S, Vh = torch.linalg.svd(plain[0].weight.grad)
    init_from_gradients(model, _loss(model), [x])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    _loss(model)(x).backward()
    optimizer.step()
    adapter = model[0].lora_adapters["default"]
    (A, B), scale = adapter.factors(), adapter.scale
    torch.testing.assert_close(scale * B @ A, -0.1 * U[:, :2] @ torch.diag(S[:2]) @ Vh[:2])


def test_attention_blocks_of_rows_and_stacks() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    plain = copy.deepcopy(attention)
    plain(x, x, x)[0].pow(3).mean().backward()
    lp.inject_lora(attention, ["q", "v"], r=2)
    init_from_gradients(attention, lambda x: attention(x, x, x)[0].pow(3).mean(), [x])
    for place, rows in (("q", slice(0, 8)), ("v", slice(16, 24))):
        A = adapter_state_dict(attention)[f"{place}.lora_A"]
        Vh = torch.linalg.svd(plain.in_proj_weight.grad[rows])[2]
        torch.testing.assert_close(_projector(A), _projector(Vh[:2]), rtol=0, atol=1e-8)


def test_buffers_gradients_and_random_states_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    lp.inject_lora(model, ["0"], r=2, train_also=["3"])
    model[3].weight.grad = torch.ones(3, 5)
    batch, buffers, state = torch.randn(8, 6), copy.deepcopy(dict(model.named_buffers())), torch.get_rng_state()
    init_from_gradients(model, _loss(model), [batch])
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[3].weight.grad, torch.ones(3, 5)) and model[0].weight.grad is None


class _TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layers_without_a_gradient_are_named_and_nothing_changes() -> None:
    model = lp.inject_lora(_TwoLayers(), ["used", "idle"], r=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'idle': the loss does not depend on it"):
        init_from_gradients(model, _loss(model), [torch.randn(3, 4)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_start_from_gradients_is_refused() -> None:
    model = lp.inject_lora(_TwoLayers(), ["used"], r=2)
    with pytest.raises(ValueError, match="no batch given"):
        init_from_gradients(model, _loss(model), [])
    with pytest.raises(KeyError, match="no adapter 'other'"):
        init_from_gradients(model, _loss(model), [torch.randn(3, 4)], adapter="other")
    with torch.no_grad():
        model.used.lora_B["default"][0, 0] = 1
    with pytest.raises(ValueError, match="'used': its update is not zero"):
        init_from_gradients(model, _loss(model), [torch.randn(3, 4)])
    assert not model.used.weight.requires_grad
    with lp.merged(model), pytest.raises(ValueError, match=r"^starting an adapter from gradients needs unmer"):
        init_from_gradients(model, _loss(model), [torch.randn(3, 4)])
    lp.inject_lora(model, ["used"], r=2, init="pissa", adapter="pissa")
    with pytest.raises(ValueError, match="injected with an init that leaves A or B zero"):
        init_from_gradients(model, _loss(model), [torch.randn(3, 4)], adapter="pissa")

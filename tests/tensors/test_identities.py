"""What LoRA+ is, on this library's models and optimizers: gradients, scales, what is conserved, growth with width."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randomise
from torch import Tensor, nn

from lora_plus import create_loraplus_optimizer, inject_lora

# ---- gradients and steps ---------------------------------------------------------------------------------------------


def problem(r: int = 3, **settings: Any) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(7, 5, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(5, 7, generator=generator, dtype=torch.float64))
    x = torch.randn(11, 7, generator=generator, dtype=torch.float64)
    y = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    return inject_lora(layer, "", r=r, generator=generator, **settings), x, y


def test_the_gradients_are_those_of_the_weight_times_the_other_factor() -> None:
    model, x, y = problem(alpha=6)
    randomise(model)
    A, B = model.lora_A["default"], model.lora_B["default"]
    (model(x) - y).square().mean().backward()
    W = (model.weight + 2 * B @ A).detach().requires_grad_(True)
    ((x @ W.T) - y).square().mean().backward()
    assert W.grad is not None
    torch.testing.assert_close(A.grad, 2 * B.detach().T @ W.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(B.grad, 2 * W.grad @ A.detach().T, rtol=1e-12, atol=1e-14)


def test_at_the_start_only_b_moves_by_the_sign_of_its_gradient() -> None:
    model, x, y = problem(alpha=6)
    A = model.lora_A["default"].detach().clone()
    optimizer = create_loraplus_optimizer(model, torch.optim.Adam, lr=1e-3, lr_ratio=8, eps=1e-300)
    (model(x) - y).square().mean().backward()
    G = 2 / y.numel() * (x @ model.weight.detach().T - y).T @ x
    assert not model.lora_A["default"].grad.any()
    optimizer.step()
    assert torch.equal(model.lora_A["default"], A)
    torch.testing.assert_close(model.lora_B["default"].detach(), -8e-3 * (G @ A.T).sign(), rtol=1e-12, atol=0)


def losses(make: Callable[..., torch.optim.Optimizer], lr_ratio: float, **settings: Any) -> list[float]:
    model, x, y = problem(**settings)
    optimizer = create_loraplus_optimizer(model, make, lr=1e-2, lr_ratio=lr_ratio)
    path = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        path.append(loss.item())
    return path


def adam(groups: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, eps=1e-300, **settings)


@pytest.mark.parametrize("r", [3, 4])
@pytest.mark.parametrize(
    ("make", "power"),
    [(adam, 1.0), (torch.optim.SGD, 0.5)],
    ids=["adam: rslora is a ratio of sqrt(r)", "sgd: rslora is a ratio of r"],
)
def test_rslora_is_a_ratio(make: Callable[..., torch.optim.Optimizer], power: float, r: int) -> None:
    ratio = math.sqrt(r) ** (1 / power)
    rslora = losses(make, 1.0, r=r, alpha=6, scaling="rslora")
    plus = losses(make, ratio, r=r, alpha=6)
    assert rslora == pytest.approx(plus, rel=1e-10)
    assert rslora != pytest.approx(losses(make, 1.0, r=r, alpha=6), rel=1e-3)


def test_small_steps_conserve_what_gradient_flow_conserves() -> None:
    """B^T B / rate_B - A A^T / rate_A is constant under gradient flow, and a step of size h changes it by h^2."""
    drifts = []
    for h in (1e-2, 1e-3):
        model, x, y = problem(alpha=6)
        A, B = model.lora_A["default"], model.lora_B["default"]
        optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=h, lr_ratio=16)

        def balance(A: Tensor = A, B: Tensor = B) -> Tensor:
            return (B.T @ B / 16 - A @ A.T).detach()

        start = balance()
        for _ in range(round(1 / h)):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        drifts.append(float((balance() - start).norm() / start.norm()))
    assert drifts[1] < 0.01 and drifts[0] / drifts[1] == pytest.approx(10, rel=0.1)


# ---- width (Hayou et al. 2024, arXiv:2402.12354, theorem 1) ----------------------------------------------------------


class Wide(nn.Module):
    """Features of width n, an adapted n x n layer, ReLU, and a head that divides by n."""

    def __init__(self, n: int, seed: int) -> None:
        super().__init__()
        task = torch.Generator().manual_seed(1000 * seed + 7)
        x, v = torch.randn(64, 16, generator=task), torch.randn(16, generator=task)
        generator = torch.Generator().manual_seed(1000 * seed + n)
        w_in = torch.randn(n, 16, generator=generator) / 4
        self.hidden = nn.Linear(n, n, bias=False)
        with torch.no_grad():
            self.hidden.weight.normal_(0, math.sqrt(2 / n), generator=generator)
        self.head = torch.randn(n, generator=generator) / n
        inject_lora(self, ["hidden"], r=4, alpha=4, generator=generator)
        self.x = math.sqrt(2) * torch.relu(x @ w_in.T)
        wave = torch.sin(2 * x @ (v / v.norm()))
        self.y = self().detach() + wave / wave.std()

    def forward(self) -> Tensor:
        return torch.relu(self.hidden(self.x)) @ self.head


WIDTHS = (64, 128, 256, 512, 1024)
TERMS = ("B dA x", "dB A x", "dB dA x", "A x", "B")


def rms_at_each_step(n: int, seed: int, lr: float, lr_ratio: float, steps: int = 10) -> list[list[float]]:
    """The root mean square of each of the terms, step by step."""
    model = Wide(n, seed)
    A, B, x = model.hidden.lora_A["default"], model.hidden.lora_B["default"], model.x
    optimizer = create_loraplus_optimizer(model, torch.optim.Adam, lr=lr, lr_ratio=lr_ratio, eps=1e-12)
    path = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model() - model.y).square().mean().backward()
        A0, B0 = A.detach().clone(), B.detach().clone()
        optimizer.step()
        dA, dB = A.detach() - A0, B.detach() - B0
        terms = ((x @ dA.T) @ B0.T, (x @ A0.T) @ dB.T, (x @ dA.T) @ dB.T, x @ A0.T, B0)
        path.append([float(term.square().mean().sqrt()) for term in terms])
    return path


def exponents(step: int, rates: Callable[[int], tuple[float, float]]) -> dict[str, float]:
    """How each term grows with the width n: the slope of log2(RMS) over log2(n)."""
    sizes = [
        torch.tensor([rms_at_each_step(n, seed, *rates(n), steps=step)[-1] for seed in range(3)]).mean(0).log2()
        for n in WIDTHS
    ]
    log_n = torch.tensor(WIDTHS).log2()
    centred = log_n - log_n.mean()
    slopes = (centred @ torch.stack(sizes)) / centred.square().sum()
    return dict(zip(TERMS, slopes.tolist(), strict=True))


@pytest.mark.parametrize("step", [3, 10])
def test_with_a_ratio_that_grows_with_the_width_every_term_stays_what_it_is(step: int) -> None:
    found = exponents(step, lambda n: (0.01 * 64 / n, 0.2 / (0.01 * 64 / n)))
    assert all(abs(slope) <= 0.1 for slope in found.values()), found


def test_with_equal_rates_the_features_of_a_grow_with_the_square_root_of_the_width() -> None:
    found = exponents(10, lambda n: (0.05 * math.sqrt(64 / n), 1.0))
    assert 0.35 <= found["A x"] <= 0.65, found
    assert all(abs(found[term]) <= 0.1 for term in TERMS[:3]), found
    assert found["B"] == pytest.approx(-0.5, abs=0.1)


def test_with_equal_rates_that_keep_the_features_of_a_the_updates_vanish() -> None:
    found = exponents(3, lambda n: (0.05 * 64 / n, 1.0))
    assert abs(found["A x"]) <= 0.1
    assert all(found[term] == pytest.approx(-1, abs=0.15) for term in TERMS[:3]), found

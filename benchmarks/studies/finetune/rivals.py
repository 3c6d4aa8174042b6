"""Optimizers that set the balance of A and B by each other's Gram matrix, where LoRA+ sets it by a ratio.

Each is a rule for one factor, which is written ``(n, r)``: B, or the transpose of A. The rule sees the factor's
gradient and the other factor. `attach` puts a pair of rules before the step of any torch optimizer. With an invertible
T, ``(T A, B T^-1)`` is the same update as ``(A, B)``; the tests say which rules take the same step from both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from methods import adamw
from torch import Tensor, nn

from lora_plus.model.tree import adapters_of

Rule = Callable[[Tensor, Tensor], Tensor]
"""From the gradient ``(n, r)`` of a factor and the other factor ``(m, r)`` to a direction ``(n, r)``, in float64."""
CUTOFF = 1e-12
"""Eigenvalues of a Gram matrix below this part of the largest one count as zero."""


def inverse_root(gram: Tensor) -> Tensor:
    """``S^-1/2`` of a symmetric ``(r, r)``, zero where S is: the factor that starts at zero has no directions yet.

    All NaN if S is not finite, as in a run that diverges.
    """
    if not gram.isfinite().all():
        return torch.full_like(gram, torch.nan)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > CUTOFF * values[-1].clamp(min=torch.finfo(gram.dtype).tiny)
    return vectors * torch.where(kept, values, torch.inf).rsqrt() @ vectors.T


class Riemannian:
    """``g (Y^T Y + d I)^-1``, a gradient that an optimizer then goes on with.

    The scaled gradient of Zhang & Pilanci 2024 (arXiv:2402.02347), which is preconditioned before AdamW's moments. With
    SGD and d = 0 it is invariant; AdamW works on entries, and is not.
    """

    def __init__(self, damping: float = 1e-6) -> None:
        self.damping = damping

    def __call__(self, gradient: Tensor, other: Tensor) -> Tensor:
        gram = other.T @ other
        return torch.linalg.solve(gram + self.damping * torch.eye(len(gram), dtype=gram.dtype), gradient.T).T


class Muon:
    """``msign(m S^-1/2) S^-1/2 / 2`` with ``S = Y^T Y``, m the mean of gradients, and msign(X) = ``X (X^T X)^-1/2``.

    LoRA-Muon (Cesista et al. 2026, arXiv:2606.12921), without its split weight decay and with exact roots. All singular
    values of what a step of one factor adds to B A are half the rate.
    """

    def __init__(self, beta: float = 0.9) -> None:
        self.beta = beta
        self.mean: Tensor | float = 0.0

    def __call__(self, gradient: Tensor, other: Tensor) -> Tensor:
        self.mean = self.beta * self.mean + (1 - self.beta) * gradient
        root = inverse_root(other.T @ other)
        free = self.mean @ root
        return free @ inverse_root(free.T @ free) @ root / 2


class Rite:
    """Adam with a matrix for its second moment, in the basis of the other factor.

    LoRA-RITE (Yen et al. 2024, arXiv:2410.20625, algorithm 1): with ``Y = U R`` the gradient ``g R^-1`` does not depend
    on the size of Y. Its moments are carried from the last U to this one, and what the second loses on the way is added
    to it. Means run as in the authors' code, with Adam's correction for their start and over the n rows. Here R is
    symmetric; another choice turns U, and the step stays.
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.betas, self.t = betas, 0
        self.basis: Tensor | None = None
        self.escaped: Tensor | float = 0.0

    def __call__(self, gradient: Tensor, other: Tensor) -> Tensor:
        n, r = gradient.shape
        root = inverse_root(other.T @ other)
        basis, free = other @ root, gradient @ root
        if self.basis is None:
            self.basis, self.first, self.second = basis, torch.zeros_like(free), free.new_zeros(r, r)
        self.t += 1
        keep, keep_square = (beta * (1 - beta ** (self.t - 1)) / (1 - beta**self.t) for beta in self.betas)
        turned = basis.T @ self.basis
        carried = turned @ self.second @ turned.T
        lost = (torch.linalg.eigvalsh(self.second) - torch.linalg.eigvalsh(carried)).abs().max()
        self.escaped = keep_square * (self.escaped + lost)
        self.second = keep_square * carried + (1 - keep_square) * free.T @ free / n
        size = inverse_root(self.second + self.escaped * torch.eye(r, dtype=free.dtype))
        self.first = keep * self.first @ turned.T + (1 - keep) * free @ size
        self.basis = basis
        return self.first @ root


def factors(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """A ``(r, in)`` and B ``(out, r)`` of every adapter."""
    for _, adapter, _ in adapters_of(model):
        of_role = dict(adapter.parameters())
        yield of_role["A"], of_role["B"]


def attach(optimizer: torch.optim.Optimizer, model: nn.Module, rule: Callable[[], Rule], *, whole: bool) -> None:
    """Let a rule act on each A and B before each step of the optimizer, which holds them.

    Args:
        optimizer: of which A and B have their rates.
        model: with adapters.
        rule: makes the rule of one factor.
        whole: whether the direction times the rate is the step. The optimizer then does not see A and B. Otherwise the
            direction takes the place of the gradient.
    """
    pairs = [(A, B, rule(), rule()) for A, B in factors(model)]

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for A, B, rule_A, rule_B in pairs:
            tall = [x.detach().double() for x in (A.T, B, _gradient(A).T, _gradient(B))]
            directions = rule_A(tall[2], tall[1]).T, rule_B(tall[3], tall[0])
            for factor, direction in zip((A, B), directions, strict=True):
                if whole:
                    factor.data.sub_(rates[factor] * direction.to(factor.dtype))
                factor.grad = None if whole else direction.to(factor.dtype)

    optimizer.register_step_pre_hook(before)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _with_adamw(
    model: nn.Module, groups: list[dict[str, Any]], *, rule: Callable[[], Rule], whole: bool
) -> torch.optim.Optimizer:
    optimizer = adamw(model, groups)
    attach(optimizer, model, rule, whole=whole)
    return optimizer


def under_adamw(rule: Callable[[], Rule], *, whole: bool) -> Callable[..., torch.optim.Optimizer]:
    """What `methods.Method.optimizer` takes: AdamW, with a rule for A and B before its step."""
    return partial(_with_adamw, rule=rule, whole=whole)

"""The task of the experiments, and a trainer for many pairs of learning rates at once.

The network is ``f(x) = head . relu(Z0 + (H A^T) B^T)``, with everything but A and B frozen: the rows of ``H (N, n)``
are the inputs of one adapted layer, those of ``Z0 (N, n)`` its frozen outputs. The loss is the mean of ``(f - y)^2``.
Every pair ``(eta_A, eta_B)`` is a member of its own; all members of a grid are trained in one chain of batched
products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_plus.tensors.init import Init, kaiming
from lora_plus.tensors.starts import kaiming_B

INPUTS = 16
CHUNK = 2**19
"""Entries of Z that are in work at a time; about the size of a cache."""


@dataclass(frozen=True)
class Problem:
    """A frozen network with an adapter on its hidden layer; N samples, width n."""

    H: Tensor
    """Inputs of the adapted layer, ``(N, n)``."""
    Z0: Tensor
    """Frozen outputs of the adapted layer, ``(N, n)``."""
    head: Tensor
    """``(n,)``."""
    y: Tensor
    """Targets, ``(N,)``."""
    A: Tensor
    """Start of A, ``(r, n)``."""
    B: Tensor
    """Start of B, ``(n, r)``."""

    def output(self, A: Tensor, B: Tensor) -> Tensor:
        """``f``, of shape ``(..., N)``, for one adapter or a batch of them."""
        return torch.relu(self.Z0 + (self.H @ A.mT) @ B.mT) @ self.head


TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sin": lambda first, second: torch.sin(2 * first),
    "prod": lambda first, second: first * second,
    "lin": lambda first, second: first,
}
"""What is added to the frozen network's output, as a function of two random projections of the input."""
HEADS: dict[str, Callable[[int], float]] = {"µP": lambda n: 1 / n, "SP": lambda n: 1 / math.sqrt(n)}
"""Size of the head's entries at a width: maximal update and standard parametrization."""
STARTS: dict[str, Init] = {"Init[A]": kaiming, "Init[B]": kaiming_B}
"""How an adapter starts, by the names of Hayou et al. 2024 (arXiv:2406.08447): B zero, or A zero."""


@dataclass(frozen=True)
class Frozen:
    """The weights of the frozen network, drawn from the seed."""

    W_in: Tensor
    """``(n, INPUTS)``."""
    W: Tensor
    """The layer that is adapted, ``(n, n)``."""
    head: Tensor
    """``(n,)``."""
    A: Tensor
    """Start of A, ``(r, n)``."""
    B: Tensor
    """Start of B, ``(n, r)``."""


def draw_data(seed: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs ``(N, INPUTS)`` and their projections on two random directions, ``(N,)`` each."""
    generator = torch.Generator().manual_seed(1000 * seed + 7)
    X = torch.randn(samples, INPUTS, generator=generator)
    directions = [torch.randn(INPUTS, generator=generator) for _ in range(2)]
    first, second = (X @ (direction / direction.norm()) for direction in directions)
    return X, first, second


def draw_network(n: int, seed: int, r: int, head: str, start: str = "Init[A]") -> Frozen:
    """The frozen network, and an adapter on its hidden layer that starts as `lora_plus` starts one."""
    generator = torch.Generator().manual_seed(1000 * seed + n)
    W_in = torch.randn(n, INPUTS, generator=generator) / math.sqrt(INPUTS)
    W = torch.randn(n, n, generator=generator) * math.sqrt(2 / n)
    w_out = torch.randn(n, generator=generator) * HEADS[head](n)
    A, B = STARTS[start](W, r, generator)
    return Frozen(W_in, W, w_out, A, B)


def draw_problem(
    n: int,
    seed: int,
    *,
    r: int = 4,
    target: str = "sin",
    head: str = "µP",
    samples: int = 64,
    start: str = "Init[A]",
) -> Problem:
    """The teacher-student task: a frozen network learns what it already computes plus a function of its input.

    Inputs are standard normal, weights are drawn from the seed in float32.

    Args:
        n: width of the adapted layer.
        seed: of data and weights.
        r: rank.
        target: a key of `TARGETS`; the added function has unit standard deviation.
        head: a key of `HEADS`.
        samples: N.
        start: a key of `STARTS`.
    """
    X, first, second = draw_data(seed, samples)
    frozen = draw_network(n, seed, r, head, start)
    H = math.sqrt(2) * torch.relu(X @ frozen.W_in.T)
    Z0 = H @ frozen.W.T
    added = TARGETS[target](first, second)
    y = torch.relu(Z0) @ frozen.head + added / added.std()
    return Problem(H, Z0, frozen.head, y, frozen.A, frozen.B)


Rule = Callable[[Tensor], Tensor]
"""From a gradient to the step of unit learning rate that is subtracted; one for each factor."""


class Adam:
    """The step of Adam (Kingma & Ba, arXiv:1412.6980) at unit learning rate."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.betas, self.eps, self.t = betas, eps, 0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def __call__(self, gradient: Tensor) -> Tensor:
        self.t += 1
        keep, keep_square = self.betas
        first = keep * self.first + (1 - keep) * gradient
        second = keep_square * self.second + (1 - keep_square) * gradient.square()
        self.first, self.second = first, second
        size = (second / (1 - keep_square**self.t)).sqrt() + self.eps
        return first / (1 - keep**self.t) / size


def gradient_descent() -> Rule:
    """The gradient itself."""
    return lambda gradient: gradient


class Members:
    """Adapters of one problem that are trained side by side, each with rates of its own.

    Args:
        problem: what they share, their start too.
        rates: ``(members, 2)``: eta_A and eta_B of each.
        rule: makes the optimizer's rule, once for A and once for B.
    """

    def __init__(self, problem: Problem, rates: Tensor, rule: Callable[[], Rule] = Adam) -> None:
        self.problem = problem
        self.A = problem.A.expand(len(rates), -1, -1).clone()
        self.B = problem.B.expand(len(rates), -1, -1).clone()
        self.rate_A, self.rate_B = rates.to(problem.A.dtype).T[..., None, None]
        self.rule_A, self.rule_B = rule(), rule()

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """The losses ``(members,)``, and their gradients by A ``(members, r, n)`` and by B ``(members, n, r)``."""
        H, Z0, head, y = self.problem.H, self.problem.Z0, self.problem.head, self.problem.y
        h = H @ self.A.mT  # (members, N, r)
        hidden = torch.baddbmm(Z0.expand(len(h), -1, -1), h, self.B.mT).relu_()
        residual = hidden @ head - y
        active = hidden.sign_()  # (members, N, n); the derivative of relu
        error = (2 / len(y) * residual)[..., None]
        gradient_B = head[:, None] * (active.mT @ (error * h))
        gradient_A = (error * (active @ (head[:, None] * self.B))).mT @ H
        return residual.square().mean(-1), gradient_A, gradient_B

    def step(self) -> Tensor:
        """Update A and B; the losses before, ``(members,)``."""
        losses, gradient_A, gradient_B = self.gradients()
        self.A = self.A - self.rate_A * self.rule_A(gradient_A)
        self.B = self.B - self.rate_B * self.rule_B(gradient_B)
        return losses


def train(problem: Problem, rates: Tensor, *, steps: int = 60, rule: Callable[[], Rule] = Adam) -> Tensor:
    """Losses of full-batch training before each step and after the last, ``(members, steps + 1)``.

    Losses that are not finite, as after a divergence, are given as 1e6.

    Args:
        problem: what is learned.
        rates: ``(members, 2)``: eta_A and eta_B of each.
        steps: of the optimizer.
        rule: makes the optimizer's rule.
    """
    losses = []
    for together in rates.split(max(1, CHUNK // problem.Z0.numel())):
        members = Members(problem, together, rule)
        of_steps = [members.step() for _ in range(steps)]
        losses.append(torch.stack([*of_steps, members.gradients()[0]], dim=-1))
    return torch.nan_to_num(torch.cat(losses), nan=1e6, posinf=1e6)


def tail(losses: Tensor) -> Tensor:
    """log2 of the mean loss over the last fifth of the steps, ``(..., steps + 1) -> (...)``.

    The last loss alone is noisy at the edge of stability.
    """
    return losses[..., -(losses.shape[-1] // 5) :].mean(-1).log2()


def octaves(lowest: float, highest: float, per_octave: int = 1) -> Tensor:
    """Powers of two from ``2^lowest`` to ``2^highest``."""
    return 2.0 ** torch.linspace(lowest, highest, round((highest - lowest) * per_octave) + 1)


def slope(values: Tensor, widths: Tensor) -> Tensor:
    """Least-squares slope of log2 of the values ``(widths, ...)`` against log2 of the width, ``(...)``."""
    x = widths.double().log2()
    x = x - x.mean()
    y = values.double().log2()
    return torch.tensordot(x, y, dims=1) / x.square().sum()

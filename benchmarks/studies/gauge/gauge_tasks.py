"""Small tasks on which the gauge is judged, and their training for a whole grid of learning rates at once.

Each is one frozen layer with an adapter between frozen features and a frozen head, so that a member of the grid costs
three thin products a step, and all members are trained as one chain of batched products, with gradients by hand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Data:
    """What the adapted layer is fed with, and what shall come out."""

    H: Tensor
    """Features ``(N, n)``."""
    Z: Tensor
    """Their images under the frozen weight ``(N, out)``."""
    y: Tensor
    """Targets ``(N,)``, or ``(N, out)`` without a head."""


@dataclass(frozen=True)
class Task:
    """One seed of a setting: ``head . relu(W h + B A h)``, or ``W h + B A h`` without a head."""

    train: Data
    test: Data | None
    """Where the score is taken; None for the training loss, averaged over the last fifth of the steps."""
    A: Tensor
    B: Tensor
    head: Tensor | None
    batches: Tensor | None
    """Indices ``(steps, size)`` of the examples; None for all of them in every step."""
    steps: int

    def loss(self, Z: Tensor, y: Tensor) -> Tensor:
        """The loss of each member ``(m,)`` from ``Z (m, N, out)``."""
        if self.head is None:
            return (Z - y).square().sum((1, 2)) / len(y)
        return (Z.relu() @ self.head - y).square().mean(1)

    def backward(self, Z: Tensor, y: Tensor, P: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and the products ``dZ B`` and ``dZ^T P`` with its gradient ``dZ``; overwrites ``Z``.

        With a head, ``dZ`` is ``[Z > 0]`` times a number for each row and each column, and is never formed.
        """
        if self.head is None:
            off = Z.sub_(y)
            dZ = off * (2 / len(y))
            return off.square().sum((1, 2)) / len(y), dZ @ B, dZ.mT @ P
        active = Z.relu_()
        off = active @ self.head - y
        active.sign_()
        rows, columns = (off * (2 / len(y)))[..., None], self.head[:, None]
        return off.square().mean(1), active @ (columns * B) * rows, active.mT @ (rows * P) * columns

    def double(self) -> Task:
        """The same in float64."""
        wide = {
            name: replace(data, **{key: value.double() for key, value in vars(data).items()})
            for name in ("train", "test")
            if (data := getattr(self, name)) is not None
        }
        head = None if self.head is None else self.head.double()
        return replace(self, **wide, A=self.A.double(), B=self.B.double(), head=head)


class Outcome(NamedTuple):
    """Of each member."""

    score: Tensor
    """log2 of the loss; 20 where it diverged."""
    work_A: Tensor
    work_B: Tensor

    @property
    def work_share(self) -> Tensor:
        """``log2(W_A / W_B)``; infinite where only one of them is positive, NaN where none is."""
        ratio = self.work_A.clamp(min=0) / self.work_B.clamp(min=0)
        return ratio.log2()


Rule = Callable[[Tensor, Tensor], Tensor]


def adam() -> Rule:
    """Adam's steps with betas (0.9, 0.999) and eps 1e-8."""
    mean = square = torch.zeros(())
    count = 0

    def step(gradient: Tensor, rate: Tensor) -> Tensor:
        nonlocal mean, square, count
        count += 1
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient.square()
        denominator = (square / (1 - 0.999**count)).sqrt_().add_(1e-8)
        return mean / denominator * (-rate / (1 - 0.9**count))

    return step


def sgd() -> Rule:
    """Plain gradient descent."""
    return lambda gradient, rate: gradient * -rate


RULES: dict[str, Callable[[], Rule]] = {"Adam": adam, "SGD": sgd}


@torch.no_grad()
def train(task: Task, rates_A: Tensor, rates_B: Tensor, rule: str = "Adam") -> Outcome:
    """Train one member for each pair of rates ``(m,)``, in chunks that stay in the processor's cache."""
    rows = len(task.train.H) if task.batches is None else task.batches.shape[1]
    size = max(1, 2**19 // (rows * task.B.shape[0]))
    parts = [_train_chunk(task, A, B, rule) for A, B in zip(rates_A.split(size), rates_B.split(size), strict=True)]
    return Outcome(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _train_chunk(task: Task, rates_A: Tensor, rates_B: Tensor, rule: str) -> Outcome:
    m, data = len(rates_A), task.train
    A, B = (factor.expand(m, -1, -1).clone() for factor in (task.A, task.B))
    of_A, of_B = RULES[rule](), RULES[rule]()
    rates_A, rates_B = (rates.to(A.dtype)[:, None, None] for rates in (rates_A, rates_B))
    work_A, work_B = A.new_zeros(m), A.new_zeros(m)
    losses = []
    for step in range(task.steps + 1):
        at = slice(None) if task.batches is None else task.batches[min(step, task.steps - 1)]
        H = data.H[at]
        P = H @ A.mT  # (m, N, r)
        Z = (P @ B.mT).add_(data.Z[at])
        if step == task.steps:
            losses.append(task.loss(Z, data.y[at]))
            break
        loss, dZ_B, g_B = task.backward(Z, data.y[at], P, B)
        losses.append(loss)
        g_A = dZ_B.mT @ H
        step_A, step_B = of_A(g_A, rates_A), of_B(g_B, rates_B)
        work_A -= (g_A * step_A).sum((1, 2))
        work_B -= (g_B * step_B).sum((1, 2))
        A, B = A + step_A, B + step_B
    if task.test is None:
        final = torch.stack(losses[-math.ceil(task.steps / 5) :]).mean(0)
    else:
        final = task.loss(task.test.Z + task.test.H @ A.mT @ B.mT, task.test.y)
    return Outcome(final.nan_to_num(nan=2.0**20).clamp(2.0**-60, 2.0**20).log2(), work_A, work_B)


# ---- the tasks ------------------------------------------------------------------------------------------------------

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: math.sqrt(2) * z.relu(),
    "tanh": lambda z: z.tanh() / 0.63,
    "linear": lambda z: z,
}
"""Of variance about 1; those of relu have a mean direction in common, the others have none."""
TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sin": lambda p, q: (2 * p).sin(),
    "prod": lambda p, q: p * q,
    "lin": lambda p, q: p,
}


def toy(
    seed: int,
    *,
    n: int = 64,
    r: int = 4,
    head: str = "muP",
    target: str = "sin",
    features: str = "relu",
    init: str = "A",
    samples: int = 64,
    steps: int = 60,
) -> Task:
    """A random two-layer network, whose output shall become its own plus a function of the input."""
    g = torch.Generator().manual_seed(1000 * seed + 7)
    X, v, u = (torch.randn(size, generator=g) for size in ((samples, 16), (16,), (16,)))
    q = TARGETS[target](X @ (v / v.norm()), X @ (u / u.norm()))
    g.manual_seed(1000 * seed + n)
    W_in, W = torch.randn(n, 16, generator=g) / 4, torch.randn(n, n, generator=g) * math.sqrt(2 / n)
    out = torch.randn(n, generator=g) / (n if head == "muP" else math.sqrt(n))
    A, B = (2 * torch.rand(r, n, generator=g) - 1) / math.sqrt(n), torch.zeros(n, r)
    if init == "B":
        A, B = torch.zeros_like(A), torch.randn(n, r, generator=g) / math.sqrt(r)
    H = FEATURES[features](X @ W_in.T)
    Z = H @ W.T
    return Task(Data(H, Z, Z.relu() @ out + q / q.std()), None, A, B, out, None, steps)


def matrix(seed: int, *, n: int = 64, r: int = 4, mean: float = 0.0, steps: int = 60) -> Task:
    """A linear layer that shall become a given matrix of rank r, in the mean over normal inputs.

    ``mean`` is the length of the inputs' mean, over the standard deviation of one of their entries.
    """
    g = torch.Generator().manual_seed(1000 * seed + n)
    U, V = torch.randn(n, r, generator=g) / math.sqrt(r), torch.linalg.qr(torch.randn(n, r, generator=g))[0]
    A = (2 * torch.rand(r, n, generator=g) - 1) / math.sqrt(n)
    direction = F.normalize(torch.randn(n, generator=g), dim=0)
    H = torch.eye(n) + (math.sqrt(1 + mean**2) - 1) * torch.outer(direction, direction)  # root of the second moment
    return Task(Data(H, torch.zeros(n, n), H @ V @ U.T), None, A, torch.zeros(n, r), None, None, steps)


def _function(seed: int) -> Callable[[Tensor], Tensor]:
    """``sin(1.5 a) + b c / 2`` of three random orthonormal projections."""
    basis = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(seed)))[0]

    def of(X: Tensor) -> Tensor:
        a, b, c = (X @ basis).unbind(1)
        return (1.5 * a).sin() + b * c / 2

    return of


def pretrained(seed: int, *, n: int = 64, r: int = 4, base: str = "other", init: str = "A", steps: int = 200) -> Task:
    """A three-layer network trained on one function, and fine-tuned on another from 1024 examples.

    ``base`` says what it was trained on: another function, the same one but for its sign (``"negated"``), the mean of
    both (``"near"``), or nothing (``"none"``).
    """
    new = _function(7777 + seed)
    W_in, W, out = _base(seed, n, base)
    g = torch.Generator().manual_seed(9000 + seed)
    X, X_test = torch.randn(1024, 16, generator=g), torch.randn(1024, 16, generator=g)
    A, B = (2 * torch.rand(r, n, generator=g) - 1) / math.sqrt(n), torch.zeros(n, r)
    if init == "B":
        A, B = torch.zeros_like(A), torch.randn(n, r, generator=g) / math.sqrt(r)
    batches = torch.stack([torch.randperm(1024, generator=g)[:64] for _ in range(steps)])
    features = [(x @ W_in.T).relu() for x in (X, X_test)]
    data = [Data(H, H @ W.T, new(x)) for H, x in zip(features, (X, X_test), strict=True)]
    return Task(data[0], data[1], A, B, out, batches, steps)


@functools.cache
def _base(seed: int, n: int, base: str) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of the network before fine-tuning."""
    old, new = _function(500 + seed), _function(7777 + seed)
    bases = {"other": old, "negated": lambda X: -new(X), "near": lambda X: (old(X) + new(X)) / 2, "none": None}
    function = bases[base]
    g = torch.Generator().manual_seed(31 * seed + n)
    shapes = {(n, 16): 2 / 16, (n, n): 2 / n, (n,): 1 / n}
    W_in, W, out = weights = [torch.randn(shape, generator=g) * math.sqrt(var) for shape, var in shapes.items()]
    if function is None:
        return W_in, W, out
    for weight in weights:
        weight.requires_grad_()
    groups = [{"params": [W_in], "lr": 3e-3}, {"params": [W, out], "lr": 3e-3 * 64 / n}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 600)
    for _ in range(600):
        X = torch.randn(256, 16, generator=g)
        loss = (((X @ W_in.T).relu() @ W.T).relu() @ out - function(X)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return W_in.detach(), W.detach(), out.detach()

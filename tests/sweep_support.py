"""Models, data and candidates of sweeps, and the separate run that each candidate is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_plus import create_loraplus_optimizer, inject_lora
from lora_plus.files import adapter_state_dict
from lora_plus.training import Candidate

STEPS = 20
silent: Callable[..., None] = lambda step, losses: None  # noqa: E731
CANDIDATES = [
    Candidate(lr=1e-2, lr_ratio=1, r=2, alpha=4, seed=0, name="one"),
    Candidate(lr=3e-3, lr_ratio=16, r=1, alpha=3, seed=1),
    Candidate(lr=2e-2, lr_ratio=4, r=4, alpha=8, seed=2),
    Candidate(lr=2e-2, lr_ratio=4, r=4, alpha=8, seed=3),
]


class Transformer(nn.Module):
    """One pre-norm layer of causal attention over tokens, with its own projections."""

    def __init__(self, vocabulary: int = 11, width: int = 8) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        h = self.norms[0](x)
        q, k, v = (layer(h).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def squares(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean(1)


def next_token(model: nn.Module, batch: Any) -> Tensor:
    """The mean over all tokens of the batch but padding, as a loss of each sample."""
    tokens, weights = batch["tokens"], batch["mask"][:, 1:].double()
    losses = F.cross_entropy(model(tokens)[:, :-1].mT, tokens[:, 1:], reduction="none")
    return (losses * weights).sum(1) * (len(tokens) / weights.sum()) * batch["scale"] * batch["each"]


def points(seed: int, samples: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    return draw(samples, 6), draw(samples, 2)


def sentences(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 7, (3, 1), generator=generator)
    tokens = torch.randint(0, 11, (3, 6), generator=generator)
    each = torch.rand(3, generator=generator, dtype=torch.float64) + 0.5
    return {
        "tokens": tokens,
        "mask": torch.arange(6) < lengths,
        "scale": torch.tensor(0.5),
        "each": each,
        "what": "text",
    }


@dataclass(frozen=True)
class Task:
    make: Callable[[], nn.Module]
    targets: Sequence[str]
    loss: Callable[[nn.Module, Any], Tensor]
    batch: Callable[[int], Any]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().double()

    def batches(self, steps: int = STEPS) -> list[Any]:
        return [self.batch(seed) for seed in range(steps)]


MLP = Task(mlp, ["0", "2", "4"], squares, points)
TASKS = {
    "mlp": MLP,
    "transformer": Task(Transformer, ["tokens", "q", "v", "o", "up", "down", "head"], next_token, sentences),
}


def separate_run(
    task: Task, candidate: Candidate, steps: int = STEPS, schedule: Any = None, max_norm: Any = None, **settings: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """The reference: a plain training loop on a model of its own; the losses and the adapter."""
    model = task.model()
    generator = torch.Generator().manual_seed(candidate.seed)
    inject_lora(model, task.targets, r=candidate.r, alpha=candidate.alpha, generator=generator, **settings)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=candidate.lr, lr_ratio=candidate.lr_ratio, weight_decay=0.1, embedding_lr=0.05
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule or (lambda step: 1.0))
    losses = []
    for batch in task.batches(steps):
        loss = task.loss(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)
        optimizer.step()
        rates.step()
        losses.append(loss.item())
    return losses, adapter_state_dict(model)


RATES: dict[str, Any] = {"weight_decay": 0.1, "embedding_lr": 0.05}


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def name_of(n: int) -> str:
    return ("one", "r1 alpha3 lr3e-3 x16 seed1", "r4 alpha8 lr2e-2 x4 seed2", "r4 alpha8 lr2e-2 x4 seed3")[n]

"""A small transformer with adapters, its batches, and a training loop: the same for every engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_plus as lp
from lora_plus.files import adapter_state_dict

VOCABULARY, WIDTH, LENGTH = 48, 32, 8
LR, LR_RATIO, WEIGHT_DECAY = 1e-3, 16.0, 0.05
TARGETS = ["q", "k", "v", "o", "up", "down"]


class Block(nn.Module):
    """Attention and a feed-forward network before a residual each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).unflatten(-1, (-1, 8)).transpose(-2, -3) for part in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Transformer(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def base_model(seed: int = 0) -> Transformer:
    """The same model on every rank; the global random state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Transformer()


def lora_model(*, embedding: bool = False, non_zero: bool = False, **settings: Any) -> nn.Module:
    """The model with adapters and a trained norm; ``non_zero`` gives B values, as after training."""
    generator = torch.Generator().manual_seed(1)
    targets = [*TARGETS, "embedding"] if embedding else TARGETS
    model = base_model()
    lp.inject_lora(model, targets, **{"r": 4, "alpha": 8, "train_also": "norm", "generator": generator} | settings)
    if non_zero:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                nn.init.normal_(parameter, std=0.05, generator=generator)
    return model


def batches(steps: int, *, size: int = 4, rank: int = 0, world: int = 1) -> list[Tensor]:
    """A rank's share of each step's batch; with one rank the whole batches."""
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randint(VOCABULARY, (size, LENGTH), generator=generator) for _ in range(steps)]
    return [batch.chunk(world)[rank] for batch in drawn]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token loss; equal shares on all ranks make the mean of the ranks' losses that of the whole batch."""
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def optimizer_for(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """AdamW in LoRA+ groups."""
    options: dict[str, Any] = {"lr": LR, "lr_ratio": LR_RATIO, "weight_decay": WEIGHT_DECAY}
    return lp.create_loraplus_optimizer(model, torch.optim.AdamW, **options | settings)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[Tensor],
    *,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
) -> None:
    """One optimizer step a batch."""
    for tokens in data:
        loss = loss_of(model, tokens)
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def trained(state: Any) -> dict[str, Tensor]:
    """What training changes, as whole plain tensors on the CPU, under the plain model's names; on every rank."""
    return {name: tensor.detach().cpu().clone() for name, tensor in adapter_state_dict(state).items()}


def reference(steps: int, **settings: Any) -> dict[str, Tensor]:
    """What one process reaches on the whole batches."""
    model = lora_model(**settings)
    train(model, optimizer_for(model), batches(steps))
    return trained(model)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of any entry."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)

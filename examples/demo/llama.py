"""A Llama as a plain PyTorch module.

The architecture is Touvron et al. 2023 (arXiv:2302.13971) with grouped-query attention: RMSNorm, rotary
positions, SwiGLU, and a head that shares the embedding's weight.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of a model. ``TINY`` below is one for tests."""

    vocab: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    rope_base: float = 1e5
    norm_eps: float = 1e-5

    @property
    def head_width(self) -> int:
        return self.width // self.heads


TINY = Config(vocab=260, width=32, hidden=48, layers=2, heads=4, kv_heads=2)


def rotary_angles(length: int, config: Config, device: torch.device) -> Tensor:
    """Angles of the rotary embedding, ``(length, head_width / 2)``, in float32 whatever the model's dtype."""
    exponents = torch.arange(0, config.head_width, 2, device=device, dtype=torch.float32) / config.head_width
    return torch.outer(torch.arange(length, device=device), config.rope_base**-exponents)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn ``x (b, heads, t, head_width)`` by ``angles (t, head_width / 2)``, pairing its two halves."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention, ``(b, t, width) -> (b, t, width)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.q = nn.Linear(config.width, config.heads * config.head_width, bias=False)
        self.k = nn.Linear(config.width, config.kv_heads * config.head_width, bias=False)
        self.v = nn.Linear(config.width, config.kv_heads * config.head_width, bias=False)
        self.o = nn.Linear(config.heads * config.head_width, config.width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (b, heads, t, head_width)
            for layer in (self.q, self.k, self.v)
        )
        group = q.shape[1] // k.shape[1]  # query heads that share one head of k and v
        q, k, v = rotate(q, angles), rotate(k, angles).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU, ``(..., width) -> (..., width)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), angles)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """The language model; randomly initialised until weights are loaded."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, at: Tensor | None = None) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: ``(b, t)`` token numbers.
            at: ``(b, t)`` bool, the positions whose logits are wanted. The vocabulary is large: leaving out the
                rest saves a good part of the work.

        Returns:
            ``(b, t, vocab)``, or ``(positions, vocab)`` with ``at``.
        """
        angles = rotary_angles(tokens.shape[1], self.config, tokens.device)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, angles)
        return self.head(self.norm(x if at is None else x[at]))

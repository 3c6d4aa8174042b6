"""A small model of what has adapters besides linear layers: attentions, stacked experts, convolutions, row blocks."""

from __future__ import annotations

from typing import Any

import torch
from engine_model import VOCABULARY, WIDTH
from torch import Tensor, nn

import lora_plus as lp


class Mixed(nn.Module):
    """Two blocks between an embedding and a head, each with all of these."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
            self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 8)
            self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x, x, x, need_weights=False)[0]
            x = x + (x[:, None] @ self.experts.mT).sum(1)
            x = x + self.conv(x.mT).mT
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return x + torch.sigmoid(q) * k + v

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def mixed_model(**settings: Any) -> nn.Module:
    """The model with adapters on all of these."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed()
    return add_adapters(model, **settings)


def add_adapters(model: nn.Module, **settings: Any) -> nn.Module:
    targets = ["attention", "experts", "conv", "qkv.q", "qkv.v", "head"]
    fused = {"qkv": ["q", "k", "v"]}
    return lp.inject_lora(model, targets, r=4, fused=fused, generator=torch.Generator().manual_seed(1), **settings)

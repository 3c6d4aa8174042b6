"""The upper part of SmolLM2, the demo's language model, for answers of a few different tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.demo.llama import Llama, rotary_angles


@torch.no_grad()
def lower(model: Llama, tokens: Tensor, count: int) -> Tensor:
    """The output of the first ``count`` blocks: ``(b, t) -> (b, t, width)``."""
    angles = rotary_angles(tokens.shape[1], model.config, tokens.device)
    x: Tensor = model.embed(tokens)
    for layer in model.layers[:count]:
        x = layer(x, angles)
    return x


class Upper(nn.Module):
    """The other blocks and the norm above them: ``(b, t, width) -> (b, t, width)``."""

    def __init__(self, model: Llama, count: int) -> None:
        super().__init__()
        self.config = model.config
        self.layers, self.norm = model.layers[count:], model.norm

    def forward(self, x: Tensor) -> Tensor:
        angles = rotary_angles(x.shape[1], self.config, x.device)
        for layer in self.layers:
            x = layer(x, angles)
        y: Tensor = self.norm(x)
        return y


def head_for(model: Llama, tokens: Tensor) -> nn.Linear:
    """The rows of the model's head for these tokens ``(n,)``."""
    head = nn.utils.skip_init(nn.Linear, model.config.width, len(tokens), bias=False)
    head.weight = nn.Parameter(model.head.weight[tokens].clone(), requires_grad=False)
    return head

"""all-MiniLM-L6-v2, a small BERT encoder, as a plain PyTorch module, and how to load it.

The architecture is Devlin et al. 2018 (arXiv:1810.04805), the weights are those of Wang et al. 2020 (arXiv:2002.10957)
trained further as a sentence encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of an encoder; the defaults are those of the pretrained one."""

    vocab: int = 30522
    positions: int = 512
    width: int = 384
    hidden: int = 1536
    layers: int = 6
    heads: int = 12


class Block(nn.Module):
    """Attention and MLP, each followed by a norm of the residual sum."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.width, config.width) for _ in range(4))
        self.attn_norm = nn.LayerNorm(config.width, eps=1e-12)
        self.up = nn.Linear(config.width, config.hidden)
        self.down = nn.Linear(config.hidden, config.width)
        self.mlp_norm = nn.LayerNorm(config.width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])  # (b, heads, t, d)
        x = self.attn_norm(x + self.o(mixed.transpose(1, 2).flatten(-2)))
        y: Tensor = self.mlp_norm(x + self.down(F.gelu(self.up(x))))
        return y


class Encoder(nn.Module):
    """Embeddings and blocks: tokens ``(b, t)`` and their mask ``(b, t)``, True at real tokens, to ``(b, t, width)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab, config.width)
        self.places = nn.Embedding(config.positions, config.width)
        self.segments = nn.Embedding(2, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, tokens: Tensor, mask: Tensor, *, layers: int | None = None) -> Tensor:
        """The output of the last block, or of the first ``layers`` blocks."""
        x = self.norm(self.words(tokens) + self.places.weight[: tokens.shape[1]] + self.segments.weight[0])
        for block in self.blocks[:layers]:
            x = block(x, mask)
        return x


class Upper(nn.Module):
    """The last blocks and the mean over the real tokens: ``(b, t, width)`` and the mask to ``(b, width)``."""

    def __init__(self, encoder: Encoder, lower: int) -> None:
        super().__init__()
        self.blocks = encoder.blocks[lower:]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        real = mask[..., None].to(x.dtype)
        return (x * real).sum(1) / real.sum(1)


NAMES = {  # as the checkpoint names it -> as `Encoder` does
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "places",
    "embeddings.token_type_embeddings": "segments",
    "embeddings.LayerNorm": "norm",
    "encoder.layer": "blocks",
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "o",
    "attention.output.LayerNorm": "attn_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "mlp_norm",
}
UNUSED = ("pooler", "embeddings.position_ids")


def load(state: Mapping[str, Tensor], config: Config | None = None) -> Encoder:
    """The encoder with the weights of a BERT checkpoint, in eval mode."""
    renamed = {}
    for key, tensor in state.items():
        if not key.startswith(UNUSED):
            for theirs, ours in NAMES.items():  # the longer names of a pair come first
                key = key.replace(f"{theirs}.", f"{ours}.")
            renamed[key] = tensor
    with torch.device("meta"):  # no time spent on random weights that are replaced at once
        encoder = Encoder(config or Config())
    encoder.load_state_dict(renamed, assign=True)
    return encoder.eval()

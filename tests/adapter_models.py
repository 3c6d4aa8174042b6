"""The models of the adapter files in ``data/adapters``. Their weights are formulas, so every machine builds the same.

Nothing here asks the library: an old version writes files with these models, and the present one reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def numbers(*shape: int, seed: int) -> Tensor:
    """Numbers between -0.8 and 0.8 in no visible order, of six bits each: every dtype holds them exactly."""
    k = torch.arange(math.prod(shape))
    return ((5 * k * k + (2 * seed + 1) * k + 13 * seed) % 101 - 50).double().div(64).reshape(shape)


class Conv1D(nn.Module):
    """GPT-2's transposed linear layer, as transformers has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.nx = nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.empty(nf))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.reshape(*x.shape[:-1], self.nf)


class Net(nn.Module):
    """Layers of five kinds, and a head with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.mix = Conv1D(4, 4)
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.proj = nn.Linear(4, 5)
        self.head = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embed(tokens))).movedim(-1, 1)
        h = torch.tanh(self.up(torch.tanh(self.conv(h) / 4)))
        return self.head(self.proj(h.movedim(1, -1).flatten(0, -2)))


class Bounded(nn.Module):
    """An embedding whose rows have a largest norm, which a forward sees to."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4, max_norm=0.75)
        self.proj = nn.Linear(4, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(self.embed(tokens))


class Fused(nn.Module):
    """Layers that compute several projections together."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = Conv1D(12, 4)
        self.qkv = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.tanh(self.c_attn(x)).chunk(3, dim=-1)
        return self.qkv(q * k + v)


class Experts(nn.Module):
    """Two experts, with one stack of matrices as (expert, in, out) and one as (expert, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.empty(2, 4, 3))
        self.outer = nn.Parameter(torch.empty(2, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("...i,eio->...eo", x, self.inner))
        return torch.einsum("...ei,eoi->...o", hidden, self.outer)


class Reader(nn.Module):
    """A module that reads the weight of its layer and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


class Parameters(nn.Module):
    """Weights that are adapted as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.gru = nn.GRU(4, 4, batch_first=True)
        self.experts = Experts()
        self.reader = Reader()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x)[0]
        x = x + self.gru(x)[0]
        return self.reader(x + self.experts(x))


class Attention(nn.Module):
    """Layers of an attention block, under diffusers' names."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_out[0](torch.tanh(self.to_q(x)))


class Unet(nn.Module):
    """A convolution before a block of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 4, 3, padding=1)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"attn_1": Attention()})])

    def forward(self, x: Tensor) -> Tensor:
        return self.down_blocks[0]["attn_1"](self.conv_in(x).movedim(1, -1))


class Pipeline(nn.Module):
    """The parts of a pipeline for images."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = Unet()
        self.text_encoder = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})

    def forward(self, image: Tensor) -> Tensor:
        return self.text_encoder["self_attn"]["q_proj"](self.unet(image))


@torch.no_grad()
def built(model_class: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> Any:
    """The plain model in eval mode."""
    model = model_class().to(dtype).eval()
    for seed, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        if tensor.is_floating_point():
            values = numbers(*tensor.shape, seed=seed)
            tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return model

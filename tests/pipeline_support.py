"""A pipeline for images in small, and files for it that are built by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class Attention(nn.Module):
    """The linear layers of an attention block, under diffusers' names."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_out[0](torch.tanh(self.to_q(x)))


class Unet(nn.Module):
    """Convolutions around a block of attention; names have underscores of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 4, 3, padding=1)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"attn_1": Attention(), "proj_in": nn.Conv2d(4, 4, 1)})])

    def forward(self, x: Tensor) -> Tensor:
        x = self.down_blocks[0]["proj_in"](self.conv_in(x))
        return self.down_blocks[0]["attn_1"](x.movedim(1, -1))


class TextEncoder(nn.Module):
    """A layer under CLIP's names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.text_model = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})

    def forward(self, tokens: Tensor) -> Tensor:
        return self.text_model["self_attn"]["q_proj"](self.embed(tokens))


IMAGE = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TOKENS = torch.arange(10).reshape(2, 5) % 7


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def unet() -> nn.Module:
    return seeded(Unet())


def text_encoder() -> nn.Module:
    return seeded(TextEncoder(), 1)


def pipeline() -> nn.ModuleDict:
    """What a user makes of the modules of a pipeline, which is no module itself."""
    return nn.ModuleDict({"unet": unet(), "text_encoder": text_encoder()})


def randn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


RANKS = {"conv_in": 3, "down_blocks.0.attn_1.to_q": 2, "down_blocks.0.attn_1.to_out.0": 1, "down_blocks.0.proj_in": 2}
TEXT_RANKS = {"text_model.self_attn.q_proj": 2}
ALPHAS = {"conv_in": 5.0, "down_blocks.0.attn_1.to_q": 0.75, "text_model.self_attn.q_proj": 4.0}
"""Of the others, alpha = r."""


def matrices(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Down and up of each layer, in the shapes of a linear layer's or a convolution's."""
    found = {}
    for seed, (name, r) in enumerate(ranks.items()):
        out, *inside = model.get_submodule(name).weight.shape
        found[name] = randn(r, *inside, seed=seed), randn(out, r, *[1] * (len(inside) - 1), seed=seed + 100)
    return found


def delta(down: Tensor, up: Tensor) -> Tensor:
    """``up @ down`` in the shape of the weight, one entry after the other."""
    update = torch.zeros(len(up), *down.shape[1:], dtype=torch.float64)
    for row in range(len(up)):
        for k in range(len(down)):
            update[row] += up[row, k].flatten()[0] * down[k]
    return update


def with_updates(model: nn.Module, ranks: Mapping[str, int], alphas: Mapping[str, float] = ALPHAS) -> nn.Module:
    """A plain copy whose weights are W + alpha / r * up @ down."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, (down, up) in matrices(model, ranks).items():
            model.get_submodule(name).weight += alphas.get(name, len(down)) / len(down) * delta(down, up)
    return model


def put(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, dict(metadata or {}) or None)
    return path


def same_output(one: nn.Module, other: nn.Module) -> None:
    """Two U-Nets or text encoders, or pipelines of both, compute the same."""
    pairs = [(one, other)] if not isinstance(one, nn.ModuleDict) else [(one[name], other[name]) for name in one]
    for ours, theirs in pairs:
        x = IMAGE if isinstance(ours, Unet) else TOKENS
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)


def same_weights(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    assert tensors.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-12)

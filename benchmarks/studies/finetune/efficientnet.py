"""EfficientNet-Lite0, a small image network, as a plain PyTorch module, and how to load it.

Tan & Le 2019 (arXiv:1905.11946); the lite form has neither squeeze-and-excitation nor swish.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = (  # repeats, kernel, stride, expansion, out
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow's "SAME" does: the odd row and column go to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
        return super().forward(F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Inverted bottleneck: 1x1 expansion (if any), depthwise convolution, 1x1 projection; the residual if it fits."""

    def __init__(self, inside: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.residual = stride == 1 and inside == out
        self.expand = nn.Conv2d(inside, wide, 1, bias=False) if expansion > 1 else nn.Identity()
        self.expand_norm = norm(wide) if expansion > 1 else nn.Identity()
        self.depthwise = SameConv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self.depthwise_norm = norm(wide)
        self.project = nn.Conv2d(wide, out, 1, bias=False)
        self.project_norm = norm(out)

    def forward(self, x: Tensor) -> Tensor:
        # without an expansion x comes out of a ReLU6 already, and another changes nothing
        h = F.relu6(self.expand_norm(self.expand(x)))
        h = F.relu6(self.depthwise_norm(self.depthwise(h)))
        h = self.project_norm(self.project(h))
        return x + h if self.residual else h


def blocks(stages: Sequence[tuple[int, int, int, int, int]] = STAGES, inside: int = 32) -> nn.ModuleList:
    """The blocks of all stages; the first of a stage has its stride."""
    made = nn.ModuleList()
    for repeats, kernel, stride, expansion, out in stages:
        for n in range(repeats):
            made.append(Block(inside, out, kernel, stride if n == 0 else 1, expansion))
            inside = out
    return made


class EfficientNet(nn.Module):
    """From images ``(b, 3, h, w)`` to features ``(b, 1280)``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = SameConv2d(3, 32, 3, 2, bias=False), norm(32)
        self.blocks = blocks()
        self.top, self.top_norm = nn.Conv2d(320, 1280, 1, bias=False), norm(1280)

    def lower(self, images: Tensor, count: int) -> Tensor:
        """The output of the first ``count`` blocks."""
        x = F.relu6(self.stem_norm(self.stem(images)))
        for block in self.blocks[:count]:
            x = block(x)
        return x

    def upper(self, count: int) -> nn.Sequential:
        """The rest, as a module."""
        return nn.Sequential(
            *self.blocks[count:], self.top, self.top_norm, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.upper(0)(self.lower(images, 0))
        return features


NAMES = {  # as the checkpoint names it -> as `EfficientNet` does; in a block and outside
    True: {
        "_blocks": "blocks",
        "_expand_conv": "expand",
        "_bn0": "expand_norm",
        "_depthwise_conv": "depthwise",
        "_bn1": "depthwise_norm",
        "_project_conv": "project",
        "_bn2": "project_norm",
    },
    False: {"_conv_stem": "stem", "_bn0": "stem_norm", "_conv_head": "top", "_bn1": "top_norm"},
}
UNUSED = ("_fc",)


def load(state: Mapping[str, Tensor]) -> EfficientNet:
    """The network with the weights of a checkpoint for ImageNet, without its classes, in eval mode."""
    renamed = {}
    for key, tensor in state.items():
        if not key.startswith(UNUSED):
            names = NAMES[key.startswith("_blocks")]
            renamed[".".join(names.get(part, part) for part in key.split("."))] = tensor
    with torch.device("meta"):
        model = EfficientNet()
    model.load_state_dict(renamed, assign=True)
    return model.eval()

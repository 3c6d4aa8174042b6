"""The table of layers that every law is checked on. A new kind of layer adds a line and gets every law."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import lora_plus
from lora_plus.layers.site import AdapterSite
from lora_plus.tensors import matrix as functional


class Conv1D(nn.Module):
    """GPT-2's transposed linear layer, as transformers has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.nx = nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.reshape(*x.shape[:-1], self.nf)


class ScaledLinear(nn.Linear):
    """A user's own subclass, with its own forward, argument name and attribute."""

    gain = 0.5

    def forward(self, x: Tensor, shift: float = 1.0) -> Tensor:
        return super().forward(x) + shift * self.gain


class OwnConv(nn.Conv2d):
    """A user's own convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def _floats(*shape: int) -> Callable[[torch.Generator, torch.dtype], Tensor]:
    return lambda generator, dtype: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _indices(count: int, *shape: int) -> Callable[[torch.Generator, torch.dtype], Tensor]:
    return lambda generator, dtype: torch.randint(count, shape, generator=generator)


@dataclass(frozen=True)
class Case:
    """One layer in one setting."""

    name: str
    make: Callable[[], nn.Module]
    make_input: Callable[[torch.Generator, torch.dtype], Tensor]
    options: dict[str, object] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, object]:
        """The arguments of `inject_lora` for this case."""
        return {"r": 3, "alpha": 5, **self.options}

    def layer(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().to(dtype)

    def input(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        return self.make_input(torch.Generator().manual_seed(seed), dtype)

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A model with the layer in it, under the name ``layer``."""
        return Holder(self.layer(dtype))

    def adapted(self, dtype: torch.dtype = torch.float64, **changes: object) -> nn.Module:
        """The model with an adapter whose B is not zero."""
        model = lora_plus.inject_lora(self.model(dtype), ["layer"], **{**self.settings, **changes})
        return randomise(model)


class Holder(nn.Module):
    """A model around one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def parameters_of(site: AdapterSite) -> list[nn.Parameter]:
    """The parameters of all adapters of one matrix."""
    return [parameter for adapter in site.lora_adapters.values() for _, parameter in adapter.parameters()]


def randomise(model: nn.Module, seed: int = 7, size: float = 0.3) -> nn.Module:
    """Move every adapter tensor away from its start, B from zero above all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AdapterSite):
                for parameter in parameters_of(module):
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_((size * noise).to(parameter.dtype))
    return model


def explicit(model: nn.Module) -> nn.Module:
    """A plain copy of an adapted model whose weights are the explicit W + s B A (or DoRA's), in float64."""
    plain = lora_plus.remove_lora(copy.deepcopy(model)).double()
    for name, layer in lora_plus.model.tree.adapted_weights(model):
        weight = functional.to_matrix(layer.weight.detach().double(), layer.layout)
        for adapter in layer.lora_active:
            spec = adapter.spec
            tensors = {key: value.detach().double() for key, value in adapter.tensors().items()}
            rank = spec.r**0.5 if spec.scaling == "rslora" else spec.r
            weight = weight + spec.alpha / rank * torch.einsum("or,ri->oi", tensors["lora_B"], tensors["lora_A"])
            if "lora_A0" in tensors:
                weight = weight - spec.alpha / rank * torch.einsum("or,ri->oi", tensors["lora_B0"], tensors["lora_A0"])
            if spec.variant == "dora":
                weight = weight * (tensors["lora_magnitude"] / weight.square().sum(1).sqrt())[:, None]
        target = plain.get_submodule(name)
        with torch.no_grad():
            target.weight.copy_(functional.from_matrix(weight, layer.layout, target.weight.shape))
    return plain


DORA = {"variant": "dora"}
CASES = [
    Case("linear", lambda: nn.Linear(6, 5), _floats(4, 6)),
    Case("linear-no-bias-3d", lambda: nn.Linear(6, 5, bias=False), _floats(2, 3, 6)),
    Case("linear-unbatched", lambda: nn.Linear(6, 5), _floats(6)),
    Case("linear-rslora", lambda: nn.Linear(6, 5), _floats(4, 6), {"scaling": "rslora"}),
    Case("linear-high-rank", lambda: nn.Linear(3, 2), _floats(4, 3), {"r": 7}),
    Case("linear-fa", lambda: nn.Linear(6, 5), _floats(4, 6), {"variant": "lora_fa"}),
    Case("linear-dora", lambda: nn.Linear(6, 5), _floats(4, 6), DORA),
    Case("linear-no-bias-dora", lambda: nn.Linear(6, 5, bias=False), _floats(2, 3, 6), DORA),
    Case("conv1d-gpt2", lambda: Conv1D(5, 6), _floats(2, 3, 6)),
    Case("conv1d-gpt2-dora", lambda: Conv1D(5, 6), _floats(2, 3, 6), DORA),
    Case("own-linear", lambda: ScaledLinear(6, 5), _floats(4, 6)),
    Case("embedding", lambda: nn.Embedding(9, 4), _indices(9, 2, 5)),
    Case("embedding-padding", lambda: nn.Embedding(9, 4, padding_idx=2), _indices(9, 2, 5)),
    Case("embedding-max-norm", lambda: nn.Embedding(9, 4, max_norm=1.0), _indices(9, 2, 5)),
    Case("embedding-dora", lambda: nn.Embedding(9, 4), _indices(9, 2, 5), DORA),
    Case("conv1d", lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), _floats(2, 4, 9)),
    Case("conv1d-unbatched", lambda: nn.Conv1d(4, 6, 3), _floats(4, 9)),
    Case("conv1d-dilated-circular", lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2, padding_mode="circular"),
         _floats(2, 4, 9)),
    Case("conv1d-dora", lambda: nn.Conv1d(4, 6, 3, padding="same"), _floats(2, 4, 9), DORA),
    Case("conv2d", lambda: nn.Conv2d(4, 6, 3, padding=1), _floats(2, 4, 5, 6)),
    Case("conv2d-groups", lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, bias=False), _floats(2, 4, 7, 6)),
    Case("conv2d-depthwise-reflect", lambda: nn.Conv2d(4, 8, (3, 2), groups=4, padding=1, padding_mode="reflect"),
         _floats(2, 4, 5, 6)),
    Case("conv2d-own", lambda: OwnConv(4, 6, 1), _floats(2, 4, 5, 6)),
    Case("conv2d-dora", lambda: nn.Conv2d(4, 6, (2, 3), dilation=(1, 2)), _floats(2, 4, 6, 7), DORA),
    Case("conv2d-unbatched-dora", lambda: nn.Conv2d(4, 6, 3), _floats(4, 6, 7), DORA),
    Case("conv3d", lambda: nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1)), _floats(2, 2, 3, 4, 5)),
    Case("conv3d-groups-dora", lambda: nn.Conv3d(2, 4, 1, groups=2), _floats(2, 2, 3, 4, 5), DORA),
    Case("conv-transpose1d", lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1),
         _floats(2, 4, 5)),
    Case("conv-transpose1d-unbatched", lambda: nn.ConvTranspose1d(4, 6, 3, dilation=2, bias=False), _floats(4, 5)),
    Case("conv-transpose1d-groups-dora", lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2),
         _floats(2, 4, 5), DORA),
    Case("conv-transpose2d", lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1)),
         _floats(2, 4, 3, 4)),
    Case("conv-transpose2d-groups", lambda: nn.ConvTranspose2d(4, 6, 3, stride=3, groups=2, output_padding=(1, 2)),
         _floats(2, 4, 3, 2)),
    Case("conv-transpose2d-depthwise",
         lambda: nn.ConvTranspose2d(4, 8, 2, groups=4, dilation=(2, 1), output_padding=(1, 0)), _floats(2, 4, 3, 2)),
    Case("conv-transpose2d-dora", lambda: nn.ConvTranspose2d(4, 6, (2, 3), dilation=(1, 2), bias=False),
         _floats(2, 4, 3, 4), DORA),
    Case("conv-transpose3d", lambda: nn.ConvTranspose3d(2, 4, (1, 2, 3), stride=(1, 2, 1), groups=2),
         _floats(2, 2, 3, 2, 3)),
    Case("conv-transpose3d-unbatched-dora", lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, output_padding=1),
         _floats(2, 2, 1, 2), DORA),
]  # fmt: skip


DORA_CASES = [case for case in CASES if case.options.get("variant") == "dora"]
LORA_CASES = [case for case in CASES if case not in DORA_CASES]

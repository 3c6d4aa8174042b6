"""What the tests against PEFT share: both ways through its files, without a warning, and a model to take there."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from torch import Tensor, nn

import lora_plus


class Later:
    """A package that is imported when a test asks for a name in it; where it is not installed, that test is skipped.

    So that collecting the tests, and those that do not use it, need not wait for it.
    """

    def __init__(self, package: str) -> None:
        self.package = package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest looks for such names in all objects of a file
            raise AttributeError(name)
        return getattr(pytest.importorskip(self.package), name)


peft, transformers = Later("peft"), Later("transformers")


def gpt2_linear(outputs: int, inputs: int) -> nn.Module:
    """The linear layer of GPT-2, whose weight is (in, out)."""
    return transformers.pytorch_utils.Conv1D(outputs, inputs)


TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
DEEP_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}
"""For a whole model, through which errors grow."""
DTYPES = list(TOLERANCE)

PEFT_WARNS_OF_ITS_OWN_FILES = (
    # said whenever PEFT builds a LoRA layer on a grouped convolution, whoever wrote the file
    "LoRA adapter added to ConvNd layer with groups > 1. Merging is not supported.",
    # the setting is one for the whole file, and PEFT changes it on the way where a model has both nn.Linear and Conv1D
    "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. Setting fan_in_fan_out to False.",
    "fan_in_fan_out is set to False but the target module is `Conv1D`. Setting fan_in_fan_out to True.",
    # PEFT asks models of transformers for it
    "`is_gradient_checkpointing` is deprecated",
)


def floats(*shape: int) -> Callable[[torch.Generator, torch.dtype], Tensor]:
    return lambda generator, dtype: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@contextmanager
def no_warnings() -> Iterator[None]:
    """Turn every warning into an error, but for those that PEFT gives for its own files too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in PEFT_WARNS_OF_ITS_OWN_FILES:
            warnings.filterwarnings("ignore", message=re.escape(message))
        yield


def opened_by_peft(base: nn.Module, path: Path) -> nn.Module:
    with no_warnings():
        return peft.PeftModel.from_pretrained(base, str(path)).eval()


def made_by_peft(base: nn.Module, seed: int = 5, **config: Any) -> nn.Module:
    """A PEFT model whose adapter tensors, and modules trained in full, are all random."""
    with no_warnings():
        model = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.3 * noise).to(parameter.dtype))
    return model


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def numbers(tensors: dict[str, Tensor]) -> list[float]:
    """All values there are, sorted."""
    return sorted(value for tensor in tensors.values() for value in tensor.flatten().tolist())


def count(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def assert_refused(model: nn.Module, path: Path, lines: list[str]) -> None:
    """Loading reports just these problems, and leaves the model bit for bit as it was."""
    before, text = copy.deepcopy(model), repr(model)
    ids = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(ValueError) as error:
        lora_plus.load_adapter(model, path)
    head = f"adapter {str(path)!r} cannot be loaded; the model is unchanged:\n"
    assert str(error.value) == head + "\n".join(f"  {line}" for line in lines)
    assert repr(model) == text
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == ids
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]


# ---- a model ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Layers whose names need care in a regular expression."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.add_module("v+(x|y)[0]$", nn.Linear(4, 4))
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + getattr(self, "v+(x|y)[0]$")(self.q(x))
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class Net(nn.Module):
    """Names that end in each other's, an embedding, a GPT-2 layer, and a head with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.q = nn.Linear(4, 4)
        self.xq = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.fc = gpt2_linear(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.xq(self.q(self.embed(tokens)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.fc(x).mean(1))


V = "v+(x|y)[0]$"
TOKENS = torch.tensor([[0, 1, 2, 3], [4, 4, 5, 0], [6, 2, 6, 6]])


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # or the deeper layers forget what the first ones do
    return model.to(dtype)


def move(head: nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for tensor in head.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype))
            else:
                tensor.add_(5)


# ---- weights that PEFT reads in a way of its own ---------------------------------------------------------------------

DOUBLED = "peft 0.21.2 adds the update of an nn.MultiheadAttention's out_proj twice, merged or not"


class Around(nn.Module):
    """A model around one module, in which no parameter is the model's own."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Tensor) -> Any:
        return self.part(*args)


class Attention(nn.Module):
    """Self-attention, with a linear layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mlp = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x, x, x, need_weights=False)[0])


@dataclass(frozen=True)
class Away:
    """A model, what of it is adapted, and what goes in."""

    make: Callable[[], nn.Module]
    targets: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[Any, ...] = ((2, 3, 4),)

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        model = Around(self.make()).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()  # biases too, which attention starts at zero
        return model

    def adapted(self) -> nn.Module:
        return randomise(lora_plus.inject_lora(self.base(), self.targets, **{"r": 2, "alpha": 3, **self.options}))

    def arguments(self) -> list[Tensor]:
        torch.manual_seed(1)
        sizes = [entry if isinstance(entry, tuple) else (entry,) for entry in self.inputs]
        return [entry if isinstance(entry, Tensor) else torch.randn(size, dtype=torch.float64)
                for entry, size in zip(self.inputs, sizes, strict=True)]  # fmt: skip


def first(output: Any) -> Tensor:
    while isinstance(output, tuple):
        output = output[0]
    return output


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

"""What the tests of files share: models to save, files taken apart, and the check that a refusal changes nothing."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from torch import Tensor, nn

import lora_plus
from lora_plus.model.tree import adapted_weights

PATHS = {"native": "adapter.safetensors", "peft": "adapter"}
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.int32: "I32", torch.int64: "I64"}


class Net(nn.Module):
    """Every kind of layer with a fact of its own, and a head with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 6, 3, groups=2, padding=1)
        self.proj = nn.Linear(6, 5)
        self.head = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.conv(self.embed(tokens).transpose(1, 2)).mean(2)
        return self.head(self.proj(h))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


TOKENS = torch.arange(18).reshape(2, 9) % 9
TRAINED = ["embed", "conv", "proj"]


def adapted_net(seed: int = 7, **changes: Any) -> Net:
    """The net with an adapter on each layer, and a head whose parameters and buffers have moved."""
    options: dict[str, Any] = {"r": 2, "alpha": 3, "rank_pattern": {"proj": 3}, "train_also": ["head"], **changes}
    model = lora_plus.inject_lora(net(), TRAINED, **options)
    assert isinstance(model, Net)
    randomise(model, seed)
    if not options["train_also"]:
        return model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.head.state_dict(keep_vars=True).values():
            tensor += 3 if tensor.dtype == torch.int64 else torch.rand(tensor.shape, generator=generator)
    return model


def plain_net(seed: int = 0) -> nn.Module:
    """The net with an ungrouped convolution, whose PEFT file has the shapes of PEFT's own."""
    torch.manual_seed(seed)
    model = net()
    model.conv = nn.Conv1d(4, 6, 3, padding=1)
    return model


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        layer = nn.Linear(4, 4)
        setattr(self, first, layer)
        setattr(self, second, layer)
        self.names = (first, second)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that loading may change: values, identities, classes, flags, hooks, and what the model prints."""
    return {
        "modules": [(name, type(module), id(module)) for name, module in model.named_modules()],
        "tensors": {
            name: (id(tensor), tensor.requires_grad, tensor.dtype, tensor.device, bits(tensor))
            for name, tensor in model.state_dict(keep_vars=True).items()
        },
        # containers of adapters make the tables that every module has when they are asked for
        "attributes": [sorted(module.__dict__.keys() - vars(nn.Module()).keys()) for module in model.modules()],
        "hooks": [list(module._forward_pre_hooks) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "repr": repr(model),
    }


def bits(tensor: Tensor) -> bytes:
    return b"" if tensor.is_meta else bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


def settings_of(model: nn.Module, adapter: str = "default") -> dict[str, dict[str, Any]]:
    fields = ("r", "alpha", "scaling", "variant", "dropout", "scale")
    return {
        path: {name: getattr(layer.lora_adapters[adapter].spec, name) for name in fields}
        for path, layer in adapted_weights(model)
        if adapter in layer.lora_adapters
    }


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class Parts:
    """A file taken apart, to be changed and put together by means other than the library's."""

    tensors: dict[str, tuple[str, list[int], bytes]]
    document: Any
    others: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, tensor: Tensor) -> None:
        data = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
        self.tensors[name] = (DTYPES[tensor.dtype], list(tensor.shape), data)

    def bytes(self) -> bytes:
        text = self.document if isinstance(self.document, str) else json.dumps(self.document)
        return assemble(self.tensors, {**self.others, "lora_plus": text})


def assemble(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parts(path: Path) -> Parts:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__")
    tensors = {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in header.items()
    }
    document = json.loads(metadata.pop("lora_plus")) if "lora_plus" in metadata else None
    return Parts(tensors, document, metadata)


def refused(model: nn.Module, path: Path) -> list[str]:
    """The problems that loading reports, after checking that it left the model bit for bit as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        lora_plus.load_adapter(model, path)
    assert snapshot(model) == before
    head, *lines = str(error.value).split("\n")
    assert head == f"adapter {str(path)!r} cannot be loaded; the model is unchanged:"
    return [line.removeprefix("  ") for line in lines]


Edit = Callable[[Parts], object]


def put(name: str, tensor: Tensor) -> Edit:
    return lambda file: file.put(name, tensor)


def drop(name: str) -> Edit:
    return lambda file: file.tensors.pop(name)


def rename(old: str, new: str) -> Edit:
    return lambda file: file.tensors.update({new: file.tensors.pop(old)})


def both(*edits: Edit) -> Edit:
    return lambda file: [edit(file) for edit in edits]


FLOATS = "(torch.float32, torch.float16, torch.bfloat16, torch.float64)"


def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", script, *arguments]
    root = Path(lora_plus.__file__).parents[1]
    return subprocess.Popen(command, env=variables, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output

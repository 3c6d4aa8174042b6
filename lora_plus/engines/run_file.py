"""What a run changes in a model with adapters, as one file, to resume it from: adapter files leave out some of that."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from lora_plus.errors import Problems
from lora_plus.files.tensor_writer import write_safetensors
from lora_plus.model.state import State
from lora_plus.model.storage import Storage
from lora_plus.model.tree import Tree, named_parameters
from lora_plus.text import join


def run_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that is not the frozen base, by name: the tensors of all adapters, trainable parameters, lasting buffers."""
    tree = Tree(model)
    found: dict[str, Tensor] = {
        join(path, f"{container}.{adapter.name}"): tensor
        for path, adapter, _ in tree.adapters()
        for container, tensor in adapter.tensors().items()
    }
    found |= {name: parameter for name, parameter in named_parameters(model) if parameter.requires_grad}
    for path, module in tree.modules:
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[join(path, name)] = buffer
    return found


def save_run(model: nn.Module, path: Path, *, write: bool = True) -> None:
    """Write the tensors of all adapters, other trained parameters and buffers to a file, unless ``write`` is False.

    If the model is sharded, every rank must call this, because tensors are gathered. If one rank cannot write its file,
    all raise its error.
    """
    storage = State(model).storage
    tensors = storage.read(run_tensors(model))
    storage.on_every_rank(lambda: write_safetensors(path, tensors, {}) if write else None)


def load_run(model: nn.Module, path: Path) -> None:
    """Copy the tensors of a file of `save_run` into the model.

    If the model is sharded, every rank must call this and read the file; if one cannot, all raise its error.

    Raises:
        Problems: a ValueError with every difference between file and model, which is unchanged then.
    """
    own, storage = run_tensors(model), State(model).storage
    tensors = storage.on_every_rank(lambda: _read(path, own, storage))
    storage.write((tensor, tensors[name]) for name, tensor in own.items())


def _read(path: Path, own: Mapping[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    """The tensors of a file, which must be those of the model."""
    tensors = load_file(path)
    problems = name_problems(tensors, "file", own, "model")
    for name in own.keys() & tensors.keys():
        in_file = tuple(tensors[name].shape), tensors[name].dtype
        in_model = storage.shape(own[name]), own[name].dtype
        if in_file != in_model:
            problems.append(f"{name!r} is {in_file} in the file, {in_model} in the model")
    if problems:
        failure = f"{str(path)!r} does not fit the model, whose adapters must be those of its run"
        raise Problems(failure, sorted(problems))
    return tensors


def name_problems(saved: Collection[str], there: str, own: Collection[str], here: str) -> list[str]:
    """The names that only what was saved has, or only what it is loaded into; both are told by these words."""
    return [f"{name!r} is in the {there}, and not in the {here}" for name in saved if name not in own] + [
        f"{name!r} is in the {here}, and not in the {there}" for name in own if name not in saved
    ]

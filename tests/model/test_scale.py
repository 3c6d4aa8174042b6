"""The cost of a large tree: ratios measured in one run, never absolute times."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import tree
from torch import nn

import lora_plus
from lora_plus.files import tensor_file, tensor_writer
from lora_plus.files.saved_adapter import most_common
from lora_plus.layers.adapter import AdapterTensors
from lora_plus.layers.site import BaseParameters
from lora_plus.model import tree as module_tree


@pytest.mark.slow
def test_four_times_the_layers_cost_about_four_times_as_much() -> None:
    # machines are noisy, so the sizes are far enough apart to tell 4 from the 16 of a quadratic cost
    small, large = tree.best(tree.ours, 1_500, 3), tree.best(tree.ours, 6_000, 3)
    for name in small:
        assert large[name] < 10 * small[name], f"{name}: {large[name] / small[name]:.2f} times as long"
    assert small["inject"] < 8 * small["wrap by hand"]
    assert small["second adapter"] < 4 * small["inject"]


def test_a_file_that_fits_nothing_is_refused_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora_plus.save_adapter(lora_plus.inject_lora(tree.tree(4000), "all-linear", r=1), path)
    start = time.process_time()
    with pytest.raises(ValueError, match="and 3970 more"):
        lora_plus.load_adapter(nn.ModuleDict({f"x{i}": nn.Linear(2, 2) for i in range(4000)}), path)
    # a search for near misses of every name would take minutes
    assert time.process_time() - start < 30


def test_each_operation_walks_through_the_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[int] = []
    walk = module_tree.walk

    def counted(model: nn.Module, **settings: bool) -> module_tree.Walk:
        found = walk(model, **settings)
        walked.append(len(found.modules))
        return found

    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and getattr(module, "walk", None) is walk:
            monkeypatch.setattr(module, "walk", counted)

    def walks(layers: int) -> list[list[int]]:
        model, path, folder = tree.tree(layers), tmp_path / f"{layers}.safetensors", tmp_path / f"{layers}"
        operations = [
            *(partial(lora_plus.inject_lora, model, "all-linear", r=1, adapter=name) for name in "abc"),
            partial(lora_plus.save_adapter, model, path, adapter="a"),
            partial(lora_plus.load_adapter, tree.tree(layers), path),
            partial(lora_plus.save_adapter, model, folder, adapter="a"),
            partial(lora_plus.load_adapter, tree.tree(layers), folder),
            partial(lora_plus.lora_summary, model),
            partial(lora_plus.remove_lora, model),
        ]
        sizes = []
        for operation in operations:
            walked.clear()
            operation()
            sizes.append(walked.copy())
        return sizes

    # the model, its blocks of four and its layers; the containers of the adapters' tensors are left out
    assert walks(8) == [[1 + 2 + 8]] * 9
    assert walks(80) == [[1 + 20 + 80]] * 9


def test_a_walk_finds_what_torch_finds_but_the_containers_of_tensors() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.MultiheadAttention(2, 1), "c": shared})
    model["a"].register_module("none", None)
    lora_plus.inject_lora(model, ["c", "b"], r=1)
    for every_name in (False, True):
        theirs = model.named_modules(remove_duplicate=not every_name)
        assert module_tree.named_modules(model, every_name=every_name) == [
            (name, module) for name, module in theirs if not isinstance(module, (AdapterTensors, BaseParameters))
        ]


def test_the_tensors_of_a_file_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, starts = tmp_path / "a.safetensors", []
    lora_plus.save_adapter(lora_plus.inject_lora(tree.tree(40), "all-linear", r=1), path)
    read = tensor_file.TensorFile.read_many

    def noted(file: tensor_file.TensorFile, names: list[str]) -> list[torch.Tensor]:
        starts.append([file.tensors[name].start for name in names])
        return read(file, names)

    monkeypatch.setattr(tensor_file.TensorFile, "read_many", noted)
    lora_plus.load_adapter(tree.tree(40), path)
    assert len(starts) == 1 and len(starts[0]) == 80 and starts[0] == sorted(starts[0])


def test_a_file_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    numbers = torch.arange(24.0).reshape(2, 3, 4)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    tensors = {f"{dtype}": numbers.to(dtype) for dtype in (*dtypes, torch.complex64, torch.float8_e4m3fn)}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "byte": torch.ones(1, dtype=torch.uint8)}
    tensor_writer.write_safetensors(path, tensors, {"key": "text"})
    problems: list[str] = []
    unread, metadata = tensor_file.open_safetensors(path, problems)
    assert metadata == {"key": "text"} and list(unread) == sorted(tensors) and not problems
    read = {name: tensor_file.read(tensor) for name, tensor in unread.items()}
    path.write_bytes(bytes(path.stat().st_size))  # what was read is no window on the file
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert bytes(read[name].untyped_storage()) == bytes(tensor.untyped_storage())


def test_the_most_common_of_many_different_values_is_found_in_linear_time() -> None:
    compared = 0

    class Value(int):
        __hash__ = int.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return int(self) == other

    assert most_common([*map(Value, range(1000)), Value(7)]) == 7
    assert compared < 100
    assert most_common([3, 1, 1, 2, 2]) == 1

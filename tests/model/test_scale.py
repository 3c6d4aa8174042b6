"""The cost of a large tree: ratios measured in one run, never absolute times."""

from __future__ import annotations

import copy
import pickle
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import tree
from torch import nn

import lora_plus
from lora_plus.files import checks, tensor_file, tensor_writer
from lora_plus.files.saved_adapter import most_common
from lora_plus.layers.adapter import AdapterTensors
from lora_plus.layers.site import BaseParameters
from lora_plus.model import parameter_places
from lora_plus.model import tree as module_tree


@pytest.mark.slow
def test_four_times_the_layers_cost_about_four_times_as_much() -> None:
    # machines are noisy, so the sizes are far enough apart to tell 4 from the 16 of a quadratic cost
    small, large = tree.best(tree.ours, 1_000, 2), tree.best(tree.ours, 4_000, 2)
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


def walks(operation: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many modules each walk in an operation has met, ours or torch's; walks over one layer are left out."""
    walked: list[int] = []
    walk, theirs = module_tree.Tree.__init__, nn.Module.named_modules

    def ours(self: module_tree.Tree, model: nn.Module) -> None:
        walk(self, model)
        walked.append(len(self.names))

    def torchs(self: nn.Module, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        found = list(theirs(self, memo, prefix, remove_duplicate))
        if prefix == "" and len(found) > 5:
            walked.append(len(found))
        return iter(found)

    with monkeypatch.context() as patched:
        patched.setattr(module_tree.Tree, "__init__", ours)
        patched.setattr(nn.Module, "named_modules", torchs)
        operation()
    return walked


@pytest.mark.parametrize("layers", [8, 80])
def test_each_operation_walks_through_the_model_once(
    layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path, folder = tree.tree(layers), tmp_path / "a.safetensors", tmp_path / "a"
    operations: list[Callable[[], object]] = [
        *(partial(lora_plus.inject_lora, model, "all-linear", r=1, adapter=name) for name in "abc"),
        partial(lora_plus.save_adapter, model, path, adapter="a"),
        partial(lora_plus.load_adapter, tree.tree(layers), path),
        partial(lora_plus.save_adapter, model, folder, adapter="a"),
        partial(lora_plus.load_adapter, tree.tree(layers), folder),
        partial(lora_plus.lora_summary, model),
        partial(lora_plus.set_adapter, model, "b"),
        partial(lora_plus.merge_lora, model),
        partial(lora_plus.unmerge_lora, model),
        partial(lora_plus.delete_adapter, model, "c"),
        partial(lora_plus.remove_lora, model),
    ]
    # the model, its blocks of four and its layers; the containers of the adapters' tensors are left out
    size = 1 + layers // 4 + layers
    assert [walks(operation, monkeypatch) for operation in operations] == [[size]] * len(operations)


def calls(operation: Callable[[], object]) -> int:
    """How often an operation calls a function of this package."""
    count, package = 0, str(Path(lora_plus.__file__).parent)

    def counted(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(package)

    sys.setprofile(counted)
    try:
        operation()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(("name", "saving", "loading"), [("a.safetensors", 90, 105), ("folder", 105, 135)])
def test_saving_and_loading_call_few_functions_for_each_layer(
    name: str, saving: int, loading: int, tmp_path: Path
) -> None:
    def both(layers: int) -> tuple[int, int]:
        model, path = lora_plus.inject_lora(tree.tree(layers), "all-linear", r=1), tmp_path / str(layers) / name
        return calls(lambda: lora_plus.save_adapter(model, path)), calls(
            lambda: lora_plus.load_adapter(tree.tree(layers), path)
        )

    both(4)  # what is done once in a process
    (few_saving, few_loading), (many_saving, many_loading) = both(40), both(80)
    assert (many_saving - few_saving) / 40 <= saving
    assert (many_loading - few_loading) / 40 <= loading


def test_values_are_asked_together_and_the_wrong_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = lora_plus.inject_lora(tree.tree(400), "all-linear", r=1), tmp_path / "a.safetensors"
    asked = 0
    is_finite = checks.is_finite

    def counted(tensor: torch.Tensor) -> bool:
        nonlocal asked
        asked += 1
        return is_finite(tensor)

    monkeypatch.setattr(checks, "is_finite", counted)
    lora_plus.save_adapter(model, path)
    lora_plus.load_adapter(tree.tree(400), path)
    assert asked == 4  # all A and all B
    with torch.no_grad():
        for number, value in ((3, torch.inf), (70, torch.nan)):
            model.get_submodule(f"{number}.1.lora_B").default[0, 0] = value
    with pytest.raises(ValueError, match="not finite") as error:
        lora_plus.save_adapter(model, path)
    assert [line.split()[0] for line in str(error.value).splitlines()[1:]] == ["'3.1.lora_B'", "'70.1.lora_B'"]


def test_a_folder_is_read_without_a_place_for_each_parameter_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(2, 3, 3)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.up[0] @ self.down[1]

    def model() -> nn.Module:
        return nn.ModuleDict({"experts": Experts(), "rest": tree.tree(40)})

    lora_plus.save_adapter(lora_plus.inject_lora(model(), ["experts.up", "0"], r=1), tmp_path / "folder")
    places = list[str]()
    made = parameter_places.ParameterPlace.__init__

    def noted(place: parameter_places.ParameterPlace, *settings: Any, **named: Any) -> None:
        made(place, *settings, **named)
        places.append(place.name)

    monkeypatch.setattr(parameter_places.ParameterPlace, "__init__", noted)
    lora_plus.load_adapter(model(), tmp_path / "folder")
    assert set(places) == {"experts.up", "experts.down"}


def calls_for_a_layer(**settings: Callable[[list[str]], Any]) -> float:
    """The calls that each further layer costs; settings are made from the names of all layers."""
    counts = []
    for layers in (80, 240):
        model, names = tree.tree(layers), [f"{block}.{index}" for block in range(layers // 4) for index in range(4)]
        made = {name: make(names) for name, make in {"targets": lambda names: "all-linear", **settings}.items()}
        counts.append(calls(partial(lora_plus.inject_lora, model, r=1, **made)))
    return (counts[1] - counts[0]) / 160


def test_injecting_calls_few_functions_for_each_layer() -> None:
    lora_plus.inject_lora(tree.tree(4), "all-linear", r=1)  # what is done once for each class
    assert calls_for_a_layer() <= 68  # some of them by the engines whose packages are loaded


@pytest.mark.parametrize(
    "settings, more",
    [
        ({"targets": list}, 10),
        ({"rank_pattern": lambda names: dict.fromkeys(names, 2)}, 20),
        ({"exclude": lambda names: names[1:]}, 0),
        ({"train_also": lambda names: names[1:], "targets": lambda names: names[:1]}, 0),
    ],
    ids=["targets", "rank_pattern", "exclude", "train_also"],
)
def test_a_name_for_each_layer_costs_the_same_for_each(settings: dict[str, Any], more: int) -> None:
    lora_plus.inject_lora(tree.tree(4), "all-linear", r=1)
    assert calls_for_a_layer(**settings) <= 68 + more  # where each name is compared with each layer, 320 more


def test_a_container_of_tensors_has_hooks_as_any_module_once_they_are_asked_for() -> None:
    layer = lora_plus.LoRALinear(4, 4, r=2)
    container, seen = layer.lora_A, list[Any]()
    tables = [name for name in vars(nn.Module()) if "hook" in name]
    assert len(tables) > 10 and not set(tables) & set(vars(container))
    assert container._forward_hooks == {} and not hasattr(container, "nothing")
    container.register_state_dict_post_hook(lambda *given: seen.append(given))
    layer.state_dict()
    assert len(seen) == 1
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(lora_plus.LoRALinear(4, 4, r=2)))):
        # what keeps the layer out of torch's fused kernels
        assert copied.lora_A._forward_pre_hooks and copied.lora_B._forward_pre_hooks
    assert not layer.lora_B._state_dict_hooks


def test_a_walk_finds_what_torch_finds_but_the_containers_of_tensors() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.MultiheadAttention(2, 1), "c": shared})
    model["a"].register_module("none", None)
    lora_plus.inject_lora(model, ["c", "b"], r=1)
    met = module_tree.Tree(model)
    for every_name, ours in ((False, met.modules), (True, met.names)):
        theirs = model.named_modules(remove_duplicate=not every_name)
        assert ours == [
            (name, module) for name, module in theirs if not isinstance(module, (AdapterTensors, BaseParameters))
        ]
    assert {*map(id, met.parameters())} == {*map(id, model.parameters())}


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

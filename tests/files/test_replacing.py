"""Values of a saved adapter into one that the model has: in place, all or nothing, from a disk or from memory."""

from __future__ import annotations

import copy
import errno
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_plus as lp
from lora_plus.files import read_adapter, to_peft
from lora_plus.files.tensor_file import TensorFile


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_gets_the_values_in_place(case: Case, tmp_path: Path) -> None:
    source, model = case.adapted(), randomise(case.adapted(), seed=3)
    lp.save_adapter(source, tmp_path / "a.safetensors")
    x = case.input()
    assert not torch.allclose(model.eval()(x), source.eval()(x), atol=1e-4)
    held = dict(model.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in held.items()}
    assert lp.load_adapter(model, tmp_path / "a.safetensors", replace=True) is model
    assert dict(model.named_parameters()) == held and all(p is held[n] for n, p in model.named_parameters())
    assert {name: parameter.requires_grad for name, parameter in held.items()} == flags
    assert torch.equal(model(x), source(x))


def pair(r: int = 4, alpha: float = 16, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    return randomise(lp.inject_lora(model, ["0", "2"], r=r, alpha=alpha, **settings), seed=r)


@pytest.mark.parametrize("r", [1, 3, 4])
@pytest.mark.parametrize("settings", [{}, {"scaling": "rslora"}, {"variant": "dora"}, {"dropout": 0.5}])
def test_a_lower_rank_and_another_scale_give_the_same_update(r: int, settings: dict[str, Any], tmp_path: Path) -> None:
    source, model = pair(r, alpha=3, **settings), pair(4, alpha=-7, **settings)
    lp.save_adapter(source, tmp_path / "a.safetensors")
    spec = model[0].lora_adapters["default"].spec
    lp.load_adapter(model, tmp_path / "a.safetensors", replace=True)
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), source.eval()(x), rtol=1e-12, atol=1e-12)
    assert model[0].lora_adapters["default"].spec == spec
    assert not model[0].lora_A["default"][r:].any() and not model[0].lora_B["default"][:, r:].any()


def test_what_is_in_memory_is_taken_too(tmp_path: Path) -> None:
    source, x = pair(3), torch.randn(5, 6, dtype=torch.float64)
    lp.save_adapter(source, tmp_path / "a.safetensors")
    for given in (
        read_adapter(tmp_path / "a.safetensors"),
        to_peft(source),
        to_peft(source, for_="vllm", dtype=torch.float64),
    ):
        model = lp.load_adapter(pair(4), given, replace=True)
        torch.testing.assert_close(model(x), source(x), rtol=1e-12, atol=1e-12)
        fresh = lp.load_adapter(lp.remove_lora(pair(4)), given, replace=True)  # there is none to replace
        torch.testing.assert_close(fresh(x), source(x), rtol=1e-12, atol=1e-12)
    config, tensors = to_peft(source)
    broken = {**tensors, "base_model.model.0.lora_A.weight": torch.zeros(3, 5)}
    with pytest.raises(ValueError, match=r"the adapter cannot be loaded; the model is unchanged:\n.*'0'"):
        lp.load_adapter(pair(4), (config, broken), replace=True)
    with pytest.raises(ValueError, match="peft_type is None"):
        lp.load_adapter(pair(4), ({}, tensors), replace=True)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a higher rank": ({"r": 5}, "r 5 in the file, 4 in the model"),
    "a variant": ({"variant": "dora"}, "variant 'dora' in the file, 'lora' in the model"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_name_and_nothing_changes(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    lp.save_adapter(pair(**{"r": 4, **settings}), tmp_path / "a.safetensors")
    model = pair(4)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"'2': {message}"):
        lp.load_adapter(model, tmp_path / "a.safetensors", replace=True)
    assert_unchanged(model, before)


def test_other_places_are_refused_by_name(tmp_path: Path) -> None:
    one = randomise(lp.inject_lora(lp.remove_lora(pair()), ["0"], r=4))
    lp.save_adapter(one, tmp_path / "one.safetensors")
    lp.save_adapter(pair(), tmp_path / "both.safetensors")
    model = pair()
    before = snapshot(model)
    with pytest.raises(ValueError, match="'2' has no adapter in the file"):
        lp.load_adapter(model, tmp_path / "one.safetensors", replace=True)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="'2' has no adapter 'default' in the model"):
        lp.load_adapter(one, tmp_path / "both.safetensors", replace=True)


BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "another shape": lambda B: B.new_zeros(4, 3),
    "not finite": lambda B: B.index_fill(1, torch.tensor([2]), torch.nan),
    "not finite in the model's dtype": lambda B: B * 1e5,
}
"""What becomes of the last tensor of a source."""


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_source_changes_nothing(broken: Callable[[Tensor], Tensor], on_disk: bool, tmp_path: Path) -> None:
    model, path = pair().half(), tmp_path / "a.safetensors"
    lp.save_adapter(pair(3), path)
    data = read_adapter(path)
    if on_disk:
        tensors, metadata = load_file(path), safe_open(path, "pt").metadata()
        save_file(tensors | {"2.lora_B": broken(tensors["2.lora_B"])}, path, metadata)
    else:
        last = data.layers["2"].tensors
        last["lora_B"] = broken(last["lora_B"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot be loaded; the model is unchanged:\n  '2"):
        lp.load_adapter(model, path if on_disk else data, replace=True)
    assert_unchanged(model, before)


def test_a_file_that_is_cut_short_changes_nothing(tmp_path: Path) -> None:
    model, path = pair(), tmp_path / "a.safetensors"
    lp.save_adapter(pair(3), path)
    before, whole = snapshot(model), path.read_bytes()
    for length in (len(whole) - 8, len(whole) // 2, 4, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be loaded; the model is unchanged"):
            lp.load_adapter(model, path, replace=True)
        assert_unchanged(model, before)


class Immovable(Tensor):
    """A tensor that fits on no device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and any(isinstance(each, torch.device) for each in args):
            raise MemoryError("no memory left on the device")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_device_without_memory_changes_nothing() -> None:
    model, (config, tensors) = pair(), to_peft(pair(4, alpha=3))
    before = snapshot(model)
    for name, tensor in tensors.items():
        given = config, {**tensors, name: tensor.as_subclass(Immovable)}
        with pytest.raises(MemoryError):
            lp.load_adapter(model, given, replace=True)
        assert_unchanged(model, before)


@pytest.mark.parametrize("folder", [False, True])
def test_a_disk_that_fails_changes_nothing(folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = pair(), tmp_path / ("folder" if folder else "a.safetensors")
    lp.save_adapter(pair(3), path)
    before, read_many = snapshot(model), TensorFile.read_many

    def failing(file: TensorFile, names: list[str]) -> list[Tensor]:
        read_many(file, names[:-1])
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(TensorFile, "read_many", failing)
    with pytest.raises(OSError, match="Input/output error"):
        lp.load_adapter(model, path, replace=True)
    assert_unchanged(model, before)


def test_without_the_word_an_adapter_that_is_there_is_refused(tmp_path: Path) -> None:
    lp.save_adapter(pair(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="the model has an adapter 'default' already"):
        lp.load_adapter(pair(), tmp_path / "a.safetensors")
    with lp.merged(model := pair()), pytest.raises(ValueError, match="loading into an adapter needs unmerged weights"):
        lp.load_adapter(model, tmp_path / "a.safetensors", replace=True)


def test_an_optimizer_goes_on_and_modules_trained_in_full_follow(tmp_path: Path) -> None:
    model = lp.inject_lora(lp.remove_lora(pair()), ["0"], r=4, train_also=["2"])
    optimizer = lp.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2)
    x = torch.randn(5, 6, dtype=torch.float64)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()
    best, outputs = copy.deepcopy(to_peft(model)), model(x).detach()
    step()
    assert not torch.equal(model(x), outputs)
    lp.load_adapter(model, best, replace=True)
    assert torch.equal(model(x), outputs)
    lp.check_optimizer(optimizer, model)
    step()
    assert not torch.equal(model(x), outputs)


def test_inside_of_inference_mode_per_sample_and_disabled_blocks() -> None:
    source, model, x = pair(3), pair(4), torch.randn(2, 6, dtype=torch.float64)
    lp.add_adapter(model, "b", like="default")
    given = to_peft(source)
    with torch.inference_mode(), lp.adapter_per_sample(model, ["default", "b"]):
        model(x)
        lp.load_adapter(model, given, replace=True)
        torch.testing.assert_close(model(x)[0], source(x)[0], rtol=1e-12, atol=1e-12)
    with lp.disabled(model):
        lp.load_adapter(model, to_peft(pair(2)), adapter="b", replace=True)
    lp.set_adapter(model, "b")
    torch.testing.assert_close(model(x), pair(2)(x), rtol=1e-12, atol=1e-12)


def scale(model: nn.Module) -> float:
    return model[0].lora_adapters["default"].scale


def test_tensors_that_count_no_changes_are_never_stale() -> None:
    x = torch.randn(2, 6, dtype=torch.float64)
    with torch.inference_mode():
        model = copy.deepcopy(lp.add_adapter(pair(4), "b", like="default"))
        assert model[0].lora_A["default"].is_inference()
        with lp.adapter_per_sample(model, ["default", "b"]):
            for r in (3, 2):
                lp.load_adapter(model, to_peft(pair(r)), replace=True)
                torch.testing.assert_close(model(x)[0], pair(r)(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # in importing Inductor
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("gradients", [False, True])
def test_swapping_ranks_makes_no_new_graph(gradients: bool, dynamic: bool | None, backend: str) -> None:
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    model, x = pair(8), torch.randn(5, 6, dtype=torch.float64)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    for r in range(1, 9):
        source = pair(r, alpha=r + 2)
        lp.load_adapter(model, to_peft(source), replace=True)
        with torch.set_grad_enabled(gradients):
            y, wanted = compiled(x), source(x)
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
        if gradients:
            steps = ((y, model[0].lora_B["default"]), (wanted, source[0].lora_B["default"]))
            grads = [torch.autograd.grad(each.square().sum(), B)[0][:, :r] for each, B in steps]
            torch.testing.assert_close(grads[0] / scale(model), grads[1] / scale(source), rtol=1e-12, atol=1e-12)
        assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_thousand_swaps_leave_nothing_behind() -> None:
    import torch._dynamo.testing

    torch._dynamo.reset()
    sources, model, x = [to_peft(pair(r)) for r in (3, 4)], pair(4), torch.randn(2, 6, dtype=torch.float64)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    fresh = [lp.load_adapter(lp.remove_lora(pair()), source)(x).detach() for source in sources]

    def swap(n: int) -> None:
        lp.load_adapter(model, sources[n % 2], replace=True)
        if n % 50 < 2:
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), fresh[n % 2], rtol=1e-12, atol=1e-12)

    def alive() -> int:
        gc.collect()
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    swap(0)
    before = alive()
    for n in range(1, 1002):
        swap(n)
    assert alive() <= before  # of other tests some may go meanwhile
    assert counter.frame_count == 1
    torch._dynamo.reset()

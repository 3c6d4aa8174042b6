"""A variant that is entered in the table from outside, with a tensor of its own, goes through everything."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, Conv1D, Holder, randomise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_plus
from lora_plus.files import adapter_state_dict, read_adapter, write_adapter
from lora_plus.surgery import combine_adapters, resize_adapter
from lora_plus.tensors import matrix as functional
from lora_plus.tensors.variant import VARIANTS, HasFactors, HasWeight, LoRA, TensorSpec
from lora_plus.training import reset_lora_parameters

PLAIN_CASES = [case for case in CASES if "variant" not in case.options]


class Gain(LoRA):
    """``W + gain * s B A`` with a factor for each output."""

    tensors = (TensorSpec("lora_gain", ("out",), role="gain", group="gain", decays=False),)

    def extra(self, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> dict[str, Tensor]:
        return {"lora_gain": B.new_ones(B.shape[:-1])}

    def join(self, layer: HasWeight, adapter: HasFactors, x: Tensor, y: Tensor, update: Tensor) -> Tensor:
        gain = adapter.tensors()["lora_gain"]
        return y + (layer.per_channel(gain) * update).to(y.dtype)

    def merge(self, weight: Tensor, A: Tensor, B: Tensor, scale: float, tensors: Mapping[str, Tensor]) -> Tensor:
        return functional.add_delta(weight, A, tensors["lora_gain"].unsqueeze(-1) * B, scale)


class Lens(Gain):
    """One whose tensor lies along the input, and another along the rank: ``W + s B diag(core) A diag(lens)``."""

    tensors = (
        TensorSpec("lora_core", ("r",), role="core", group="other", decays=True),
        TensorSpec("lora_lens", ("in",), role="lens", group="A", decays=True),
    )

    def extra(self, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> dict[str, Tensor]:
        return {"lora_core": A.new_ones(A.shape[:-1]), "lora_lens": A.new_ones(A.shape[:-2] + A.shape[-1:])}

    def merge(self, weight: Tensor, A: Tensor, B: Tensor, scale: float, tensors: Mapping[str, Tensor]) -> Tensor:
        seen = tensors["lora_core"].unsqueeze(-1) * A * tensors["lora_lens"].unsqueeze(-2)
        return functional.add_delta(weight, seen, B, scale)


@pytest.fixture(autouse=True)
def entered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setitem(VARIANTS, "gain", Gain())
        patch.setitem(VARIANTS, "lens", Lens())
        yield
    assert not {"gain", "lens"} & VARIANTS.keys()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 5), Conv1D(4, 5), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).tanh()))


def net(**settings: object) -> nn.Module:
    model = Net().double()
    return lora_plus.inject_lora(model, ["a", "b"], **{"r": 3, "alpha": 5, "variant": "gain", **settings})


def explicit(model: nn.Module) -> nn.Module:
    """A plain copy of the model with the weights ``W + gain * s B A``."""
    plain = lora_plus.remove_lora(copy.deepcopy(model))
    for name in ("a", "b"):
        layer = model.get_submodule(name)
        A, B, gain = (layer.get_parameter(f"lora_{part}.default").detach() for part in ("A", "B", "gain"))
        update = 5 / 3 * gain[:, None] * (B @ A)
        plain.get_parameter(f"{name}.weight").data += update if name == "a" else update.T
    return plain


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 6, dtype=torch.float64)


def test_it_computes_what_it_states(x: Tensor) -> None:
    model = randomise(net())
    torch.testing.assert_close(model(x), explicit(model)(x), rtol=0, atol=1e-12)
    with torch.no_grad():  # where sums of products are computed at once
        torch.testing.assert_close(model(x), explicit(model)(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", PLAIN_CASES, ids=lambda case: case.name)
def test_merged_equals_unmerged_on_every_kind_of_layer(case: Case) -> None:
    model, given = case.adapted(variant="gain").eval(), case.input()
    base, unmerged = model.layer.weight, model(given)
    lora_plus.merge_lora(model)
    assert set(model.state_dict()) == set(case.model().state_dict())
    torch.testing.assert_close(model(given), unmerged, rtol=0, atol=1e-12)
    lora_plus.unmerge_lora(model)
    assert model.layer.weight is base
    assert torch.equal(model(given), unmerged)


@pytest.mark.parametrize("layout", ["o i -> o i", "e o i -> e o i"])
@pytest.mark.parametrize("variant", ["gain", "lens"])
def test_it_acts_on_parameters_and_merges_in_blocks(variant: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 130, 4, dtype=torch.float64)[: 3 if layout[0] == "e" else 1])
            if layout[0] == "o":
                self.w = nn.Parameter(self.w[0].detach())

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w.mT

    model = randomise(lora_plus.inject_lora(Bare(), ["w"], r=2, variant=variant)).eval()
    given = torch.randn(5, 4, dtype=torch.float64)
    unmerged = model(given)
    monkeypatch.setattr(functional, "block_elements", lambda device: 64)
    lora_plus.merge_lora(model)
    torch.testing.assert_close(model(given), unmerged, rtol=0, atol=1e-12)


def test_its_tensor_has_a_group_of_its_own_and_is_trained(x: Tensor) -> None:
    model = randomise(net(train_also=["head"]))
    optimizer = lora_plus.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, lr_ratio=4, weight_decay=0.1)
    groups = {group["name"]: (group["lr"], group["weight_decay"], group["params"]) for group in optimizer.param_groups}
    gains = [model.a.lora_gain["default"], model.b.lora_gain["default"]]
    assert list(groups) == ["lora_A", "lora_B", "lora_gain", "other", "other_no_decay"]
    assert groups["lora_gain"][:2] == (1e-2, 0.0)
    assert [id(p) for p in groups["lora_gain"][2]] == [id(p) for p in gains]
    lora_plus.check_optimizer(optimizer, model)
    before = [gain.detach().clone() for gain in gains]
    model(x).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(gain, old) for gain, old in zip(gains, before, strict=True))
    rest = [p for p in model.parameters() if p.requires_grad]
    decayed = lora_plus.loraplus_param_groups(model, lr=1e-2, weight_decay=0.1, decayed=rest)
    assert "lora_gain_decay" in [group["name"] for group in decayed]


def test_a_tensor_can_be_in_the_group_of_A(x: Tensor) -> None:
    model = lora_plus.inject_lora(Net().double(), ["a", "b"], variant="lens")
    groups = {group["name"]: group for group in lora_plus.loraplus_param_groups(model, lr=1e-3)}
    assert list(groups) == ["lora_A", "lora_B", "other"]
    assert len(groups["lora_A"]["params"]) == 4
    assert len(groups["other"]["params"]) == 2


def test_it_is_saved_and_loaded(tmp_path: Path, x: Tensor) -> None:
    model = randomise(net())
    lora_plus.save_adapter(model, tmp_path / "a.safetensors")
    fresh = lora_plus.remove_lora(copy.deepcopy(model))
    loaded = lora_plus.load_adapter(fresh, tmp_path / "a.safetensors")
    assert torch.equal(loaded(x), model(x))
    state = adapter_state_dict(loaded)
    assert sorted(state) == [f"{name}.lora_{part}" for name in "ab" for part in ("A", "B", "gain")]
    write_adapter(read_adapter(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_file_without_its_tensor_or_with_a_wrong_one_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model = net()
    lora_plus.save_adapter(model, path := tmp_path / "a.safetensors")
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file({**tensors, "a.lora_gain": torch.ones(4)}, path, metadata)
    with pytest.raises(ValueError, match=r"lora_gain has shape \(4,\), expected \(5,\)"):
        lora_plus.load_adapter(Net().double(), path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "a.lora_gain"}, path, metadata)
    with pytest.raises(ValueError, match=r"tensor 'a.lora_gain' is missing"):
        lora_plus.load_adapter(Net().double(), path)


def test_checkpoints_are_merged_with_it(tmp_path: Path, x: Tensor) -> None:
    from safetensors.torch import load_file, save_file

    model = randomise(net())
    plain = lora_plus.remove_lora(copy.deepcopy(model))
    save_file(plain.state_dict(), tmp_path / "base.safetensors")
    lora_plus.save_adapter(model, tmp_path / "a.safetensors")
    lora_plus.merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    plain.load_state_dict(load_file(tmp_path / "out.safetensors"))
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-12)


def test_it_is_renamed_added_to_deleted_and_copied(x: Tensor) -> None:
    model = randomise(net())
    right = model(x)
    lora_plus.rename_adapter(model, "default", "other")
    assert [name for name in model.state_dict() if "gain" in name] == ["a.lora_gain.other", "b.lora_gain.other"]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), right)
    lora_plus.add_adapter(model, "second", like="other")
    assert not model.a.lora_gain["other"].requires_grad
    assert model.a.lora_gain["second"].requires_grad
    lora_plus.delete_adapter(model, "second")
    lora_plus.set_adapter(model, "other", trainable=True)
    assert model.a.lora_gain["other"].requires_grad
    assert torch.equal(model(x), right)
    lora_plus.delete_adapter(model, "other")
    assert set(model.state_dict()) == set(Net().state_dict())


def test_nothing_of_it_is_left(x: Tensor) -> None:
    torch.manual_seed(0)
    plain = Net().double()
    torch.manual_seed(0)
    model = net()
    assert torch.equal(model(x), plain(x))
    lora_plus.remove_lora(randomise(model))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert set(vars(model.a)) == set(vars(plain.a))
    assert torch.equal(model(x), plain(x))


def test_it_is_live_and_drawn_anew(x: Tensor) -> None:
    model = randomise(net())
    assert lora_plus.check_adapters(model, x) == ["a", "b"]
    reset_lora_parameters(model)
    assert torch.equal(model.a.lora_gain["default"], torch.ones(5, dtype=torch.float64))


def test_each_sample_has_its_own(x: Tensor) -> None:
    model = lora_plus.inject_lora(net(), ["a"], variant="lora", adapter="plain")
    randomise(model)
    names = ["default", None, "plain", "default", None, "plain", "default"]
    expected = []
    for sample, name in zip(x, names, strict=True):
        lora_plus.set_adapter(model, [] if name is None else name)
        expected.append(model(sample[None]))
    with lora_plus.adapter_per_sample(model, names), torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat(expected), rtol=0, atol=1e-12)


def test_it_keeps_its_update_at_another_rank(x: Tensor) -> None:
    model = randomise(net())
    right = model(x)
    resize_adapter(model, r=5)
    torch.testing.assert_close(model(x), right, rtol=0, atol=1e-12)
    lens = lora_plus.inject_lora(Net().double(), ["a"], variant="lens")
    with pytest.raises(ValueError, match="'a' is of the variant 'lens', whose lora_core cannot have another rank"):
        resize_adapter(lens, r=5)


def test_a_difference_in_its_tensor_is_a_difference(tmp_path: Path) -> None:
    from lora_plus.files.save import describe
    from lora_plus.model.state import State
    from lora_plus.surgery.measures import diff_saved

    model = randomise(net())
    one = describe(State(model), "default")
    assert diff_saved(one, describe(State(model), "default")).equal
    other = copy.deepcopy(model)
    other.a.lora_gain["default"].data *= 2
    found = diff_saved(one, describe(State(other), "default"))
    assert not found.equal
    assert [layer.magnitude for layer in found.layers] == [1.0, 0.0]


REFUSED_FORMATS = {
    "peft": "'a': PEFT has no variant 'gain'; save a .safetensors file, or merge it",
    "kohya": "'a': kohya files have no variant 'gain'; save a native file, or merge it",
    "diffusers": "'a': diffusers files have no variant 'gain'; save a native file, or merge it",
}


@pytest.mark.parametrize(("format", "message"), REFUSED_FORMATS.items(), ids=REFUSED_FORMATS)
def test_other_formats_refuse_it_by_name(tmp_path: Path, format: str, message: str) -> None:
    model = lora_plus.inject_lora(Net(), ["a"], variant="gain")
    with pytest.raises(ValueError) as caught:
        lora_plus.save_adapter(model, tmp_path / "file", format=format)
    assert message in str(caught.value)
    assert "DoRA" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="PEFT has no variant 'gain'"):
        lora_plus.export_adapter(model, tmp_path / "file")


def test_what_takes_sums_only_refuses_it(tmp_path: Path) -> None:
    model = lora_plus.inject_lora(net(), ["a"], adapter="plain")
    with pytest.raises(
        ValueError, match="'a': 'default' is of the variant 'gain', which is more than a product of A and B"
    ):
        combine_adapters(model, ["default", "plain"])
    fused = Holder(nn.Linear(6, 4))
    with pytest.raises(ValueError, match="variant 'gain' is no plain sum and cannot act on some rows of a weight"):
        lora_plus.inject_lora(fused, ["layer.q"], fused={"layer": ["q", "k"]}, variant="gain")
    assert type(fused.layer) is nn.Linear


def test_tensors_that_are_not_as_stated_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gain, "tensors", ())
    model = Net()
    with pytest.raises(ValueError, match=r"variant 'gain' made the tensors \{'lora_gain': \(5,\)\} besides A and B"):
        lora_plus.inject_lora(model, ["a"], variant="gain")
    assert type(model.a) is nn.Linear


class Passes(TorchDispatchMode):
    """Notes what computes with tensors of a shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.names = shape, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in (*args, result) if isinstance(each, Tensor)]
        if not function.is_view and any(each.shape == self.shape for each in tensors):
            self.names.append(function.overloadpacket.__name__)
        return result


@pytest.mark.parametrize(("bias", "besides"), [(True, ["sub"]), (False, [])])
def test_dora_passes_over_an_output_to_add_and_to_rescale(bias: bool, besides: list[str]) -> None:
    model = lora_plus.inject_lora(nn.Linear(7, 5, bias=bias), "", r=2, variant="dora")
    with Passes(3, 5) as passes:
        y = model(torch.randn(3, 7, requires_grad=True))
    assert passes.names == ["addmm" if bias else "mm", "mm", "add", *besides, "mul", "add"]
    dy = torch.ones(3, 5)
    with Passes(3, 5) as passes:
        y.backward(dy)
    # the input's gradient through W and B; m's; that of the sum, which the base and the update share
    assert sorted(passes.names) == ["add", "mm", "mm", "mul", "mul", "sum"]

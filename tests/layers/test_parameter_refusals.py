"""What is refused of weights adapted as parameters or blocks of rows, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randomise
from files_support import parts, refused, snapshot
from torch import Tensor, nn

import lora_plus
from lora_plus import inject_lora

FUSED = {"linear": ["q", "k", "v"]}


class Net(nn.Module):
    """An attention, a linear layer, a recurrent layer, a matrix and a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.linear = nn.Linear(4, 12)
        self.lstm = nn.LSTM(12, 4, batch_first=True)
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.stack = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(self.attention(x, x, x)[0])
        return torch.einsum("...i,eoi->...eo", F.linear(self.lstm(h)[0], self.matrix), self.stack)


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def x() -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


READ = "dropout 0.1 has no input to act on where only a weight is read; use 0, or exclude it"
ROWS = "variant 'dora' rescales whole weights and cannot act on some rows of one; exclude it"


@pytest.mark.parametrize(
    ("targets", "settings", "lines"),
    [
        (["attention"], {"dropout": 0.1}, [f"'attention.{part}': {READ}" for part in ("q", "k", "v", "out_proj")]),
        (["linear", "matrix"], {"dropout": 0.1}, [f"'matrix': {READ}"]),
        (["stack"], {"dropout": 0.1}, [f"'stack': {READ}"]),
        ([nn.LSTM], {"dropout": 0.1}, [f"'lstm.{name}': {READ}" for name in ("weight_ih_l0", "weight_hh_l0")]),
        (["linear.weight"], {"dropout": 0.1}, [f"'linear.weight': {READ}"]),
        (["attention"], {"variant": "dora"}, [f"'attention.{part}': {ROWS}" for part in "qkv"]),
        (["linear.k"], {"variant": "dora", "fused": FUSED}, [f"'linear.k': {ROWS}"]),
        (["linear", "linear.weight"], {},
         ["'linear.weight' and its layer 'linear' are both to be adapted; choose one"]),
        (["linear.q", "linear.weight"], {"fused": FUSED},
         ["'linear.weight' and its layer 'linear.q' are both to be adapted; choose one"]),
        (["linear.z"], {"fused": FUSED},
         ["target 'linear.z' matches no module or parameter (did you mean 'linear.v' or 'linear.q' or 'linear.k'?)"]),
        (["linear.q"], {"fused": {"linear": ["q", "k", "v", "w", "x"]}},
         ["fused 'linear': 'linear' has 12 rows, which are not 5 equal blocks; state the rows of each",
          "target 'linear.q' matches no module or parameter "
          "(did you mean 'linear' or 'linear.weight'?)"]),
        (["linear.q"], {"fused": {"linear": {"q": 4, "k": 4}}},
         ["fused 'linear': 'linear' has 12 rows, but the blocks {'q': 4, 'k': 4} have 8",
          "target 'linear.q' matches no module or parameter "
          "(did you mean 'linear' or 'linear.weight'?)"]),
        (["stack"], {"layouts": {"matrix": "i o -> o i"}},
         ["layouts 'matrix' matches no adapted layer; there is 'stack'"]),
        (["attention.q"], {"train_also": ["attention"]},
         ["'attention.q' is both a target and trained by train_also or train_rows; add it to exclude"]),
    ],
)  # fmt: skip
def test_a_refusal_names_the_place_and_changes_nothing(targets: Any, settings: Any, lines: list[str]) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        inject_lora(model, targets, **settings)
    assert str(error.value) == "\n".join(["nothing was changed, because of:", *(f"  {line}" for line in lines)])
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ((["linear"], {}), (["linear.q"], {"fused": FUSED}), "'linear.q' cannot be adapted: its whole weight has"),
        ((["linear.k"], {"fused": FUSED}), (["linear"], {}), "rows 4 to 8 of its weight have adapters as 'k'"),
        ((["linear.q"], {"fused": FUSED}), (["linear.a"], {"fused": {"linear": ["a", "b"]}}), "adapters as 'q'"),
        ((["linear.q"], {"fused": FUSED}), (["linear.a"], {"fused": {"linear": ["a", "b", "c"]}}), "as 'q'"),
        ((["linear.k"], {"fused": FUSED}), (["linear.k"], {"fused": {"linear": {"q": 4, "k": 2, "v": 6}}}), "as 'k'"),
        ((["linear.weight"], {}), (["linear"], {}), "LoRALinear whose parameters ['weight'] have adapters"),
        ((["linear"], {}), (["linear.weight"], {}), "parameter 'weight' of a layer that has adapters itself"),
        ((["matrix"], {}), (["stack", "matrix"], {"layouts": {"matrix": "i o -> o i"}}), "'matrix'"),
    ],
)
def test_a_second_adapter_that_overlaps_is_refused_and_changes_nothing(first: Any, second: Any, text: str) -> None:
    model = inject_lora(net(), first[0], **first[1])
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(text)):
        inject_lora(model, second[0], adapter="second", **second[1])
    assert snapshot(model) == before


def test_a_second_adapter_takes_the_layout_of_the_first() -> None:
    model = inject_lora(net(), ["matrix"], layouts={"matrix": "i o -> o i"}, adapter="first")
    once = inject_lora(net(), ["matrix"], layouts={"matrix": "i o -> o i"}, adapter="second")
    randomise(inject_lora(model, ["matrix"], adapter="second"))
    once.load_state_dict(
        {name: value for name, value in model.state_dict().items() if not name.endswith("first")}, strict=True
    )
    torch.testing.assert_close(model(x()), once(x()), rtol=1e-12, atol=1e-12)


def test_a_file_for_another_layout_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    saved = inject_lora(net(), ["matrix"], layouts={"matrix": "i o -> o i"})
    lora_plus.save_adapter(saved, tmp_path / "adapter.safetensors")
    model = inject_lora(net(), ["matrix"], adapter="first")
    before = snapshot(model)
    with pytest.raises(ValueError, match="'matrix'"):
        lora_plus.load_adapter(model, tmp_path / "adapter.safetensors")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("target", "settings", "extra", "line"),
    [
        ("matrix", {"dropout": 0.1}, {}, READ),
        ("linear.q", {"variant": "dora"}, {"lora_magnitude": torch.ones(4)}, ROWS),
    ],
)
def test_a_file_that_asks_for_what_its_place_cannot_do_is_refused(
    tmp_path: Path, target: str, settings: dict[str, Any], extra: dict[str, Tensor], line: str
) -> None:
    path = tmp_path / "adapter.safetensors"
    lora_plus.save_adapter(inject_lora(net(), [target], fused=FUSED), path)
    file = parts(path)
    file.document["layers"][target].update(settings)
    for name, tensor in extra.items():
        file.put(f"{target}.{name}", tensor)
    path.write_bytes(file.bytes())
    assert refused(net(), path) == [f"{target!r}: {line}"]


@pytest.mark.parametrize("target", ["linear.bias", "lstm.bias_ih_l0"])
def test_parameters_of_one_dimension_are_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"of shape \(\d+,\), expected two or three dimensions, none of them 0"):
        inject_lora(net(), [target])


def test_a_bag_that_rescales_its_weight_in_place_is_refused() -> None:
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(6, 4, max_norm=1.0)})
    before = snapshot(model)
    for target in ("bag", "bag.weight"):
        with pytest.raises(ValueError, match="EmbeddingBag with max_norm, which rescales rows of its weight in place"):
            inject_lora(model, [target])
    assert snapshot(model) == before


def test_the_second_adapter_of_a_parameter_or_block_may_be_on_other_blocks() -> None:
    model = inject_lora(net(), ["linear.q", "attention.q"], fused=FUSED, adapter="first")
    inject_lora(model, ["linear.q", "linear.v", "attention"], fused=FUSED, adapter="second")
    names = [(row.name, row.adapter) for row in lora_plus.lora_summary(model).rows]
    assert ("linear.q", "first") in names and ("linear.q", "second") in names and ("linear.v", "second") in names
    lora_plus.delete_adapter(model, "second")
    assert [(row.name, row.adapter) for row in lora_plus.lora_summary(model).rows] == [
        ("attention.q", "first"),
        ("linear.q", "first"),
    ]


@pytest.mark.parametrize("name", ["matrix", "linear.weight", "attention.in_proj_weight", "lstm.weight_hh_l0"])
def test_a_parameter_assigned_to_the_attribute_becomes_the_base(name: str) -> None:
    model, reference = randomise(inject_lora(net(), [name])).eval(), net().eval()
    owner_name, _, attribute = name.rpartition(".")
    owner, old = model.get_submodule(owner_name), reference.get_parameter(name)
    update = getattr(owner, attribute).detach() - old.detach()
    new = nn.Parameter(torch.randn_like(old), requires_grad=False)
    for value in (nn.Parameter(torch.zeros(3, 3)), None):
        with pytest.raises(ValueError, match=rf"'{attribute}' has adapters, so it can only be replaced by a parameter"):
            setattr(owner, attribute, value)
    setattr(owner, attribute, new)
    assert model.state_dict()[name].data_ptr() == new.data_ptr()
    with torch.no_grad():
        old.copy_(new + update)
    torch.testing.assert_close(model(x()), reference(x()), rtol=1e-12, atol=1e-12)
    lora_plus.merge_lora(model)
    with pytest.raises(ValueError, match="while it is not merged; call remove_lora"):
        setattr(owner, attribute, nn.Parameter(torch.randn_like(old)))
    assert lora_plus.remove_lora(model).get_parameter(name) is new


def test_dropout_acts_on_the_input_of_fused_rows_in_training_only() -> None:
    model = randomise(inject_lora(net(), ["linear.q", "linear.v"], fused=FUSED, dropout=0.4)).linear
    plain = lora_plus.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(model.eval()(x()), plain(x()), rtol=1e-12, atol=1e-12)
    model.train()
    outputs = torch.stack([model(x()) for _ in range(400)])
    spread = outputs.std(0)
    assert bool((spread[..., :4] > 0).all()) and bool((spread[..., 8:] > 0).all())
    assert not torch.count_nonzero(spread[..., 4:8] > 1e-12)
    error = (outputs.mean(0) - plain(x())).abs() / (spread / 20 + 1e-12)
    assert error.max() < 5.5


def test_rows_of_one_weight_with_different_dropout_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora_plus.save_adapter(inject_lora(net(), ["linear.q", "linear.k"], fused=FUSED), path)
    file = parts(path)
    file.document["layers"]["linear.k"]["dropout"] = 0.9
    path.write_bytes(file.bytes())
    line = "'linear.k' and 'linear.q' are rows of one weight with dropout 0.9 and 0.0; write the same for both"
    assert refused(net(), path) == [line]
    file.document["layers"]["linear.q"]["dropout"] = 0.9
    path.write_bytes(file.bytes())
    loaded = lora_plus.load_adapter(net(), path)
    assert loaded.linear.adapter_named("default").spec.dropout == 0.9


def test_a_layout_that_does_not_fit_the_parameter_is_named() -> None:
    model = nn.ParameterDict({"experts": torch.randn(2, 3, 4)})
    with pytest.raises(ValueError, match=r"of shape \(2, 3, 4\), which is not 'i o'"):
        inject_lora(model, ["experts"], layouts={"experts": "i o -> o i"})

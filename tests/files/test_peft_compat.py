"""PEFT opens the adapter of any layer that is written here, and the other way round, with equal outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, DORA, Case, Holder
from peft_support import (
    DTYPES,
    TOLERANCE,
    assert_refused,
    floats,
    gpt2_linear,
    made_by_peft,
    numbers,
    opened_by_peft,
    read_config,
)
from safetensors.torch import load_file
from torch import nn

import lora_plus
from lora_plus.files import adapter_state_dict

pytestmark = pytest.mark.peers

PEFT_DIFFERS = {
    "conv1d-gpt2": "PEFT knows transformers' class only; see GPT2",
    "conv1d-gpt2-dora": "PEFT knows transformers' class only; see GPT2",
    "embedding-max-norm": "the writer refuses it",
    **{case.name: "the writer refuses it" for case in CASES if case.name.startswith("conv-transpose")},
    "conv3d-groups-dora": "the writer refuses it",
    "conv1d-dilated-circular": "PEFT's A drops dilation and padding_mode",
    "conv2d-depthwise-reflect": "PEFT's A drops padding_mode",
    "conv2d-dora": "PEFT's A drops dilation",
    "conv2d-own": "PEFT makes A and B of the user's own class, with its own forward",
    "conv2d-unbatched-dora": "PEFT's DoRA takes the batch for the channels",
}
"""Cases that PEFT cannot express or computes in another way."""


GPT2 = [
    Case("gpt2", lambda: _random_bias(gpt2_linear(5, 6)), floats(2, 3, 6)),
    Case("gpt2-rslora", lambda: _random_bias(gpt2_linear(5, 6)), floats(2, 3, 6), {"scaling": "rslora"}),
    Case("gpt2-dora", lambda: _random_bias(gpt2_linear(5, 6)), floats(2, 3, 6), DORA),
]
PEER_CASES = [
    *(case for case in CASES if case.name not in PEFT_DIFFERS),
    *GPT2,
    Case("embedding-rslora", lambda: nn.Embedding(9, 4), CASES[[c.name for c in CASES].index("embedding")].make_input,
         {"scaling": "rslora"}),
    Case("conv1d-rslora", lambda: nn.Conv1d(4, 6, 3), floats(2, 4, 9), {"scaling": "rslora"}),
    Case("conv1d-groups", lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1), floats(2, 4, 9)),
    Case("conv2d-groups-rslora", lambda: nn.Conv2d(4, 6, 3, groups=2), floats(2, 4, 7, 6), {"scaling": "rslora"}),
    Case("conv2d-depthwise", lambda: nn.Conv2d(4, 8, (3, 2), groups=4), floats(2, 4, 5, 6)),
    Case("conv3d-groups", lambda: nn.Conv3d(2, 4, (1, 2, 1), groups=2), floats(2, 2, 3, 4, 5)),
    Case("conv2d-plain-dora", lambda: nn.Conv2d(4, 6, (2, 3), padding=1), floats(2, 4, 6, 7), DORA),
    Case("conv3d-dora", lambda: nn.Conv3d(2, 3, (1, 2, 3)), floats(2, 2, 3, 4, 5), DORA),
]  # fmt: skip


def _random_bias(layer: nn.Module) -> nn.Module:
    nn.init.normal_(layer.bias)
    return layer


@pytest.fixture(params=PEER_CASES, ids=lambda case: case.name)
def peer_case(request: pytest.FixtureRequest) -> Case:
    return request.param


def peft_config(case: Case) -> dict[str, Any]:
    """The case's settings in PEFT's words; rank 4, because PEFT wants a multiple of the groups."""
    return {
        "target_modules": ["layer"],
        "r": 4,
        "lora_alpha": 5,
        "use_rslora": case.options.get("scaling") == "rslora",
        "use_dora": case.options.get("variant") == "dora",
        "fan_in_fan_out": case.name.startswith("gpt2"),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_peft_opens_what_we_write(peer_case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = peer_case.adapted(dtype).eval(), peer_case.input(dtype)
    lora_plus.save_adapter(model, tmp_path)
    theirs = opened_by_peft(peer_case.model(dtype), tmp_path)
    base = peer_case.model(dtype).eval()
    assert (model(x) - base(x)).abs().max() > 1e-2, "the adapter is inert"
    torch.testing.assert_close(theirs(x), model(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


PEFT_15 = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layer_replication", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
"""The fields of PEFT 0.15.2, which warns of others."""


def test_a_folder_has_no_field_that_the_oldest_peft_does_not_know(tmp_path: Path) -> None:
    lora_plus.save_adapter(CASES[0].adapted(), tmp_path)
    assert set(read_config(tmp_path)) <= PEFT_15


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_peft_saves_again_is_still_the_adapter(peer_case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = peer_case.adapted(dtype).eval(), peer_case.input(dtype)
    lora_plus.save_adapter(model, tmp_path / "ours")
    opened_by_peft(peer_case.model(dtype), tmp_path / "ours").save_pretrained(str(tmp_path / "theirs"))
    loaded = lora_plus.load_adapter(peer_case.model(dtype).eval(), tmp_path / "theirs")
    torch.testing.assert_close(loaded(x), model(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert loaded.layer.lora_adapters["default"].spec.r == peer_case.settings["r"]
    for name, tensor in adapter_state_dict(loaded).items():
        assert torch.equal(tensor, adapter_state_dict(model)[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_open_what_peft_writes(peer_case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs, x = made_by_peft(peer_case.model(dtype), **peft_config(peer_case)), peer_case.input(dtype)
    groups = getattr(peer_case.layer(), "groups", 1)
    if groups > 1:
        _unmix(theirs, groups)
    theirs.save_pretrained(str(tmp_path))
    base = peer_case.model(dtype).eval()
    plain = base(x)
    loaded = lora_plus.load_adapter(base, tmp_path)
    assert (theirs(x) - plain).abs().max() > 1e-2, "PEFT's adapter is inert"
    torch.testing.assert_close(loaded(x), theirs(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    if groups == 1:
        written = load_file(tmp_path / "adapter_model.safetensors")
        assert numbers(adapter_state_dict(loaded)) == numbers(written)


def _unmix(model: nn.Module, groups: int) -> None:
    """Cut a PEFT adapter of a grouped convolution down to what acts inside each group."""
    A = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    kept = torch.zeros_like(A).unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
    parts = A.detach().unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
    for group in range(groups):
        kept[group, :, group] = parts[group, :, group]
    with torch.no_grad():
        A.copy_(kept.flatten(2, 3).flatten(0, 1))


def test_an_adapter_that_mixes_the_channels_of_groups_is_refused(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return Holder(nn.Conv2d(4, 6, 3, groups=2))

    made_by_peft(base(), target_modules=["layer"], r=4).save_pretrained(str(tmp_path))
    assert_refused(
        base(), tmp_path, ["'layer': the adapter mixes the channels of groups, which a grouped weight cannot hold"]
    )


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
@pytest.mark.parametrize("groups", [1, 2])
def test_pefts_dora_of_a_grouped_convolution_has_the_norm_of_another_weight(groups: int) -> None:
    """Which is why it is refused: only without groups PEFT computes m / |W + s B A| (W + s B A) x."""
    model = made_by_peft(
        Holder(nn.Conv2d(4, 6, 3, groups=groups)).double(), target_modules=["layer"], r=4, use_dora=True
    )
    _unmix(model.double(), groups)
    layer = model.base_model.model.layer
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight.flatten(1)
    own = A.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    delta = torch.cat([b @ a.flatten(1) for a, b in zip(own, B.chunk(groups), strict=True)]).view_as(layer.weight)
    V, m = layer.weight + layer.scaling["default"] * delta, layer.lora_magnitude_vector["default"].weight
    W = V * (m.flatten() / V.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    same = torch.allclose(model(x), nn.functional.conv2d(x, W, layer.bias, groups=groups), rtol=1e-10, atol=1e-10)
    assert same == (groups == 1)


@pytest.mark.parametrize("name", sorted(PEFT_DIFFERS))
def test_each_exception_to_the_table_is_a_case(name: str) -> None:
    assert name in {case.name for case in CASES}

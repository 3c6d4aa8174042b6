"""Reading files in the format of kohya's sd-scripts: the public formula, every name, and every refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from files_support import refused, settings_of
from pipeline_support import (
    ALPHAS,
    IMAGE,
    RANKS,
    TEXT_RANKS,
    matrices,
    pipeline,
    put,
    randn,
    same_output,
    same_weights,
    text_encoder,
    unet,
    with_updates,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_plus

Q = "lora_unet_down_blocks_0_attn_1_to_q"
OUT = "lora_unet_down_blocks_0_attn_1_to_out_0"


def tensors_of(model: nn.Module, ranks: dict[str, int], prefix: str) -> dict[str, Tensor]:
    """What sd-scripts would write."""
    tensors = {}
    for name, (down, up) in matrices(model, ranks).items():
        module = f"{prefix}_{name.replace('.', '_')}"
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        if name in ALPHAS:
            tensors[f"{module}.alpha"] = torch.tensor(ALPHAS[name], dtype=torch.float16)
    return tensors


def unet_tensors() -> dict[str, Tensor]:
    return tensors_of(unet(), RANKS, "lora_unet")


def whole_file(text: str = "lora_te") -> dict[str, Tensor]:
    return {**unet_tensors(), **tensors_of(text_encoder(), TEXT_RANKS, text)}


# ---- what a file says ------------------------------------------------------------------------------------------------


def test_a_unet_gets_the_public_formula(tmp_path: Path) -> None:
    """W + alpha / r * up @ down, with alpha = r where there is none."""
    path = put(tmp_path / "a.safetensors", unet_tensors())
    model = lora_plus.load_adapter(unet(), path)
    same_output(model, with_updates(unet(), RANKS))
    scales = {name: settings["scale"] for name, settings in settings_of(model).items()}
    assert scales == {"conv_in": 5 / 3, "down_blocks.0.attn_1.to_q": 0.75 / 2,
                      "down_blocks.0.attn_1.to_out.0": 1, "down_blocks.0.proj_in": 1}  # fmt: skip


def test_a_convolution_is_one_after_the_other(tmp_path: Path) -> None:
    """What sd-scripts computes: the up convolution of the down convolution, with the layer's own padding."""
    tensors = {name: tensor for name, tensor in unet_tensors().items() if "conv_in" in name}
    model = lora_plus.load_adapter(unet(), put(tmp_path / "a.safetensors", tensors))
    down, up = (tensors[f"lora_unet_conv_in.lora_{side}.weight"] for side in ("down", "up"))
    layer = unet().conv_in
    wanted = layer(IMAGE) + 5 / 3 * F.conv2d(F.conv2d(IMAGE, down, padding=1), up)
    torch.testing.assert_close(model.conv_in(IMAGE), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("text", ["lora_te", "lora_te1"])
def test_the_parts_of_a_pipeline(text: str, tmp_path: Path) -> None:
    path = put(tmp_path / "a.safetensors", whole_file(text))
    wanted = nn.ModuleDict(
        {"unet": with_updates(unet(), RANKS), "text_encoder": with_updates(text_encoder(), TEXT_RANKS)}
    )
    same_output(lora_plus.load_adapter(pipeline(), path), wanted)
    same_output(lora_plus.load_adapter(unet(), path, names={text: None}), wanted["unet"])
    same_output(lora_plus.load_adapter(text_encoder(), path, names={"lora_unet_": None}), wanted["text_encoder"])


def test_a_transformer_may_be_called_unet_in_the_file(tmp_path: Path) -> None:
    model = nn.ModuleDict({"transformer": unet()})
    lora_plus.load_adapter(model, put(tmp_path / "a.safetensors", unet_tensors()))
    same_output(model["transformer"], with_updates(unet(), RANKS))


@pytest.mark.parametrize("names", [
    {"lora_unet_input_blocks_4": "down_blocks.0"},
    lambda name: name.replace("lora_unet_input_blocks_4", "down_blocks.0"),
    {"lora_unet_input_blocks_4_": "lora_unet_down_blocks_0"},
])  # fmt: skip
def test_other_names_are_mapped(names: Callable[[str], str], tmp_path: Path) -> None:
    tensors = {key.replace("_down_blocks_0", "_input_blocks_4"): tensor for key, tensor in unet_tensors().items()}
    model = lora_plus.load_adapter(unet(), put(tmp_path / "a.safetensors", tensors), names=names)
    same_output(model, with_updates(unet(), RANKS))


def test_a_checkpoint_gets_what_the_model_gets(tmp_path: Path) -> None:
    path = put(tmp_path / "a.safetensors", whole_file())
    for model, ranks, names in (
        (unet(), RANKS, {"lora_te": None}),
        (nn.ModuleDict({"unet": unet()}), {f"unet.{name}": r for name, r in RANKS.items()}, {"lora_te": None}),
        (text_encoder(), TEXT_RANKS, {"lora_unet": None}),
    ):
        base = put(tmp_path / "base.safetensors", model.state_dict())
        lora_plus.merge_checkpoint(base, path, tmp_path / "out.safetensors", names=names)
        alphas = {**ALPHAS, **{f"unet.{name}": alpha for name, alpha in ALPHAS.items()}}
        same_weights(load_file(tmp_path / "out.safetensors"), with_updates(model, ranks, alphas))
        (tmp_path / "out.safetensors").unlink()


@pytest.mark.parametrize("name", RANKS)
def test_dora_over_output_channels(name: str, tmp_path: Path) -> None:
    """LyCORIS: (W + s up @ down) * dora_scale / its norm over all but the output channels."""
    start = f"lora_unet_{name.replace('.', '_')}"
    tensors = {key: tensor for key, tensor in unet_tensors().items() if key.startswith(f"{start}.")}
    wanted = with_updates(unet(), {name: RANKS[name]})
    down, up = matrices(unet(), RANKS)[name]
    with torch.no_grad():
        weight = wanted.get_submodule(name).weight
        weight.copy_(unet().get_submodule(name).weight)
        weight += ALPHAS.get(name, RANKS[name]) / RANKS[name] * torch.einsum("or,r...->o...", up.flatten(1), down)
        magnitude = 1 + randn(4, seed=9).abs()
        for row in range(4):
            weight[row] *= magnitude[row] / weight[row].square().sum().sqrt()
    tensors |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up}
    tensors[f"{start}.dora_scale"] = magnitude.reshape(4, *[1] * (weight.ndim - 1))
    path = put(tmp_path / "a.safetensors", tensors)
    same_output(lora_plus.load_adapter(unet(), path), wanted)
    base = put(tmp_path / "base.safetensors", unet().state_dict())
    lora_plus.merge_checkpoint(base, path, tmp_path / "out.safetensors")
    same_weights(load_file(tmp_path / "out.safetensors"), wanted)


# ---- what is wrong with a file ---------------------------------------------------------------------------------------

Tensors = dict[str, Tensor]
WRONG: dict[str, tuple[Callable[[Tensors], object], list[str]]] = {
    "no up": (lambda file: file.pop(f"{Q}.lora_up.weight"), [f"'{Q}': lora_up.weight is missing"]),
    "no down": (lambda file: file.pop(f"{Q}.lora_down.weight"), [f"'{Q}': lora_down.weight is missing"]),
    "alpha alone": (
        lambda file: [file.pop(f"{Q}.lora_{side}.weight") for side in ("up", "down")],
        [f"'{Q}': lora_down.weight is missing", f"'{Q}': lora_up.weight is missing"],
    ),
    "two ranks": (
        lambda file: file.update({f"{Q}.lora_up.weight": randn(4, 3)}),
        [f"'{Q}': lora_down.weight has rank 2, lora_up.weight has 3"],
    ),
    "no matrix": (
        lambda file: file.update({f"{Q}.lora_up.weight": randn(4)}),
        [f"'{Q}': lora_up.weight has shape (4,), expected two dimensions or more"],
    ),
    "another width": (
        lambda file: file.update({f"{Q}.lora_down.weight": randn(2, 5)}),
        ["'unet.down_blocks.0.attn_1.to_q': lora_A has shape (2, 5), expected (2, 4)"],
    ),
    "another kernel": (
        lambda file: file.update({"lora_unet_conv_in.lora_down.weight": randn(3, 3, 1, 9)}),
        ["'unet.conv_in': lora_A.weight has shape (3, 3, 1, 9), expected (3, 3, 3, 3)"],
    ),
    "alphas": (
        lambda file: file.update({f"{Q}.alpha": randn(2)}),
        [f"'{Q}': alpha has shape (2,), expected a single number"],
    ),
    "alpha nan": (
        lambda file: file.update({f"{Q}.alpha": torch.tensor(math.nan)}),
        [f"'{Q}': alpha must be finite and not zero (zero would switch the adapter off), got nan"],
    ),
    "alpha zero": (
        lambda file: file.update({f"{Q}.alpha": torch.tensor(0)}),
        [f"'{Q}': alpha must be finite and not zero (zero would switch the adapter off), got 0"],
    ),
    "alpha true": (
        lambda file: file.update({f"{Q}.alpha": torch.tensor(True)}), [f"'{Q}': alpha must be a number, got True"]
    ),
    "infinite": (
        lambda file: file.update({f"{Q}.lora_up.weight": torch.full((4, 2), math.inf)}),
        ["'unet.down_blocks.0.attn_1.to_q.lora_B' has values that are not finite"],
    ),
    "LoHa": (
        lambda file: file.update({f"{Q}.hada_w1_a": randn(2)}),
        [f"tensor '{Q}.hada_w1_a' is of LoHa, a Hadamard product, and only LoRA and DoRA are read"],
    ),
    "LoKr": (
        lambda file: file.update({"lora_unet_x.lokr_w1": randn(2), "lora_unet_x.alpha": randn(1)}),
        ["tensor 'lora_unet_x.lokr_w1' is of LoKr, a Kronecker product, and only LoRA and DoRA are read"],
    ),
    "CP": (
        lambda file: file.update({"lora_unet_conv_in.lora_mid.weight": randn(3, 3, 3, 3)}),
        ["tensor 'lora_unet_conv_in.lora_mid.weight' is the middle one of a convolution in three parts (CP "
         "decomposition), and only LoRA and DoRA are read"],
    ),
    "differences": (
        lambda file: file.update({"lora_unet_norm.diff": randn(2), "lora_unet_norm.diff_b": randn(2)}),
        ["tensor 'lora_unet_norm.diff' is the difference of a whole weight, and only LoRA and DoRA are read",
         "tensor 'lora_unet_norm.diff_b' is the difference of a bias, and only LoRA and DoRA are read"],
    ),
    "DoRA over input channels": (
        lambda file: file.update({f"{Q}.dora_scale": randn(1, 4)}),
        [f"'{Q}': dora_scale has shape (1, 4), expected (4, 1, ...); that of a norm over columns is another method "
         "than DoRA"],
    ),
    "unknown key": (
        lambda file: file.update({"position_ids": randn(2)}), ["tensor 'position_ids' belongs to no adapter"]
    ),
    "two formats": (
        lambda file: file.update({"unet.conv_in.lora_A.weight": randn(2, 3, 3, 3)}),
        ["tensor 'unet.conv_in.lora_A.weight' belongs to no adapter"],
    ),
    "a typo": (
        lambda file: file.update({key.replace("to_q", "to_qq"): file.pop(key) for key in list(file) if Q in key}),
        [f"'{Q}q': the model has no such module (did you mean 'unet_down_blocks_0_attn_1_to_q' or "
         "'unet_down_blocks_0_attn_1_to_out' or 'unet_down_blocks_0_attn_1'?)"],
    ),
    "a layer of another kind": (
        lambda file: file.update({"lora_te_embed.lora_down.weight": randn(2, 7),
                                  "lora_te_embed.lora_up.weight": randn(4, 2)}),
        ["'text_encoder.embed': Embedding; kohya files have adapters of Linear, Conv1d, Conv2d, Conv3d only"],
    ),
    "no layer": (
        lambda file: file.update({"lora_unet_down_blocks.lora_down.weight": randn(2, 4),
                                  "lora_unet_down_blocks.lora_up.weight": randn(4, 2)}),
        ["'unet.down_blocks' cannot be adapted: it is ModuleList"],
    ),
    "twice": (
        lambda file: file.update({key.replace("lora_te_", "lora_te1_"): file[key].clone() for key in list(file)}),
        ["'lora_te1_text_model_self_attn_q_proj' and 'lora_te_text_model_self_attn_q_proj' are both "
         "'text_encoder.text_model.self_attn.q_proj' here; map or leave out one with names"],
    ),
    "several": (
        lambda file: (file.pop(f"{Q}.lora_up.weight"), file.pop(f"{OUT}.lora_down.weight"),
                      file.update({"x": randn(1), "lora_unet_conv_in.alpha": torch.tensor(math.inf)})),
        ["tensor 'x' belongs to no adapter", f"'{OUT}': lora_down.weight is missing",
         f"'{Q}': lora_up.weight is missing",
         "'lora_unet_conv_in': alpha must be finite and not zero (zero would switch the adapter off), got inf"],
    ),
}  # fmt: skip
"""How a file can be wrong, and all that the error then says."""


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_file_is_refused_with_the_reason(fault: str, tmp_path: Path) -> None:
    edit, lines = WRONG[fault]
    tensors = whole_file()
    edit(tensors)
    path = put(tmp_path / "a.safetensors", tensors)
    model = pipeline()
    assert refused(model, path) == lines


def test_a_part_that_the_model_lacks_is_named_with_the_ways_out(tmp_path: Path) -> None:
    assert refused(unet(), put(tmp_path / "a.safetensors", whole_file())) == [
        "none of the 1 modules of 'lora_te' is in the model, the first is 'lora_te_text_model_self_attn_q_proj'; load "
        "the file into a model that has them, map them with names, or leave them out with names={'lora_te': None}"
    ]


def test_names_that_fit_two_modules_are_refused_until_one_is_said(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.ModuleDict(
            {"a": nn.ModuleDict({"b_c": nn.Linear(4, 4)}), "a_b": nn.ModuleDict({"c": nn.Linear(4, 4)})}
        ).double()

    tensors = {"lora_unet_a_b_c.lora_down.weight": randn(2, 4), "lora_unet_a_b_c.lora_up.weight": randn(4, 2)}
    path = put(tmp_path / "a.safetensors", tensors)
    assert refused(model(), path) == [
        "'lora_unet_a_b_c' can be 'a.b_c' or 'a_b.c'; say which with names={'lora_unet_a_b_c': 'a.b_c'}"
    ]
    loaded = lora_plus.load_adapter(model(), path, names={"lora_unet_a_b_c": "a_b.c"})
    assert list(settings_of(loaded)) == ["a_b.c"]

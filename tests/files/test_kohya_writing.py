"""Writing files in the format of kohya's sd-scripts: the public formula again, and every refusal."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from cases import CASES, Case, randomise
from pipeline_support import RANKS, TEXT_RANKS, pipeline, same_output
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_plus


def adapted_pipeline(**options: object) -> nn.Module:
    targets = [*(f"unet.{name}" for name in RANKS), *(f"text_encoder.{name}" for name in TEXT_RANKS)]
    pattern = {"unet.conv_in": 2}
    model = lora_plus.inject_lora(
        pipeline(), targets, r=3, alpha=5, rank_pattern=pattern, dtype=torch.float64, **options
    )
    return randomise(model).eval()


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_a_written_file_has_the_public_formula(scaling: str, tmp_path: Path) -> None:
    """The file, read by the formula alone, gives the weights that merging gives."""
    model, path = adapted_pipeline(scaling=scaling), tmp_path / "a.safetensors"
    lora_plus.save_adapter(model, path, format="kohya")
    tensors = load_file(path)
    plain = pipeline()
    spelled = {f"lora_unet_{name.replace('.', '_')}": f"unet.{name}" for name in RANKS}
    spelled |= {f"lora_te_{name.replace('.', '_')}": f"text_encoder.{name}" for name in TEXT_RANKS}
    assert {key.partition(".")[0] for key in tensors} == set(spelled)
    with torch.no_grad():
        for key, name in spelled.items():
            down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
            assert down.ndim == up.ndim == plain.get_submodule(name).weight.ndim
            plain.get_submodule(name).weight += tensors[f"{key}.alpha"].item() / len(down) * delta_of(down, up)
    same_output(model, plain)
    loaded = lora_plus.load_adapter(pipeline(), path)
    same_output(loaded, model)
    before = path.read_bytes()
    lora_plus.save_adapter(loaded, path, format="kohya")
    assert path.read_bytes() == before


def test_a_written_file_has_one_alpha(tmp_path: Path) -> None:
    """diffusers gives every module the alpha that most of them have."""
    model = adapted_pipeline(scaling="rslora", alpha_pattern={"unet.conv_in": 2, "text_encoder.*": 11})
    lora_plus.save_adapter(model, tmp_path / "a.safetensors", format="kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    assert len({tensor.item() for name, tensor in tensors.items() if name.endswith(".alpha")}) == 1
    same_output(lora_plus.load_adapter(pipeline(), tmp_path / "a.safetensors"), model)


def delta_of(down: Tensor, up: Tensor) -> Tensor:
    return torch.einsum("or,r...->o...", up.flatten(1), down)


def test_prefixes_follow_the_parts_of_the_model(tmp_path: Path) -> None:
    def prefixes(*children: str) -> set[str]:
        model = nn.ModuleDict({name: nn.ModuleDict({"q": nn.Linear(4, 4)}) for name in children})
        lora_plus.inject_lora(model, ["q"], r=1)
        lora_plus.save_adapter(model, tmp_path / "a.safetensors", format="kohya")
        return {key.partition(".")[0] for key in load_file(tmp_path / "a.safetensors")}

    assert prefixes("unet", "text_encoder") == {"lora_unet_q", "lora_te_q"}
    assert prefixes("unet", "text_encoder", "text_encoder_2") == {"lora_unet_q", "lora_te1_q", "lora_te2_q"}
    assert prefixes("transformer", "text_encoder_3") == {"lora_transformer_q", "lora_te3_q"}
    assert prefixes("body") == {"lora_unet_body_q"}


EXPRESSIBLE = {"linear", "linear-no-bias-3d", "linear-unbatched", "linear-rslora", "linear-high-rank", "linear-fa",
               "own-linear", "conv1d", "conv1d-unbatched", "conv1d-dilated-circular", "conv2d", "conv2d-own",
               "conv3d"}  # fmt: skip


def test_every_kind_of_layer_comes_back_or_is_refused(case: Case, tmp_path: Path) -> None:
    saved, path = case.adapted(), tmp_path / "a.safetensors"
    if case.name not in EXPRESSIBLE:
        with pytest.raises(ValueError, match=r"^the adapter cannot be written in kohya's format:\n  'layer'"):
            lora_plus.save_adapter(saved, path, format="kohya")
        assert not path.exists()
        return
    lora_plus.save_adapter(saved, path, format="kohya")
    loaded = lora_plus.load_adapter(case.model(torch.float64), path)
    x = case.input()
    torch.testing.assert_close(loaded.eval()(x), saved.eval()(x), rtol=0, atol=1e-12)


def test_every_expressible_case_is_one() -> None:
    assert {case.name for case in CASES} >= EXPRESSIBLE


def test_all_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    model = nn.ModuleDict({
        "unet": nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(4, 4)}), "a_b": nn.Linear(4, 4),
                               "attn": nn.MultiheadAttention(4, 2), "embed": nn.Embedding(5, 4),
                               "grouped": nn.Conv1d(4, 4, 1, groups=2)}),
        "other": nn.Linear(4, 4), "head": nn.Linear(4, 4),
    })  # fmt: skip
    lora_plus.inject_lora(model, ["a.b", "attn.q", "embed", "grouped", "other"], r=1, train_also=["head"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        lora_plus.save_adapter(model, tmp_path / "a.safetensors", format="kohya", metadata={"by": "me"})
    only = "kohya files have adapters of Linear, Conv1d, Conv2d, Conv3d only"
    assert str(error.value).split("\n  ") == [
        "the adapter cannot be written in kohya's format:",
        f"'unet.attn.q': some rows of a weight; {only}",
        f"'unet.embed': Embedding; {only}",
        f"train_also 'head': {only}",
        "'other' is in none of ['unet'], and only these have prefixes",
        "'unet.a.b' is spelled like 'unet.a_b' with underscores for dots",
        "'unet.grouped': programs disagree on the shapes of a grouped convolution",
        "metadata 'by': kohya's format has no room for texts",
    ]
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

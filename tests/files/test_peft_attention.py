"""Adapters of attention modules go to PEFT and come back as W + s B A, and who computes otherwise is named."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from cases import randomise
from peft_support import DOUBLED, Attention, Away, made_by_peft, opened_by_peft, peft, read_config, same
from safetensors.torch import load_file
from sites import adapter_sites
from torch import nn

import lora_plus
from lora_plus.files import adapter_state_dict

pytestmark = pytest.mark.peers

OUT = Away(Attention, ["part.attn"], {"rank_pattern": {"part.attn.k": 3}, "alpha_pattern": {"part.attn.out_proj": 7}})
THEIRS = {"r": 2, "lora_alpha": 5, "target_modules": ["attn"], "lora_dropout": 0.1}


def saved_with_warning(model: nn.Module, folder: Path, names: str) -> None:
    with pytest.warns(UserWarning) as caught:
        lora_plus.save_adapter(model, folder)
    assert [str(warning.message) for warning in caught] == [
        f"the file says W + s B A of {names}, but {DOUBLED}; to compute the same there, halve their lora_B "
        "after loading"
    ]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_the_output_projection_is_written_as_it_is_and_peft_doubles_it(scaling: str, tmp_path: Path) -> None:
    away = Away(OUT.make, OUT.targets, {**OUT.options, "scaling": scaling})
    model, arguments = away.adapted(), away.arguments()
    saved_with_warning(model, tmp_path, "'part.attn.out_proj'")
    theirs = opened_by_peft(away.base(), tmp_path)
    wanted = lora_plus.merge_and_unload(copy.deepcopy(model)).part.attn
    attention, base = theirs.base_model.model.part.attn, away.base().part.attn
    same(attention.get_delta_weight("default"), wanted.in_proj_weight - base.in_proj_weight)
    update = attention.base_layer.out_proj.get_delta_weight("default")
    same(update, wanted.out_proj.weight - base.out_proj.weight)
    assert (theirs(*arguments) - model(*arguments)).abs().max() > 1e-2
    merged = copy.deepcopy(theirs).merge_and_unload()
    same(merged.part.attn.out_proj.weight, base.out_proj.weight + 2 * update)
    with torch.no_grad():
        attention.base_layer.out_proj.lora_B["default"].weight /= 2
    same(theirs(*arguments), model(*arguments))
    # and back, with its own ranks
    loaded = lora_plus.load_adapter(away.base(), tmp_path)
    same(loaded(*arguments), model(*arguments))
    ranks = {name: site.lora_adapters["default"].spec.r for name, site in adapter_sites(loaded)}
    assert ranks == {f"part.attn.{name}": 3 if name == "k" else 2 for name in ("q", "k", "v", "out_proj")}


@pytest.mark.parametrize("targets", ["all-linear", ["out_proj", "mlp"], r".*(out_proj|mlp)"])
def test_an_adapter_of_the_projection_alone_is_dead_in_peft_until_it_is_merged(
    targets: str | list[str], tmp_path: Path
) -> None:
    away = Away(Attention, ["part.attn"], {})
    model, arguments = away.base(), away.arguments()
    settings = {"r": 2, "target_modules": targets}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    theirs(*arguments).sum().backward()
    for name, parameter in theirs.named_parameters():
        assert "out_proj.lora" not in name or parameter.grad is None  # what PEFT trains stays at B = 0
    theirs.save_pretrained(str(tmp_path / "trained"))
    loaded = lora_plus.load_adapter(away.base(), tmp_path / "trained")
    same(loaded(*arguments), theirs(*arguments))
    with torch.no_grad():
        [each.normal_() for name, each in theirs.named_parameters() if "lora" in name]
    theirs.save_pretrained(str(tmp_path / "other"))
    unmerged, merged = theirs(*arguments), copy.deepcopy(theirs).merge_and_unload()(*arguments)
    assert (unmerged - merged).abs().max() > 1e-2
    with pytest.warns(UserWarning, match="PEFT passes by the adapter of 'part.attn.out_proj' until it is merged"):
        loaded = lora_plus.load_adapter(away.base(), tmp_path / "other")
    same(loaded(*arguments), merged)
    if targets == "all-linear":
        loaded = lora_plus.load_adapter(away.base(), tmp_path / "other", names={"part.attn.out_proj": None})
        same(loaded(*arguments), unmerged)


def test_a_weight_of_attention_without_adapter_stays_without(tmp_path: Path) -> None:
    for targets, there in ((["part.attn.out_proj"], ["out_proj"]), (["part.attn.k"], ["k"])):
        away = Away(Attention, targets)
        folder = tmp_path / there[0]
        model, arguments = away.adapted(), away.arguments()
        if there == ["out_proj"]:
            saved_with_warning(model, folder, "'part.attn.out_proj'")
        else:
            lora_plus.save_adapter(model, folder)
        opened_by_peft(away.base(), folder)  # without a word about missing tensors
        loaded = lora_plus.load_adapter(away.base(), folder)
        assert [name for name, _ in adapter_sites(loaded)] == [f"part.attn.{part}" for part in there]
        same(loaded(*arguments), model(*arguments))


def test_what_peft_trained_with_a_doubled_update_is_warned_of(tmp_path: Path) -> None:
    theirs, arguments = made_by_peft(OUT.base(), **THEIRS), OUT.arguments()
    theirs.save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning) as caught:
        loaded = lora_plus.load_adapter(OUT.base(), tmp_path)
    assert [str(warning.message) for warning in caught] == [
        f"the file says W + s B A of 'part.attn.out_proj', which is what is loaded, but {DOUBLED}; if it was trained "
        "there, double their lora_B to compute the same"
    ]
    site = next(site for name, site in adapter_sites(loaded) if name == "part.attn.out_proj")
    with torch.no_grad():
        site.lora_B["default"].mul_(2)
    same(loaded(*arguments), theirs(*arguments))


def test_parts_of_attention_share_copies_of_peft_s_a(tmp_path: Path) -> None:
    made_by_peft(OUT.base(), **THEIRS).save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match=DOUBLED):
        loaded = lora_plus.load_adapter(OUT.base(), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    own = adapter_state_dict(loaded)
    shared = [tensor for name, tensor in own.items() if "lora_A" in name and "out_proj" not in name]
    assert len(shared) == 3 and len({tensor.data_ptr() for tensor in shared}) == 3
    assert all(torch.equal(tensor, tensors["base_model.model.part.attn.lora_A.weight"]) for tensor in shared)
    settings = [site.lora_adapters["default"].spec for _, site in adapter_sites(loaded)]
    assert {(spec.r, spec.alpha, spec.dropout) for spec in settings} == {(2, 5, 0.0)}


def test_dropout_of_the_layers_leaves_attention_alone(tmp_path: Path) -> None:
    away = Away(Attention, ["part.attn.q"])
    model = away.adapted()
    lora_plus.inject_lora(model.part.mlp, "", r=2, dropout=0.5)
    lora_plus.save_adapter(randomise(model).eval(), tmp_path)
    assert read_config(tmp_path)["lora_dropout"] == 0.5
    same(opened_by_peft(away.base(), tmp_path)(*away.arguments()), model(*away.arguments()))
    loaded = lora_plus.load_adapter(away.base(), tmp_path)
    dropouts = {name: site.lora_adapters["default"].spec.dropout for name, site in adapter_sites(loaded)}
    assert dropouts == {"part.attn.q": 0, "part.mlp": 0.5}

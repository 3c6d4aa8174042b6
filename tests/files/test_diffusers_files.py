"""Files in the formats of diffusers, present and old: what PEFT makes of them, the formula, and every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, randomise
from files_support import refused, settings_of
from pipeline_support import (
    ALPHAS,
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
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_plus

KEY = "lora_adapter_metadata"
Q = "unet.down_blocks.0.attn_1.to_q"
PRESENT, OLD = ("lora_A.weight", "lora_B.weight"), ("lora.down.weight", "lora.up.weight")
Tensors = dict[str, Tensor]


def tensors_of(model: nn.Module, ranks: dict[str, int], start: str, ends: tuple[str, str] = PRESENT) -> Tensors:
    found = matrices(model, ranks)
    return {f"{start}{name}.{end}": part for name, pair in found.items() for end, part in zip(ends, pair, strict=True)}


def whole_file(ends: tuple[str, str] = PRESENT) -> Tensors:
    text = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight") if ends is OLD else ends
    return {**tensors_of(unet(), RANKS, "unet.", ends), **tensors_of(text_encoder(), TEXT_RANKS, "text_encoder.", text)}


def alphas() -> Tensors:
    parts = {"unet.": RANKS, "text_encoder.": TEXT_RANKS}
    return {
        f"{start}{name}.alpha": torch.tensor(ALPHAS[name])
        for start, ranks in parts.items()
        for name in ranks
        if name in ALPHAS
    }


def config_of(ranks: dict[str, int], alphas: dict[str, float] = ALPHAS) -> dict[str, Any]:
    """PEFT's config for these layers."""
    pattern = {name: int(alphas.get(name, r) * 4) / 4 for name, r in ranks.items()}
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "rank_pattern": ranks, "alpha_pattern": pattern,
            "target_modules": sorted(ranks), "use_dora": False, "use_rslora": False, "bias": "none",
            "lora_dropout": 0.0, "init_lora_weights": True}  # fmt: skip


def metadata(**changes: Any) -> dict[str, str]:
    document = {f"unet.{key}": value for key, value in config_of(RANKS).items()}
    document |= {f"text_encoder.{key}": value for key, value in config_of(TEXT_RANKS).items()}
    document |= {key.replace("__", "."): value for key, value in changes.items()}
    return {"format": "pt", KEY: json.dumps(document)}


def wanted() -> nn.ModuleDict:
    return nn.ModuleDict(
        {"unet": with_updates(unet(), RANKS), "text_encoder": with_updates(text_encoder(), TEXT_RANKS)}
    )


# ---- what a file says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [PRESENT, OLD], ids=["present", "old"])
@pytest.mark.parametrize("settings", ["alpha tensors", "metadata"])
def test_the_formula(ends: tuple[str, str], settings: str, tmp_path: Path) -> None:
    tensors = {**whole_file(ends), **(alphas() if settings == "alpha tensors" else {})}
    path = put(tmp_path / "a.safetensors", tensors, None if settings == "alpha tensors" else metadata())
    same_output(lora_plus.load_adapter(pipeline(), path), wanted())
    same_output(lora_plus.load_adapter(unet(), path, names={"text_encoder": None}), wanted()["unet"])
    same_output(lora_plus.load_adapter(text_encoder(), path, names={"unet": None}), wanted()["text_encoder"])
    base = put(tmp_path / "base.safetensors", pipeline().state_dict())
    lora_plus.merge_checkpoint(base, path, tmp_path / "out.safetensors")
    same_weights(load_file(tmp_path / "out.safetensors"), wanted())


def test_alpha_is_the_rank_where_nothing_is_said(tmp_path: Path) -> None:
    model = lora_plus.load_adapter(pipeline(), put(tmp_path / "a.safetensors", whole_file()))
    assert {settings["scale"] for settings in settings_of(model).values()} == {1}
    same_output(model["unet"], with_updates(unet(), RANKS, {}))


def test_a_file_without_components(tmp_path: Path) -> None:
    path = put(tmp_path / "a.safetensors", tensors_of(unet(), RANKS, ""), {KEY: json.dumps(config_of(RANKS))})
    same_output(lora_plus.load_adapter(unet(), path), wanted()["unet"])
    model = lora_plus.load_adapter(nn.ModuleDict({"body": unet()}), path, names={"": "body"})
    same_output(model["body"], wanted()["unet"])


def test_the_oldest_names_of_attention_layers(tmp_path: Path) -> None:
    attention = nn.ModuleDict({f"to_{name}": nn.Linear(4, 4) for name in "qkv"})
    attention["to_out"] = nn.ModuleList([nn.Linear(4, 4)])
    text = nn.ModuleDict({f"{name}_proj": nn.Linear(4, 4) for name in ("q", "k", "v", "out")})
    model = nn.ModuleDict({"unet": nn.ModuleDict({"attn1": attention}),
                           "text_encoder": nn.ModuleDict({"self_attn": text})}).double()  # fmt: skip
    tensors, deltas = {}, {}
    for seed, name in enumerate(("q", "k", "v", "out")):
        for start, module in {
            f"unet.attn1.processor.to_{name}_lora": f"unet.attn1.to_{name}" + (".0" if name == "out" else ""),
            f"text_encoder.self_attn.to_{name}_lora": f"text_encoder.self_attn.{name}_proj",
        }.items():
            down, up = randn(2, 4, seed=seed), randn(4, 2, seed=seed + 9 + len(start))
            tensors |= {f"{start}.down.weight": down, f"{start}.up.weight": up}
            deltas[module] = up @ down
    loaded = lora_plus.load_adapter(model, put(tmp_path / "a.safetensors", tensors))
    before = {name: loaded.get_submodule(name).weight.detach().clone() for name in deltas}
    plain = lora_plus.merge_and_unload(loaded)
    for name, delta in deltas.items():
        torch.testing.assert_close(plain.get_submodule(name).weight, before[name] + delta, rtol=0, atol=1e-12)


@pytest.mark.peers
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_what_peft_trains_is_read_as_peft_computes_it(options: dict[str, bool], tmp_path: Path) -> None:
    """diffusers writes PEFT's tensors without PEFT's prefix, and its config under the component's name."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(RANKS), rank_pattern={"conv_in": 3}, **options)
    theirs = peft.get_peft_model(unet(), config).eval()
    with torch.no_grad():
        for seed, parameter in enumerate(theirs.parameters()):
            if parameter.requires_grad:
                parameter += 0.3 * randn(*parameter.shape, seed=seed).to(parameter.dtype)
    state = peft.get_peft_model_state_dict(theirs)
    tensors = {f"unet.{name.removeprefix('base_model.model.')}": tensor for name, tensor in state.items()}
    document = {f"unet.{k}": list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    path = put(tmp_path / "a.safetensors", tensors, {KEY: json.dumps(document)})
    same_output(lora_plus.load_adapter(unet(), path), theirs.base_model.model)


@pytest.mark.peers
@pytest.mark.parametrize("options", [{}, {"variant": "dora"}, {"scaling": "rslora"}], ids=["lora", "dora", "rslora"])
def test_peft_computes_what_is_written(options: dict[str, str], tmp_path: Path) -> None:
    """As diffusers loads it: PEFT's config from the metadata, and PEFT's tensors from the file."""
    peft = pytest.importorskip("peft")
    ours = nn.ModuleDict({"unet": unet()})
    names = [f"unet.{name}" for name in RANKS]
    lora_plus.inject_lora(ours, names, r=2, alpha=3, rank_pattern={"unet.conv_in": 3}, dtype=torch.float64, **options)
    randomise(ours).eval()
    lora_plus.save_adapter(ours, tmp_path / "a.safetensors", format="diffusers")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        document = json.loads(file.metadata()[KEY])
    config = peft.LoraConfig(**{key.removeprefix("unet."): value for key, value in document.items()})
    theirs = peft.inject_adapter_in_model(config, unet())
    state = {key.removeprefix("unet."): tensor for key, tensor in load_file(tmp_path / "a.safetensors").items()}
    report = peft.set_peft_model_state_dict(theirs, state)
    assert not report.unexpected_keys
    same_output(ours["unet"], theirs.eval())
    same_output(lora_plus.load_adapter(unet(), tmp_path / "a.safetensors"), ours["unet"])


# ---- what is wrong with a file ---------------------------------------------------------------------------------------

WHERE = f"metadata {KEY!r}"
WRONG: dict[str, tuple[Callable[[Tensors], object], dict[str, str], list[str]]] = {
    "no B": (lambda file: file.pop(f"{Q}.lora_B.weight"), {}, [f"'{Q}': lora_B.weight is missing"]),
    "no A": (lambda file: file.pop(f"{Q}.lora_A.weight"), {}, [f"'{Q}': lora_A.weight is missing"]),
    "half old": (
        lambda file: (file.pop(f"{Q}.lora_A.weight"), file.pop(f"{Q}.lora_B.weight"),
                      file.update({f"{Q}.lora.up.weight": randn(4, 2)})),
        {}, [f"'{Q}': lora.down.weight is missing"],
    ),
    "both ways": (
        lambda file: file.update({f"{Q}.lora.down.weight": randn(2, 4)}),
        {}, [f"tensor '{Q}.lora_A.weight': the module has lora.down.weight already"],
    ),
    "one under two names": (
        lambda file: file.update({"unet.attn1.processor.to_q_lora.up.weight": randn(4, 2),
                                  "unet.attn1.to_q.lora.up.weight": randn(4, 2)}),
        {}, ["tensor 'unet.attn1.processor.to_q_lora.up.weight': 'unet.attn1.to_q.lora.up.weight' is there too, which "
             "is another name of it", "'unet.attn1.to_q': lora.down.weight is missing"],
    ),
    "two ranks": (
        lambda file: file.update({f"{Q}.lora_B.weight": randn(4, 3)}),
        {}, [f"'{Q}': lora_A.weight has rank 2, lora_B.weight has 3"],
    ),
    "another width": (
        lambda file: file.update({f"{Q}.lora_A.weight": randn(2, 5)}),
        {}, [f"'{Q}': lora_A has shape (2, 5), expected (2, 4)"],
    ),
    "another kernel": (
        lambda file: file.update({"unet.conv_in.lora_A.weight": randn(3, 3, 1, 9)}),
        {}, ["'unet.conv_in': lora_A.weight has shape (3, 3, 1, 9), expected (3, 3, 3, 3)"],
    ),
    "alphas": (
        lambda file: file.update({f"{Q}.alpha": randn(2)}),
        {}, [f"'{Q}': alpha has shape (2,), expected a single number"],
    ),
    "alpha twice": (
        lambda file: file.update({f"{Q}.alpha": torch.tensor(1.0)}),
        metadata(), [f"'{Q}': alpha is there, and the file has its settings in its metadata"],
    ),
    "rank of the metadata": (
        lambda file: file.update({f"{Q}.lora_A.weight": randn(3, 4), f"{Q}.lora_B.weight": randn(4, 3)}),
        metadata(), [f"'{Q}': rank 3 in the file, 2 in its metadata"],
    ),
    "DoRA that is not said": (
        lambda file: file.update({f"{Q}.lora_magnitude_vector": randn(4)}),
        metadata(), [f"'{Q}': lora_magnitude_vector is there, but use_dora is not set"],
    ),
    "DoRA that is not there": (
        lambda file: None, metadata(text_encoder__use_dora=True),
        ["'text_encoder.text_model.self_attn.q_proj': lora_magnitude_vector is missing"],
    ),
    "a bias": (
        lambda file: file.update({f"{Q}.lora_B.bias": randn(4)}),
        {}, [f"tensor '{Q}.lora_B.bias' belongs to no adapter"],
    ),
    "an embedding": (
        lambda file: file.update({"text_encoder.embed.lora_A.weight": randn(2, 7),
                                  "text_encoder.embed.lora_B.weight": randn(4, 2)}),
        {}, ["'text_encoder.embed': Embedding; diffusers files have adapters of Linear, Conv1d, Conv2d, Conv3d only"],
    ),
    "a typo": (
        lambda file: file.update({key.replace("to_q", "to_qq"): file.pop(key) for key in list(file) if Q in key}),
        {}, [f"'{Q}q': the model has no such module (did you mean '{Q}' or 'unet.down_blocks.0.attn_1.to_out' or "
             "'unet.down_blocks.0.attn_1'?)"],
    ),
    "not JSON": (
        lambda file: None, {KEY: "{"},
        [f"{WHERE} is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"],
    ),
    "a list": (lambda file: None, {KEY: "[]"}, [f"{WHERE} must be a JSON object, got list"]),
    "several": (
        lambda file: file.update({"x": randn(1), f"{Q}.alpha": randn(2)}),
        metadata(unet__r=0, text_encoder__bias="all", unet__init_lora_weights="pissa"),
        ["tensor 'x' belongs to no adapter", f"'{Q}': alpha has shape (2,), expected a single number",
         f"{WHERE}: r must be a positive integer, got 0",
         f"{WHERE}: init_lora_weights is 'pissa': its tensors belong to a base weight that PEFT changes when it loads "
         "them; save them again with path_initial_model_for_weight_conversion",
         f"{WHERE}: bias is 'all', and trained biases cannot be read; expected 'none'"],
    ),
}  # fmt: skip
"""How a file can be wrong, and all that the error then says."""


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_file_is_refused_with_the_reason(fault: str, tmp_path: Path) -> None:
    edit, header, lines = WRONG[fault]
    tensors = whole_file()
    edit(tensors)
    assert refused(pipeline(), put(tmp_path / "a.safetensors", tensors, header)) == lines


def test_a_component_that_the_model_lacks_is_named_with_the_ways_out(tmp_path: Path) -> None:
    path = put(tmp_path / "a.safetensors", whole_file(), metadata())
    (line,) = refused(nn.ModuleDict({"text_encoder": text_encoder()}), path)
    assert line.startswith("none of the 4 modules of 'unet' is in the model, the first is 'unet.conv_in'")
    assert line.endswith("or leave them out with names={'unet': None}")


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_layer_comes_back_or_is_refused(case: Case, tmp_path: Path) -> None:
    saved, path = case.adapted(), tmp_path / "a.safetensors"
    plain = type(case.layer()).__name__ in ("Linear", "ScaledLinear", "Conv1d", "Conv2d", "OwnConv", "Conv3d")
    if not plain or case.name == "conv3d-groups-dora":
        with pytest.raises(ValueError, match=r"^the adapter cannot be written in diffusers' format:\n  .*'layer'"):
            lora_plus.save_adapter(saved, path, format="diffusers")
        assert not path.exists()
        return
    lora_plus.save_adapter(saved, path, format="diffusers")
    loaded = lora_plus.load_adapter(case.model(torch.float64), path)
    x = case.input()
    torch.testing.assert_close(loaded.eval()(x), saved.eval()(x), rtol=0, atol=1e-12)


def test_the_components_of_a_pipeline_are_in_one_file(tmp_path: Path) -> None:
    model = lora_plus.inject_lora(pipeline(), ["unet.conv_in", "q_proj"], r=2, dtype=torch.float64)
    path = tmp_path / "a.safetensors"
    lora_plus.save_adapter(randomise(model).eval(), path, format="diffusers")
    assert {key.partition(".")[0] for key in load_file(path)} == {"unet", "text_encoder"}
    loaded = lora_plus.load_adapter(pipeline(), path)
    same_output(loaded, model)
    before = path.read_bytes()
    lora_plus.save_adapter(loaded, path, format="diffusers")
    assert path.read_bytes() == before


def test_all_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    model = nn.ModuleDict({"unet": nn.ModuleDict({"q": nn.Linear(4, 4), "embed": nn.Embedding(5, 4)}),
                           "other": nn.Linear(4, 4), "head": nn.Linear(4, 4)})  # fmt: skip
    lora_plus.inject_lora(model, ["q", "embed", "other"], r=1, train_also=["head"])
    with pytest.raises(ValueError) as error:
        lora_plus.save_adapter(model, tmp_path / "a.safetensors", format="diffusers", metadata={"by": "me"})
    only = "diffusers files have adapters of Linear, Conv1d, Conv2d, Conv3d only"
    assert str(error.value).split("\n  ") == [
        "the adapter cannot be written in diffusers' format:",
        f"'unet.embed': Embedding; {only}",
        f"train_also 'head': {only}",
        "'other' is in none of ('unet', 'transformer', 'text_encoder', 'text_encoder_2', 'text_encoder_3'), and others "
        "are",
        "metadata 'by': diffusers' format has no room for texts",
    ]
    assert list(tmp_path.iterdir()) == []

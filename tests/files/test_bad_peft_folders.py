"""What is wrong with a PEFT folder is refused with the reason, and the model is untouched."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from files_support import (
    FLOATS,
    TRAINED,
    Edit,
    Parts,
    assemble,
    assert_same_tensors,
    both,
    drop,
    net,
    parts,
    plain_net,
    put,
    refused,
    rename,
    settings_of,
)

import lora_plus
from lora_plus.files import adapter_state_dict


@dataclass
class PeftParts:
    """A PEFT folder as plain data."""

    config: Any
    weights: Parts

    def write(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        text = self.config if isinstance(self.config, str) else json.dumps(self.config)
        (folder / "adapter_config.json").write_text(text)
        (folder / "adapter_model.safetensors").write_bytes(assemble(self.weights.tensors, {"format": "pt"}))
        return folder


@pytest.fixture
def peft_parts(tmp_path: Path) -> PeftParts:
    model = plain_net()
    lora_plus.inject_lora(model, TRAINED, r=2, alpha=3, rank_pattern={"proj": 3}, train_also=["head"])
    lora_plus.save_adapter(randomise(model), tmp_path / "right")
    config = json.loads((tmp_path / "right" / "adapter_config.json").read_text())
    return PeftParts(config, parts(tmp_path / "right" / "adapter_model.safetensors"))


PeftEdit = Callable[[PeftParts], object]


def set_config(**values: Any) -> PeftEdit:
    return lambda folder: folder.config.update(values)


def unset_config(name: str) -> PeftEdit:
    return lambda folder: folder.config.pop(name)


def config_is(value: Any) -> PeftEdit:
    return lambda folder: setattr(folder, "config", value)


def weights(edit: Edit) -> PeftEdit:
    return lambda folder: edit(folder.weights)


def drop_all(prefix: str) -> Edit:
    return lambda file: [file.tensors.pop(name) for name in list(file.tensors) if name.startswith(prefix)]


BASE = "base_model.model."
NOT_PLAIN = "which plain LoRA and DoRA do not have"
PEFT_CORRUPTIONS: dict[str, tuple[PeftEdit, list[str]]] = {
    "r=0": (set_config(r=0), ["adapter_config.json: r must be a positive integer, got 0"]),
    "r=-1": (set_config(r=-1), ["adapter_config.json: r must be a positive integer, got -1"]),
    "r=4.0": (set_config(r=4.0), ["adapter_config.json: r must be a positive integer, got 4.0"]),
    "r='8'": (set_config(r="8"), ["adapter_config.json: r must be a positive integer, got '8'"]),
    "r=four": (set_config(r="four"), ["adapter_config.json: r must be a positive integer, got 'four'"]),
    "r=null": (set_config(r=None), ["adapter_config.json: r must be a positive integer, got None"]),
    "r=true": (set_config(r=True), ["adapter_config.json: r must be a positive integer, got True"]),
    "r other than the file's": (
        set_config(r=1000),
        ["'conv': rank 2 in the file, 1000 in the config", "'embed': rank 2 in the file, 1000 in the config"],
    ),
    "alpha=0": (set_config(lora_alpha=0), ["adapter_config.json: lora_alpha must be a finite number and not 0, got 0"]),
    "alpha=nan": (
        set_config(lora_alpha=math.nan), ["adapter_config.json: lora_alpha must be a finite number and not 0, got nan"]
    ),
    "alpha beyond all floats": (
        set_config(lora_alpha=10**400),
        [f"adapter_config.json: lora_alpha must be a finite number and not 0, got {10**400}"],
    ),
    "alpha of one layer zero": (
        set_config(alpha_pattern={"proj": 0}),
        ["'proj': alpha must be finite and not zero (zero would switch the adapter off), got 0"],
    ),
    "dropout=-0.5": (
        set_config(lora_dropout=-0.5), ["adapter_config.json: lora_dropout must be a number in [0, 1), got -0.5"]
    ),
    "dropout=1.5": (
        set_config(lora_dropout=1.5), ["adapter_config.json: lora_dropout must be a number in [0, 1), got 1.5"]
    ),
    **{
        f"init {init}": (
            set_config(init_lora_weights=init),
            [f"adapter_config.json: init_lora_weights is {init!r}: its tensors belong to a base weight that PEFT "
             "changes when it loads them; save them again with path_initial_model_for_weight_conversion"],
        )
        for init in ("corda", "lora_ga", "loftq")
    },
    "bias": (
        set_config(bias="foo"),
        ["adapter_config.json: bias is 'foo', expected one of 'none', 'all', 'lora_only'"],
    ),
    "biases that are not there": (
        set_config(bias="lora_only"),
        ["bias is 'lora_only', and the file lacks 'conv.bias', 'proj.bias'; set it to 'none' in the config to load the "
         "adapter without them"],
    ),
    "all biases, and none is there": (
        set_config(bias="all"),
        ["bias is 'all', and the file lacks 'conv.bias', 'proj.bias'; set it to 'none' in the config to load the "
         "adapter without them"],
    ),
    "no bias of B": (
        set_config(lora_bias=True),
        [f"{name!r}: lora_B.bias is missing, which the others have (lora_bias)" for name in ("conv", "embed", "proj")],
    ),
    "lora_bias a text": (
        set_config(lora_bias="no"), ["adapter_config.json: lora_bias must be true or false, got 'no'"]
    ),
    "a bias of B of another shape": (
        both(set_config(lora_bias=True), *(
            weights(put(f"{BASE}{name}.lora_B.bias", torch.ones(3))) for name in ("conv", "embed", "proj"))),
        ["'conv': its lora_B has a bias (lora_bias), and the layer has another kind of bias here",
         "'embed': its lora_B has a bias (lora_bias), and the layer has no bias to add it to here",
         "'proj': its lora_B has a bias (lora_bias), and the layer has another kind of bias here"],
    ),
    "use_dora a text": (set_config(use_dora="no"), ["adapter_config.json: use_dora must be true or false, got 'no'"]),
    "use_rslora a number": (set_config(use_rslora=1), ["adapter_config.json: use_rslora must be true or false, got 1"]),
    "rank_pattern a list": (
        set_config(rank_pattern=["q"]), ["adapter_config.json: rank_pattern must be an object of numbers, got ['q']"]
    ),
    "alpha_pattern of texts": (
        set_config(alpha_pattern={"q": "1"}),
        ["adapter_config.json: alpha_pattern must be an object of numbers, got {'q': '1'}"],
    ),
    "alpha_pattern not a regular expression": (
        set_config(alpha_pattern={"q(": 1}),
        ["adapter_config.json: alpha_pattern: 'q(' is not a regular expression"],
    ),
    "modules_to_save a text": (
        set_config(modules_to_save="head"), ["adapter_config.json: modules_to_save must be a list of names, got 'head'"]
    ),
    "modules_to_save that the model lacks": (
        both(set_config(modules_to_save=["head", "nope"]), weights(put(f"{BASE}nope.weight", torch.ones(2)))),
        ["modules_to_save 'nope': the model has no such module"],
    ),
    "modules_to_save without tensors": (
        both(set_config(modules_to_save=["nope"]), weights(drop_all(f"{BASE}head."))),
        ["modules_to_save 'nope': the model has no such module"],
    ),
    "target_parameters a text": (
        set_config(target_parameters="proj.weight"),
        ["adapter_config.json: target_parameters must be a list of names, got 'proj.weight'"],
    ),
    "target_parameters matches nothing": (
        set_config(target_parameters=["nope.weight"]),
        ["target_parameters 'nope.weight' names no parameter inside the model"],
    ),
    "target_parameters without tensors": (
        set_config(target_parameters=["0.weight"]),
        [f"{name!r}: lora_{part}.weight is missing" for name in ("head.0.weight",) for part in "AB"],
    ),
    "config a list": (config_is([]), ["adapter_config.json must be a JSON object, got list"]),
    "config empty": (
        config_is(""), ["adapter_config.json is not valid JSON: Expecting value: line 1 column 1 (char 0)"]
    ),
    "config malformed": (
        config_is("{"),
        ["adapter_config.json is not valid JSON: Expecting property name enclosed in double quotes: "
         "line 1 column 2 (char 1)"],
    ),
    "no peft_type": (unset_config("peft_type"), ["adapter_config.json: peft_type is None, expected 'LORA'"]),
    "unknown peft_type": (
        set_config(peft_type="FOO"), ["adapter_config.json: peft_type is 'FOO', expected 'LORA'"]
    ),
    "unknown field": (set_config(my_field=1), [f"adapter_config.json: my_field is 1, {NOT_PLAIN}"]),
    **{
        name: (set_config(**{name: value}), [f"adapter_config.json: {name} is {value!r}, {NOT_PLAIN}"])
        for name, value in {
            "use_qalora": True, "use_bdlora": {"a": 1}, "kasa_config": {"a": 1}, "arrow_config": {"a": 1},
            "alora_invocation_tokens": [1], "layer_replication": [[0, 2]],
            "megatron_config": {"a": 1}, "monteclora_config": {"a": 1},
        }.items()
    },
    "ids without rows": (
        set_config(trainable_token_indices=[1]), ["trainable_token_indices [1] has no tensor in the file"]
    ),
    "wrong shape": (
        weights(put(f"{BASE}proj.lora_A.weight", torch.ones(3, 7))),
        ["'proj': lora_A has shape (3, 7), expected (3, 6)"],
    ),
    "wrong rank of one layer": (
        weights(put(f"{BASE}proj.lora_A.weight", torch.ones(2, 6))), ["'proj': rank 2 in the file, 3 in the config"]
    ),
    "wrong shape of a convolution": (
        weights(put(f"{BASE}conv.lora_B.weight", torch.ones(6, 2))),
        ["'conv': lora_B.weight has shape (6, 2), expected (6, 2, 1)"],
    ),
    "no dimensions": (
        weights(put(f"{BASE}proj.lora_A.weight", torch.tensor(1.0))),
        ["'proj': lora_A.weight has shape (), expected two dimensions or more"],
    ),
    "missing key": (weights(drop(f"{BASE}proj.lora_B.weight")), ["'proj': lora_B.weight is missing"]),
    "empty file": (
        weights(lambda file: file.tensors.clear()),
        ["modules_to_save 'head' has no tensors in the file"],
    ),
    "nested key": (
        weights(both(rename(f"{BASE}proj.lora_A.weight", f"{BASE}proj.base_layer.lora_A.weight"),
                     rename(f"{BASE}proj.lora_B.weight", f"{BASE}proj.base_layer.lora_B.weight"))),
        [f"tensor '{BASE}proj.base_layer.lora_{part}.weight': 'proj.base_layer' is neither a module nor where PEFT "
         "adapts a parameter with target_parameters []" for part in "AB"],
    ),
    "parameter key": (
        weights(both(rename(f"{BASE}proj.lora_A.weight", f"{BASE}proj.weight.lora_A.weight"),
                     rename(f"{BASE}proj.lora_B.weight", f"{BASE}proj.weight.lora_B.weight"))),
        [f"tensor '{BASE}proj.weight.lora_{part}.weight': 'proj.weight' is neither a module nor where PEFT adapts a "
         "parameter with target_parameters []" for part in "AB"],
    ),
    "extra key": (
        weights(put(f"{BASE}proj.extra", torch.ones(1))),
        ["tensor 'base_model.model.proj.extra' is neither part of an adapter nor of modules_to_save ['head']"],
    ),
    "base key": (
        weights(put(f"{BASE}proj.weight", torch.ones(5, 6))),
        ["tensor 'base_model.model.proj.weight' is neither part of an adapter nor of modules_to_save ['head']"],
    ),
    "base layer key": (
        weights(put(f"{BASE}proj.base_layer.weight", torch.ones(5, 6))),
        ["tensor 'base_model.model.proj.base_layer.weight' is one of the base model, which an adapter leaves alone, "
         "and differs from the model's; load that weight into the model first, or save the adapter again with "
         "save_embedding_layers=False"],
    ),
    "wrong prefix": (
        weights(rename(f"{BASE}head.0.bias", "head.0.bias")),
        ["tensor 'head.0.bias': expected a name that starts with 'base_model.model.'", "'head.0.bias' is missing"],
    ),
    "wrong prefix of all": (
        weights(lambda file: [rename(key, key.removeprefix("base_model."))(file) for key in sorted(file.tensors)]),
        [f"tensor 'model.{name}': expected a name that starts with 'base_model.model.'" for name in (
            "conv.lora_A.weight", "conv.lora_B.weight", "embed.lora_embedding_A", "embed.lora_embedding_B",
            "head.0.bias", "head.0.weight", "head.1.bias", "head.1.num_batches_tracked", "head.1.running_mean",
            "head.1.running_var", "head.1.weight", "proj.lora_A.weight", "proj.lora_B.weight",
        )] + ["modules_to_save 'head' has no tensors in the file"],
    ),
    "unknown layer": (
        weights(both(rename(f"{BASE}embed.lora_embedding_A", f"{BASE}embde.lora_embedding_A"),
                     rename(f"{BASE}embed.lora_embedding_B", f"{BASE}embde.lora_embedding_B"))),
        ["'embde': the model has no such module (did you mean 'embed'?)"],
    ),
    "layer and head at once": (
        weights(both(put(f"{BASE}head.0.lora_A.weight", torch.ones(2, 5)),
                     put(f"{BASE}head.0.lora_B.weight", torch.ones(5, 2)))),
        ["'head' is trained in full, but 'head.0' in it has an adapter"],
    ),
    "NaN": (
        weights(put(f"{BASE}proj.lora_A.weight", torch.full((3, 6), math.nan))),
        ["'proj.lora_A' has values that are not finite"],
    ),
    "infinity": (
        weights(put(f"{BASE}proj.lora_B.weight", torch.full((5, 3), math.inf))),
        ["'proj.lora_B' has values that are not finite"],
    ),
    "integers": (
        weights(put(f"{BASE}proj.lora_A.weight", torch.ones(3, 6, dtype=torch.int32))),
        [f"'proj.lora_A' is torch.int32, expected one of {FLOATS}"],
    ),
    "a magnitude without use_dora": (
        weights(put(f"{BASE}proj.lora_magnitude_vector", torch.ones(5))),
        ["'proj': lora_magnitude_vector is there, but use_dora is not set"],
    ),
    "use_dora without magnitudes": (
        set_config(use_dora=True),
        [f"{name!r}: lora_magnitude_vector is missing" for name in ("conv", "embed", "proj")],
    ),
    "several at once": (
        both(set_config(r=0, bias="some", use_bdlora={"a": 1})),
        ["adapter_config.json: r must be a positive integer, got 0",
         "adapter_config.json: bias is 'some', expected one of 'none', 'all', 'lora_only'",
         f"adapter_config.json: use_bdlora is {{'a': 1}}, {NOT_PLAIN}"],
    ),
}  # fmt: skip
"""How a PEFT folder can be wrong, and all that the error then says, in full."""


def test_a_usual_name_of_a_head_that_nothing_has_is_passed_over(peft_parts: PeftParts, tmp_path: Path) -> None:
    peft_parts.config.update(modules_to_save=["classifier", "head"])
    loaded = lora_plus.load_adapter(plain_net(), peft_parts.write(tmp_path / "more"))
    right = lora_plus.load_adapter(plain_net(), tmp_path / "right")
    assert_same_tensors(adapter_state_dict(loaded), adapter_state_dict(right))


@pytest.mark.parametrize("version", ["0.22.0", "0.22.0.dev0", "1.0", "0.100.1"])
def test_an_unknown_field_of_a_newer_peft_is_warned_of(version: str, peft_parts: PeftParts, tmp_path: Path) -> None:
    peft_parts.config.update(
        peft_version=version, some_field=16, other_field="x" * 1000, empty_field=[], **{"\x1b[2J": 1}
    )
    folder = peft_parts.write(tmp_path / "newer")
    with pytest.warns(UserWarning) as record:
        loaded = lora_plus.load_adapter(plain_net(), folder)
    (text,) = (str(one.message) for one in record)
    assert f"was written by peft {version}" in text and "some_field is 16" in text and "empty_field" not in text
    assert len(text) < 700 and text.isprintable()
    right = lora_plus.load_adapter(plain_net(), tmp_path / "right")
    assert_same_tensors(adapter_state_dict(loaded), adapter_state_dict(right))


@pytest.mark.parametrize("version", ["0.21.2", "0.21", "0.9.0", "", None, 22, "x", [], "9" * 5000])
def test_an_unknown_field_of_a_peft_that_is_known_is_refused(
    version: Any, peft_parts: PeftParts, tmp_path: Path
) -> None:
    peft_parts.config.update(peft_version=version, some_field=16, empty_field=None)
    (line,) = refused(plain_net(), peft_parts.write(tmp_path / "wrong"))
    assert line == f"adapter_config.json: some_field is 16, {NOT_PLAIN}"


def test_a_method_that_is_known_is_refused_whatever_the_version(peft_parts: PeftParts, tmp_path: Path) -> None:
    peft_parts.config.update(peft_version="0.99", use_qalora=True, some_field=16)
    (line,) = refused(plain_net(), peft_parts.write(tmp_path / "wrong"))
    assert line == f"adapter_config.json: use_qalora is True, {NOT_PLAIN}"


def test_dora_of_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    lora_plus.save_adapter(lora_plus.inject_lora(net(), ["conv"], r=2), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | {"use_dora": True}
    folder = PeftParts(config, parts(tmp_path / "a" / "adapter_model.safetensors"))
    folder.weights.put(f"{BASE}conv.lora_magnitude_vector", torch.ones(1, 6, 1))
    assert refused(net(), folder.write(tmp_path / "a")) == [
        "'conv': PEFT's DoRA of a grouped convolution divides by the norm of another weight than W + s B A"
    ]


def test_lines_and_their_number_are_bounded(peft_parts: PeftParts, tmp_path: Path) -> None:
    peft_parts.config.update(bias="x" * 10**6, **{f"field{number}": "y" * 10**4 for number in range(100)})
    lines = refused(plain_net(), peft_parts.write(tmp_path / "wrong"))
    assert len(lines) == 31 and all(len(line) < 700 for line in lines)
    assert "(999" in lines[0] and lines[-1] == "and 71 more"


@pytest.mark.parametrize("corruption", PEFT_CORRUPTIONS)
def test_a_wrong_peft_folder_is_refused_with_the_reason(corruption: str, peft_parts: PeftParts, tmp_path: Path) -> None:
    edit, lines = PEFT_CORRUPTIONS[corruption]
    edit(peft_parts)
    problems = refused(plain_net(), peft_parts.write(tmp_path / "wrong"))
    if corruption == "r other than the file's":
        problems = [line for line in problems if "rank" in line]
    assert problems == lines


def test_the_folder_that_is_corrupted_is_right_before(peft_parts: PeftParts, tmp_path: Path) -> None:
    one = lora_plus.load_adapter(plain_net(), tmp_path / "right")
    other = lora_plus.load_adapter(plain_net(), peft_parts.write(tmp_path / "same"))
    assert settings_of(other)["proj"]["r"] == 3
    assert_same_tensors(adapter_state_dict(other), adapter_state_dict(one))


def test_an_incomplete_peft_folder_names_what_is_missing(peft_parts: PeftParts, tmp_path: Path) -> None:
    model = plain_net()
    (tmp_path / "empty").mkdir()
    no_config, no_weights = (
        f"the folder has no {name}" for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert refused(model, tmp_path / "empty") == [f"{no_config} and no adapter_model.safetensors"]
    folder = peft_parts.write(tmp_path / "folder")
    (folder / "adapter_config.json").unlink()
    assert refused(model, folder) == [no_config]
    folder = peft_parts.write(tmp_path / "folder")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    pickle = "; there is a .bin file, which is a pickle and is not read: convert it to safetensors"
    assert refused(model, folder) == [no_weights + pickle]
    (folder / "adapter_model.safetensors").write_bytes(b"\0\0\0\0")
    (line,) = refused(model, folder)
    assert line.startswith("adapter_model.safetensors is not a whole safetensors file: ")
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe")
    problems = refused(model, folder)
    assert problems[0].startswith("adapter_config.json is not valid JSON: ")
    assert len(problems) == 2
    (folder / "adapter_config.json").write_text("[" * 100_000)
    assert refused(model, folder)[0].startswith("adapter_config.json is not valid JSON: ")


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:-100], lambda raw: raw[:4], lambda raw: b"", lambda raw: b"garbage" * 100,
    lambda raw: raw + b"\0", lambda raw: b"\x80\x02}q\0." + raw,
], ids=["short by 100", "four bytes", "empty", "garbage", "long by one", "a pickle"])  # fmt: skip
def test_weights_that_are_no_whole_file_are_refused(
    damage: Callable[[bytes], bytes], peft_parts: PeftParts, tmp_path: Path
) -> None:
    file = peft_parts.write(tmp_path / "wrong") / "adapter_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    (line,) = refused(plain_net(), tmp_path / "wrong")
    assert line.startswith("adapter_model.safetensors is not a whole safetensors file: ")


def test_a_flat_magnitude_of_a_convolution_is_refused(tmp_path: Path) -> None:
    model = lora_plus.inject_lora(plain_net(), ["conv"], r=2, variant="dora")
    lora_plus.save_adapter(randomise(model), tmp_path / "right")
    config = json.loads((tmp_path / "right" / "adapter_config.json").read_text())
    folder = PeftParts(config, parts(tmp_path / "right" / "adapter_model.safetensors"))
    folder.weights.put(f"{BASE}conv.lora_magnitude_vector", torch.ones(6))
    assert refused(plain_net(), folder.write(tmp_path / "wrong")) == [
        "'conv': lora_magnitude_vector has shape (6,), expected (1, 6, 1)"
    ]

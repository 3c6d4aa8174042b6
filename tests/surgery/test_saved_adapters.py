"""Adapters work without their models: what is read, combined, resized and written is what the model would give."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, LORA_CASES, Case, Conv1D, randomise
from files_support import (
    PATHS,
    adapted_net,
    assemble,
    assert_same_tensors,
    contents,
    drop,
    net,
    parts,
    plain_net,
    rename,
)
from parameter_cases import PARAMETER_CASES, ParameterCase
from torch import nn

import lora_plus
from lora_plus import inject_lora, save_adapter
from lora_plus.files import SavedAdapter, read_adapter, write_adapter
from lora_plus.files.save import describe
from lora_plus.model.state import State
from lora_plus.surgery import combine_adapters, combine_saved, resize_adapter, resize_saved

ALL = [*CASES, *PARAMETER_CASES]


def saved(model: nn.Module, path: Path) -> Path:
    """The adapter on the disk; the test is skipped where PEFT cannot express it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that PEFT doubles an out_proj
            save_adapter(model, path)
    except ValueError:
        pytest.skip("PEFT cannot express it")
    return path


def problems(path: Path) -> list[str]:
    with pytest.raises(ValueError) as error:
        read_adapter(path)
    return [line.removeprefix("  ") for line in str(error.value).split("\n")[1:]]


# ---- the law: a file is what it was ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_a_native_file_is_written_again_byte_by_byte(case: Case | ParameterCase, tmp_path: Path) -> None:
    path = saved(case.adapted(), tmp_path / "a.safetensors")
    write_adapter(read_adapter(path), tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_peft_folder_becomes_the_native_file_of_the_model(case: Case, tmp_path: Path) -> None:
    folder = saved(case.adapted(), tmp_path / "a")
    model = lora_plus.load_adapter(case.model(), folder)
    save_adapter(model, tmp_path / "model.safetensors")
    write_adapter(read_adapter(folder), tmp_path / "plain.safetensors")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_native_file_becomes_the_peft_folder_of_the_model(case: Case, tmp_path: Path) -> None:
    adapted = case.adapted()
    folder = saved(adapted, tmp_path / "model")
    save_adapter(adapted, tmp_path / "a.safetensors")
    write_adapter(read_adapter(tmp_path / "a.safetensors"), tmp_path / "plain")
    ours, theirs = contents(tmp_path / "plain"), contents(folder)
    assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]
    configs = [json.loads(files["adapter_config.json"]) for files in (ours, theirs)]
    assert configs[0].pop("target_modules") == "layer"
    assert configs[1].pop("target_modules") == ["layer"]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("form", PATHS)
def test_modules_trained_in_full_and_settings_come_along(form: str, tmp_path: Path) -> None:
    model = adapted_net(alpha_pattern={"embed": 7})
    save_adapter(model, tmp_path / PATHS[form])
    found, wanted = read_adapter(tmp_path / PATHS[form]), describe(State(model), "default")
    assert found.format == form
    assert found.trained.keys() == wanted.trained.keys()
    for name, tensors in wanted.trained.items():
        assert_same_tensors(dict(sorted(found.trained[name].items())), dict(sorted(tensors.items())))
    assert {name: (layer.base, layer.spec.scale) for name, layer in found.layers.items()} == {
        name: (layer.base, layer.spec.scale) for name, layer in wanted.layers.items()
    }
    for name, layer in wanted.layers.items():
        assert_same_tensors(found.layers[name].tensors, layer.tensors)


def test_the_model_itself_can_be_the_layer(tmp_path: Path) -> None:
    path = saved(randomise(inject_lora(nn.Linear(4, 3), [""], r=2)), tmp_path / "a.safetensors")
    write_adapter(read_adapter(path), tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_blocks_of_rows_stay_blocks(tmp_path: Path) -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(6, 12)})
    inject_lora(model, ["qkv.q", "qkv.v"], r=2, fused={"qkv": {"q": 6, "k": 2, "v": 4}})
    path = saved(randomise(model), tmp_path / "a.safetensors")
    write_adapter(read_adapter(path), tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_no_random_numbers_are_drawn(tmp_path: Path) -> None:
    path = saved(adapted_net(), tmp_path / "a.safetensors")
    state = torch.random.get_rng_state()
    read_adapter(path)
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- what works over a model works over files ------------------------------------------------------------------------


COMBINED = [
    *((case, {"method": "svd", "r": 2}) for case in ALL if case.options.get("variant") != "dora"),
    (LORA_CASES[0], {}),
    (LORA_CASES[0], {"method": "ties", "r": 3, "density": 0.5}),
]


@pytest.mark.parametrize(("case", "method"), COMBINED, ids=lambda value: getattr(value, "name", str(value)))
def test_combining_files_is_combining_in_the_model(case: Case | ParameterCase, method: dict, tmp_path: Path) -> None:
    model = case.adapted()
    path = saved(model, tmp_path / "a.safetensors")
    randomise(model, seed=1)
    save_adapter(model, tmp_path / "b.safetensors")
    both = {"a": read_adapter(path), "b": read_adapter(tmp_path / "b.safetensors")}
    combined, report = combine_saved(both, weights=[1, -0.5], **method)
    lora_plus.load_adapter(model, path, adapter="a")
    wanted = combine_adapters(model, ["a", "default"], weights=[1, -0.5], **method)
    assert (report.ranks, report.errors) == (wanted.ranks, wanted.errors)
    assert_same_file(combined, model, tmp_path, adapter="combined")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_resizing_a_file_is_resizing_in_the_model(case: Case, tmp_path: Path) -> None:
    model = case.adapted(torch.float32)
    adapter = read_adapter(saved(model, tmp_path / "a.safetensors"))
    for r in (1, 5):
        adapter, _ = resize_saved(adapter, r=r, generator=torch.Generator().manual_seed(3))
        resize_adapter(model, r=r, generator=torch.Generator().manual_seed(3))
        assert_same_file(adapter, model, tmp_path)


def assert_same_file(made: SavedAdapter, model: nn.Module, folder: Path, **options: str) -> None:
    write_adapter(made, folder / "one.safetensors")
    save_adapter(model, folder / "other.safetensors", **options)
    assert (folder / "one.safetensors").read_bytes() == (folder / "other.safetensors").read_bytes()


@pytest.mark.peers
def test_peft_adapts_just_these_layers_of_a_model_with_others_whose_names_end_alike(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"q": nn.Linear(4, 4), "deep": nn.ModuleDict({"q": nn.Linear(4, 4)})})

    save_adapter(randomise(inject_lora(model(), [lambda name, module: name == "q"], r=2)), tmp_path / "a.safetensors")
    write_adapter(read_adapter(tmp_path / "a.safetensors"), tmp_path / "peft")
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path / "peft")
    adapted = {name for name, module in loaded.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert adapted == {"base_model.model.q"}


@pytest.mark.peers
def test_peft_computes_the_same_from_a_converted_file(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = inject_lora(plain_net().double(), ["embed", "conv", "proj"], r=2, rank_pattern={"proj": 3})
    save_adapter(randomise(model), tmp_path / "a.safetensors")
    write_adapter(read_adapter(tmp_path / "a.safetensors"), tmp_path / "peft")
    loaded = peft.PeftModel.from_pretrained(plain_net().double(), tmp_path / "peft", autocast_adapter_dtype=False)
    tokens = torch.arange(18).reshape(2, 9) % 9
    torch.testing.assert_close(loaded(tokens), model(tokens), rtol=1e-12, atol=1e-12)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_adapters_of_different_models_are_refused(tmp_path: Path) -> None:
    def adapter(layer: nn.Module, **options: Any) -> SavedAdapter:
        return describe(State(inject_lora(nn.Sequential(layer), "all-linear", r=2, **options)), "default")

    adapters = {"a": adapter(nn.Linear(4, 3)), "b": adapter(nn.Linear(4, 5))}
    with pytest.raises(ValueError, match="adapters \\['a', 'b'\\] cannot be combined:\n  '0' is a Linear") as error:
        combine_saved(adapters)
    assert str(error.value).endswith("'0' is a Linear (5, 4) in 'b', and a Linear (3, 4) in 'a'")
    adapters = {"a": adapter(nn.Linear(4, 6)), "b": adapter(nn.Linear(4, 6), fused={"0": ["q", "k"]})}
    with pytest.raises(ValueError, match=r"cannot be combined:\n  '0\.q' and '0' overlap"):
        combine_saved(adapters)


def test_what_is_the_same_in_all_stays_beside_a_combination() -> None:
    model = inject_lora(nn.Sequential(nn.Linear(4, 3)), ["0"], r=2)
    texts = {"a": {"task_type": "x", "by": "me"}, "b": {"task_type": "x", "by": "you", "note": "b"}}
    adapters = {name: describe(State(model), "default", metadata) for name, metadata in texts.items()}
    assert combine_saved(adapters)[0].metadata == {"task_type": "x"}
    assert resize_saved(adapters["b"], r=1)[0].metadata == texts["b"]


def test_peft_folders_that_leave_the_layers_open_are_refused(tmp_path: Path) -> None:
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 1)})
    saved(inject_lora(attention, ["attn"]), tmp_path / "attention")
    (line,) = problems(tmp_path / "attention")
    assert line.startswith("'attn' is an attention module, whose parts cannot be told without the model; load")
    saved(inject_lora(nn.ModuleDict({"lstm": nn.LSTM(4, 4)}), ["lstm.weight_ih_l0"]), tmp_path / "lstm")
    (line,) = problems(tmp_path / "lstm")
    assert line.startswith("how target_parameters are stored cannot be told without the model; load")


def test_peft_tensors_that_fit_no_layer_are_refused(tmp_path: Path) -> None:
    folder = saved(inject_lora(net(), ["proj", "embed"]), tmp_path / "a")
    file = parts(folder / "adapter_model.safetensors")
    dtype, shape, raw = file.tensors["base_model.model.proj.lora_A.weight"]
    file.tensors["base_model.model.proj.lora_A.weight"] = (dtype, [*shape, 1], raw)
    (folder / "adapter_model.safetensors").write_bytes(assemble(file.tensors, {}))
    (line,) = problems(folder)
    assert line == (
        "'proj': what kind of layer it belongs to cannot be told from its tensors, "
        "{'lora_A': (8, 6, 1), 'lora_B': (5, 8)}"
    )


EDITS = {
    "kind": (lambda file: file.document["layers"]["proj"].update(kind="Dense"), "unknown kind of layer 'Dense'"),
    "shape": (lambda file: file.document["layers"]["proj"].update(shape=[5]), "its weight has shape (5,), which is"),
    "negative": (lambda file: file.document["layers"]["proj"].update(shape=[-5, 6]), "its weight has shape (-5, 6)"),
    "text": (lambda file: file.document["layers"]["proj"].update(shape=["a", 6]), "its weight has shape ('a', 6)"),
    "wrong": (lambda file: file.document["layers"]["proj"].update(shape=[5, 7]), "lora_A has shape (3, 6), expected"),
    "groups": (
        lambda file: file.document["layers"]["conv"].update(groups=5),
        "'conv': groups is 5, which Conv1d of shape",
    ),
    "text groups": (lambda file: file.document["layers"]["conv"].update(groups="a"), "'conv': "),
    "missing": (drop("proj.lora_A"), "tensor 'proj.lora_A' is missing"),
    "extra": (rename("head.0.bias", "head.0.other"), "tensor 'head.0.bias' is missing"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_bad_native_file_is_refused_with_the_reason(edit: str, tmp_path: Path) -> None:
    path = saved(adapted_net(), tmp_path / "a.safetensors")
    file = parts(path)
    change, reason = EDITS[edit]
    change(file)
    path.write_bytes(file.bytes())
    assert any(reason in line for line in problems(path))


SETTINGS = {
    "dropout of a parameter": (
        {"kind": "Parameter", "parameter": "proj.weight", "dropout": 0.5},
        "'proj': dropout 0.5 has no input to act on where only a weight is read",
    ),
    "overlapping rows": ({"parameter": "conv.weight", "rows": [0, 5]}, "'proj' and 'conv' overlap"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_an_adapter_that_no_model_can_have_is_refused(case: str, tmp_path: Path) -> None:
    changes, line = SETTINGS[case]
    path = saved(adapted_net(), tmp_path / "a.safetensors")
    file = parts(path)
    file.document["layers"]["proj"].update(changes)
    path.write_bytes(file.bytes())
    assert line in problems(path)


def test_a_module_trained_in_full_with_an_adapter_in_it_is_refused() -> None:
    adapter = describe(State(inject_lora(nn.Sequential(nn.Linear(4, 3)), ["0"], r=2)), "default")
    adapter.trained["0"] = {"bias": torch.zeros(3)}
    with pytest.raises(ValueError, match="'0' is trained in full, but '0' in it has an adapter"):
        write_adapter(adapter, "none.safetensors")


def test_values_that_are_not_finite_are_not_written() -> None:
    adapter = describe(State(inject_lora(nn.Sequential(nn.Linear(4, 3)), ["0"], r=2)), "default")
    adapter.trained["1"] = {"bias": torch.full((3,), torch.inf)}
    with pytest.raises(ValueError, match=r"'1\.bias' has values that are not finite"):
        write_adapter(adapter, "none.safetensors")
    assert not Path("none.safetensors").exists()


def test_parameters_cannot_be_written_for_peft_without_their_model(tmp_path: Path) -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "proj": nn.Linear(4, 4)})
    path = saved(inject_lora(model, ["lstm.weight_ih_l0", "proj"]), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"'lstm.weight_ih_l0': how PEFT adapts a parameter depends on its module"):
        write_adapter(read_adapter(path), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_attention_beside_a_transposed_layer_cannot_be_written_for_peft_without_the_model(tmp_path: Path) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 1), "proj": Conv1D(4, 4)})
    path = saved(inject_lora(model, ["attn.q", "proj"]), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"\['attn'\]: PEFT may transpose out_proj, by the order of the layers"):
        write_adapter(read_adapter(path), tmp_path / "peft")


def test_saved_adapters_without_names_are_refused(tmp_path: Path) -> None:
    lora_plus.save_adapter(adapted_net(), tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match="adapters must map names to saved adapters, got a list"):
        combine_saved([read_adapter(tmp_path / "a.safetensors")])  # type: ignore[arg-type]

"""Adapters of tied layers in PEFT's format, for other programs, and merged into checkpoints; PEFT is the reference."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from peft_support import opened_by_peft, peft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_plus as lp
from lora_plus.files import export_adapter, read_adapter, to_peft, write_adapter

pytestmark = pytest.mark.peers

F64 = torch.float64
TIED = "one A and B with 'lm_head', tied"


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.q_proj = nn.Embedding(19, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q_proj(self.embed_tokens(x)))


class Language(nn.Module):
    """With what PEFT asks a model of Transformers for its ties."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self) -> None:
        super().__init__()
        self.model, self.lm_head = Body(), nn.Linear(8, 19, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.model(x))


def language() -> nn.Module:
    torch.manual_seed(0)
    return Language().to(F64).eval()


def untied() -> nn.Module:
    model = language()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def logits(model: nn.Module) -> Tensor:
    return model(torch.arange(7)[None])


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def adapted(*targets: str) -> nn.Module:
    return randomise(lp.inject_lora(language(), list(targets), r=2, tied="both", dtype=F64)).eval()


def notes(model: nn.Module) -> dict[str, str]:
    """Of the layers that have tensors of adapters."""
    return {row.name: row.note for row in lp.lora_summary(model).rows if row.parameters}


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"]])
def test_peft_opens_it_and_we_open_it_again_as_one(targets: list[str], tmp_path: Path) -> None:
    model = adapted(*targets)
    lp.save_adapter(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["ensure_weight_tying"] is True
    close(logits(opened_by_peft(language(), tmp_path / "a")), logits(model))
    for source in (tmp_path / "a", to_peft(model)):
        loaded = lp.load_adapter(language(), source)
        close(logits(loaded), logits(model))
        assert notes(loaded)["model.embed_tokens"] == TIED and "lm_head" not in notes(loaded)
    lp.save_adapter(loaded, tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("path", ["a.safetensors", "a", "memory"])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize(
    ("one", "other"), [("lm_head", "lm_head"), ("lm_head", "embed_tokens"), ("embed_tokens", "lm_head")]
)
def test_values_go_to_the_layer_that_has_the_adapter(
    one: str, other: str, init: str, path: str, tmp_path: Path
) -> None:
    if path == "memory" and init == "pissa" and one != other:
        return  # the two start from other tensors, and PEFT's config has no place for what says that they started
    models = [
        lp.inject_lora(language(), [each, "q_proj"], r=2, tied="both", dtype=F64, init=init) for each in (one, other)
    ]
    source, model = (model.eval() for model in models)
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    held = dict(model.named_parameters())
    if path != "memory":
        lp.save_adapter(source, tmp_path / path)
    lp.load_adapter(model, to_peft(source) if path == "memory" else tmp_path / path, replace=True)
    close(logits(model), logits(source))
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    lp.load_adapter(model, tmp_path / path if path != "memory" else to_peft(source), adapter="more")
    lp.set_adapter(model, "more")
    close(logits(model), logits(source))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_what_peft_ties_comes_as_one(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    theirs = peft.get_peft_model(language(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lm_head" not in name and "lora_" in name:  # that of the head is the same memory
                parameter.normal_()
    theirs.save_pretrained(str(tmp_path))
    loaded = lp.load_adapter(language(), tmp_path)
    close(logits(loaded), logits(theirs))
    assert notes(loaded) == {"model.embed_tokens": TIED, "model.q_proj": ""}
    with pytest.warns(UserWarning, match="weights of the base model"):
        read = read_adapter(tmp_path)
    assert read.layers["model.embed_tokens"].base.facts == {"tied": {"lm_head": "Linear"}}


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_what_peft_trains_in_full_and_ties_stays_tied(module: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[module], ensure_weight_tying=True)
    theirs = peft.get_peft_model(language(), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    theirs.save_pretrained(str(tmp_path / "a"))
    loaded = lp.load_adapter(language(), tmp_path / "a")
    close(logits(loaded), logits(theirs))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    head = tensors.pop("base_model.model.lm_head.weight")
    for changed in (tensors, {**tensors, "base_model.model.lm_head.weight": head + 1}):
        save_file(changed, path)
        with pytest.raises(ValueError, match=r"is trained in full and tied to 'lm_head\.weight', which PEFT unties"):
            lp.load_adapter(language(), path.parent)


def trained_in_full(model: nn.Module, module: str) -> nn.Module:
    lp.inject_lora(model, ["q_proj"], r=2, train_also=[module])
    with torch.no_grad():
        [p.normal_(generator=torch.Generator().manual_seed(1)) for p in model.parameters() if p.requires_grad]
    return model


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_what_is_trained_in_full_and_tied_is_tied_in_peft(module: str, tmp_path: Path) -> None:
    model = trained_in_full(language(), module)
    lp.save_adapter(model, tmp_path / "a")
    theirs = opened_by_peft(language(), tmp_path / "a")
    close(logits(theirs), logits(model))
    merged = theirs.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    close(logits(merged), logits(model))
    back = lp.load_adapter(language(), tmp_path / "a")
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert torch.equal(logits(back), logits(model))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[module], ensure_weight_tying=True)
    peft.get_peft_model(language(), config).save_pretrained(str(tmp_path / "theirs"))
    names = [load_file(tmp_path / each / "adapter_model.safetensors").keys() for each in ("a", "theirs")]
    assert names[0] == names[1]
    lp.save_adapter(back, tmp_path / "b")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


class Biased(Language):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head.bias = nn.Parameter(torch.zeros(19))


class Plain(Language):
    _tied_weights_keys = None


@pytest.mark.parametrize(("kind", "module"), [(Biased, "lm_head"), (Plain, "embed_tokens")])
def test_what_peft_would_untie_is_not_written(kind: type[Language], module: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is tied to '.*weight', and PEFT would untie them; train both"):
        lp.save_adapter(trained_in_full(kind(), module), tmp_path / "a")


def test_where_it_is_not_tied_each_has_its_own_and_the_user_is_told(tmp_path: Path) -> None:
    model = adapted("embed_tokens")
    lp.save_adapter(model, tmp_path / "a")
    with pytest.warns(UserWarning, match="says ensure_weight_tying.*but no such layers are tied here"):
        loaded = lp.load_adapter(untied(), tmp_path / "a")
    close(logits(loaded), logits(model))
    assert {*notes(loaded)} == {"model.embed_tokens", "lm_head"}
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.lora_A.weight"] *= 2
    save_file(tensors, path)
    with pytest.warns(UserWarning, match="but 'model.embed_tokens' and 'lm_head' differ in it"):
        loaded = lp.load_adapter(language(), path.parent)
    assert {*notes(loaded)} == {"model.embed_tokens", "lm_head"}


def test_names_are_mapped(tmp_path: Path) -> None:
    model = adapted("embed_tokens")
    lp.save_adapter(model, tmp_path / "a")
    loaded = lp.load_adapter(nn.ModuleDict({"body": language()}), tmp_path / "a", names={"": "body"})
    close(logits(loaded["body"]), logits(model))
    assert notes(loaded) == {"body.model.embed_tokens": "one A and B with 'body.lm_head', tied"}


def test_what_a_format_cannot_tie_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    model["head"].weight = model["embed"].weight
    randomise(lp.inject_lora(model, ["embed"], r=2, tied="both"))
    lines = {
        "peft": "'embed': PEFT ties adapters of 'embed_tokens' and 'lm_head' only; save a .safetensors file",
        "diffusers": "'embed': diffusers files have no adapter that tied layers share; save a native file",
    }
    for format, line in lines.items():
        with pytest.raises(ValueError, match=line):
            lp.save_adapter(model, tmp_path / "a", format=format)
    assert not list(tmp_path.iterdir())


def test_other_programs_get_an_adapter_for_each(tmp_path: Path) -> None:
    model = adapted("embed_tokens")
    export_adapter(model, tmp_path / "vllm", for_="vllm")
    names = {key.rpartition(".lora_")[0] for key in load_file(tmp_path / "vllm" / "adapter_model.safetensors")}
    assert names == {"base_model.model.lm_head", "base_model.model.model.embed_tokens"}
    with pytest.raises(ValueError, match=r"'lm_head': its weight is also .*, and llama\.cpp has one tensor for both"):
        export_adapter(model, tmp_path / "cpp", for_="llama.cpp", base_model="a/b")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("form", ["a.safetensors", "a"])
def test_a_checkpoint_of_tied_weights_gets_it_once(target: str, form: str, tmp_path: Path) -> None:
    model = adapted(target)
    lp.save_adapter(model, tmp_path / form)
    base, name = tmp_path / "base", "model.embed_tokens.weight"
    base.mkdir()
    state = {key: tensor for key, tensor in language().state_dict().items() if key != "lm_head.weight"}
    save_file(state, base / "model.safetensors", {"lm_head.weight": name, "format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lp.merge_checkpoint(base, tmp_path / form, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    lp.merge_lora(model)
    close(found[name], model.lm_head.weight)
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items() if key != name)
    save_file({**state, "lm_head.weight": state[name].clone()}, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"the file has one adapter for .* which the checkpoint stores apart; tie"):
        lp.merge_checkpoint(base, tmp_path / form, tmp_path / "again")


@pytest.mark.parametrize("tied", [3, ["lm_head"], {"lm_head": "x"}])
def test_a_checkpoint_is_not_merged_with_what_no_file_says(tied: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    lp.save_adapter(adapted("embed_tokens"), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        document = json.loads(file.metadata()["lora_plus"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    document["layers"]["model.embed_tokens"]["tied"] = tied
    save_file(tensors, tmp_path / "a.safetensors", {"lora_plus": json.dumps(document)})
    save_file(language().model.embed_tokens.state_dict(prefix="model.embed_tokens."), tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match="tied is"):
        lp.merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="tied is"):
        read_adapter(tmp_path / "a.safetensors")


def test_a_file_keeps_it_from_format_to_format(tmp_path: Path) -> None:
    lp.save_adapter(adapted("embed_tokens"), tmp_path / "a.safetensors")
    write_adapter(read_adapter(tmp_path / "a.safetensors"), tmp_path / "a")
    write_adapter(read_adapter(tmp_path / "a"), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert copy.deepcopy(read_adapter(tmp_path / "a")).layers.keys() == {"model.embed_tokens"}

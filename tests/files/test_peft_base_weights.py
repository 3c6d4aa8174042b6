"""The base model in a PEFT folder: its weights, as PEFT saves them with adapters of embeddings and heads, its name."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from peft_support import TOKENS, Net, net, peft, transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_plus
from lora_plus.files import adapter_state_dict, read_adapter

pytestmark = pytest.mark.peers

IDS = torch.arange(12).reshape(2, 6) * 3 % 32


def llama(tied: bool = False, vocabulary: int = 32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def saved(folder: Path, *targets: str, model: Any = None) -> Any:
    """A PEFT model with default arguments saved to a folder, with random adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)
        theirs = peft.get_peft_model(model or llama(), config).eval()
        theirs.save_pretrained(folder)
    return theirs


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def change(folder: Path, **tensors: Tensor) -> None:
    save_file({**weights(folder), **tensors}, folder / "adapter_model.safetensors", {"format": "pt"})


HEAD = "base_model.model.lm_head.base_layer.weight"
EMBED = "base_model.model.model.embed_tokens.base_layer.weight"


@pytest.mark.parametrize("targets", [("q_proj", "lm_head"), ("embed_tokens",), ("embed_tokens", "lm_head", "v_proj")])
def test_what_peft_saves_by_default_opens(targets: tuple[str, ...], tmp_path: Path) -> None:
    theirs = saved(tmp_path, *targets)
    assert {HEAD, EMBED} & weights(tmp_path).keys()
    ours = lora_plus.load_adapter(llama(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, to PEFT
        reader = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert torch.equal(reader(IDS).logits, theirs(IDS).logits)
    torch.testing.assert_close(ours(IDS).logits, reader(IDS).logits, rtol=0, atol=1e-12)
    held = {name.replace(".default", ""): tensor for name, tensor in reader.state_dict().items() if "lora_" in name}
    read = adapter_state_dict(ours)
    assert len(read) == len(held) == 2 * len(targets)
    assert sorted(tensor.flatten().tolist() for tensor in read.values()) == sorted(
        tensor.flatten().tolist() for tensor in held.values()
    )  # to the bit


def test_what_transformers_saves_by_default_opens(tmp_path: Path) -> None:
    theirs = llama()
    theirs.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.eval().save_pretrained(tmp_path)
    assert any(name.endswith("lm_head.base_layer.weight") for name in weights(tmp_path))
    ours = lora_plus.load_adapter(llama(), tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-12)


def test_embeddings_that_were_resized_are_saved_and_open(tmp_path: Path) -> None:
    larger = llama(vocabulary=40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(larger, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        theirs.eval().save_pretrained(tmp_path, save_embedding_layers=True)
    key = "base_model.model.model.embed_tokens.weight"
    assert key in weights(tmp_path)
    ours = lora_plus.load_adapter(llama(vocabulary=40), tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=re.escape(f"tensor {key!r} is neither part of an adapter")):
        lora_plus.load_adapter(llama(), tmp_path)


def test_a_weight_that_differs_in_one_element_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "q_proj", "lm_head")
    moved = weights(tmp_path)[HEAD].clone()
    moved[0, 0] *= 1 + 2**-52
    change(tmp_path, **{HEAD: moved})
    with pytest.raises(ValueError, match=re.escape(f"tensor {HEAD!r} is one of the base model")):
        lora_plus.load_adapter(llama(), tmp_path)
    change(tmp_path, **{HEAD: moved[:-1].clone()})
    with pytest.raises(ValueError, match=re.escape(f"tensor {HEAD!r} is one of the base model")):
        lora_plus.load_adapter(llama(), tmp_path)


def test_weights_are_compared_in_the_model_s_dtype(tmp_path: Path) -> None:
    saved(tmp_path, "q_proj", "lm_head")
    lora_plus.load_adapter(llama().bfloat16(), tmp_path)  # the file has them in float64
    change(tmp_path, **{HEAD: weights(tmp_path)[HEAD].bfloat16()})
    with pytest.raises(ValueError, match="differs from the model's"):
        lora_plus.load_adapter(llama(), tmp_path)


def test_a_weight_that_cannot_be_compared_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    saved(tmp_path / "a", "q_proj", "lm_head")
    message = re.escape(
        f"the file also has weights of the base model, {HEAD!r}, which are ignored; they could not be compared"
    )
    with pytest.warns(UserWarning, match=message):
        ours = lora_plus.load_adapter(llama().to("meta"), tmp_path / "a")
    assert "lm_head.lora_A" in adapter_state_dict(ours)
    with pytest.warns(UserWarning, match=message):
        assert len(read_adapter(tmp_path / "a").layers) == 2


def test_a_checkpoint_s_own_weights_are_compared(tmp_path: Path) -> None:
    theirs = saved(tmp_path / "a", "q_proj", "lm_head")
    base = {name: tensor.clone() for name, tensor in llama().state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    lora_plus.merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "out.safetensors")
    merged = llama()
    merged.load_state_dict(load_file(tmp_path / "out.safetensors"))
    torch.testing.assert_close(merged(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-12)
    base["lm_head.weight"][0, 0] += 1
    save_file(base, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=re.escape(f"tensor {HEAD!r} is one of the base model")):
        lora_plus.merge_checkpoint(tmp_path / "other.safetensors", tmp_path / "a", tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_weights_are_found_under_other_names(tmp_path: Path) -> None:
    saved(tmp_path, "q_proj", "lm_head")
    around = nn.ModuleDict({"inner": llama()})
    lora_plus.load_adapter(around, tmp_path, names={"": "inner"})
    other = nn.ModuleDict({"inner": llama()})
    with torch.no_grad():
        other["inner"].lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match=re.escape(f"tensor {HEAD!r} is one of the base model")):
        lora_plus.load_adapter(other, tmp_path, names={"": "inner"})


def test_any_weight_that_the_model_has_may_be_in_the_file(tmp_path: Path) -> None:
    """Also one of a model that is not of transformers, and a second time, beside the first adapter."""
    model = net()
    lora_plus.save_adapter(lora_plus.inject_lora(model, ["q"], r=2), tmp_path)
    lora_plus.remove_lora(model)
    change(
        tmp_path, **{f"base_model.model.{name}": model.get_parameter(name).data for name in ("xq.weight", "xq.bias")}
    )
    change(tmp_path, **{"base_model.model.q.base_layer.bias": model.q.bias.data})
    loaded = net()
    for adapter in ("one", "two"):
        lora_plus.load_adapter(loaded, tmp_path, adapter=adapter)
    assert isinstance(loaded, Net) and loaded(TOKENS).shape == model(TOKENS).shape
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None


# ---- its name and class ----------------------------------------------------------------------------------------------

ABOUT = ("base_model_name_or_path", "auto_mapping", "task_type", "revision")


def about(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return {name: config.get(name) for name in ABOUT}


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_peft_builds_the_base_model_of_our_folder_itself(task: str | None, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type=task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, to PEFT
        peft.get_peft_model(copy.deepcopy(model), settings).save_pretrained(tmp_path / "theirs")
        randomise(lora_plus.inject_lora(model, ["q_proj"], r=4))
        model.__class__ = type("FSDPLlama", (type(model),), {})  # as fully_shard does
        lora_plus.save_adapter(model, tmp_path / "ours", metadata={} if task is None else {"task_type": task})
        assert about(tmp_path / "ours") == about(tmp_path / "theirs")
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "ours"))
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=0, atol=1e-12)


def test_what_the_user_says_of_the_base_model_counts(tmp_path: Path) -> None:
    model = lora_plus.inject_lora(llama(), ["q_proj"])
    lora_plus.save_adapter(model, tmp_path / "nameless")
    model.name_or_path = "org/name"
    lora_plus.save_adapter(model, tmp_path / "named", metadata={"revision": "main"})
    lora_plus.save_adapter(model, tmp_path / "told", metadata={"base_model_name_or_path": "mine"})
    found = [about(tmp_path / name) for name in ("nameless", "named", "told")]
    assert [each["base_model_name_or_path"] for each in found] == [None, "org/name", "mine"]
    assert [each["revision"] for each in found] == [None, "main", None]
    assert {each["auto_mapping"]["base_model_class"] for each in found} == {"LlamaForCausalLM"}
    lora_plus.save_adapter(lora_plus.inject_lora(net(), ["q"]), tmp_path / "plain")  # nothing that PEFT could build
    assert "auto_mapping" not in json.loads((tmp_path / "plain" / "adapter_config.json").read_text())


# ---- modules trained in full -----------------------------------------------------------------------------------------


def test_heads_that_a_model_does_not_have_are_passed_over(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_labels=3, pad_token_id=0,
    )  # fmt: skip

    def classifier() -> Any:
        torch.manual_seed(0)
        return transformers.LlamaForSequenceClassification(config).double().eval()

    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, to PEFT
        theirs = peft.get_peft_model(classifier(), settings).eval()
    with torch.no_grad():
        theirs.base_model.model.score.modules_to_save["default"].weight.add_(1)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    ours = lora_plus.load_adapter(classifier(), tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-12)
    assert read_adapter(tmp_path).trained.keys() == {"score"}
    weights_left = {name: tensor for name, tensor in weights(tmp_path).items() if "score" not in name}
    save_file(weights_left, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="modules_to_save 'classifier': the model has no such module"):
        lora_plus.load_adapter(classifier(), tmp_path)


def test_a_tied_embedding_that_peft_unties_is_refused(tmp_path: Path) -> None:
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(llama(tied=True), settings).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"'model\.embed_tokens\.weight' is trained in full and tied to 'lm_head\.weig"
    ):
        lora_plus.load_adapter(llama(tied=True), tmp_path)
    assert lora_plus.load_adapter(llama(), tmp_path) is not None

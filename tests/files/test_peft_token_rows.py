"""Rows of tokens through PEFT's format, whose ``trainable_token_indices`` they are there, both ways."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_support import TOLERANCE, made_by_peft, opened_by_peft, peft, read_config, transformers
from torch import Tensor, nn

import lora_plus
from lora_plus import inject_lora, load_adapter, save_adapter
from lora_plus.files import read_adapter, to_peft, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it

IDS = [7, 2, 8]
TOKENS = torch.tensor([[7, 1, 2, 0, 5], [4, 8, 3, 6, 7]])


class Plain(nn.Module):
    """An embedding and a head that are not tied, without a config."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.q_proj = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 9, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.q_proj(self.embed_tokens(tokens))))


def llama(tied: bool) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def gemma() -> nn.Module:
    config = transformers.Gemma3TextConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "a tied head": (lambda: llama(True), {"embed_tokens": IDS}),
    "a tied head, the ids alone": (lambda: llama(True), IDS),
    "a tied head, named too": (lambda: llama(True), {"embed_tokens": IDS, "lm_head": IDS}),
    "an untied head": (lambda: llama(False), {"embed_tokens": IDS}),
    "both, untied": (lambda: llama(False), {"embed_tokens": IDS, "lm_head": [0, 4]}),
    "the head alone": (lambda: llama(False), {"lm_head": IDS}),
    "an embedding that scales its rows": (gemma, {"embed_tokens": IDS}),
    "no model of transformers": (Plain, {"embed_tokens": IDS}),
    "no model of transformers, the ids alone": (Plain, IDS),
}
"""What makes a model, and ``trainable_token_indices``."""


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output = model(TOKENS)
    return output if isinstance(output, Tensor) else output.logits


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = 20 * TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_is_loaded_and_computes_the_same(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, indices = CASES[case]
    theirs = made_by_peft(make().to(dtype), target_modules=["q_proj"], r=2, trainable_token_indices=indices)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(make().to(dtype), tmp_path)
    close(logits(ours), logits(theirs))
    with lora_plus.merged(ours):
        close(logits(ours), logits(theirs))
    close(logits(lora_plus.merge_and_unload(ours)), logits(theirs.merge_and_unload()))


def test_a_setting_for_adapters_of_tied_layers_says_nothing_of_rows(tmp_path: Path) -> None:
    theirs = made_by_peft(llama(True), target_modules=["q_proj"], r=2, trainable_token_indices=IDS)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(read_config(tmp_path) | {"ensure_weight_tying": True}))
    close(logits(load_adapter(llama(True), tmp_path)), logits(theirs))  # without a warning


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [case for case in CASES if "alone" not in case or "head alone" in case])
def test_what_is_saved_opens_in_peft_and_computes_the_same(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, rows = CASES[case]
    ours = moved(inject_lora(make().to(dtype), ["q_proj"], r=2, train_rows=rows))
    save_adapter(ours, tmp_path / "a")
    close(logits(opened_by_peft(make().to(dtype), tmp_path / "a")), logits(ours))
    again = load_adapter(make().to(dtype), tmp_path / "a")
    assert torch.equal(logits(again), logits(ours))
    save_adapter(again, tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config, tensors = to_peft(ours)
    assert torch.equal(logits(load_adapter(make().to(dtype), (config, tensors))), logits(ours))
    lora_plus.export_adapter(ours, tmp_path / "c", for_="peft")
    close(logits(load_adapter(make().to(dtype), tmp_path / "c")), logits(ours))


def test_the_rows_are_written_as_peft_writes_them(tmp_path: Path) -> None:
    theirs = made_by_peft(llama(True), target_modules=["q_proj"], r=2, trainable_token_indices={"embed_tokens": IDS})
    theirs.save_pretrained(tmp_path / "theirs")
    save_adapter(load_adapter(llama(True), tmp_path / "theirs"), tmp_path / "ours")
    from safetensors.torch import load_file

    own, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    assert read_config(tmp_path / "ours")["trainable_token_indices"] == {"model.embed_tokens": IDS}


def test_a_training_step_moves_the_rows_as_pefts_does() -> None:
    """The same loss, the same plain SGD: what PEFT trains and what is trained here go the same way."""
    theirs = peft.get_peft_model(
        llama(True).double(),
        peft.LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices={"embed_tokens": IDS}),
    )
    ours = inject_lora(llama(True).double(), ["q_proj"], r=2, alpha=8, train_rows={"embed_tokens": IDS})
    for model in (ours, theirs):
        rows = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.shape == (3, 8)]
        optimizer = torch.optim.SGD(rows, lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
    close(logits(ours), logits(theirs))


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, list[int]], str]] = {
    "a head with a bias": (lambda: Plain(bias=True), {"lm_head": IDS}, "without its bias"),
    "a tie that PEFT does not know": (
        lambda: tie(Plain()), {"embed_tokens": IDS}, "its weight is that of 'lm_head' too, which PEFT would leave"
    ),
    "a tie that is not there": (
        lambda: untie(llama(True)), {"embed_tokens": IDS}, "PEFT would give a head these rows, and none is tied"
    ),
}  # fmt: skip


def tie(model: Any) -> nn.Module:
    model.lm_head.weight = model.embed_tokens.weight
    return model


def untie(model: Any) -> nn.Module:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_would_compute_otherwise_is_refused_both_ways(case: str, tmp_path: Path) -> None:
    make, rows, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        save_adapter(inject_lora(make(), ["q_proj"], r=2, train_rows=rows), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    made_by_peft(Plain(), target_modules=["q_proj"], r=2, trainable_token_indices=rows).save_pretrained(tmp_path)
    if "bias" in case or not hasattr(make(), "config"):
        with pytest.raises(ValueError, match=message):
            load_adapter(make(), tmp_path)


def test_rows_alone_are_no_lora_adapter_of_peft(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['embed_tokens'\]: PEFT trains rows of tokens beside adapted layers"):
        save_adapter(inject_lora(Plain(), [], train_rows={"embed_tokens": IDS}), tmp_path / "a")


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no ids": (lambda config: config.update(trainable_token_indices=None), "gives no ids of 'embed_tokens'"),
    "no list": (lambda config: config.update(trainable_token_indices="7"), "must be a list of ids, or an object"),
    "ids that are texts": (
        lambda config: config["trainable_token_indices"].update(embed_tokens=["7"]),
        "must be a list",
    ),
    "too few": (lambda config: config["trainable_token_indices"].update(embed_tokens=[7, 2]), "lora_rows has shape"),
    "an id too large": (lambda config: config["trainable_token_indices"].update(embed_tokens=[7, 2, 9]), "ids is"),
    "an id twice": (lambda config: config["trainable_token_indices"].update(embed_tokens=[7, 2, 2]), "ids is"),
    "other names": (lambda config: config.update(trainable_token_indices={"wte": IDS}), "gives no ids of"),
    "a name more": (
        lambda config: config["trainable_token_indices"].update(wte=[1]),
        r"\[1\] has no tensor in the file",
    ),
    "two lists": (lambda config: config["trainable_token_indices"].update(tokens=[1]), "or several lists"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_with_wrong_ids_is_refused(case: str, tmp_path: Path) -> None:
    change, message = BROKEN[case]
    save_adapter(inject_lora(Plain(), ["q_proj"], r=2, train_rows={"embed_tokens": IDS}), tmp_path)
    config = read_config(tmp_path)
    change(config)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = Plain()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert type(model.embed_tokens) is nn.Embedding


def test_without_a_model(tmp_path: Path) -> None:
    ours = moved(inject_lora(Plain(), ["q_proj"], r=2, train_rows={"embed_tokens": IDS}))
    save_adapter(ours, tmp_path / "a.safetensors")
    write_adapter(read_adapter(tmp_path / "a.safetensors"), tmp_path / "a")
    assert torch.equal(logits(load_adapter(Plain(), tmp_path / "a")), logits(ours))
    with pytest.raises(ValueError, match="'embed_tokens': whose rows these are cannot be told without the model"):
        read_adapter(tmp_path / "a")
    tied = inject_lora(tie(Plain()), ["q_proj"], r=2, train_rows={"embed_tokens": IDS})
    save_adapter(tied, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="depends on the model; load and save them there"):
        write_adapter(read_adapter(tmp_path / "b.safetensors"), tmp_path / "b")


def test_under_other_names(tmp_path: Path) -> None:
    ours = moved(inject_lora(Plain(), ["q_proj"], r=2, train_rows={"embed_tokens": IDS}))
    save_adapter(ours, tmp_path)
    around = load_adapter(nn.ModuleDict({"inner": Plain()}), tmp_path, names={"": "inner"})
    assert torch.equal(logits(around["inner"]), logits(ours))
    plain = load_adapter(Plain(), tmp_path, names={"embed_tokens": None})
    assert type(plain.embed_tokens) is nn.Embedding
    assert copy.deepcopy(plain) is not plain

"""Tiny models and data for the recipes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from prepare_recipes import write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "pad_token_id": 256,
}  # fmt: skip
CLASSIFIERS = {
    "bert": (BertForSequenceClassification, BertConfig, "query, value, intermediate.dense"),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, "query, value"),
}
"""The class of the model, that of its configuration, and layers to adapt."""


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """One token a byte; the special ones from 256 on."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def save_classifier(folder: Path, kind: str) -> None:
    """The body only, so that each run draws a head."""
    model_cls, config_cls, _ = CLASSIFIERS[kind]
    torch.manual_seed(0)
    settings = config_cls(hidden_dropout_prob=0, attention_probs_dropout_prob=0, **SIZES)
    model_cls(settings).base_model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def save_llama(folder: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, eos_token_id=256, **SIZES)).save_pretrained(folder)
    tokenizer("<|EOT|>").save_pretrained(folder)


def write_sentences(folder: Path, label: Callable[[int], Any]) -> None:
    """Sentences of one letter, which says the label."""
    draw = random.Random(0)
    letters = [draw.randrange(2) for _ in range(320)]
    rows = [{"sentence": "ab"[n] * draw.randrange(3, 9), "label": label(n)} for n in letters]
    write_rows(folder, rows[:256], rows[256:])


def write_instructions(folder: Path) -> None:
    counts = [{"instruction": f"Count to {n}.", "output": f"{n}, and {n}"} for n in range(32)]
    write_rows(folder, counts[::2], counts[1::2])

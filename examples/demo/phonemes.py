"""The demo's task: from a word to its phonemes, learnt from entries of the CMU Pronouncing Dictionary."""

import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

IGNORED = -100
END = "<|im_end|>"
_ENTRY = re.compile(r"([a-z]{3,12}) ([^#\n]+)")  # further pronunciations are written "word(2)" and do not match


class Entry(NamedTuple):
    """A word and its phonemes, ``Entry("dog", "D AO1 G")``."""

    word: str
    phonemes: str


class Batch(NamedTuple):
    """Padded examples."""

    tokens: Tensor
    """``(b, t)`` inputs."""
    labels: Tensor
    """``(b, t)`` the token that follows each input, or ``IGNORED`` in the prompt and in the padding."""


def parse(text: str) -> list[Entry]:
    """The entries of ``cmudict.dict`` for words of 3 to 12 letters a-z, the first pronunciation of each."""
    matches = (_ENTRY.match(line) for line in text.splitlines())
    return [Entry(match[1], match[2].strip()) for match in matches if match]


def split(entries: Sequence[Entry], *, held_out: int, seed: int) -> tuple[list[Entry], list[Entry]]:
    """Shuffled training and held-out entries; no word is in both."""
    if len(entries) <= held_out:
        raise ValueError(f"{len(entries)} entries are too few to hold {held_out} out and train on the rest")
    shuffled = random.Random(seed).sample(entries, len(entries))
    return shuffled[held_out:], shuffled[:held_out]


def prompt(word: str) -> str:
    """The text that the model continues with the phonemes.

    The word is spelled: a tokenizer hides the letters of a word in one or two tokens.
    """
    return f"The phonemes of {' '.join(word)}:"


def end_token(tokenizer: Tokenizer) -> int:
    """The number of the token that ends an answer."""
    number = tokenizer.token_to_id(END)
    assert number is not None, f"the tokenizer has no {END}"
    return number


def collate(entries: Sequence[Entry], tokenizer: Tokenizer) -> Batch:
    """One batch of prompts, phonemes and end marks, padded on the right.

    No attention mask is needed: attention is causal, so padding on the right is seen by no real token, and
    what the padding itself computes is not counted.
    """
    end = end_token(tokenizer)
    rows, labels = [], []
    for entry in entries:
        asked = tokenizer.encode(prompt(entry.word)).ids
        answer = [*tokenizer.encode(f" {entry.phonemes}").ids, end]
        rows.append(torch.tensor([*asked, *answer[:-1]]))
        labels.append(torch.tensor([IGNORED] * (len(asked) - 1) + answer))
    return Batch(
        nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end),
        nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )


def batches(entries: Sequence[Entry], tokenizer: Tokenizer, size: int) -> Iterator[Batch]:
    """The entries in order, ``size`` at a time, again from the start when they end: an endless stream."""
    start = 0
    while True:
        yield collate([entries[(start + n) % len(entries)] for n in range(size)], tokenizer)
        start += size


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats of every counted token, ``(n,)`` in float32.

    Only the counted positions reach the head: prompt and padding cost no logits.
    """
    counted = batch.labels != IGNORED
    return F.cross_entropy(model(batch.tokens, counted).float(), batch.labels[counted], reduction="none")


@torch.no_grad()
def evaluate(model: nn.Module, entries: Sequence[Entry], tokenizer: Tokenizer, size: int = 32) -> Tensor:
    """``token_losses`` of all entries, ``size`` at a time, one after the other; their mean is the held-out loss."""
    starts = range(0, len(entries), size)
    return torch.cat([token_losses(model, collate(entries[n : n + size], tokenizer)) for n in starts])

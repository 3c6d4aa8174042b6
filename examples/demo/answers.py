"""Prompts with their answers as batches, of which only the answers are counted."""

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

IGNORED = -100
END = "<|im_end|>"


class Example(NamedTuple):
    """What the model is asked, and what it shall answer."""

    prompt: str
    answer: str


class Batch(NamedTuple):
    """Padded examples."""

    tokens: Tensor
    """``(b, t)`` inputs."""
    labels: Tensor
    """``(b, t)`` the token that follows each input, or ``IGNORED`` in the prompt and in the padding."""


class Verdict(NamedTuple):
    """How well a model answers."""

    losses: Tensor
    """``(n,)`` cross-entropy in nats of every token of the answers."""
    right: Tensor
    """``(examples,)`` whether the model's own answer is the right one."""


def end_token(tokenizer: Tokenizer) -> int:
    """The number of the token that ends an answer."""
    number = tokenizer.token_to_id(END)
    assert number is not None, f"the tokenizer has no {END}"
    return number


def collate(examples: Sequence[Example], tokenizer: Tokenizer) -> Batch:
    """One batch of prompts, answers and end marks, padded on the right.

    No attention mask is needed: attention is causal, so padding on the right is seen by no real token, and
    what the padding itself computes is not counted.
    """
    end = end_token(tokenizer)
    rows, labels = [], []
    for example in examples:
        asked = tokenizer.encode(example.prompt).ids
        answer = [*tokenizer.encode(f" {example.answer}").ids, end]
        rows.append(torch.tensor([*asked, *answer[:-1]]))
        labels.append(torch.tensor([IGNORED] * (len(asked) - 1) + answer))
    return Batch(
        nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end),
        nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )


def batches(examples: Sequence[Example], tokenizer: Tokenizer, size: int) -> Iterator[Batch]:
    """The examples in order, ``size`` at a time, again from the start when they end: an endless stream."""
    stream = cycle(examples)
    while True:
        yield collate([*islice(stream, size)], tokenizer)


def counted_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``(n, vocab)`` in float32 where an answer's token follows, and those tokens ``(n,)``.

    Only these positions reach the head: prompt and padding cost no logits.
    """
    counted = batch.labels != IGNORED
    return model(batch.tokens, counted).float(), batch.labels[counted]


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats, the mean over the tokens of the answers."""
    return F.cross_entropy(*counted_logits(model, batch))


@torch.no_grad()
def judge(model: nn.Module, examples: Sequence[Example], tokenizer: Tokenizer, size: int = 32) -> Verdict:
    """Losses and right answers of all examples, ``size`` at a time.

    The model answers right if at each place the expected token is its likeliest: so it would write the answer
    itself, one token after the other. What it writes behind the answer does not matter.
    """
    losses, right = [], []
    end = end_token(tokenizer)
    for start in range(0, len(examples), size):
        batch = collate(examples[start : start + size], tokenizer)
        logits, expected = counted_logits(model, batch)
        losses.append(F.cross_entropy(logits, expected, reduction="none"))
        missed = torch.zeros_like(batch.labels, dtype=torch.bool)
        missed[batch.labels != IGNORED] = (logits.argmax(-1) != expected) & (expected != end)
        right.append(~missed.any(-1))
    return Verdict(torch.cat(losses), torch.cat(right))

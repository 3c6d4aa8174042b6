"""What is learnt: a table of tasks, each a pretrained model, a data set and their split.

Only the upper part of a model is adapted. What lies below is frozen, so its outputs are computed once, and a task's
inputs are those outputs.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import phonemes
import smollm
import sources
import torch
import torch.nn.functional as F
from methods import FAR, FULL, METHODS, PLACES, PLAIN, SIZES, Method, only
from minilm import Upper
from probe import fit_head
from torch import Tensor, nn

from examples.demo.answers import IGNORED, collate

LAYERS_BELOW = 4
"""Blocks of MiniLM (of 6) that have no adapter."""
BLOCKS_BELOW = 11
"""Blocks of EfficientNet (of 16) that have no adapter."""
PIECES = 14
"""Word pieces of a gloss at most, with its start and end marks."""
IMAGE = 32
"""Pixels of a side to which the digits are scaled."""
LLAMA_BELOW = 26
"""Blocks of SmolLM2 (of 30) that have no adapter."""
TOKENS = 14
"""Tokens of a question and its answer at most."""


class Split(NamedTuple):
    """Examples."""

    inputs: tuple[Tensor, ...]
    """Each ``(n, ...)``."""
    labels: Tensor
    """Classes ``(n,)``, or of each position ``(n, t)``, where `IGNORED` is not counted."""

    def at(self, rows: Tensor | slice) -> Split:
        return Split(tuple(x[rows] for x in self.inputs), self.labels[rows])


class Classifier(nn.Module):
    """Features of a body, and a linear head."""

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(*inputs))
        return logits


@dataclass(frozen=True)
class Task:
    """A pretrained model as all methods start from it, and the examples."""

    start: Classifier
    """With the linear probe as its head, or its own; in eval mode, so that batch norms keep their statistics."""
    train: Split
    validation: Split
    test: Split

    def model(self) -> Classifier:
        """A model of its own to train."""
        return copy.deepcopy(self.start)


@dataclass(frozen=True)
class Setting:
    """How a task is trained, the same for all methods, and by which methods."""

    load: Callable[[int, int, int], Task]
    """From the numbers of training, validation and test examples."""
    sizes: tuple[int, int, int]
    """These numbers."""
    targets: Any
    """What gets an adapter, as `lora_plus.inject_lora` takes it."""
    rates: tuple[float, ...]
    """Of the sweep: the geometric mean of A's and B's rate, in ascending order."""
    words: str
    """What the task is, for the page."""
    steps: int = 40
    batch: int = 16
    also: tuple[str, ...] = ("head",)
    """Modules that are trained beside the adapters."""
    plane: tuple[Sequence[float], Sequence[float]] = ((), ())
    """Rates of A and rates of B of which each pair is run, the head's being `HEAD_RATE`."""
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    """What is compared, by name; the others are compared with `PLAIN`, which is among them."""


def divided(inputs: tuple[Tensor, ...], labels: Tensor, validation: int, test: int) -> tuple[Split, Split, Split]:
    """Training, validation and test examples, in the order given: test first, training last."""
    whole = Split(inputs, labels)
    end = test + validation
    return whole.at(slice(end, None)), whole.at(slice(test, end)), whole.at(slice(test))


def starting(body: nn.Module, classes: int, train: Split, validation: Split, test: Split) -> Task:
    """The task whose head is fitted to the frozen features first, so that the probe is the starting point."""
    body.eval().requires_grad_(False)
    head = fit_head(features(body, train), train.labels, features(body, validation), validation.labels, classes)
    return Task(Classifier(body, head).eval(), train, validation, test)


@torch.no_grad()
def features(body: nn.Module, split: Split, size: int = 64) -> Tensor:
    """``(n, width)``."""
    return torch.cat([body(*split.at(slice(n, n + size)).inputs) for n in range(0, len(split.labels), size)])


@cache
def wordnet(train: int, validation: int, test: int) -> Task:
    """From a gloss to its lexicographer category, one of 45."""
    encoder, tokenizer = sources.minilm(), sources.minilm_tokenizer()
    found = sources.glosses()
    random.Random(0).shuffle(found)
    encoded = ((tokenizer.encode(gloss.text).ids, gloss.category) for gloss in found)
    short = ((ids, category) for ids, category in encoded if 5 <= len(ids) <= PIECES)
    chosen = [next(short) for _ in range(train + validation + test)]
    mask = torch.tensor([[n < len(ids) for n in range(PIECES)] for ids, _ in chosen])
    tokens = torch.tensor([ids + [0] * (PIECES - len(ids)) for ids, _ in chosen])
    labels = torch.tensor([category for _, category in chosen])
    with torch.no_grad():
        below = [encoder(*pair, layers=LAYERS_BELOW) for pair in zip(tokens.split(64), mask.split(64), strict=True)]
    splits = divided((torch.cat(below), mask), labels, validation, test)
    return starting(Upper(encoder, LAYERS_BELOW), 45, *splits)


@cache
def digits(train: int, validation: int, test: int) -> Task:
    """From an image of a digit to the digit."""
    network, (images, labels) = sources.efficientnet(), sources.digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: train + validation + test]
    scaled = F.interpolate(images[order, None], size=IMAGE, mode="bilinear").expand(-1, 3, -1, -1)
    with torch.no_grad():
        below = torch.cat([network.lower(2 * part - 1, BLOCKS_BELOW) for part in scaled.split(64)])
    return starting(network.upper(BLOCKS_BELOW), 10, *divided((below,), labels[order], validation, test))


@cache
def spelling(train: int, validation: int, test: int) -> Task:
    """From a spelled word to its phonemes, token by token, among the tokens that occur in answers."""
    model, tokenizer = sources.smollm()
    shuffled, _ = phonemes.split(sources.pronunciations(), held_out=1, seed=0)
    asked = (phonemes.example(entry) for entry in shuffled)
    short = (example for example in asked if collate([example], tokenizer).tokens.shape[1] <= TOKENS)
    batch = collate([next(short) for _ in range(train + validation + test)], tokenizer)
    words = batch.labels[batch.labels != IGNORED].unique()  # ascending
    labels = torch.where(batch.labels == IGNORED, IGNORED, torch.searchsorted(words, batch.labels))
    below = torch.cat([smollm.lower(model, part, LLAMA_BELOW) for part in batch.tokens.split(64)])
    start = Classifier(smollm.Upper(model, LLAMA_BELOW), smollm.head_for(model, words))
    return Task(start.eval().requires_grad_(False), *divided((below,), labels, validation, test))


def pointwise(name: str, module: nn.Module) -> bool:
    """A convolution of 1x1, as nearly all weights of EfficientNet are."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)


def octaves(lowest: int, highest: int) -> tuple[float, ...]:
    return tuple(2.0**exponent for exponent in range(lowest, highest + 1))


HEAD_RATE = 2.0**-10
"""Of the head where A and B have any two rates."""
GLOSSES = Setting(
    wordnet,
    (3000, 300, 600),
    ("q", "k", "v", "o", "up", "down"),
    octaves(-12, -8),
    f"all-MiniLM-L6-v2 (Apache-2.0, 22.6M parameters) learns to tell the lexicographer category (45 classes) of a "
    f"WordNet gloss of at most {PIECES} word pieces. Adapters on all linear layers of the last {6 - LAYERS_BELOW} "
    f"of 6 blocks.",
    plane=(octaves(-14, -6), octaves(-12, -6)),
    methods=METHODS | FAR | SIZES | PLACES,
)
DIGITS = Setting(
    digits,
    (2500, 500, 1000),
    pointwise,
    octaves(-11, -7),
    f"EfficientNet-Lite0 (Apache-2.0, 4.7M parameters, trained on ImageNet) learns to tell handwritten digits of "
    f"MNIST (5,000 of them, scaled to {IMAGE} x {IMAGE}). Adapters on the 1x1 convolutions of the last "
    f"{16 - BLOCKS_BELOW} of 16 blocks and the one above them.",
    plane=(octaves(-12, -8), octaves(-11, -7)),
    methods=METHODS | FAR | SIZES,
)
PHONEMES = Setting(
    spelling,
    (800, 150, 250),
    ("q", "k", "v", "o", "gate", "up", "down"),
    octaves(-9, -7),
    f"SmolLM2-135M-Instruct (Apache-2.0) learns to write the phonemes of a spelled English word (CMU Pronouncing "
    f"Dictionary), among the 42 tokens that occur in answers. Question and answer have at most {TOKENS} tokens. "
    f"Adapters on all linear layers of the last {30 - LLAMA_BELOW} of 30 blocks; the head stays as it is. Accuracy is "
    f"the share of held-out words whose phonemes greedy decoding writes without a mistake.",
    batch=8,
    also=(),
    plane=(octaves(-12, -6), octaves(-9, -3)),
    methods=only(PLAIN, "LoRA+ x4", "LoRA+ x16", "LoRA+ x64", FULL),
)
TASKS: dict[str, Setting] = {
    "glosses": GLOSSES,
    "digits": DIGITS,
    "phonemes": PHONEMES,
    "phonemes, 120 steps": replace(
        PHONEMES, steps=120, plane=((), ()), methods=only(PLAIN, "LoRA+ x4", "LoRA+ x64", FULL)
    ),
}

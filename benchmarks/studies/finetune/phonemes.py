"""Words and their phonemes, from entries of the CMU Pronouncing Dictionary."""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from examples.demo.answers import Example

_ENTRY = re.compile(r"([a-z]{3,12}) ([^#\n]+)")  # further pronunciations are written "word(2)" and do not match


class Entry(NamedTuple):
    """A word and its phonemes, ``Entry("dog", "D AO1 G")``."""

    word: str
    phonemes: str


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


def example(entry: Entry) -> Example:
    """What a language model is asked, with its answer.

    The word is spelled: a tokenizer hides the letters of a word in one or two tokens.
    """
    return Example(f"The phonemes of {' '.join(entry.word)}:", entry.phonemes)

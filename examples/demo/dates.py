"""The demo's task: dates as six languages write them, and the same dates in ISO 8601."""

import datetime
import random

from babel.dates import format_date

from .answers import Example

LANGUAGES = ("de", "es", "fr", "it", "nl", "pt")
FIRST, LAST = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)


def examples(count: int, seed: int) -> list[Example]:
    """Different days of the years 1900 to 2099, each in a random language.

    A language model hardly reads its very first token (Xiao et al. 2023, arXiv:2309.17453: it serves as a place to
    look at instead). Therefore a prompt does not begin with the date.
    """
    chance = random.Random(seed)
    days = chance.sample(range(FIRST.toordinal(), LAST.toordinal() + 1), count)
    return [example(datetime.date.fromordinal(day), chance.choice(LANGUAGES)) for day in days]


def example(day: datetime.date, language: str) -> Example:
    """``In ISO format, 3 mars 1987 is`` with its answer, ``1987-03-03``."""
    return Example(f"In ISO format, {format_date(day, 'long', locale=language)} is", day.isoformat())

"""The keys of PEFT's ``rank_pattern`` and ``alpha_pattern``, compared with names in linear time.

PEFT takes each key for a regular expression, which the end of a name has to match, from a dot on. Files come from
strangers, and Python's own engine needs years for some expressions of ten characters. So keys that are names, as PEFT
and this library write them, are looked up, and other expressions are read here: characters, classes, groups, ``|``, and
repetitions of one character or class, for which a name is gone through once. Anything else is refused. A dot that is
not escaped stands for any character, in names too.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lora_plus.text import endings, parents

_NAME = re.compile(r"(\^?)((?:[^\\^$*+?{}\[\]|()]|\\[^a-zA-Z0-9])*)\$?", re.DOTALL)
"""A dotted name, anchored or not, in which characters may be escaped."""

LONGEST = 1000
"""Characters that all keys of a pattern may have which are no names."""

MOST_DOTTED = 200
"""Ways in which dots that are not escaped may lie in the names of a pattern; a name is compared in all of them."""


class _Names:
    """Values by names in which some characters may be any."""

    def __init__(self) -> None:
        self.known: dict[int, dict[tuple[int, ...], dict[str, list[tuple[int, Any]]]]] = {}
        """By length, then by where any character may stand, then by the name with dots there."""
        self.dotted = 0

    def add(self, key: str, position: int, value: Any) -> bool:
        """Enter a key; whether there was room for it."""
        characters = re.findall(r"\\?.", key, re.DOTALL)
        free = tuple(at for at, character in enumerate(characters) if character == ".")
        alike = self.known.setdefault(len(characters), {})
        self.dotted += bool(free) and free not in alike
        known = alike.setdefault(free, {}).setdefault("".join(each[-1] for each in characters), [])
        if len(known) < 2 and all(value != other for _, other in known):  # two tell that there are several
            known.append((position, value))
        return self.dotted <= MOST_DOTTED

    def find(self, name: str) -> Iterator[tuple[int, Any]]:
        """The values of the keys that are this name, with their positions."""
        for free, known in self.known.get(len(name), {}).items():
            dotted = list(name)
            for at in free:
                dotted[at] = "."
            yield from known.get("".join(dotted), ())


class Patterns:
    """What a pattern says of names; of the keys that match, the first one in the file counts.

    Args:
        pattern: values by key.
        problems: the keys that are not read are added.
    """

    def __init__(self, pattern: Mapping[str, Any], problems: list[str]) -> None:
        self._whole, self._endings = _Names(), _Names()
        self._expressions: list[tuple[int, Any, _Step]] = []
        length = 0
        for position, (key, value) in enumerate(pattern.items()):
            name = _NAME.fullmatch(key)
            if name is not None:
                if not (self._whole if name[1] else self._endings).add(name[2], position, value):
                    problems.append(f"{key!r} and others have their dots at too many places; escape the dots")
                    break
                continue
            length += len(key)
            try:
                self._expressions.append((position, value, _Parser(key).whole()))
            except ValueError as error:
                problems.append(f"{key!r} {error}")
            if length > LONGEST:
                problems.append(f"its keys that are no names have more than {LONGEST} characters; write out the names")
                break

    def values(self, name: str) -> list[Any]:
        """The values of the keys that match a name, in the order of the keys."""
        found = [*self._whole.find(name)] if self._whole.known else []
        if self._endings.known:
            found += [entry for ending in (name, *endings(name)) for entry in self._endings.find(ending)]
        if self._expressions:
            text = _Text(name)
            found += [(position, value) for position, value, step in self._expressions if text.matches(step)]
        return [value for _, value in sorted(found, key=operator.itemgetter(0))]


def expression(text: str) -> Callable[[str], bool]:
    """Whether an expression matches what is in a dotted name from its start or a dot to a dot or its end.

    Raises a ValueError where it has more than is read here.
    """
    if len(text) > LONGEST:
        raise ValueError(f"has more than {LONGEST} characters")
    step = _Parser(text).whole()
    return lambda name: any(_Text(each).matches(step) for each in (name, *parents(name)))


class _Text:
    """A name, gone through by steps from sets of positions to sets of positions; a set is an integer with its bits."""

    def __init__(self, name: str) -> None:
        self.end = 1 << len(name)
        self._characters: dict[str, int] = {}
        for position, character in enumerate(name):
            self._characters[character] = self._characters.get(character, 0) | 1 << position
        self._accepted: dict[str, int] = {}

    def matches(self, step: _Step) -> bool:
        """Whether the name, or what is behind one of its dots, matches whole."""
        return bool(step(self, 1 | self._characters.get(".", 0) << 1) & self.end)

    def accepted(self, token: str) -> int:
        """The positions of characters that an expression for one character accepts."""
        if token not in self._accepted:
            places = (where for character, where in self._characters.items() if _accepts(token, character))
            self._accepted[token] = functools.reduce(operator.or_, places, 0)
        return self._accepted[token]


_Step = Callable[[_Text, int], int]
"""From the positions at which a part of an expression may begin to those at which it may end."""


@functools.lru_cache(maxsize=2**14)
def _accepts(token: str, character: str) -> bool:
    return re.fullmatch(token, character) is not None


class _Parser:
    """Turns one regular expression into a step; raises ValueError where it has more than is read here."""

    _TOKEN = re.compile(
        r"""(?P<open>\((?:\?:)?) | (?P<close>\))(?P<optional>\?\??)? | (?P<bar>\|) | (?P<edge>[\^$])
        | (?P<one>\\[dDwWsS] | \\[^a-zA-Z0-9] | [^\\*+?{}\[\]()|^$]
                | \[\^?\]?(?:\\[dDwWsS]|\\[^a-zA-Z0-9]|[^\]\\\[])*\])
          (?:(?P<count>[*+?]|\{\d{1,2}(?:,\d{0,2})?\})\??)?""",
        re.VERBOSE | re.DOTALL,
    )
    _DEEPEST = 20

    def __init__(self, key: str) -> None:
        self.key, self.at = key, 0

    def whole(self) -> _Step:
        step = self._options(0)
        if self.at < len(self.key):
            raise ValueError("is not a regular expression")
        return step

    def _options(self, depth: int) -> _Step:
        """Alternatives, up to the end or the closing bracket, which is left."""
        options: list[list[_Step]] = [[]]
        while self.at < len(self.key):
            token = self._TOKEN.match(self.key, self.at)
            if token is None or depth > self._DEEPEST:
                raise ValueError(_REFUSED)
            if token["close"]:
                break
            self.at = token.end()
            if token["bar"]:
                options.append([])
            elif token["open"]:
                options[-1].append(self._group(depth))
            elif token["edge"]:
                options[-1].append(_EDGES[token["edge"]])
            else:
                options[-1].append(_repeated(token["one"], token["count"] or ""))
        return _either([_one_after_the_other(steps) for steps in options])

    def _group(self, depth: int) -> _Step:
        inner = self._options(depth + 1)
        token = self._TOKEN.match(self.key, self.at)
        if token is None:
            raise ValueError("is not a regular expression")
        self.at = token.end()
        return _either([inner, _one_after_the_other([])]) if token["optional"] else inner


_REFUSED = (
    "is a pattern that is not read: only characters, classes, |, groups and repetitions of one character are; "
    "write out the names"
)


_EDGES: dict[str, _Step] = {"^": lambda text, at: at & 1, "$": lambda text, at: at & text.end}


def _either(options: Sequence[_Step]) -> _Step:
    return lambda text, at: functools.reduce(operator.or_, (option(text, at) for option in options))


def _one_after_the_other(steps: Sequence[_Step]) -> _Step:
    return lambda text, at: functools.reduce(lambda positions, step: step(text, positions), steps, at)


def _repeated(token: str, count: str) -> _Step:
    """An expression for one character, so many times."""
    try:
        re.compile(token)
    except re.error:
        raise ValueError("is not a regular expression") from None
    low, _, high = {"": "1,1", "*": "0,", "+": "1,", "?": "0,1"}.get(count, count.strip("{}")).partition(",")
    least = int(low)
    most = least if "," not in count and count.startswith("{") else None if not high else int(high)

    def step(text: _Text, at: int) -> int:
        accepted = text.accepted(token)
        for _ in range(least):
            at = (at & accepted) << 1
        if most is None:
            # the sum carries each position through the accepted ones that follow it
            return (((at & accepted) + accepted) ^ accepted) | at
        for _ in range(most - least):
            at |= (at & accepted) << 1
        return at

    return step

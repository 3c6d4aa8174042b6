"""A command line that cannot be understood, and how that is told."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typer import BadParameter
from typer.core import TyperArgument, TyperCommand, TyperGroup

from lora_plus.text import printable

UsageError: type[Exception] = BadParameter.__mro__[1]
"""The error of click for all of this; some versions of typer have a copy of click inside."""


class Command(TyperCommand):
    """A command that says what belongs on its command line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click does it."""
        given = list(args)
        with _printable():
            try:
                return super().parse_args(ctx, args)
            except UsageError as error:
                message = self._missing(error, ctx, given) or _bare_number(error, given)
                if message is None:
                    raise
                raise UsageError(message, ctx) from None

    def _missing(self, error: Exception, ctx: Any, given: list[str]) -> str | None:
        """What to say of an argument that is not given: click names the one that it has no value for, not the last."""
        wanted = [each for each in self.params if isinstance(each, TyperArgument)]
        if getattr(error, "param", None) not in wanted or getattr(error, "message", None):
            return None
        names = [each.metavar or str(each.name).upper() for each in wanted]
        taken, _, _ = self.make_parser(ctx).parse_args(args=list(given))
        left = names[sum(taken.get(each.name) is not None for each in wanted) :]
        told = f"; {' and '.join(left)} {'is' if len(left) == 1 else 'are'} not given" if left != names else ""
        return f"Missing argument: give {' '.join(names)}{told}"


class Group(TyperGroup):
    """The commands together."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _printable():
            return super().parse_args(ctx, args)


@contextmanager
def _printable() -> Iterator[None]:
    """Arguments in an error, such as the names of files that a shell found, do not act on the terminal."""
    try:
        yield
    except UsageError as error:
        error.message = "\n".join(map(printable, error.message.split("\n")))  # type: ignore[attr-defined]
        raise


_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)")


def _bare_number(error: Exception, given: list[str]) -> str | None:
    """What to say of a negative number that no option is before, which click takes for an option."""
    taken = getattr(error, "option_name", None)
    bare = next((text for text in given if _NEGATIVE.fullmatch(text) and text[:2] == taken), None)
    return bare and f"{bare} is after no option; give the option again, as in --weight 1 --weight {bare}"

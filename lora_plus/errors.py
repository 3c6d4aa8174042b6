"""Errors that name what is wrong and what to write instead: all problems in one, numbers, arguments mixed up."""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn

from .text import near_misses, printable

P = ParamSpec("P")
R = TypeVar("R")


class Problems(ValueError):
    """All problems of one file or call, in one error."""

    SHOWN = 30
    LONGEST = 600
    """Characters of a line; a file can say a value of any length."""

    def __init__(self, where: object, problems: Sequence[str]) -> None:
        self.where, self.problems = where, list(problems)
        shown = [f"  {printable(shortened(line, self.LONGEST))}" for line in self.problems[: self.SHOWN]]
        if len(self.problems) > self.SHOWN:
            shown.append(f"  and {len(self.problems) - self.SHOWN} more")
        super().__init__(f"{where}:\n" + "\n".join(shown))

    def __reduce__(self) -> Any:  # one rank tells the others
        return type(self), (self.where, self.problems)


def shortened(text: str, length: int) -> str:
    """A text that is at most so long; what is cut out of its middle is counted."""
    if len(text) <= length:
        return text
    note = f"... ({len(text) - length} characters) ..."
    kept = length // 2
    return f"{text[:kept]}{note}{text[len(text) - kept :]}"


_OURS = re.compile(r"lora_plus(\.|$)|contextlib$|torch\.utils\._contextlib$")
"""Modules between a user's line and a warning: this package, and decorators that are context managers."""


def warn_user(text: str) -> None:
    """Warn, at the line outside of this package from which it was called."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _OURS.match(str(frame.f_globals.get("__name__"))):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


RANGES: dict[str, Callable[[float], bool]] = {
    "finite": lambda number: True,
    "finite and positive": lambda number: number > 0,
    "finite and at least 0": lambda number: number >= 0,
    "finite and not zero (zero would switch the adapter off)": lambda number: number != 0,
    "in [0, 1)": lambda number: 0 <= number < 1,
    "above 0 and at most 1": lambda number: 0 < number <= 1,
}
"""What numbers can be asked to be, in the words of the message. None of it holds for NaN and infinities."""


def check_number(name: str, value: Any, range: str = "finite and positive", *, tensor: bool = False) -> None:
    """Raise unless the value is a number in one of the `RANGES`; a tensor of one element only where that may be."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor) if tensor else (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or not RANGES[range](number):
        raise ValueError(f"{name} must be {range}, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raise unless the value is a positive int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")


def entry_of(setting: str, name: Any, table: Mapping[Any, R]) -> R:
    """The entry of this name in the table of what a setting can be. Raises where there is none."""
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"unknown {setting} {name!r}; choose one of {sorted(table)}")
    return table[name]


_OTHER_WORDS = {
    "adapter_name": "adapter", "bias": 'train_also="*.bias"', "dora": 'variant="dora"', "use_dora": 'variant="dora"',
    "ensure_weight_tying": 'tied="both"', "exclude_modules": "exclude", "init_lora_weights": "init",
    "is_trainable": "trainable", "learning_rate": "lr", "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_r": "r",
    "loraplus_lr_embedding": "embedding_lr", "loraplus_lr_ratio": "lr_ratio", "ratio": "lr_ratio", "rank": "r",
    "loraplus_weight_decay": "weight_decay", "modules_to_save": "train_also", "rslora": 'scaling="rslora"',
    "seed": "generator", "target_modules": "targets", "trainable_token_indices": "train_rows",
    "use_rslora": 'scaling="rslora"', "wd": "weight_decay",
}  # fmt: skip
"""What other libraries call an argument -> what it is here."""


def check_model(model: Any) -> None:
    """Raise unless it is a module."""
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}; make one" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"the model must be an nn.Module, got {got}{'; it comes first' * isinstance(model, str)}")


def check_makes_optimizers(optimizer_cls: Any, function: Callable[..., Any], keywords: Collection[str]) -> None:
    """Raise unless it can be called, and takes the keywords that a function would pass on to it."""
    own = type(optimizer_cls).__name__
    is_module = isinstance(optimizer_cls, type) and issubclass(optimizer_cls, nn.Module)
    if not callable(optimizer_cls) or is_module:
        got = repr(optimizer_cls) if is_module or isinstance(optimizer_cls, str) else f"an instance of {own}"
        raise TypeError(f"optimizer_cls must be an optimizer's class, such as torch.optim.AdamW, got {got}")
    try:
        parameters = inspect.signature(optimizer_cls).parameters
    except (TypeError, ValueError, NameError):  # there are callables that do not tell, or not without annotations
        return
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        who = f"{function.__name__} and {getattr(optimizer_cls, '__name__', own)}"
        check_keywords(who, keywords, {*parameters, *inspect.signature(function).parameters} - {"params"})


def named_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function name the right word for each keyword that it does not know, and what it takes without one."""
    parameters = inspect.signature(function).parameters
    known, bare = [*parameters], [name for name, each in parameters.items() if each.kind is not each.KEYWORD_ONLY]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        check_keywords(function.__name__, kwargs, known)
        if len(args) > len(bare):
            more = f"; write the others by name, such as {known[len(bare)]}=" if known != bare else ""
            raise TypeError(f"{function.__name__} takes {' and '.join(bare)}, got {len(args)} arguments{more}")
        return function(*args, **kwargs)

    return checked


def check_keywords(who: str, keywords: Iterable[str], known: Collection[str]) -> None:
    """Raise unless each keyword is known, naming the right words for those that are not."""
    unknown = [f"{keyword!r}{_hint(keyword, known)}" for keyword in keywords if keyword not in known]
    if unknown:
        raise TypeError(f"unexpected keyword argument of {who}: {', '.join(unknown)}")


def _hint(keyword: str, known: Collection[str]) -> str:
    ours = _OTHER_WORDS.get(keyword, "")
    return f" (did you mean {ours}?)" if ours.partition("=")[0] in known else near_misses(keyword, known)

"""The settings of one adapter over a model, as a frozen value that checks itself and can be written as JSON."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_plus.layers.adapter_tensors import check_adapter_name
from lora_plus.tensors.init import Init, check_init
from lora_plus.tensors.variant import AdapterSpec

Pattern = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]
"""Selects modules: a name, a glob, a compiled regular expression, a type, or a function of name and module."""


@dataclass(frozen=True)
class LoRAConfig:
    """The arguments of `inject_lora`, in one value: ``inject_lora(model, **vars(config))``.

    Raises:
        TypeError, ValueError: naming the setting, its value and what was expected.
    """

    targets: Pattern | Sequence[Pattern]
    """Which layers get an adapter; a list, or one pattern, or ``"all-linear"``."""
    r: int = 8
    """Rank of the update."""
    alpha: float = 16
    """Numerator of the scaling: the update is ``alpha / r * B @ A`` with the standard rule."""
    dropout: float = 0.0
    """Probability that an entry of an adapter's input is dropped in training."""
    exclude: Pattern | Sequence[Pattern] = ()
    """Which layers get none although a target matches them."""
    rank_pattern: Mapping[Any, int] | None = None
    """Rank by pattern, for layers that deviate from ``r``."""
    alpha_pattern: Mapping[Any, float] | None = None
    """Alpha by pattern, for layers that deviate from ``alpha``."""
    scaling: str = "standard"
    """``"standard"``: alpha / r; ``"rslora"``: alpha / sqrt(r) (arXiv:2312.03732)."""
    init: str | Init = "kaiming"
    """How A and B start: a name in `INITS` or `PRINCIPAL` of `lora_plus.tensors.init`, or a function of that form."""
    variant: str = "lora"
    """``"lora"``, ``"lora_fa"`` (arXiv:2308.03303), ``"dora"`` (arXiv:2402.09353), or another name in `VARIANTS`."""
    train_also: Pattern | Sequence[Pattern] = ()
    """Modules that are trained in full and saved with the adapter, such as a new head."""
    fused: Mapping[Any, Sequence[str] | Mapping[str, int]] | None = None
    """By pattern, the names of the projections that one layer computes together, with their rows if they differ."""
    layouts: Mapping[Any, str] | None = None
    """By pattern, how bare parameters are stored, as one of `LAYOUTS`."""
    dtype: torch.dtype | None = None
    """Dtype of A and B; None for float32, or the base's own where that is wider."""

    def __post_init__(self) -> None:
        for field in ("targets", "exclude", "train_also"):
            object.__setattr__(self, field, as_patterns(getattr(self, field)))
        if not self.targets:
            raise ValueError('no target given; name layers, or pass "all-linear"')
        self.spec()
        check_init(self.init)
        checks: dict[str, Callable[[Any], Any]] = {
            "rank_pattern": lambda r: self.spec(r=r),
            "alpha_pattern": lambda alpha: self.spec(alpha=alpha),
            "fused": _check_blocks,
            "layouts": _check_layout,
        }
        for field, check in checks.items():
            pattern = {} if getattr(self, field) is None else getattr(self, field)
            if not isinstance(pattern, Mapping):
                raise TypeError(f"{field} must be a mapping from pattern to value, got {pattern!r}")
            object.__setattr__(self, field, dict(pattern))
            for key, value in pattern.items():
                try:
                    check(value)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{field}[{key!r}]: {error}") from None
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {self.dtype!r}")

    def spec(self, **changes: Any) -> AdapterSpec:
        """The settings of one layer, with r or alpha changed."""
        own = {"r": self.r, "alpha": self.alpha, "dropout": self.dropout}
        return AdapterSpec(**{**own, "scaling": self.scaling, "variant": self.variant, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The config in JSON's types.

        Raises:
            ValueError: if a pattern is a type or a function, or the init is one: those cannot be written.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if callable(self.init):
            raise ValueError(f"init is a function ({self.init!r}) and cannot be written; give it a name in INITS")
        for name in ("targets", "exclude", "train_also"):
            fields[name] = [_pattern_to_json(name, pattern) for pattern in fields[name]]
        for name in _BY_PATTERN:
            fields[name] = [[_pattern_to_json(name, pattern), value] for pattern, value in fields[name].items()]
        fields["dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LoRAConfig:
        """The config that `to_dict` wrote.

        Raises:
            ValueError: naming fields that are unknown or missing, and values that are not valid.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown config fields {unknown}; known are {sorted(known)}")
        if "targets" not in fields:
            raise ValueError("the config has no 'targets'")
        values = dict(fields)
        for name in ("targets", "exclude", "train_also"):
            if name in values:
                values[name] = tuple(map(_pattern_from_json, as_patterns(values[name])))
        for name in _BY_PATTERN:
            if values.get(name) is not None:
                values[name] = {_pattern_from_json(pattern): value for pattern, value in values[name]}
        if values.get("dtype") is not None:
            values["dtype"] = getattr(torch, str(values["dtype"]), values["dtype"])
        return cls(**values)


_BY_PATTERN = ("rank_pattern", "alpha_pattern", "fused", "layouts")

LAYOUTS = ("o i -> o i", "i o -> o i", "e o i -> e o i", "e i o -> e o i")
"""How a bare parameter can be stored: (out, in) or (in, out), alone or as a stack of experts."""


def _check_layout(layout: Any) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {LAYOUTS}")


def _check_blocks(blocks: Any) -> None:
    if isinstance(blocks, str) or not isinstance(blocks, (Sequence, Mapping)):
        raise TypeError(f"expected a list of names, or a mapping from names to numbers of rows, got {blocks!r}")
    names = list(blocks)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected one name or more, each once, got {names}")
    for name in names:
        check_adapter_name(name, "a block")
    if isinstance(blocks, Mapping) and not all(
        isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in blocks.values()
    ):
        raise ValueError(f"numbers of rows must be positive integers, got {blocks!r}")


def as_patterns(patterns: Any) -> tuple[Any, ...]:
    """One pattern or several, as a tuple."""
    several = isinstance(patterns, Iterable) and not isinstance(patterns, (str, type, Mapping, nn.Module))
    return tuple(patterns) if several else (patterns,)


def _pattern_to_json(field: str, pattern: Pattern) -> str | dict[str, Any]:
    if isinstance(pattern, re.Pattern):
        return {"regex": pattern.pattern, "flags": pattern.flags}
    if isinstance(pattern, str):
        return pattern
    raise ValueError(f"{field} has {pattern!r}, which cannot be written; use names, globs or regular expressions")


def _pattern_from_json(pattern: Any) -> Pattern:
    if isinstance(pattern, Mapping):
        return re.compile(pattern["regex"], pattern.get("flags", 0))
    return pattern  # type: ignore[no-any-return]

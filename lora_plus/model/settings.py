"""What a user says of the layers to adapt, checked before the model is looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_plus.layers.adapter import check_adapter_name
from lora_plus.tensors.variant import AdapterSpec

from .patterns import Pattern, as_patterns

LAYOUTS = ("o i -> o i", "i o -> o i", "e o i -> e o i", "e i o -> e o i")
"""How a bare parameter can be stored: (out, in) or (in, out), alone or as a stack of experts."""


class Targets:
    """Which layers of a model get an adapter, and the settings of each.

    Args:
        spec: the settings of layers that no pattern excepts.
        targets, exclude, train_also, rank_pattern, alpha_pattern, fused, layouts: as in `inject_lora`.

    Raises:
        TypeError, ValueError: naming the setting, its value and what was expected.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        targets: Pattern | Sequence[Pattern],
        *,
        exclude: Pattern | Sequence[Pattern] = (),
        train_also: Pattern | Sequence[Pattern] = (),
        rank_pattern: Mapping[Any, int] | None = None,
        alpha_pattern: Mapping[Any, float] | None = None,
        fused: Mapping[Any, Sequence[str] | Mapping[str, int]] | None = None,
        layouts: Mapping[Any, str] | None = None,
    ) -> None:
        self.spec, self.targets = spec, as_patterns(targets)
        self.exclude, self.train_also = as_patterns(exclude), as_patterns(train_also)
        if not self.targets:
            raise ValueError('no target given; name layers, or pass "all-linear"')
        self.ranks = _by_pattern("rank_pattern", rank_pattern, lambda r: replace(spec, r=r))
        self.alphas = _by_pattern("alpha_pattern", alpha_pattern, lambda alpha: replace(spec, alpha=alpha))
        self.fused = _by_pattern("fused", fused, _check_blocks)
        self.layouts = _by_pattern("layouts", layouts, _check_layout)


def _by_pattern(setting: str, values: Any, check: Callable[[Any], object]) -> dict[Any, Any]:
    """A setting by pattern; each value is checked."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f"{setting} must be a mapping from pattern to value, got {values!r}")
    for pattern, value in values.items():
        try:
            check(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{setting}[{pattern!r}]: {error}") from None
    return dict(values)


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

"""Every trap of the benchmark: lora_plus is right, or refuses and says why. What PEFT does is not asserted."""

from __future__ import annotations

import re

import pytest
import torch
import trap_cases
import traps
from torch import nn
from traps import Outcome, Trap

pytestmark = pytest.mark.peers

REFUSED = {
    "weight read by others": r"\bl\b",
    "NaN in the adapter": "not finite",
    "overlapping alpha_pattern": r"'z\.q' and 'q' both match 'z\.q'",
    "misspelt target": "'nope' matches no",
    "alpha is NaN": "alpha .*nan",
    "base weight in an adapter's file": r"a\.base_layer\.weight",
    "tensor missing in an adapter's file": r"'a': lora_B\.weight is missing",
    "NaN in an adapter's file": r"'a\.lora_B' .*not finite",
}
"""Traps that leave nothing to compute, with what the error must say."""

RIGHT_OR_REFUSED = {
    "weight_norm": "weight is computed",
    "spectral_norm": "weight is computed",
    "pruned layer": "weight is computed",
}
"""Merges that may be refused, with what the error must say."""


@pytest.fixture(autouse=True, scope="module")
def with_peft() -> None:
    pytest.importorskip("peft")


@pytest.fixture(params=trap_cases.TRAPS, ids=lambda trap: trap.name)
def trap(request: pytest.FixtureRequest) -> Trap:
    return request.param


def test_lora_plus_is_right_or_refuses_with_the_reason(trap: Trap) -> None:
    outcome = traps.run(trap.ours)
    reason = REFUSED.get(trap.name) or RIGHT_OR_REFUSED.get(trap.name)
    if reason is None or (trap.name in RIGHT_OR_REFUSED and outcome.verdict == "right"):
        assert outcome.verdict == "right", outcome.detail
    else:
        assert outcome.verdict == "refused", outcome.detail
        assert re.search(reason, outcome.detail), outcome.detail


def test_peft_can_be_measured(trap: Trap) -> None:
    outcome = traps.run(trap.peft)
    assert outcome.verdict in traps.VERDICTS
    assert outcome.detail


def test_every_trap_has_a_name_of_its_own() -> None:
    names = [trap.name for trap in trap_cases.TRAPS]
    assert len(names) == len(set(names))
    assert REFUSED.keys() | RIGHT_OR_REFUSED.keys() <= set(names)


def test_the_page_has_a_row_for_every_trap() -> None:
    rows = [(trap, Outcome("right", "a | b"), Outcome("refused", "<c>")) for trap in trap_cases.TRAPS]
    table = [line for line in traps.page(rows).splitlines() if line.startswith("|")]
    assert len(table) == len(rows) + 2
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in table)


def test_an_adapter_without_effect_is_called_wrong() -> None:
    x = trap_cases.floats(4, 6)
    base = traps.built(trap_cases.LINEAR)(x)
    right = traps.explicit(trap_cases.LINEAR, {"l": {"A": trap_cases.floats(2, 6), "B": trap_cases.floats(5, 2)}})(x)
    assert traps.run(lambda: traps.judged(base, right, base)).verdict == "wrong, silently"
    assert traps.run(lambda: traps.judged(right, right, base)).verdict == "right"


def test_an_error_from_below_the_library_is_a_crash() -> None:
    outcome = traps.run(lambda: Outcome("right", str(nn.Linear(2, 2)(torch.zeros(3)))))
    assert outcome.verdict == "crashes"


def test_a_mistake_in_a_trap_is_raised() -> None:
    x = torch.zeros(2)
    with pytest.raises(AssertionError, match="the update must have an effect"):
        traps.run(lambda: traps.judged(x, x, x))

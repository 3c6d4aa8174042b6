"""The keys of PEFT's patterns match what they match in PEFT, and none of them takes long."""

from __future__ import annotations

import gc
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from files_support import finish, start
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_plus
from lora_plus.files import native
from lora_plus.files.formats import Contents
from lora_plus.files.outline import outline_of, readers_in
from lora_plus.files.peft.folder import CONFIG, WEIGHTS
from lora_plus.files.peft.folder import read as read_folder
from lora_plus.files.peft.pattern_keys import LONGEST, MOST_DOTTED, Patterns
from lora_plus.files.target import ModelTarget, Target
from lora_plus.model.tree import Tree

NAMES = [
    "q", "xq", "a.q", "a.xq", "a.q.b", "layers.0.q", "layers.1.q", "layers.10.q", "model.layers.1.q", "qq", "q-1",
    "a..q", "v+(x|y)[0]$", "blocks.0.v+(x|y)[0]$", "layers.1.q_proj", "Q", "a_1.b_2", "",
]  # fmt: skip
KEYS = [
    "q", "^q", "q$", "^q$", r"layers\.1\.q", "layers.1.q", r"^model\.layers\.1\.q", ".*q", ".*.q", "q|xq", "(q|xq)",
    ".+",
    r"layers\.(0|1)\.q", r"layers\.\d+\.q", r"layers\.\d\.q", r"layers\.[0-9]+\.q", r".*\.(q|v)_proj", "[a-z]*",
    "[^.]+",
    r"(?:model\.)?layers\.1\.q", r"layers\.1\d?\.q", r"layers\.\d{2}\.q", r"layers\.\d{1,2}\.q", r"\w{2,}", "a{1}.q",
    "",
    re.escape("v+(x|y)[0]$"), f"^{re.escape('blocks.0.v+(x|y)[0]$')}", "^a|q$", ".*?q", "(a|b|)q", r"[\d.]+", "[]q]",
    r"q\-1",
    "((a)?.)?q", "x?q", r"\S*1.q", "(^a.)?q", "q()",
    "layers.1.q.proj", "layers.1.", "^layers.1.q", "laye.s.1.q", "q.", r"a\.q.b", "..", ".", "^.",
]  # fmt: skip


def in_peft(key: str, name: str) -> bool:
    """PEFT's rule, ``peft.utils.other.get_pattern_key``."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def here(key: str, name: str) -> bool:
    problems: list[str] = []
    found = Patterns({key: 5}, problems).values(name)
    assert not problems and found in ([], [5])
    return bool(found)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_matches_the_names_that_it_matches_in_peft(key: str) -> None:
    assert {name for name in NAMES if here(key, name)} == {name for name in NAMES if in_peft(key, name)}


ONES = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\w"])
COUNTS = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{1,2}", "{1,}"])
EXPRESSIONS = st.recursive(
    st.builds(str.__add__, ONES, COUNTS),
    lambda inner: (
        st.lists(inner, max_size=3).map("".join)
        | st.lists(inner, min_size=1, max_size=3).map(lambda options: f"({'|'.join(options)})")
        | inner.map(lambda one: f"(?:{one})?")
        | inner.map(lambda one: f"^{one}")
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, database=None)
@given(key=EXPRESSIONS, name=st.text("ab.", max_size=8))
def test_any_expression_of_the_grammar_means_what_it_means_in_python(key: str, name: str) -> None:
    assert here(key, name) == in_peft(key, name)


def test_the_first_key_counts_whatever_kind_it_is() -> None:
    problems: list[str] = []
    pattern = {".*0.q": 1, "layers.0.q": 2, "^layers.1.q": 3, "q": 4, "^layers.2.q": 5, "[a-z]": 6}
    found = Patterns(pattern, problems)
    names = ["layers.0.q", "layers.1.q", "layers.2.q", "v", "xy"]
    assert not problems
    assert [found.values(name) for name in names] == [[1, 2, 4, 6], [3, 4, 6], [4, 5, 6], [6], []]
    assert Patterns({"q": 1, "^q": 1, ".*q": 1}, problems).values("q") == [1, 1, 1]


REFUSED = (
    "is a pattern that is not read: only characters, classes, |, groups and repetitions of one character are; "
    "write out the names"
)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        *((key, REFUSED) for key in ("(a+)+b", "(a|a)*b", r"(a)\1", "(?=a)a", "(?!a)q", "a**", "(?i)q", r"\bq")),
        *((key, REFUSED) for key in ("(ab){2}", "a{100}", "(?P<n>a)", "(?#x)a", "*", "(" * 30 + "a" + ")" * 30, r"\n")),
        *((key, "is not a regular expression") for key in ("q(", "q)", "(a|", "a|)", "[b-a]")),
    ],
)  # fmt: skip
def test_what_may_take_long_is_refused(key: str, reason: str) -> None:
    problems: list[str] = []
    Patterns({"q": 1, key: 2}, problems)
    assert problems == [f"{key!r} {reason}"]


def test_dots_of_names_have_so_many_places() -> None:
    keys = [("a" * first + ".").ljust(300, "a") for first in range(MOST_DOTTED + 1)]
    problems: list[str] = []
    found = Patterns(dict.fromkeys(keys[:-1], 1), problems)
    assert not problems and found.values(keys[0]) == [1]
    Patterns(dict.fromkeys(keys, 1), problems)
    assert problems == [f"{keys[-1]!r} and others have their dots at too many places; escape the dots"]


def test_keys_that_are_no_names_have_a_length_together() -> None:
    problems: list[str] = []
    Patterns({f".*{number:03}": number for number in range(LONGEST // 5)}, problems)
    assert not problems
    Patterns({f".*{number:03}": number for number in range(LONGEST // 5 + 1)}, problems)
    assert problems == ["its keys that are no names have more than 1000 characters; write out the names"]


SCRIPT = """
import sys, time, torch, lora_plus
from torch import nn
for path in sys.argv[2:]:
    started = time.process_time()
    try:
        lora_plus.load_adapter(nn.ModuleDict({sys.argv[1]: nn.Linear(2, 2)}), path)
        refused = False
    except ValueError as error:
        refused = "is not read" in str(error)
    print(refused, time.process_time() - started < 2)
"""

QUICK = {
    "(a|a)*b": "True", "(a+)+b": "True", "(([a-z])+.)+[A-Z]": "True", "(a|a)" * 40 + "b": "False",
    ".*" * 200 + "b": "False",
}  # fmt: skip
"""Expressions that take Python's engine years, and whether they are refused."""


def test_no_expression_of_a_file_hangs_the_reader(tmp_path: Path) -> None:
    name = "a" * 40
    model = lora_plus.inject_lora(nn.ModuleDict({name: nn.Linear(2, 2)}), [name], r=2)
    cases = [(field, key) for field in ("rank_pattern", "alpha_pattern") for key in QUICK]
    for number, (field, key) in enumerate(cases):
        lora_plus.save_adapter(model, tmp_path / str(number))
        config = tmp_path / str(number) / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {field: {key: 2}}))
    paths = [str(tmp_path / str(number)) for number in range(len(cases))]
    assert finish(start(SCRIPT, name, *paths)).splitlines() == [f"{QUICK[key]} True" for _, key in cases]


HOSTILE = """
import sys, lora_plus
from torch import nn
model = nn.ModuleDict({"(a+)+b": nn.Linear(2, 2), "a" * 40: nn.Linear(2, 2)})
lora_plus.inject_lora(model, ["a" * 40], r=2, train_also=["(a+)+b"])
try:
    lora_plus.save_adapter(model, sys.argv[1])
except ValueError as error:
    print("is a pattern that is not read" in str(error))
"""


def test_no_name_of_a_module_trained_in_full_hangs_the_writer(tmp_path: Path) -> None:
    assert finish(start(HOSTILE, str(tmp_path / "a"))) == "True\n"


def cost(keys: int, layers: int) -> float:
    """CPU time of asking for each layer among so many keys, the shortest of three."""
    pattern: dict[str, Any] = {f"model.layers.{number}.self_attn.q_proj": number for number in range(keys)}
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        patterns = Patterns(pattern, [])
        for number in range(layers):
            assert patterns.values(f"base.model.layers.{number}.self_attn.q_proj") == [number]
        best = min(best, time.process_time() - started)
    return best


def test_the_time_is_linear_in_the_keys() -> None:
    assert cost(20_000, 20_000) < 30 * cost(2_000, 2_000)


@pytest.mark.slow
def test_entries_are_looked_up_and_not_searched(tmp_path: Path) -> None:
    def seconds(count: int, field: str) -> float:
        model = nn.ModuleDict({f"m{number}": nn.Linear(1, 1) for number in range(count)})
        config = {"peft_type": "LORA", field: [f"absent{number}.weight" for number in range(count)]}
        target, problems = ModelTarget(Tree(model).names), list[str]()
        outline_of(target)
        readers_in(target)
        gc.disable()  # it takes as long as all that the process has, and comes only with many names
        started = time.process_time()
        read_folder({WEIGHTS: Contents({}, {}), CONFIG: config}, target, problems)
        spent = time.process_time() - started
        gc.enable()
        assert len(problems) == count
        return spent

    for field in ("target_parameters", "modules_to_save"):
        few, many = (min(seconds(count, field) for _ in range(3)) for count in (800, 8_000))
        assert many < 40 * few


def test_many_names_trained_in_full_are_counted_once() -> None:
    def seconds(count: int) -> float:
        names = [f"w{number}" for number in range(count)]
        document = {"format_version": 1, "r": 1, "alpha": 1, "scaling": "standard", "variant": "lora", "dropout": 0.0}
        text = json.dumps(
            {**document, "layers": {}, "train_also": {"head": names, **{f"bad{n}": 0 for n in range(count)}}}
        )
        tensors = {f"head.{name}": torch.ones(1) for name in names} | {f"left{n}": torch.ones(1) for n in range(count)}
        started = time.process_time()
        native.read({"": Contents(tensors, {"lora_plus": text})}, Target(), [])
        return time.process_time() - started

    assert seconds(10_000) < 40 * seconds(1_000)

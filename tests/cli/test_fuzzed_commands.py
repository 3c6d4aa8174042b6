"""Whatever is in a file, every command and every load does right or refuses, in time and without a trace.

The default run has a few cases, the slow one (``-m slow``) 2,000. A longer run, or one case again::

    LORA_PLUS_FUZZ=20000 python -m pytest -m slow tests/cli/test_fuzzed_commands.py    # the number of cases
    LORA_PLUS_FUZZ=20000:7 python -m pytest -m slow tests/cli/test_fuzzed_commands.py  # and the seed
    LORA_PLUS_FUZZ=1:7:345 python -m pytest -m slow tests/cli/test_fuzzed_commands.py  # one case, number 345 of seed 7

A case is told by its seed and number. One that fails is told with the command and what is wrong, and its files are in
pytest's temporary folder.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import file_mutations as material
import pytest
import torch
from files_support import contents, snapshot
from typer.testing import CliRunner

import lora_plus
from lora_plus.cli import app as cli
from lora_plus.errors import Problems
from lora_plus.files import adapter_state_dict
from lora_plus.files.checks import is_finite
from lora_plus.files.formats import FORMATS
from lora_plus.files.read import read_adapter
from lora_plus.files.tensor_file import DTYPES as STORED
from lora_plus.layers.kinds import DTYPES as WEIGHTS
from lora_plus.surgery.checkpoint.folder import Checkpoint
from lora_plus.surgery.measures import diff_saved
from lora_plus.surgery.methods import METHODS
from lora_plus.text import printable

resource = pytest.importorskip("resource")
if not Path("/proc/self/statm").exists():
    pytest.skip("the memory of this process cannot be told", allow_module_level=True)

SECONDS, BYTES = 20, 2**30
"""What one call may take, of processor time and of memory more than there was."""


class TooLong(BaseException):
    """A call did not end."""


@contextmanager
def bounded() -> Iterator[None]:
    """A block that may take so much time and memory."""

    def late(*_: Any) -> None:
        raise TooLong(f"no end after {SECONDS} s")

    there = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, late)
    resource.setrlimit(resource.RLIMIT_AS, (there + BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, before)


# ---- a case ----------------------------------------------------------------------------------------------------------

PLAIN = "adapter.safetensors"
NAMES = [PLAIN, PLAIN, PLAIN, "[red]x.safetensors", "a\x1b[2J\n\u202e.safetensors", "\udcff.safetensors", "a.b c"]
"""Names of the adapter's file or folder."""


class Case:
    """One command on files of which one was changed, in a folder of its own."""

    def __init__(self, seed: int, number: int, folder: Path) -> None:
        self.rng = random.Random(f"{seed}:{number}")
        self.folder = folder
        self.adapter = folder / self.rng.choice(NAMES)
        self.other, self.base, self.tuned = folder / "other.safetensors", folder / "base", folder / "tuned.safetensors"
        self.out = folder / self.rng.choice(["out.safetensors", "out", "out\x1b[2J.safetensors"])
        pick, known = self.rng.choice, material.adapters()
        self.command = pick(sorted(COMMANDS))
        readable = set(known) - ({"kohya", "diffusers"} if self.rng.random() < 0.9 else set())
        self.kind = pick(sorted(known if self.command in ("merge", "verify") else readable))
        checkpoint = pick(["single", "sharded"])
        if checkpoint == "single":
            self.base = folder / "base.safetensors"
        files = {self.adapter: known[self.kind], self.other: known["native other"]}
        files |= {self.base: material.checkpoints()[checkpoint], self.tuned: material.checkpoints()["tuned"]}
        arguments = [str(each) for each in COMMANDS[self.command](self)]
        used = [path for path in files if str(path) in arguments]
        spoiled = self.adapter if self.adapter in used and self.rng.random() < 0.7 else pick(used)
        for path, found in files.items():
            material.write(material.changed(found, self.rng) if path == spoiled else found, path)
        self.arguments = [self.command, *arguments]
        self.used = used

    def check(self) -> str:
        """Run the command; what came of it. AssertionError if that is against the law."""
        before, state = contents(self.folder), torch.get_rng_state()
        inputs = dict(before)
        with bounded():
            result = CliRunner().invoke(cli.app, self.arguments, env={"TERM": "dumb", "COLUMNS": "80"})
        text = result.output
        assert result.exit_code in (0, 1), f"status {result.exit_code}: {text}"
        assert "Traceback" not in text
        assert all(line.isprintable() for line in text.split("\n")), text
        assert torch.equal(torch.get_rng_state(), state), "the random state moved"
        after = contents(self.folder)
        if result.exit_code == 1:
            assert after == before, "a failed call left something behind"
            if self.command != "verify" or not result.stdout:
                assert result.stdout == "" and re.search(r'^(error|{"error"): ', result.stderr, re.M), text
                told = re.sub(
                    r"^{.*", lambda line: printable(json.loads(line[0]).get("error", "")), result.stderr, flags=re.M
                )
                paths = (*self.used, self.out)
                names = {printable(name) for path in paths for name in (path.name, path.stem.replace(".", "-"))}
                assert any(name in told for name in {*names, _FORMAT}), f"no file is named: {text}"
            return "refused"
        ours = {str(self.out.relative_to(self.folder))}
        assert {name: raw for name, raw in after.items() if name.split("/")[0] not in ours} == inputs
        with warnings.catch_warnings():
            self.check_output()
        return "done"

    def check_output(self) -> None:
        if self.command == "merge":
            old, new = Checkpoint(self.base), Checkpoint(self.out)
            assert {name: entry.shape for name, entry in old.tensors.items()} == {
                name: entry.shape for name, entry in new.tensors.items()
            }
            for name in (name for name, entry in new.tensors.items() if entry.dtype in STORED):
                assert is_finite(new.read(name)) or not is_finite(old.read(name)), name
        elif self.out.exists():
            warnings.simplefilter("ignore", UserWarning)  # they were told already
            options = dict(zip(self.arguments[:-1], self.arguments[1:], strict=True))
            if options.get("--to") not in ("kohya", "diffusers"):  # which are not read without the model
                try:
                    made = read_adapter(self.out)
                except Problems as error:
                    assert self.out.is_dir() and all("without the model" in line for line in error.problems), error
                    return
                if self.command == "convert":
                    found = diff_saved(read_adapter(self.adapter), made)
                    assert found.equal, found
        else:
            assert self.command in ("inspect", "diff", "verify"), "it wrote nothing"


_FORMAT = "the adapter cannot be written in"
"""Begins what a format cannot express, in which the layers are named."""


def _options(case: Case, *options: list[object]) -> list[object]:
    return [part for each in options if case.rng.random() < 0.4 for part in each]


DENSE = sorted(name for name, method in METHODS.items() if "density" in method.options)

COMMANDS: dict[str, Any] = {
    "inspect": lambda case: [case.adapter, *_options(case, ["--layers"], ["--json"])],
    "convert": lambda case: [
        case.adapter, case.out, *_options(case, ["--to", case.rng.choice(list(FORMATS))], ["--json"])
    ],
    "diff": lambda case: [*case.rng.sample([case.adapter, case.other], 2), *_options(case, ["--json"])],
    "combine": lambda case: [case.adapter, case.other, case.out, "--r", case.rng.randint(1, 4), "--method",
                             *case.rng.choice([["svd"], *([each, "--density", 0.5] for each in DENSE)])]
                            [: case.rng.choice([3, 9])],
    "resize": lambda case: [case.adapter, case.out, "--r", case.rng.randint(1, 4), *_options(case, ["--json"])],
    "merge": lambda case: [case.base, *case.rng.choice([[case.adapter], [case.adapter, case.other]]), case.out,
                           *_options(case, ["--dtype", "bfloat16"], ["--rename", "layers=layers"])],
    "verify": lambda case: [case.base, case.adapter, *_options(case, ["--json"])],
    "extract": lambda case: [*case.rng.sample([case.base, case.tuned], 2), case.out, "--r", 2,
                             *_options(case, ["--kind", "embed=Embedding"], ["--target", "layers.*"])],
}  # fmt: skip
"""What stands after each command."""


# ---- many of them ----------------------------------------------------------------------------------------------------


def chosen(count: int) -> tuple[int, int, int]:
    """How many cases, the seed, and the number of the first one."""
    given = [int(part) for part in os.environ.get("LORA_PLUS_FUZZ", "").split(":") if part]
    count, seed, first = [*given, *[count, 0, 0][len(given) :]]
    return count, seed, first


def run(count: int, seed: int, first: int, kept: Path) -> None:
    """Check cases, and tell all that fail; the files of these stay."""
    failures, outcomes = [], Counter[str]()
    for number in range(first, first + count):
        folder = Path(tempfile.mkdtemp(dir=kept, prefix=f"{seed}-{number}-"))
        case = Case(seed, number, folder)
        try:
            outcomes[case.check()] += 1
        except (Exception, TooLong) as error:
            told = "".join(traceback.format_exception_only(error)).strip()
            failures.append(f"{seed}:{number} {case.kind} {case.arguments}\n    {printable(told)[:600]}")
        else:
            shutil.rmtree(folder)
    print(f"{count} cases of seed {seed}: {dict(outcomes)}, {len(failures)} failed")
    assert not failures, f"{len(failures)} failed:\n" + "\n".join(failures[:40])


def test_a_few_commands_on_any_files(tmp_path: Path) -> None:
    run(100, 0, 0, tmp_path)


@pytest.mark.slow
def test_commands_on_any_files(tmp_path: Path) -> None:
    run(*chosen(2000), tmp_path)


def load(count: int, seed: int, first: int, folder: Path) -> None:
    """Load changed files into a model: it loads and is finite, or the model is as it was."""
    known = material.adapters()
    model = material.model()
    before = snapshot(model)
    failures = []
    for number in range(first, first + count):
        rng = random.Random(f"load {seed}:{number}")
        path = folder / str(number)
        kind = rng.choice(sorted(known))
        material.write(material.changed(known[kind], rng), path)
        state = torch.get_rng_state()
        try:
            with bounded(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                lora_plus.load_adapter(model, path)
        except (ValueError, OSError) as error:
            wrong = snapshot(model) != before and "the model was changed"
            wrong = wrong or (str(path) not in str(error) and f"no file is named: {error}")
        except (Exception, TooLong) as error:
            wrong, model = f"{type(error).__name__}: {error}", material.model()
            before = snapshot(model)
        else:
            state_dict = adapter_state_dict(model)
            wrong = not all(map(is_finite, state_dict.values())) and "values that are not finite"
            wrong = wrong or (not state_dict and "no adapter")
            model = material.model()  # draws what the next one starts from
            torch.set_rng_state(state)
            before = snapshot(model)
        wrong = wrong or (not torch.equal(torch.get_rng_state(), state) and "the random state moved")
        torch.set_rng_state(state)
        if wrong:
            failures.append(f"{seed}:{number} {kind} {path}\n    {printable(wrong)[:600]}")
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    assert not failures, f"{len(failures)} failed:\n" + "\n".join(failures[:40])


def test_a_few_loads_of_any_files(tmp_path: Path) -> None:
    load(150, 0, 0, tmp_path)


@pytest.mark.slow
def test_loads_of_any_files(tmp_path: Path) -> None:
    load(*chosen(2000), tmp_path)


def with_dtypes(dtypes: list[str], folder: Path) -> None:
    """Load each kind of file with each of its tensors in these dtypes: the file is refused, or a weight can be so."""
    for kind, files in material.adapters().items():
        weights = next(name for name in files if not name.endswith(".json"))
        for number, (dtype, raw) in enumerate(
            (each, raw) for each in dtypes for raw in material.retyped(files[weights], each)
        ):
            path = folder / f"{kind} {number}"
            material.write({**files, weights: raw}, path)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    lora_plus.load_adapter(material.model(), path)
            except ValueError as error:
                assert str(path) in str(error), (kind, dtype)
            else:
                assert STORED.get(dtype) in WEIGHTS, (kind, dtype)


def test_dtypes_that_no_weight_has_are_refused(tmp_path: Path) -> None:
    with_dtypes(["F8_E5M2", "U32"], tmp_path)


@pytest.mark.slow
def test_any_dtype_is_taken_or_refused(tmp_path: Path) -> None:
    with_dtypes(sorted(material.DTYPES), tmp_path)

"""Whatever is written in a file or in a path, a terminal shows it as text."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from test_checkpoint import save
from torch import nn
from typer.testing import CliRunner

import lora_plus
from lora_plus.cli import app as cli
from lora_plus.errors import Problems
from lora_plus.text import aligned, counted, printable

if sys.platform == "win32":
    pytest.skip("there are no pseudoterminals", allow_module_level=True)

ACTING = ["\x1b]0;owned\x07", "\x1b[2J", "\x9b2J", "\x7f", "\r", "\n", "\u2028", "\u202e", "\u2066", "\ud800", "\0"]
"""Sets the title, clears the screen (twice), control characters, separators, marks of direction, a lone surrogate."""

NAMES = ["[bold red]q", "[link=http:evil]q[/link]", "[/x]", "[red]\x1b]0;owned\x07\x1b[2J", "a\nerror: b", "\u202eq"]


def evil(targets: str | list[str] = "all-linear", seed: int = 1, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in NAMES})
    return randomise(lora_plus.inject_lora(model, targets, r=2, **options), seed) if targets else model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an adapter, another one of fewer layers, and a base; names and texts act on a terminal."""
    monkeypatch.chdir(tmp_path)
    lora_plus.save_adapter(evil(), "[b]\x1b[2J\n.safetensors", metadata={"\x1b[2Jnote": "\x1b]0;owned\x07\x1b[2J [/x]"})
    lora_plus.save_adapter(evil(train_also=[NAMES[0]], exclude=NAMES[:4]), "few.safetensors")
    base = evil("")
    save(base, tmp_path / "base.safetensors")
    Path("folder").mkdir()
    save(base, tmp_path / "folder" / "model.safetensors")
    Path("folder", "\x1b[2J.bin").touch()
    save({"other\x1b[2J.weight": torch.ones(4, 4)}, tmp_path / "other.safetensors")
    tuned = {**base.state_dict(), f"{NAMES[3]}.bias": torch.ones(4)}
    tuned[f"{NAMES[1]}.weight"] = tuned[f"{NAMES[1]}.weight"] + 1
    save(tuned, tmp_path / "tuned.safetensors")
    return tmp_path


EVIL = "[b]\x1b[2J\n.safetensors"
CALLS = {
    "inspect": ["inspect", EVIL],
    "inspect layers": ["inspect", EVIL, "--layers"],
    "trained": ["inspect", "few.safetensors"],
    "diff": ["diff", EVIL, "few.safetensors"],
    "same": ["diff", EVIL, EVIL],
    "convert": ["convert", EVIL, "out\x1b[2J[/x].safetensors"],
    "combine": ["combine", EVIL, EVIL, "out\x1b[2J", "--method", "svd", "--r", "1"],
    "resize": ["resize", EVIL, "[/x].safetensors", "--r", "1"],
    "verify": ["verify", "base.safetensors", EVIL],
    "verify other": ["verify", "other.safetensors", EVIL],
    "merge": ["merge", "base.safetensors", EVIL, "out\x1b[2J.safetensors", "--dtype", "bfloat16"],
    "merge folder": ["merge", "folder", EVIL, "out\x1b[2J"],
    "merge other": ["merge", "other.safetensors", EVIL, "out.safetensors"],
    "extract": ["extract", "base.safetensors", "tuned.safetensors", "out\x1b[2J", "--r", "2"],
    "extract other": ["extract", "other.safetensors", "tuned.safetensors", "out", "--r", "2"],
    "absent": ["inspect", "\x1b[2J\n[/x]"],
    "a checkpoint": ["inspect", "other.safetensors"],
    "too many": ["inspect", "a", "\x1b[2J[/x]", "\x9b2J"],
    "option": ["inspect", "--\x1b[2J"],
    "option of all": ["--\x1b[2J", "inspect"],
    "command": ["\x1b[2J"],
    "number": ["resize", "a", "b", "--r", "\x1b[2J[/x]"],
    "choice": ["convert", "a", "b", "--to", "\x1b[2J[/x]"],
    "pair": ["verify", "a", "b", "--rename", "\x1b[2J[/x]"],
}


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs a command where stdout and stderr are a terminal; its status, and what reached that."""

    def run(*arguments: str) -> tuple[int, str]:
        reader, writer = os.openpty()
        found: list[bytes] = []

        def read() -> None:
            try:
                while piece := os.read(reader, 4096):
                    found.append(piece)
            except OSError:  # the other end is closed
                pass

        thread = threading.Thread(target=read)
        thread.start()
        with monkeypatch.context() as changed:
            for name, value in {"TERM": "xterm-256color", "COLUMNS": "200"}.items():
                changed.setenv(name, value)
            changed.delenv("NO_COLOR", raising=False)
            stream = TextIOWrapper(os.fdopen(writer, "wb"), encoding="utf-8", write_through=True)
            changed.setattr(sys, "stdout", stream)
            changed.setattr(sys, "stderr", stream)
            changed.setattr(sys, "argv", ["lora-plus", *arguments])
            try:
                with pytest.raises(SystemExit) as stop:
                    cli.main()
            finally:
                stream.close()
                thread.join()
                os.close(reader)
        return int(stop.value.code or 0), b"".join(found).decode()

    return run


RICH = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[1A|\r")
"""What tables, bars and boxes of rich are drawn with: colours, the cursor hidden and shown, a line cleared."""


@pytest.mark.parametrize("name", CALLS)
def test_texts_of_files_and_paths_do_not_act_on_a_terminal(
    name: str, folder: Path, on_terminal: Callable[..., tuple[int, str]]
) -> None:
    status, text = on_terminal(*CALLS[name])
    assert status in (0, 1, 2), text
    assert "Traceback" not in text
    assert "\x1b[1;31m" not in text and "http:evil\x1b" not in text  # neither red nor a link
    left = RICH.sub("", text)
    assert all(line.isprintable() for line in left.split("\n")), left
    assert not any(line.startswith("error: b") for line in left.split("\n")), left


def test_names_show_as_they_are_written(folder: Path, on_terminal: Callable[..., tuple[int, str]]) -> None:
    status, text = on_terminal("inspect", EVIL, "--layers")
    assert status == 0
    for name in NAMES:
        assert printable(name) in text
    assert r"\x1b[2Jnote: \x1b]0;owned\x07\x1b[2J [/x]" in text


@pytest.mark.parametrize("name", ["inspect", "diff", "verify", "verify other", "combine", "resize", "merge folder"])
def test_json_stays_json(name: str, folder: Path, on_terminal: Callable[..., tuple[int, str]]) -> None:
    _, text = on_terminal(*CALLS[name], "--json")
    json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert all(line.isprintable() for line in RICH.sub("", text).split("\n"))


@pytest.mark.parametrize("acting", ACTING)
def test_printable_escapes_what_acts_and_leaves_the_rest(acting: str) -> None:
    assert printable(f"a {acting}é漢\\") == f"a {acting.encode('unicode_escape').decode()}é漢\\"
    assert aligned([("a", acting), ("bb", "c")])[0] == f"a   {acting.encode('unicode_escape').decode()}"
    assert str(Problems("here", [f"name {acting}"])) == f"here:\n  name {acting.encode('unicode_escape').decode()}"


def test_one_thing_and_several() -> None:
    told = [counted(number, "layer") for number in (0, 1, 2, 1234)]
    assert told == ["0 layers", "1 layer", "2 layers", "1,234 layers"]


# ---- how a process ends ----------------------------------------------------------------------------------------------


def process(*arguments: str, before: str = "", **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own, after some Python code."""
    script = (
        f"import sys; sys.argv = ['lora-plus', *sys.argv[1:]]\n{before}\nfrom lora_plus.cli.app import main\nmain()"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    return subprocess.Popen(command, text=True, **pipes)


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(each, marks=pytest.mark.slow) for each in ("latin-1", "utf-8"))]
)
def test_letters_that_the_encoding_lacks_end_nothing(encoding: str, tmp_path: Path) -> None:
    model = lora_plus.inject_lora(nn.ModuleDict({"漢": nn.Linear(4, 4)}), ["漢"], r=2)
    lora_plus.save_adapter(model, tmp_path / "é.safetensors")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    options = {"env": environment, "encoding": "utf-8" if encoding == "ascii" else encoding}  # as click takes ascii
    running = process("inspect", str(tmp_path / "é.safetensors"), "--layers", **options)
    text, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (0, "")
    assert "é.safetensors: native format" in text
    assert ("\\u6f22" if encoding == "latin-1" else "漢") in text


@pytest.mark.parametrize("options", [["--layers"], ["--json"]])
def test_a_reader_that_goes_away_ends_it_silently(options: list[str], folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    running = process("inspect", EVIL, *options, stdout=writer)
    os.close(writer)
    assert (running.communicate(timeout=60)[1], running.returncode) == ("", 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.slow
def test_a_full_disk_is_an_error(folder: Path) -> None:
    with open("/dev/full", "w") as full:
        running = process("inspect", EVIL, stdout=full)
        errors = running.communicate(timeout=60)[1]
    assert errors == "error: [Errno 28] No space left on device\n"
    assert running.returncode == 1


@pytest.mark.slow
def test_nowhere_to_write_to_is_no_error(folder: Path) -> None:
    running = process("inspect", EVIL, before="sys.stdout = sys.stderr = None")
    assert (*running.communicate(timeout=60), running.returncode) == ("", "", 0)


@pytest.mark.slow
def test_numpy_is_not_asked_for(folder: Path) -> None:
    running = process("inspect", EVIL, before="sys.modules['numpy'] = None")
    assert (running.communicate(timeout=60)[1], running.returncode) == ("", 0)


INSTEAD = """
import importlib
def failing(*_):
    {}
importlib.import_module("lora_plus.files").read_adapter = failing
"""


def test_ctrl_c_ends_it_with_130(folder: Path) -> None:
    handled = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a process in the background ignores Ctrl-C
    before = INSTEAD.format(f"import os, signal, time; {handled}; os.kill(os.getpid(), signal.SIGINT); time.sleep(30)")
    running = process("inspect", EVIL, before=before)
    assert (*running.communicate(timeout=60), running.returncode) == ("", "", 130)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Any]:
    """Calls a command in which something is raised."""

    def run(error: BaseException) -> Any:
        def fail(*_: Any) -> None:
            raise error

        with monkeypatch.context() as changed:
            changed.setattr(importlib.import_module("lora_plus.files"), "read_adapter", fail)
            return CliRunner().invoke(cli.app, ["inspect", "a"])

    return run


def test_a_defect_says_that_it_is_one(failing: Callable[[BaseException], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_PLUS_TRACEBACK", raising=False)
    result = failing(TypeError("\x1b[2J\nwrote a"))
    assert (result.exit_code, result.stdout) == (70, "")
    assert result.stderr.split("\n") == [
        r"error: unexpected TypeError: \x1b[2J",
        "note: this is a defect of lora-plus; with LORA_PLUS_TRACEBACK=1 in the environment it shows where",
        "",
    ]
    monkeypatch.setenv("LORA_PLUS_TRACEBACK", "1")
    shown = failing(TypeError("\x1b[2J")).stderr
    assert "Traceback (most recent call last)" in shown and ", in inspect" in shown and "\x1b" not in shown


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (MemoryError(), 1, "error: there is not enough memory\n"),
        (OSError("o"), 1, "error: o\n"),
        (ValueError("v"), 1, "error: v\n"),
        (ImportError("i"), 1, "error: i\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(errno.EPIPE, "gone"), 1, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_each_error_has_its_status(
    error: BaseException, status: int, text: str, failing: Callable[[BaseException], Any]
) -> None:
    result = failing(error)
    assert (result.exit_code, result.stdout, result.stderr) == (status, "", text)

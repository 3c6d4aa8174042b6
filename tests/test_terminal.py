"""Whatever is written in a file or in a path, a terminal shows it as text."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from test_checkpoint import save
from torch import nn

import lora_plus
from lora_plus import cli
from lora_plus.formats.adapter import Problems
from lora_plus.text_table import aligned, counted, printable

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

"""The code on the documentation's pages runs as it stands, and the reference has every public name."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from doc_blocks import run_blocks
from drawn import drawn, texts

import lora_plus
import lora_plus.model  # what enters itself in tables does so before the entries of a page are taken out again
from lora_plus.tensors.variant import VARIANTS

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if "```python" in page.read_text())


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated", "ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with mock.patch.dict(VARIANTS):  # a page enters one of its own
        run_blocks(page, with_packages=False)


def test_the_reference_has_every_public_name_once() -> None:
    named = re.findall(r"^::: lora_plus\.(\w+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(name for name in lora_plus.__all__ if name != "__version__")


WIDTH = 88
"""Characters that a line of code has at most on a page: a longer one is cut off at the right."""


@pytest.mark.parametrize("page", [*DOCS.glob("*.md")], ids=lambda page: page.stem)
def test_code_fits_its_column(page: Path) -> None:
    code = re.findall(r"^```py(?:thon)?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert [line for block in code for line in block.splitlines() if len(line) > WIDTH] == []


def test_the_menu_has_every_page() -> None:
    menu = re.findall(r": ([\w-]+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(menu) == sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("name", ["sweep", "gauge", "adapter"])
def test_a_picture_shows_its_saved_run(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import pictures

    runs = json.loads((DOCS.parent / "benchmarks" / "results" / "pictures.json").read_text())
    figure = drawn(pictures.RUNS[name], runs[name], into=tmp_path)
    words = figure.get_suptitle().splitlines()
    for panel in figure.axes:
        words += [*panel.get_title(loc="left").splitlines(), panel.get_xlabel(), panel.get_ylabel(), *texts(panel)]
    svg = (DOCS / "pictures" / f"{name}.svg").read_text()
    shown = map(html.unescape, re.findall(r">([^<>]*)</text>", svg))
    assert len(words) > 10 and set(words) - {""} <= set(shown)

"""The code on a documentation page, and which optional packages it needs."""

from __future__ import annotations

import re
from pathlib import Path

_BLOCK = re.compile(r"(?:<!-- needs (\w+) -->\n)?```python\n(.*?)```", re.DOTALL)


def needed_packages(page: Path) -> list[str]:
    """The packages that comments above blocks name, as ``<!-- needs lightning -->`` does."""
    return list(dict.fromkeys(package for package, _ in _BLOCK.findall(page.read_text()) if package))


def run_blocks(page: Path, *, with_packages: bool) -> None:
    """Run the blocks of a page in one namespace: each goes on from those above it."""
    names: dict[str, object] = {"__name__": page.stem}
    for package, block in _BLOCK.findall(page.read_text()):
        if with_packages or not package:
            exec(compile(block, page.name, "exec"), names)


def block_under(page: Path, heading: str) -> str:
    """The first block under a heading of a page."""
    found = _BLOCK.search(page.read_text().split(f"\n## {heading}\n")[1])
    assert found is not None
    return found[2]

"""What the tests on distributed engines share: two processes, and a mark by which they are run apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import two_processes as two_processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engines)


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Where the mark is left out the files are not read at all, for they import packages that take seconds."""
    return True if "not engines" in config.option.markexpr else None

"""What is at a path, and whether a file is still the one that it was."""

from __future__ import annotations

import os
from pathlib import Path

State = tuple[int, int, int, int]


def state_of(file: Path | int) -> State:
    """What changes when a file is replaced or written to: device, number, size and time of the last change.

    Args:
        file: its path, or a descriptor of it.
    """
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

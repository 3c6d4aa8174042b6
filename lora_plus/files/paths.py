"""What is at a path, and whether a file is still the one that it was."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader, FileIO
from pathlib import Path


def file_state(file: Path | int) -> tuple[int, int, int, int]:
    """What changes when a file, by its path or a descriptor, is replaced or written to; its size comes first."""
    found = os.stat(file)
    return found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns


def irregular(path: Path) -> str | None:
    """What is at a path, such as ``"a FIFO"``; None for a regular file, a link to one, and for nothing.

    Opening anything else may wait for ever, and replacing it takes it away from whoever uses it.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return "a loop of links"
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BufferedReader:
    """A file, open to read from; an OSError for anything else, such as a pipe, on which a reader would wait."""
    if (what := irregular(path)) is not None:
        raise OSError(f"{str(path)!r} is {what}, not a regular file")
    return BufferedReader(FileIO(path, "r"), 2**20)


PathLike = str | os.PathLike[str]
"""The path of a file or of a folder."""


def stated(path: PathLike) -> Path:
    """A path that a user gave; a ValueError if it is empty, which would be the current folder."""
    if not os.fspath(path):
        raise ValueError("the path is empty; give the name of a file or folder")
    return Path(path)

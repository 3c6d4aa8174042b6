"""Writing files whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .paths import irregular

if sys.platform != "win32":
    import fcntl


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Temporary paths for files of one folder, which take the places of ``paths`` when the block ends well.

    What was written is on the disk before a name changes, so a crash leaves the old file or the new one, whole. Of
    several files the last is the one without which the others are not read: where it changes, it is out of the way
    until the others are in place, so a crash between two renames leaves no mixture of old and new that could be read.
    After an interruption there the renames are taken back or finished; after a kill the next run does that. A file that
    is replaced keeps its permissions.

    Raises:
        OSError: if one of the paths is neither that of a regular file nor free; it names the path, and what is there.
    """
    last = paths[-1]
    _check_replaceable(paths)

    def settle(folder: Path) -> None:
        """Take back the renames of a run that was interrupted among them, or finish them."""
        temporaries, aside = [folder / path.name for path in paths], folder / _ASIDE
        if os.path.lexists(last):
            return
        if temporaries[0].exists() and aside.exists():
            os.replace(aside, last)
        elif not temporaries[0].exists():
            for path, temporary in zip(paths, temporaries, strict=True):
                if temporary.exists():
                    os.replace(temporary, path)

    with workspace(last, settle) as folder:
        temporaries = [folder / path.name for path in paths]
        for temporary in temporaries:
            temporary.touch()
        usual = temporaries[0].stat().st_mode
        modes = [path.stat().st_mode if path.exists() else usual for path in paths]
        yield temporaries
        for temporary, mode in zip(temporaries, modes, strict=True):
            flush(temporary)
            temporary.chmod(stat.S_IMODE(mode))
        with _locked(last.parent, wait=True):  # or the files of two runs at the same time could be mixed
            if len(paths) > 1:
                (folder / _RENAMING).touch()
                if last.exists() and last.read_bytes() != temporaries[-1].read_bytes():
                    os.replace(last, folder / _ASIDE)
            for path, temporary in zip(paths, temporaries, strict=True):
                os.replace(temporary, path)
            (folder / _RENAMING).unlink(missing_ok=True)
        flush(last.parent)


_RENAMING, _ASIDE = ".renaming", ".aside"
"""In a workspace, the mark that its files are being renamed, and the old last file while it is out of the way."""


def _check_replaceable(paths: Sequence[Path]) -> None:
    folder = paths[-1].parent
    if os.path.lexists(folder) and not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is {irregular(folder) or 'a file'}, not a folder; give another name")
    for path in paths:
        if (what := irregular(path)) is not None:
            raise OSError(f"{str(path)!r} is {what}, and only regular files are replaced; give another name")


@contextmanager
def workspace(path: Path, settle: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A hidden folder beside a path, for what is to take its place; it is removed at the end.

    What killed runs left there is removed first. Where a run was interrupted among its renames, ``settle`` is called
    with its folder before that is removed; if it fails, the folder stays. Runs that still go on, such as other ranks
    that save to the same path, hold a lock on their folders. Where the file system has no locks, leftovers stay. Some
    have locks that other machines do not see, so what is left of runs on other machines stays for a day.

    Raises:
        OSError: if the folder or something in it cannot be written; it names a path.
    """
    parent = path.parent
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    # systems allow names of 255 bytes, or less
    name = path.name if len(os.fsencode(path.name)) <= 64 else _digest(path.name, 32)
    host = _digest(platform.node(), 8)
    leftover = re.compile(rf"\.{re.escape(name)}\.([0-9a-f]{{8}})[0-9a-f]{{24}}\.tmp")
    folder = parent / f".{name}.{host}{uuid.uuid4().hex[8:]}.tmp"

    def settled(folder: Path) -> None:
        if settle is not None and (folder / _RENAMING).exists():
            settle(folder)

    def end() -> None:
        with suppress(OSError):
            if (folder / _RENAMING).exists():
                with _locked(parent, wait=True):
                    settled(folder)
            shutil.rmtree(folder, ignore_errors=True)

    with naming(path, folder), ExitStack() as stack:
        stack.enter_context(_emptied_after_errors(missing))
        parent.mkdir(parents=True, exist_ok=True)
        # the lock of the parent keeps others from taking the folder for a leftover before it is locked itself
        with _locked(parent, wait=True) as held:
            for found in parent.iterdir() if held else ():
                match = leftover.fullmatch(found.name)
                if match and found.is_dir():
                    # its own run may just have removed it, and that of another user cannot be opened
                    with suppress(OSError), _locked(found, wait=False) as dead:
                        if dead and (match[1] == host or time.time() - found.stat().st_mtime > _DAY):
                            settled(found)
                            shutil.rmtree(found, ignore_errors=True)
            folder.mkdir()
            stack.callback(end)
            stack.enter_context(_locked(folder, wait=True))
        yield folder


def _digest(text: str, length: int) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:length]


_DAY = 24 * 60 * 60


@contextmanager
def _emptied_after_errors(folders: list[Path]) -> Iterator[None]:
    """Remove folders, the innermost first, as far as they are empty, if the block fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in folders:
                folder.rmdir()
        raise


def is_free(path: Path) -> bool:
    """Whether nothing is at a path, or an empty folder."""
    if path.is_dir() and not path.is_symlink():
        return not any(path.iterdir())
    return not os.path.lexists(path)


def publish(made: Path, path: Path) -> None:
    """Give a whole file or folder its name, which `is_free`; a FileExistsError where something appeared there."""
    try:
        if made.is_dir():
            if path.is_dir() and os.name != "posix":
                path.rmdir()  # elsewhere renaming replaces an empty folder, and never one that is not empty
            os.rename(made, path)
        else:
            _rename_file(made, path)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) and os.path.lexists(path):
            raise FileExistsError(
                f"{str(path)!r} appeared meanwhile and was left as it is; give another name"
            ) from error
        raise
    flush(path.parent)


def _rename_file(made: Path, path: Path) -> None:
    """Rename a file, but not onto another one, as renaming does on POSIX systems."""
    if os.name != "posix":
        os.rename(made, path)
        return
    try:
        os.link(made, path)
    except FileExistsError:
        raise
    except OSError:  # no links here
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(made, path)
        except BaseException:
            path.unlink()
            raise


@contextmanager
def naming(path: object, hidden: Path | None = None) -> Iterator[None]:
    """Errors of the file system that name no path, or one inside ``hidden``, get this one."""
    try:
        yield
    except OSError as error:
        unknown = error.filename is None or (hidden is not None and str(error.filename).startswith(str(hidden)))
        if error.errno is not None and unknown:  # else its text is already whole
            error.filename = str(path)
            del error.filename2
        raise


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this holds the lock of a folder, which ends with the block or with the process."""
    if sys.platform == "win32":
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError:  # another process holds it, or there are no locks here
            held = False
        yield held
    finally:
        os.close(handle)


def flush(path: Path) -> None:
    """Have a file's contents, or the names in a folder, on the disk; folders can be opened on POSIX systems only."""
    folder = path.is_dir()
    if folder and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows flushes only what is open for writing
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

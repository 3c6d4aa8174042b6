"""A file is written whole or not at all, whatever interrupts it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from files_support import (
    PATHS,
    TOKENS,
    adapted_net,
    assert_same_tensors,
    contents,
    finish,
    net,
    refused,
    settings_of,
    start,
)
from torch import Tensor

import lora_plus
from lora_plus.files import adapter_state_dict, tensor_file
from lora_plus.files import save as saving
from lora_plus.model import adapter_names
from lora_plus.surgery import extract_checkpoint


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o027])
@pytest.mark.parametrize("format", PATHS)
def test_files_have_the_permissions_of_any_new_file(format: str, umask: int, tmp_path: Path) -> None:
    model, before = adapted_net(), os.umask(umask)
    try:
        for _ in range(2):
            lora_plus.save_adapter(model, tmp_path / PATHS[format])
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("format", PATHS)
def test_a_file_that_is_replaced_keeps_its_permissions(format: str, tmp_path: Path) -> None:
    lora_plus.save_adapter(adapted_net(1), tmp_path / PATHS[format])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    modes = dict(zip(sorted(files), (0o600, 0o640), strict=False))
    for path, mode in modes.items():
        path.chmod(mode)
    before = contents(tmp_path)
    lora_plus.save_adapter(adapted_net(2, alpha=4), tmp_path / PATHS[format])
    assert all(data != before[name] for name, data in contents(tmp_path).items())
    assert {path: path.stat().st_mode & 0o777 for path in files} == modes


# ---- what is no regular file -----------------------------------------------------------------------------------------


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # sockets have short names


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this user may make no devices")


def make_loop(path: Path) -> None:
    path.with_suffix(".other").symlink_to(path)
    path.symlink_to(path.with_suffix(".other"))


IRREGULAR = {
    "a FIFO": os.mkfifo, "a socket": make_socket, "a device": make_device, "a loop of links": make_loop,
    "a folder": Path.mkdir,
}  # fmt: skip


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Of everything below a folder: what it is, and its number."""
    return {str(path): (path.lstat().st_mode, path.lstat().st_ino) for path in folder.rglob("*")}


@pytest.mark.skipif(os.name != "posix", reason="makes FIFOs and devices")
@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("name", ["a.safetensors", "a/adapter_model.safetensors", "a/adapter_config.json"])
@pytest.mark.parametrize("what", IRREGULAR)
def test_what_is_no_regular_file_is_neither_replaced_nor_opened(
    what: str, name: str, link: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if path.parent != tmp_path:
        lora_plus.save_adapter(adapted_net(), path.parent)
        path.unlink()
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "target" if link else path
    IRREGULAR[what](target)
    if link:
        path.symlink_to(target)
    before = state(tmp_path)
    whole = path if path.parent == tmp_path else path.parent
    with pytest.raises(OSError, match=f"is {what}, and only regular files are replaced; give another name") as error:
        lora_plus.save_adapter(adapted_net(2, alpha=4), whole)
    named = target if whole == path and what != "a loop of links" else path
    assert str(named) in str(error.value) or what == "a loop of links"
    assert str(tmp_path) in str(error.value)
    if whole != path or what not in ("a folder", "a loop of links"):
        assert refused(net(), whole) in (
            [f"{path.name} is {what}, not a regular file"], [f"the folder has no {path.name}"],
        )  # fmt: skip
    assert state(tmp_path) == before


def test_an_empty_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora_plus.save_adapter(adapted_net(), tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    calls: list[Callable[[], object]] = [
        lambda: lora_plus.save_adapter(adapted_net(2), ""),
        lambda: lora_plus.export_adapter(adapted_net(2), "", for_="peft"),
        lambda: lora_plus.load_adapter(net(), ""),
        lambda: lora_plus.merge_checkpoint("", "", "x"),
        lambda: extract_checkpoint("a", "b", "", r=1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="the path is empty"):
            call()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("size", [217, 255])
def test_a_name_may_be_as_long_as_the_system_allows(size: int, tmp_path: Path) -> None:
    path = tmp_path / f"{'n' * (size - 12)}.safetensors"
    for seed in (1, 2):
        lora_plus.save_adapter(adapted_net(seed), path)
    lora_plus.load_adapter(net(), path)
    assert list(tmp_path.iterdir()) == [path]


def test_texts_end_their_lines_the_same_way_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "linesep", "\r\n")
    lora_plus.save_adapter(adapted_net(), tmp_path / "a")
    assert b"\r" not in (tmp_path / "a" / "adapter_config.json").read_bytes()


def test_saving_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    target, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    lora_plus.save_adapter(adapted_net(1), target)
    link.symlink_to(target)
    model = adapted_net(2)
    lora_plus.save_adapter(model, link)
    assert link.is_symlink()
    assert_same_tensors(adapter_state_dict(lora_plus.load_adapter(net(), target)), adapter_state_dict(model))


class Interrupted(Exception):
    """What the tests raise in the middle of a save."""


def fail(*args: object, **kwargs: object) -> None:
    raise Interrupted


def half_written(path: Path, tensors: object, metadata: object) -> None:
    path.write_bytes(b"half a file")
    raise Interrupted


INTERRUPTIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "while writing tensors": lambda patch: patch.setattr(saving, "write_tensors", half_written),
    "before the disk has it": lambda patch: patch.setattr(os, "fsync", fail),
    "at the renaming": lambda patch: patch.setattr(os, "replace", fail),
    "while writing texts": lambda patch: patch.setattr(Path, "write_text", fail),
}


@pytest.mark.parametrize("alpha", [3, 4])
@pytest.mark.parametrize("moment", INTERRUPTIONS)
@pytest.mark.parametrize("format", PATHS)
def test_an_interrupted_save_leaves_the_old_files_and_nothing_else(
    format: str, moment: str, alpha: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if format == "native" and moment == "while writing texts":
        pytest.skip("the native format is one file of tensors")
    path = tmp_path / PATHS[format]
    lora_plus.save_adapter(adapted_net(1), path)
    before = contents(tmp_path)
    other = adapted_net(2, alpha=alpha)
    INTERRUPTIONS[moment](monkeypatch)
    with pytest.raises(Interrupted):
        lora_plus.save_adapter(other, path)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    lora_plus.save_adapter(other, path)
    assert contents(tmp_path) != before
    assert len(contents(tmp_path)) == len(before)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_peft_folder_never_mixes_old_and_new(renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after any number of renames: the old adapter, the new one, or a folder that is refused."""
    old, new, path = adapted_net(1, alpha=3), adapted_net(2, alpha=4), tmp_path / "adapter"
    lora_plus.save_adapter(old, path)
    before = contents(path)
    left, rename = renames, os.replace

    def replace(source: Any, target: Any) -> None:
        nonlocal left
        if left == 0 and not (tmp_path / "killed").exists():
            shutil.copytree(path, tmp_path / "killed")
            raise Interrupted
        left -= 1  # the renames after that one put things back
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Interrupted):
        lora_plus.save_adapter(new, path)
    monkeypatch.undo()
    lora_plus.save_adapter(new, tmp_path / "new")
    # an error, unlike a kill, leaves time to take the renames back or to finish them
    assert contents(path) == (before if renames < 2 else contents(tmp_path / "new"))
    for folder in (path, tmp_path / "killed"):
        model = net()
        try:
            lora_plus.load_adapter(model, folder)
        except ValueError as error:
            assert "the folder has no adapter_config.json" in str(error)
        else:
            wanted = old if settings_of(model)["proj"]["alpha"] == 3 else new
            torch.testing.assert_close(model(TOKENS), wanted(TOKENS))


@pytest.mark.parametrize("alpha", [3, 4])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("format", PATHS)
def test_ctrl_c_at_any_line_leaves_the_old_files_or_the_new_ones(
    format: str, there: bool, alpha: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # which takes long
    old, new, path = adapted_net(1, alpha=3), adapted_net(2, alpha=alpha), tmp_path / "place" / PATHS[format]
    (tmp_path / "old").mkdir()
    if there:
        lora_plus.save_adapter(old, tmp_path / "old" / path.name)
    lora_plus.save_adapter(new, tmp_path / "new" / path.name)
    states = [contents(tmp_path / "old"), contents(tmp_path / "new")]
    found: list[int] = []

    def save() -> None:
        lora_plus.save_adapter(new, path)

    shutil.copytree(tmp_path / "old", path.parent)
    while interrupted_at(len(found), save):
        seen = {name: data for name, data in contents(path.parent).items() if ".tmp" not in name}
        found.append(states.index(seen))
        shutil.rmtree(path.parent)
        shutil.copytree(tmp_path / "old", path.parent)
    assert found == sorted(found)
    assert set(found) == {0, 1}


def interrupted_at(line: int, work: Callable[[], object]) -> bool:
    """Whether a work got as far as this line, counted among those of `atomic_files`, where Ctrl-C is pressed."""
    left = line

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith("files/atomic.py"):
            return None
        if event == "line":
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("renames", [1, 2])
def test_what_a_killed_save_took_out_of_the_way_is_put_back_by_the_next_one_that_fails(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, path = adapted_net(1, alpha=3), adapted_net(2, alpha=4), tmp_path / "place" / "adapter"
    lora_plus.save_adapter(old, path)
    lora_plus.save_adapter(new, tmp_path / "new")
    before, left, rename = contents(path), renames, os.replace

    def killed(source: Any, target: Any) -> None:
        nonlocal left
        if left == 0:
            shutil.copytree(path, tmp_path / "killed")
        left -= 1
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    lora_plus.save_adapter(new, path)
    monkeypatch.undo()
    assert "adapter_config.json" not in contents(tmp_path / "killed")
    monkeypatch.setattr(saving, "write_tensors", fail)
    with pytest.raises(Interrupted):
        lora_plus.save_adapter(adapted_net(3, alpha=5), tmp_path / "killed")
    assert contents(tmp_path / "killed") == (before if renames == 1 else contents(tmp_path / "new"))


@pytest.mark.parametrize("format", PATHS)
@pytest.mark.parametrize("function", ["mkdir", "replace", "fsync", "chmod"])
def test_an_error_names_the_path_and_no_temporary_one(
    function: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / PATHS[format], getattr(os, function)

    def denied(*arguments: Any, **keywords: Any) -> Any:
        paths = [str(each) for each in arguments if ".tmp" in str(each)]
        if paths or function == "fsync":
            raise OSError(errno.EACCES, "Permission denied", *paths[:1])
        return real(*arguments, **keywords)

    monkeypatch.setattr(os, function, denied)
    if hasattr(path, "_accessor"):  # by which Python 3.10 calls what os had when it was imported
        monkeypatch.setattr(path._accessor, function, denied, raising=False)
    with pytest.raises(PermissionError) as error:
        lora_plus.save_adapter(adapted_net(), path)
    named = path if format == "native" else path / "adapter_config.json"
    assert str(error.value) == f"[Errno 13] Permission denied: {str(named)!r}"


@pytest.mark.parametrize("format", PATHS)
def test_a_folder_that_cannot_be_written_is_an_error_and_changes_nothing(format: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for name in ("file" if format == "peft" else f"file/{PATHS[format]}", f"file/more/{PATHS[format]}"):
        with pytest.raises(NotADirectoryError, match=str(tmp_path / "file")):
            lora_plus.save_adapter(adapted_net(), tmp_path / name, format=format)
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("format", PATHS)
def test_a_read_only_folder_is_an_error_and_keeps_the_old_file(format: str, tmp_path: Path) -> None:
    path = tmp_path / PATHS[format]
    lora_plus.save_adapter(adapted_net(1), path)
    before, folder = contents(tmp_path), tmp_path if format == "native" else path
    folder.chmod(0o500)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write anywhere")
        with pytest.raises(PermissionError):
            lora_plus.save_adapter(adapted_net(2), path)
    finally:
        folder.chmod(0o700)
    assert contents(tmp_path) == before


DISK_FULL = """
import resource, signal, sys, torch, lora_plus
from torch import Tensor, nn
def save(seed, size):
    torch.manual_seed(seed)
    model = lora_plus.inject_lora(nn.Sequential(nn.Linear(size, size)), ["0"], r=4)
    torch.nn.init.normal_(model[0].lora_B["default"])
    for path in ("adapter.safetensors", "adapter"):
        try:
            lora_plus.save_adapter(model, sys.argv[1] + "/" + path)
        except Exception as error:
            print(path, type(error).__name__, error)
save(0, 64)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import pathlib
kept = {p: p.read_bytes() for p in pathlib.Path(sys.argv[1]).rglob("*") if p.is_file()}
save(1, 64)
assert kept == {p: p.read_bytes() for p in pathlib.Path(sys.argv[1]).rglob("*") if p.is_file()}
"""


@pytest.mark.skipif(os.name != "posix", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_is_an_error_and_keeps_the_old_files(tmp_path: Path) -> None:
    errors = finish(start(DISK_FULL, str(tmp_path))).splitlines()
    assert [line.split()[:2] for line in errors] == [["adapter.safetensors", "OSError"], ["adapter", "OSError"]]
    for line, name in zip(errors, ("adapter.safetensors", "adapter/adapter_config.json"), strict=True):
        assert line.endswith(f"[Errno 27] File too large: {str(tmp_path / name)!r}")


def read_file(path: Path) -> dict[str, Tensor]:
    unread, _ = tensor_file.open_safetensors(path, [])
    return {name: tensor_file.read(tensor) for name, tensor in unread.items()}


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2)])
def test_a_file_that_is_replaced_while_it_is_read_is_read_as_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]
) -> None:
    files = [tmp_path / f"{r}.safetensors" for r in sizes]
    for r, file in zip(sizes, files, strict=True):
        lora_plus.save_adapter(lora_plus.inject_lora(net(), ["proj"], r=r), file)
    loads = json.loads

    def replaced(text: Any) -> Any:
        if files[1].exists():
            os.replace(files[1], files[0])
        return loads(text)

    monkeypatch.setattr(json, "loads", replaced)
    tensors = read_file(files[0])
    expected = adapter_state_dict(lora_plus.load_adapter(net(), files[0]))
    assert_same_tensors(tensors, expected)


def test_a_file_that_is_written_to_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, loads, contents = tmp_path / "a.safetensors", json.loads, []
    lora_plus.save_adapter(adapted_net(1), path)
    contents.append(path.read_bytes())
    lora_plus.save_adapter(adapted_net(2), path)
    assert len(path.read_bytes()) == len(contents[0])

    def written_to(text: Any) -> Any:
        found = loads(text)
        if contents:
            path.write_bytes(contents.pop())
            os.utime(path, ns=(0, 0))  # clocks of file systems are coarse
        return found

    monkeypatch.setattr(json, "loads", written_to)
    tensors = read_file(path)
    monkeypatch.undo()
    assert not contents
    assert_same_tensors(tensors, read_file(path))


def test_a_file_that_changes_each_time_it_is_read_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, loads, model = tmp_path / "a.safetensors", json.loads, net()
    lora_plus.save_adapter(adapted_net(), path)
    reads = 0

    def changing(text: Any) -> Any:
        nonlocal reads
        reads += 1
        assert reads < 1000
        os.utime(path, ns=(0, reads))
        return loads(text)

    monkeypatch.setattr(json, "loads", changing)
    with pytest.raises(ValueError, match=r"a\.safetensors' was replaced or written to while it was read, 10 times"):
        lora_plus.load_adapter(model, path)
    assert not adapter_names(model)

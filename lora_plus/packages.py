"""Packages that parts of the library need besides: from which version on, and what installs them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec

PACKAGES = {
    "accelerate": ("1.10", "transformers"),
    "deepspeed": ("0.17", "deepspeed"),
    "lightning": ("2.6", "lightning"),
    "matplotlib": ("3.8", "plot"),
    "peft": ("0.15", "peft"),
    "rich": ("13", "cli"),
    "transformers": ("5.3", "transformers"),
    "typer": ("0.19", "cli"),
}
"""Package -> the oldest version that serves, and the extra of ``lora-plus`` that installs it."""


def lacking(who: str, *packages: str) -> str | None:
    """What to install before ``who`` can be used; None if all of these packages are there and new enough."""
    for package in packages:
        oldest, extra = PACKAGES[package]
        found = _version(package)
        if found is None or _numbers(found) < _numbers(oldest):
            state = "is not installed" if found is None else f"is {found} here"
            return f"{who} needs {package} >= {oldest}, which {state}; run: pip install 'lora-plus[{extra}]'"
    return None


@contextmanager
def needed(who: str, *packages: str) -> Iterator[None]:
    """Import these packages in this block; before it begins, they are known to be there and new enough.

    Raises:
        ImportError: if one is not installed, or is too old; it says what to install.
    """
    if (problem := lacking(who, *packages)) is not None:
        raise ImportError(problem)
    yield


def check_methods(who: str, owner: type, names: Collection[str]) -> None:
    """Raise if a class of another package has no longer the methods that a class of ``who`` overrides.

    Raises:
        ImportError: if it lacks one.
    """
    gone = [name for name in names if not hasattr(owner, name)]
    if gone:
        package = owner.__module__.partition(".")[0]
        raise ImportError(
            f"{who} overrides {', '.join(gone)} of {owner.__name__}, which {package} {_version(package)} has not; "
            f"install an earlier release, from {PACKAGES[package][0]} on"
        )


def _version(package: str) -> str | None:
    """The version of a package; that of one that was not installed by pip is not known, and taken for new enough."""
    if find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return PACKAGES[package][0]


def _numbers(version: str) -> list[int]:
    """``"5.3.0rc1"`` as ``[5, 3, 0]``."""
    release = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in release[0].split(".")] if release else []

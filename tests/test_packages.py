"""Optional packages: one form of message says which is missing or too old, and what installs it."""

from __future__ import annotations

import importlib
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from torch import nn

from lora_plus.engines.peft import peft_roles
from lora_plus.packages import PACKAGES, check_methods, lacking, needed

ROOT = Path(__file__).parent.parent

PARTS = {
    "lora_plus.engines.transformers": ["transformers", "accelerate"],
    "lora_plus.engines.deepspeed": ["deepspeed"],
    "lora_plus.engines.lightning": ["lightning"],
}
"""Module -> the packages that it cannot be imported without."""


@pytest.mark.parametrize(("part", "package"), [(part, package) for part in PARTS for package in PARTS[part]])
def test_a_part_without_its_package_says_what_to_install(
    part: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in PARTS[part]:
        monkeypatch.setattr(metadata, "version", lambda name: PACKAGES[name][0])
        monkeypatch.setitem(sys.modules, other, sys)  # as if it were there
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, part, raising=False)
    oldest, extra = PACKAGES[package]
    said = f"{part} needs {package} >= {oldest}, which is not installed; run: pip install 'lora-plus[{extra}]'"
    with pytest.raises(ImportError, match=f"^{re.escape(said)}$"):
        importlib.import_module(part)
    assert len(said) <= 160


def test_the_roles_of_pefts_adapters_need_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"^peft_roles needs peft >= 0\.15, which is not installed; run: pip install"):
        list(peft_roles(nn.Linear(2, 2)))


@pytest.mark.parametrize("old", ["5.2.0", "4.57.6", "5", "5.2rc1"])
def test_an_old_package_is_named_with_its_version(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", sys)
    monkeypatch.setattr(metadata, "version", {"transformers": old}.__getitem__)
    said = f"it needs transformers >= 5.3, which is {old} here; run: pip install 'lora-plus[transformers]'"
    with pytest.raises(ImportError, match=f"^{re.escape(said)}$"), needed("it", "transformers"):
        raise AssertionError("nothing is imported")


@pytest.mark.parametrize("new", ["5.3", "5.3.0", "5.10.1", "6.0.0.dev0", "10"])
def test_a_new_package_is_taken(new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", sys)
    monkeypatch.setattr(metadata, "version", {"transformers": new}.__getitem__)
    assert lacking("it", "transformers") is None


def test_a_package_that_pip_does_not_know_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setitem(sys.modules, "rich", sys)
    monkeypatch.setattr(metadata, "version", unknown)
    assert lacking("it", "rich") is None


def test_a_method_that_is_overridden_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", sys)
    monkeypatch.setattr(metadata, "version", {"transformers": "7.0"}.__getitem__)
    trainer = type("Trainer", (), {"__module__": "transformers.trainer", "train": None})
    check_methods("it", trainer, ["train"])
    said = (
        "it overrides _load_best_model of Trainer, which transformers 7.0 has not; "
        "install an earlier release, from 5.3 on"
    )
    with pytest.raises(ImportError, match=f"^{re.escape(said)}$"):
        check_methods("it", trainer, ["train", "_load_best_model"])


def test_the_table_says_what_the_extras_say() -> None:
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, (oldest, extra) in PACKAGES.items():
        assert f"{package}>={oldest}" in extras[extra]

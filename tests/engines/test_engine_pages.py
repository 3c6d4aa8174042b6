"""Pages whose blocks need packages, as those on engines, run as they stand with these."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from doc_blocks import needed_packages, run_blocks
from processes import Processes

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if needed_packages(page))
PROCESSES = "torchrun"
"""What blocks for several processes need."""
ALONE = [page for page in PAGES if PROCESSES not in needed_packages(page)]
TOGETHER = [page for page in PAGES if PROCESSES in needed_packages(page)]


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:.*is_gradient_checkpointing:FutureWarning",
    "ignore:.torch.jit.* is deprecated",
)
@pytest.mark.parametrize("page", ALONE, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in needed_packages(page):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_blocks(page, with_packages=True)


def run_page(page: Path, folder: str) -> None:
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "init_process_group", lambda backend: None)  # there is one already
        run_blocks(page, with_packages=True)


@pytest.mark.parametrize("page", TOGETHER, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_on_two_processes(two_processes: Processes, page: Path, tmp_path: Path) -> None:
    two_processes(run_page, page, str(tmp_path))

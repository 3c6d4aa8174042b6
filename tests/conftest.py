"""What all tests share: one thread, the same random numbers, and a fixture for the table of cases."""

from __future__ import annotations

import gc
import sys
from collections.abc import Generator

import pytest
import torch
from cases import CASES, Case

import lora_plus
from lora_plus.tensors import fused_linear


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collecting the tests makes many objects and no garbage: none is looked for meanwhile, nor later among them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


IMPORTED = pytest.StashKey[set[str]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep the names of the modules that collecting the tests has imported."""
    session.config.stash[IMPORTED] = set(sys.modules)


@pytest.fixture
def imported_by_collecting(request: pytest.FixtureRequest) -> set[str]:
    return request.config.stash[IMPORTED]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The tensors are tiny: a second thread only waits."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def small_layers_computed_as_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are tiny, and what is to be tested is what real ones meet."""
    monkeypatch.setattr(fused_linear, "_LEAST_WORK", 0)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


pytest.register_assert_rewrite("files_support", "parameter_cases", "peft_support")


@pytest.fixture(scope="module")
def native_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A right native file of files_support's net."""
    from files_support import adapted_net  # which imports this file

    path = tmp_path_factory.mktemp("native") / "adapter.safetensors"
    lora_plus.save_adapter(adapted_net(), path)
    return path.read_bytes()

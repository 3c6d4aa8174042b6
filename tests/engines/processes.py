"""Processes of one gloo group that run test functions together, and stay for the next one."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest

QUIET = [
    r".*NCCL.*",
    r".*gloo.*",
    r".*is experimental.*",
    r".*torch\.jit\..* is deprecated.*",
    r".*DTensor random operators may not have complete support.*",
    r"FSDP2-wrapped module .* returned a view tensor.*",
]
"""Warnings of engines about machines like this one; every other warning is an error, as it is in the tests."""


class Processes:
    """``processes(function, *args)`` runs a function of a test file on every rank and returns the answers by rank.

    The processes are started by the first call. Where a rank raises or hangs, all of them are killed, since the others
    would wait for it; the next call starts fresh ones.
    """

    def __init__(self, size: int = 2, timeout: float = 120) -> None:
        self.size, self.timeout = size, timeout
        self._ranks: list[tuple[Any, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send((function, args))
        answers: dict[int, Any] = {}
        end = time.monotonic() + self.timeout
        while len(answers) < self.size and time.monotonic() < end:
            for rank, (process, connection) in enumerate(self._ranks):
                if rank in answers or not (connection.poll(0.01) or not process.is_alive()):
                    continue
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    answers[rank] = False, f"the process ended with status {process.exitcode}"
                if not answers[rank][0]:
                    end = min(end, time.monotonic() + 2)  # the others may have more to say, or wait for ever
        failed = [f"rank {rank}: {text}" for rank, (passed, text) in sorted(answers.items()) if not passed]
        silent = sorted(set(range(self.size)) - answers.keys())
        if failed or silent:
            self.close()
            hung = [f"ranks {silent} did not answer"] if silent else []
            raise AssertionError("\n".join([*failed, *hung]))
        return [answer for _, (_, answer) in sorted(answers.items())]

    def close(self) -> None:
        for process, _ in self._ranks:
            process.kill()  # all before the first one is gone, which gloo would abort the others for
        for process, connection in self._ranks:
            process.join()
            connection.close()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))


@pytest.fixture(scope="module")
def two_processes() -> Iterator[Processes]:
    """Two ranks; everything that a function returns to the test must pickle."""
    processes = Processes(2)
    yield processes
    processes.close()


def _serve(rank: int, size: int, folder: str, connection: Connection) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        # at the end of gloo's own time it would close the connections of a rank that is slow; the caller kills those
        timeout=timedelta(hours=1),
    )
    try:
        while True:
            try:
                function, args = connection.recv()
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    for message in QUIET:
                        warnings.filterwarnings("ignore", message=message)
                    answer = True, function(*args)
            except EOFError:
                return
            except BaseException:
                answer = False, traceback.format_exc()
            connection.send(answer)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # a process group of which a part is gone would hang in its own clean-up

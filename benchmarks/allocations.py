"""How the benchmarks measure memory: exactly, by what torch's own allocator hands out."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from measuring import Call, Spread, Task, as_task, count, synchronise
from torch.profiler import ProfilerActivity, profile, record_function


def _cpu_memory(call: Call, before: Call) -> tuple[int, int]:
    """The profiler records every allocation and release of torch's CPU allocator, those within operations too.

    It knows the size of a released block only if it saw the allocation, hence ``before`` runs under it as well.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        before()
        with record_function("measured"):
            kept = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del kept
    start = next(event["ts"] for event in events if event.get("name") == "measured")
    blocks = [event for event in events if event.get("name") == "[memory]" and event["ts"] >= start]
    blocks.sort(key=lambda event: event["ts"])
    levels = list(accumulate((event["args"]["Bytes"] for event in blocks), initial=0))
    return max(levels), levels[-1]


def _cuda_memory(call: Call, before: Call) -> tuple[int, int]:
    before()
    gc.collect()
    synchronise()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    kept = call()
    synchronise()
    peak, after = torch.cuda.max_memory_allocated() - start, torch.cuda.memory_allocated() - start
    del kept
    return peak, after


_MEMORY: dict[str, Callable[[Call, Call], tuple[int, int]]] = {"cpu": _cpu_memory, "cuda": _cuda_memory}


def memory(task: Task | Call, device: str) -> tuple[Spread, Spread]:
    """The bytes of tensors that a task adds to those before: at its peak, and at its end with what it returns.

    The task is run, and undone, once before it is measured.
    """
    full = as_task(task)

    def before() -> None:
        full.run()
        full.undo()

    peak, after = _MEMORY[torch.device(device).type](full.run, before)
    full.undo()
    return count(peak), count(after)

"""Which number format computes faster on this processor."""

import time

import torch
from torch import nn

CLEARLY = 1.3
"""How much faster bfloat16 must be to be worth its coarser rounding."""


def seconds(dtype: torch.dtype, *, rows: int = 512, width: int = 576, repeats: int = 3) -> float:
    """Best wall time of one linear layer, forward and backward to its input, in ``dtype`` on the CPU."""
    layer = nn.Linear(width, width, bias=False, dtype=dtype).requires_grad_(False)
    x = torch.ones(rows, width, dtype=dtype, requires_grad=True)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        layer(x).sum().backward()
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one also pays for torch's start-up


def fastest() -> torch.dtype:
    """bfloat16 where the processor computes it clearly faster (AMX, AVX512-BF16), float32 elsewhere."""
    faster = CLEARLY * seconds(torch.bfloat16) < seconds(torch.float32)
    return torch.bfloat16 if faster else torch.float32


DTYPES = {"auto": fastest, "float32": lambda: torch.float32, "bfloat16": lambda: torch.bfloat16}
"""The choices of ``--dtype``."""

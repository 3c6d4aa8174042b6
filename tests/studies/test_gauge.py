"""The study of the gauge: its batched training is the library's."""

from __future__ import annotations

import math
from dataclasses import replace

import gauge
import gauge_tasks
import pytest


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_the_study_trains_and_reads_as_the_library_does(ratio: float) -> None:
    task = replace(gauge_tasks.toy(0).double(), steps=20)
    w = gauge.by_hooks(task, 2**-4, ratio)
    assert math.isfinite(w) and w == pytest.approx(gauge.by_products(task, 2**-4, ratio), abs=1e-9)

"""What a training step keeps and holds at its peak, counted beside PEFT's: never more."""

from __future__ import annotations

import argparse

import memory
import pytest
from measuring import Spread


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["mlp-relu", "mlp-gelu"])
def test_a_step_needs_no_more_memory_than_peft_s(model: str, dtype: str) -> None:
    pytest.importorskip("peft")
    options = argparse.Namespace(tokens=(2, 64), device="cpu", peers=["frozen", "lora_plus", "peft"])
    _, ours, theirs = memory.compare(model, dtype, 8, options)
    for column in (2, 3):  # kept for the backward, and the peak
        mine, peft = ours[column], theirs[column]
        assert isinstance(mine, Spread) and isinstance(peft, Spread)
        assert mine.median <= peft.median

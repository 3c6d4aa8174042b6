"""The cost of a large tree: ratios measured in one run, never absolute times."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import tree
from torch import nn

import lora_plus


@pytest.mark.slow
def test_four_times_the_layers_cost_about_four_times_as_much() -> None:
    # machines are noisy, so the sizes are far enough apart to tell 4 from the 16 of a quadratic cost
    small, large = tree.best(tree.ours, 3_000, 3), tree.best(tree.ours, 12_000, 3)
    for name in small:
        assert large[name] < 10 * small[name], f"{name}: {large[name] / small[name]:.2f} times as long"
    assert small["inject"] < 8 * small["wrap by hand"]
    assert small["second adapter"] < 4 * small["inject"]


def test_a_file_that_fits_nothing_is_refused_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora_plus.save_adapter(lora_plus.inject_lora(tree.tree(4000), "all-linear", r=1), path)
    start = time.process_time()
    with pytest.raises(ValueError, match="and 3970 more"):
        lora_plus.load_adapter(nn.ModuleDict({f"x{i}": nn.Linear(2, 2) for i in range(4000)}), path)
    # a search for near misses of every name would take minutes
    assert time.process_time() - start < 30

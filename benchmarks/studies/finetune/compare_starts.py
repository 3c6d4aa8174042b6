"""Which factor should start at zero on a pretrained encoder, and does a ratio of the rates change that?

Init[A] (B zero) and Init[B] (A zero), each with ratios from 1 to 16, at the best of five rates. The page of the paper's
study, `benchmarks/results/paper.md`, shows the runs.

    python benchmarks/studies/finetune/compare_starts.py
"""

from __future__ import annotations

from compare_rivals import Rival, performer, search
from methods import Method
from sweep import RESULTS, Plan
from tasks import TASKS, octaves

from lora_plus.tensors.init import InitName

TASK = "glosses"
PATH = RESULTS / "paper.jsonl"
RATIOS = (1, 4, 16)
INITS: dict[str, InitName] = {"Init[A]": "kaiming", "Init[B]": "kaiming_B"}
STARTS: dict[str, Rival] = {
    f"{start}, ratio {ratio}": Rival(
        {f"{start}, ratio {ratio}": Method(init=init, lr_ratio=ratio)}, {TASK: octaves(-12, -8)}
    )
    for start, init in INITS.items()
    for ratio in RATIOS
}

if __name__ == "__main__":
    search(TASK, TASKS[TASK], Plan(), PATH, performer(TASKS[TASK]), STARTS)
    print(f"written to {PATH}")

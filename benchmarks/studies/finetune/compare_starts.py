"""Which factor should start at zero on pretrained models, and does a ratio of the rates change that?

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

PATH = RESULTS / "paper.jsonl"
RATIOS = (1, 4, 16)
INITS: dict[str, InitName] = {"Init[A]": "kaiming", "Init[B]": "kaiming_B"}
RATES = {"glosses": octaves(-12, -8), "digits": octaves(-11, -7)}
STARTS: dict[str, Rival] = {
    f"{start}, ratio {ratio}": Rival({f"{start}, ratio {ratio}": Method(init=init, lr_ratio=ratio)}, RATES)
    for start, init in INITS.items()
    for ratio in RATIOS
}

if __name__ == "__main__":
    for name in RATES:
        search(name, TASKS[name], Plan(), PATH, performer(TASKS[name]), STARTS)
    print(f"written to {PATH}")

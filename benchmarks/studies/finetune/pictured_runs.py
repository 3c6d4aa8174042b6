"""The runs of which the documentation shows pictures: a sweep, a gauge, and the demo's adapter.

``python benchmarks/studies/finetune/pictured_runs.py demo-out/adapter.safetensors`` measures the adapter that
``python -m examples.demo --dtype float32`` has left there, trains the others in two minutes (seed 0), and writes all
figures into ``benchmarks/results/pictures.json``, from which ``python benchmarks/pictures.py`` draws.

Sweep and gauge are of the task of phonemes with fewer words: the last 4 of SmolLM2's 30 blocks, see ``tasks.py``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tasks import PHONEMES, Split
from torch import Tensor, nn
from training import batches, loss_of

import lora_plus
from examples.demo.answers import IGNORED
from lora_plus.files import read_adapter
from lora_plus.surgery import measure
from lora_plus.training import LoRAPlusGauge, grid, sweep

OUT = Path(__file__).parents[2] / "results" / "pictures.json"
SIZES = 200, 50, 0
"""Words to train on, to validate with and to test with."""
RATES, RATIOS = [2.0**n for n in range(-12, -6)], [1, 4, 16, 64]
STEPS, HALVING = 25, {10: 0.5}
GAUGED_RATE, GAUGED_STEPS = 2.0**-8, 20


def answer_losses(model: nn.Module, batch: Split) -> Tensor:
    """For each example the mean cross-entropy of the tokens of its answer: ``(b,)``."""
    losses = F.cross_entropy(model(*batch.inputs).mT, batch.labels, ignore_index=IGNORED, reduction="none")
    return losses.sum(1) / (batch.labels != IGNORED).sum(1)


def told(step: int, losses: Mapping[str, float]) -> None:
    """Print how far the sweep is."""
    print(f"step {step}: {len(losses)} in training, lowest {min(losses.values()):.4g}", flush=True)


def swept() -> list[dict[str, Any]]:
    """Rates and ratios side by side; only the better half is trained to the end."""
    task = PHONEMES.load(*SIZES)
    data = list(islice(batches(task.train, PHONEMES.batch, torch.Generator().manual_seed(0)), STEPS))
    result = sweep(
        task.model(), PHONEMES.targets, grid(lr=RATES, lr_ratio=RATIOS), answer_losses, data,
        validation=[task.validation], halving=HALVING, report=told,
    )  # fmt: skip
    print(result)
    return [dataclasses.asdict(row) for row in result.rows]


def gauged() -> dict[str, Any]:
    """A and B at one rate, over the first steps."""
    task = PHONEMES.load(*SIZES)
    model = lora_plus.inject_lora(
        task.model(), PHONEMES.targets, r=8, alpha=16, generator=torch.Generator().manual_seed(0)
    )
    optimizer = lora_plus.create_loraplus_optimizer(model, torch.optim.AdamW, lr=GAUGED_RATE, lr_ratio=1)
    data = batches(task.train, PHONEMES.batch, torch.Generator().manual_seed(0))
    with LoRAPlusGauge(model, optimizer) as gauge:
        for batch in islice(data, GAUGED_STEPS):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    print(gauge.report())
    return dataclasses.asdict(gauge.report())


def short(value: Any) -> Any:
    """The same with six digits of each number."""
    if isinstance(value, dict):
        return {key: short(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    """Run, measure and write."""
    layers = read_adapter(sys.argv[1]).layers
    figures = {
        "sweep": swept(),
        "gauge": gauged(),
        "adapter": [dataclasses.asdict(measure(name, layer)) for name, layer in layers.items()],
    }
    rows = [f'"{name}": {json.dumps(short(each))}' for name, each in figures.items()]
    OUT.write_text("{" + ",\n".join(rows).replace("}, {", "},\n{") + "}\n")


if __name__ == "__main__":
    main()

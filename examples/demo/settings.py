"""What can be chosen in the demo."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""Every linear layer of every block, by the last part of its name."""


@dataclass(frozen=True)
class Settings:
    """What can be chosen; the defaults take two to three minutes on two CPU cores."""

    targets: Sequence[str] = TARGETS
    r: int = 8
    alpha: float = 16.0
    lr: float = 2e-3
    lr_ratio: float = 4.0
    steps: int = 100
    batch: int = 8
    seed: int = 0
    out: Path = Path("demo-out")
    held_out: int = 128
    samples: int = 8
    answer_tokens: int = 12

"""An adapter that is computed layer by layer, and the report of what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_plus.errors import Problems
from lora_plus.files.saved_adapter import SavedLayer
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.tensors.distributed import is_dtensor
from lora_plus.tensors.low_rank import Factors
from lora_plus.tensors.matrix import full_precision
from lora_plus.tensors.variant import AdapterSpec
from lora_plus.text import counted, median_and_worst, some


@dataclass(frozen=True)
class CombineReport:
    """The report of combining, resizing or extracting. ``str()`` of it is a short text."""

    adapter: str
    """The adapter's name; empty for a saved adapter, which has none."""
    ranks: dict[str, int]
    """Its rank on each layer."""
    errors: dict[str, float]
    """How far the update of each layer is from the wanted one, relative to that (Frobenius norm)."""
    ignored: list[str] = field(default_factory=list)
    """Names of tensors that differ in the tuned model or checkpoint and are not in the adapter."""

    def __str__(self) -> str:
        lowest, highest = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"{lowest}" if lowest == highest else f"{lowest} to {highest}"
        name = f"adapter {self.adapter!r}: " if self.adapter else ""
        lines = [f"{name}{counted(len(self.ranks), 'layer')}, rank {ranks}"]
        if any(self.errors.values()):
            lines.append(f"relative error of the update: {median_and_worst(self.errors, '.2g')}")
        if self.ignored:
            lines.append(f"not in it, though they differ: {some(self.ignored, 10)}")
        return "\n".join(lines)


class Draft:
    """What has been computed of an adapter, and what is wrong with it; an error says ``failure`` first."""

    def __init__(self, failure: str) -> None:
        self.failure = failure
        self.layers: dict[str, SavedLayer] = {}
        self.errors: dict[str, float] = {}
        self.problems: list[str] = []

    def fit(self, name: str, compute: Callable[[], Factors], device: torch.device) -> Factors | None:
        """The factors that a computation gives for a layer; None if they are not finite, which is a problem."""
        try:
            with full_precision(device):
                fit = compute()
        except torch.linalg.LinAlgError:  # what a decomposition says of such numbers
            fit = None
        if fit is None or not all(bool(factor.isfinite().all()) for factor in (fit.A, fit.B)):
            self.problems.append(f"{name!r}: its update is too large for its dtype to be computed with")
            return None
        return fit

    def add(self, name: str, base: BaseLayer, fit: Factors, dtype: torch.dtype) -> None:
        """Take these factors, in this dtype and with the scale 1, for a layer."""
        r = fit.A.shape[-2]
        tensors = {"lora_A": fit.A.to(dtype).contiguous(), "lora_B": fit.B.to(dtype).contiguous()}
        self.layers[name], self.errors[name] = SavedLayer(base, AdapterSpec(r=r, alpha=r), tensors), fit.error

    def check(self) -> None:
        """Raise if anything is wrong."""
        if self.problems:
            raise Problems(self.failure, self.problems)

    def report(self, adapter: str = "", ignored: Sequence[str] = ()) -> CombineReport:
        """The report, after `check`."""
        self.check()
        ranks = {name: layer.spec.r for name, layer in self.layers.items()}
        return CombineReport(adapter, ranks, self.errors, list(ignored))


def unusable(*tensors: Tensor) -> str | None:
    """Why these tensors cannot be computed with; None if they can."""
    if any(tensor.is_meta for tensor in tensors):
        return "has no values (meta device); load them first"
    if any(is_dtensor(tensor) for tensor in tensors):
        return "is sharded; do this before the model is sharded"
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
    return None if finite else "has values that are not finite"

"""Under ``fully_shard`` what an adapter trains in full goes and comes back by its values; a second one is refused."""

from __future__ import annotations

import torch
from engine_model import lora_model
from processes import Processes
from sharded_models import TOKENS, by_fully_shard
from torch import nn

import lora_plus as lp


def exchanged() -> tuple[list[float], str]:
    """How far outputs are from the plain model's after each exchange, and what is said of the second head."""

    def two() -> nn.Module:
        model = lora_model(non_zero=True, adapter="a").double().eval()
        lp.inject_lora(model, ["q"], r=2, adapter="b", train_also="norm")
        lp.inject_lora(model, ["q"], r=2, adapter="none")
        lp.set_adapter(model, "a", trainable=True)
        with torch.no_grad():
            [p.add_(0.5) for n, p in model.named_parameters() if "norm" in n and p.requires_grad]
        return model

    plain, sharded = two(), by_fully_shard(two())
    apart = []
    for name in ("a", "none", "a", "none"):
        for model in (plain, sharded):
            lp.set_adapter(model, name)
        with torch.no_grad():
            apart.append(float((plain(TOKENS) - sharded(TOKENS)).abs().max()))
    try:
        lp.set_adapter(sharded, "b")
    except ValueError as error:
        return apart, str(error)
    return apart, ""


def test_one_head_is_exchanged_by_its_values(two_processes: Processes) -> None:
    for apart, text in two_processes(exchanged):
        assert max(apart) <= 1e-12
        assert "exchanging what adapters train of" in text and "needs an unsharded model" in text

"""What needs whole parameters, or one process, says so where an engine has parted or wrapped the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_model import base_model, distance, lora_model, loss_of, optimizer_for, trained
from processes import Processes
from sharded_models import TOKENS, by_fsdp1
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lora_plus as lp
from lora_plus.files import adapter_state_dict
from lora_plus.model import adapter_names
from lora_plus.surgery import combine_adapters, extract_adapter, resize_adapter
from lora_plus.training import LoRAPlusGauge, init_from_gradients

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's, about what DeepSpeed calls
    deepspeed = pytest.importorskip("deepspeed")

CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "combine": lambda model: combine_adapters(model, ["default", "second"]),
    "resize": lambda model: resize_adapter(model, r=2),
    "extract": lambda model: extract_adapter(model, base_model(3), targets=["head"], r=2, adapter="third"),
    "gradients": lambda model: init_from_gradients(model, lambda x: loss_of(model, x), [TOKENS], adapter="second"),
    "check": lambda model: lp.check_adapters(model, TOKENS),
    "gauge": lambda model: LoRAPlusGauge(model, optimizer_for(model)),
}


def partitioned() -> nn.Module:
    """Built under ``zero.Init``, with no engine yet."""
    warnings.filterwarnings("ignore", message=".*deprecated.*")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled for a minute
    deepspeed.utils.logger.setLevel("ERROR")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": zero}):
        model = base_model()
    lp.inject_lora(model, ["q", "up"], r=4, generator=torch.Generator().manual_seed(1))
    return lp.add_adapter(model, "second", generator=torch.Generator().manual_seed(2))


def refused() -> dict[str, str]:
    flat = lora_model(train_also=())
    models = {
        "zero.Init": partitioned(),
        "FSDP1": by_fsdp1(lp.add_adapter(flat, "second")),
        "DDP": DistributedDataParallel(lp.add_adapter(lora_model(train_also=()), "second")),
    }
    texts = {}
    for name, model in models.items():
        for call in CALLS if name != "DDP" else ["gradients"]:
            before = trained(model)
            with pytest.raises(ValueError) as raised:
                CALLS[call](model)
            assert distance(trained(model), before) == 0 and adapter_names(model) == ["default", "second"]
            texts[f"{name}, {call}"] = str(raised.value)
    return texts


def test_what_needs_whole_parameters_says_so(two_processes: Processes) -> None:
    for texts in two_processes(refused):
        for call, text in texts.items():
            assert "before the model is" in text, call


def added() -> float:
    plain = lp.inject_lora(base_model(), ["q", "up"], r=4, generator=torch.Generator().manual_seed(1))
    lp.add_adapter(plain, "second", generator=torch.Generator().manual_seed(2))
    return distance(*(adapter_state_dict(model, adapter="second") for model in (partitioned(), plain)))


def test_an_adapter_is_added_to_a_partitioned_model(two_processes: Processes) -> None:
    assert two_processes(added) == [0, 0]

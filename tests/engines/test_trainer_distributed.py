"""The Trainer with LoRA+ on two processes: under each engine it does what one process does, on disk too."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from engine_model import distance
from processes import Processes
from safetensors.torch import load_file
from torch import Tensor
from trainer_model import BEST, SAVED, STEPS, STOCK, llama, lora_llama, randomised, trainer

import lora_plus as lp
from lora_plus.engines.run_file import load_run, run_tensors
from lora_plus.files import adapter_state_dict
from lora_plus.model.state import State

FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
DEEPSPEED = dict.fromkeys(
    ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"], "auto"
)

ENGINES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "DDP": ({}, "DistributedDataParallel", {}),
    "FSDP2": ({"fsdp": True, "fsdp_config": FSDP2}, "FSDPLlamaForCausalLM", {"train_also": ["norm", "lm_head"]}),
    "ZeRO-2": (
        {"deepspeed": DEEPSPEED | {"zero_optimization": {"stage": 2}}},
        "DeepSpeedEngine",
        {"variant": "lora_fa"},
    ),
    "ZeRO-3": ({"deepspeed": DEEPSPEED | {"zero_optimization": {"stage": 3}}}, "DeepSpeedEngine", {}),
}
"""Arguments of the Trainer, the class that it puts around the model, and what is particular about the adapters."""

OF_DEEPSPEED = [
    r".*torch.jit.script.* is deprecated",
    r".*torch.distributed.* is deprecated",
]


def quiet_deepspeed() -> None:
    """Let DeepSpeed import what has warnings, and build nothing."""
    deepspeed = pytest.importorskip("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for message in OF_DEEPSPEED:
        warnings.filterwarnings("ignore", message=message)


def whole(model: Any) -> dict[str, Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in State(model).storage.read(run_tensors(model)).items()}


def groups_of(run: Any) -> list[tuple[Any, ...]]:
    noted = ("name", "initial_lr", "weight_decay", "loraplus_ratio")
    return [tuple(group.get(key) for key in noted) for group in run.optimizer.param_groups]


def runs(engine: str, folder: str) -> dict[str, Any]:
    """A run to its best state, one resumed from its middle, from other values, and ratio 1 beside the stock Trainer."""
    settings, wrapper, adapters = ENGINES[engine]
    if "deepspeed" in settings:
        quiet_deepspeed()
    first = trainer(randomised(lora_llama(**adapters)), folder, **settings, **SAVED, **BEST)
    first.train()
    assert type(first.model_wrapped).__name__ == wrapper
    best = whole(first.model)
    second = trainer(lora_llama(seed=9, **adapters), f"{folder}/other", **settings)
    second.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    answer = {"best": best, "last": whole(second.model), "groups": [groups_of(first), groups_of(second)]}
    unclipped = settings | {"max_steps": 2, "max_grad_norm": 0.0}  # DeepSpeed adds up the norm group by group
    stock = trainer(lora_llama(**adapters), folder, **STOCK, **unclipped)
    stock.train()
    one = trainer(lora_llama(**adapters), folder, loraplus_lr_ratio=1.0, **unclipped)
    one.train()
    return answer | {"plain": whole(stock.model), "ratio one": whole(one.model)}


def read(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "run.safetensors")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_do_what_one_does(engine: str, two_processes: Processes, tmp_path: Path) -> None:
    adapters = ENGINES[engine][2]
    model = randomised(lora_llama(**adapters))
    alone = trainer(model, tmp_path / "alone", **SAVED)
    alone.train()
    half, end = (read(tmp_path / "alone" / f"checkpoint-{step}") for step in (2, STEPS))
    start = whole(randomised(lora_llama(**adapters)))
    assert distance(half, start) > 1e-3 and distance(half, end) > 1e-3

    folder = tmp_path / "together"
    answers = two_processes(runs, engine, str(folder))
    for answer in answers:
        assert distance(answer["best"], half) <= 1e-6
        assert distance(answer["last"], end) <= 1e-6
        assert distance(answer["last"], read(folder / f"checkpoint-{STEPS}")) == 0.0
        assert distance(answer["best"], read(folder / "checkpoint-2")) == 0.0
        assert distance(answer["ratio one"], answer["plain"]) == 0.0
        assert answer["groups"] == [groups_of(alone)] * 2
    adapter = adapter_state_dict(lp.load_adapter(llama(), folder / "checkpoint-2"))
    load_run(model, tmp_path / "alone" / "checkpoint-2" / "run.safetensors")
    assert distance(adapter, adapter_state_dict(model)) <= 1e-6
    base = sum(parameter.numel() * 4 for parameter in llama().parameters())
    files = [path for path in folder.rglob("*") if path.is_file() and "optim" not in path.name]
    assert files and all(path.stat().st_size < base for path in files)

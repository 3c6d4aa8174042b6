"""A small Llama with adapters, its data, and runs of the Trainer on it, which leave no state behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_plus as lp
from lora_plus.engines.run_file import run_tensors
from lora_plus.model.tree import adapters_of

transformers = pytest.importorskip("transformers")
state = pytest.importorskip("accelerate.state")
integration = pytest.importorskip("lora_plus.engines.transformers")

VOCABULARY, LENGTH, BATCH, STEPS = 64, 8, 8, 4
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3, "weight_decay": 0.1, "loraplus_lr_ratio": 16.0,
    "max_steps": STEPS, "report_to": [], "use_cpu": True, "save_strategy": "no", "logging_steps": 100,
    "disable_tqdm": True, "dataloader_pin_memory": False, "lr_scheduler_type": "linear", "logging_strategy": "no",
}  # fmt: skip
SAVED = {"save_strategy": "steps", "save_steps": 2}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True,
        "metric_for_best_model": "eval_loss"}  # fmt: skip
"""The loss falls, so the best by this measure is the first of two."""
STOCK: dict[str, Any] = {"trainer_cls": transformers.Trainer, "args_cls": transformers.TrainingArguments}
TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens"]


OF_OTHERS = [
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
]
"""Warnings that the code of PEFT and TRL gives rise to."""


def llama(seed: int = 0) -> Any:
    """The same base everywhere; the global random state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 32}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **shape, **heads)
        return transformers.LlamaForCausalLM(config)


def lora_llama(seed: int = 1, **settings: Any) -> nn.Module:
    """With adapters, also of the embedding, and a norm trained in full."""
    generator = torch.Generator().manual_seed(seed)
    options = {"targets": TARGETS, "r": 4, "alpha": 8, "train_also": ["norm"], "generator": generator} | settings
    return lp.inject_lora(llama(), options.pop("targets"), **options)


def randomised(model: nn.Module) -> nn.Module:
    """B as after training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, adapter, _ in adapters_of(model):
            for role, parameter in adapter.parameters():
                if role.endswith("B"):
                    parameter.normal_(std=0.05, generator=generator)
    return model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def run_state(model: nn.Module) -> dict[str, Tensor]:
    """What training can change, copied."""
    return {name: tensor.detach().clone() for name, tensor in run_tensors(model).items()}


def examples(count: int = STEPS * BATCH) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    return [{"input_ids": tokens, "labels": tokens} for tokens in drawn]


def trainer(
    model: nn.Module,
    folder: Path | str,
    *,
    trainer_cls: Any = integration.LoraPlusTrainer,
    args_cls: Any = integration.LoraPlusTrainingArguments,
    options: dict[str, Any] | None = None,
    data: Any = None,
    **settings: Any,
) -> Any:
    """A Trainer on the examples, in batches of the same size on however many processes."""
    forget_accelerate()
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    chosen = {"per_device_train_batch_size": BATCH // world, **SETTINGS} | settings
    if not hasattr(args_cls, "loraplus_lr_ratio"):
        chosen = {name: value for name, value in chosen.items() if not name.startswith("loraplus")}
    args = args_cls(output_dir=str(folder), **chosen)
    if args.fsdp:  # which accelerate takes up on accelerators only
        assert args.distributed_state.device.type == "cpu"
        state.PartialState._shared_state["distributed_type"] = state.DistributedType.MULTI_GPU
    sets = {"train_dataset": examples(), "eval_dataset": examples(BATCH)} if data is None else {"train_dataset": data}
    return trainer_cls(model=model, args=args, **sets, **options or {})


def forget_accelerate() -> None:
    """Forget the state of accelerate, which is one for a process and says what the last run was under."""
    state.AcceleratorState._reset_state(True)
    state.GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]  # ACCELERATE_USE_CPU too, with which it takes up no DeepSpeed

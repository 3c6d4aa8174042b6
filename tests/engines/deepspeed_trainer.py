"""Training under the Trainer with a DeepSpeed configuration; a subclass's ``create_optimizer`` makes LoRA+ groups."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

import lora_plus as lp
from lora_plus.files import adapter_state_dict

STEPS = 6
ADVICE = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True, "adam_w_mode": True}}
"""The section that some advise for a ratio of 1 that is unlike plain LoRA."""


def trained(sections: dict[str, Any], ratio: float) -> tuple[list[str], dict[str, Tensor]]:
    """The names of the optimizer's groups, and the adapter's weights after a few steps."""
    import transformers
    from accelerate.state import AcceleratorState, GradientState

    class LoraPlus(transformers.Trainer):
        def create_optimizer(self, model: nn.Module | None = None) -> Any:
            if getattr(self, "optimizer", None) is None:  # there may be one already, as in the Trainer's own method
                self.optimizer = lp.create_loraplus_optimizer(
                    self.model, torch.optim.AdamW, lr=self.args.learning_rate, lr_ratio=ratio
                )
            return self.optimizer

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    lp.inject_lora(model, "all-linear", r=4, alpha=8)
    tokens = torch.randint(32, (4 * STEPS, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    config = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "zero_optimization": {"stage": 2},
        **sections,
    }  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]  # what earlier arguments have left; and ACCELERATE_USE_CPU keeps DeepSpeed out
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, deepspeed=config, use_cpu=True, per_device_train_batch_size=4, max_steps=STEPS, learning_rate=1e-3,
            lr_scheduler_type="constant", save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer: Any = LoraPlus(model=model, args=arguments, train_dataset=rows)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    assert trainer.is_deepspeed_enabled
    groups = [group.get("name", "unnamed") for group in trainer.optimizer.param_groups]
    return groups, {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}

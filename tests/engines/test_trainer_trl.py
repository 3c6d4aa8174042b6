"""LoRA+ in TRL's trainers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_model import OF_OTHERS, SAVED, integration, llama, lora_llama, run_state, same, trainer, transformers

import lora_plus as lp
from lora_plus.files import adapter_state_dict

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")


@dataclass
class SFTArguments(integration.LoraPlusArguments, trl.SFTConfig):
    """LoRA+ with the defaults of TRL's own arguments."""


@dataclass
class DPOArguments(integration.LoraPlusArguments, trl.DPOConfig):
    """LoRA+ with the defaults of TRL's own arguments."""


class LoraPlusSFTTrainer(integration.LoraPlusTrainer, trl.SFTTrainer):
    """LoRA+ in TRL's trainer."""


class LoraPlusDPOTrainer(integration.LoraPlusTrainer, trl.DPOTrainer):
    """LoRA+ in TRL's trainer."""


def words() -> Any:
    """A tokenizer with a word for each number."""
    names = {f"w{i}": i for i in range(60)} | {"<pad>": 60, "<eos>": 61, "<unk>": 62}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    marks = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


DRAWN = torch.randint(60, (32, 4), generator=torch.Generator().manual_seed(0)).tolist()
LINES = [" ".join(f"w{i}" for i in row) for row in DRAWN]
ANSWERS = [f" {line}" for line in LINES]
CASES: dict[str, tuple[Any, Any, Any, Any, dict[str, Any], dict[str, list[str]]]] = {
    "SFT": (trl.SFTTrainer, trl.SFTConfig, LoraPlusSFTTrainer, SFTArguments, {}, {"text": LINES}),
    "DPO": (
        trl.DPOTrainer, trl.DPOConfig, LoraPlusDPOTrainer, DPOArguments, {"ref_model": llama()},
        {"prompt": LINES, "chosen": ANSWERS[::-1], "rejected": ANSWERS},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings(*OF_OTHERS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ratio_one_is_trls_trainer_and_others_are_not(case: Any, tmp_path: Path) -> None:
    trainer_cls, args_cls, our_trainer, our_args, models, columns = case
    assert our_args("x", use_cpu=True).learning_rate == args_cls("x", use_cpu=True).learning_rate
    settings = {"max_length": 16, "bf16": False, "activation_checkpointing": False, "max_steps": 2}
    stock, one, plus = lora_llama(), lora_llama(), lora_llama()
    runs = [
        (stock, trainer_cls, args_cls, {}),
        (one, our_trainer, our_args, {"loraplus_lr_ratio": 1.0}),
        (plus, our_trainer, our_args, SAVED),
    ]
    for model, chosen, arguments, more in runs:
        run = trainer(
            model, tmp_path, trainer_cls=chosen, args_cls=arguments, data=datasets.Dataset.from_dict(columns),
            options={"processing_class": words(), **models}, **settings, **more,
        )  # fmt: skip
        run.train()
    assert same(run_state(one), run_state(stock)) and not same(run_state(plus), run_state(stock))
    assert [group["name"] for group in run.optimizer.param_groups][:2] == ["lora_A", "lora_B"]
    saved = adapter_state_dict(lp.load_adapter(llama(), tmp_path / "checkpoint-2"))
    assert same(saved, adapter_state_dict(plus))


@pytest.mark.filterwarnings(*OF_OTHERS)
def test_adapters_of_two_libraries_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = {"processing_class": words(), "peft_config": peft.LoraConfig(target_modules=["q_proj"])}
    with pytest.raises(ValueError, match="adapters of both inject_lora and PEFT"):
        trainer(
            lora_llama(), tmp_path, trainer_cls=LoraPlusSFTTrainer, args_cls=SFTArguments, options=options,
            data=datasets.Dataset.from_dict({"text": LINES}),
        )  # fmt: skip

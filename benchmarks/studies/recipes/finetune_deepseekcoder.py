"""Instruction fine-tuning of a causal language model with LoRA+.

After github.com/mst272/simple-lora-plus and the program of github.com/deepseek-ai/DeepSeek-Coder that it builds on:
their arguments, prompts and settings are the defaults. With a hub and GPUs:

    deepspeed benchmarks/studies/recipes/finetune_deepseekcoder.py \\
        --model_name_or_path deepseek-ai/deepseek-coder-6.7b-instruct --data_path data.json --output_dir output/coder \\
        --deepspeed benchmarks/studies/recipes/ds_config_zero3.json --bf16 True --model_max_length 1024 \\
        --gradient_checkpointing True --learning_rate 2e-4 --lr_scheduler_type cosine --warmup_steps 10

Without, on what ``prepare_recipes.py`` has written (README.md has it in several processes):

    python benchmarks/studies/recipes/finetune_deepseekcoder.py --model_name_or_path recipe-data/smollm2 \\
        --data_path recipe-data/phonemes/train.json --eval_data_path recipe-data/phonemes/validation.json \\
        --system_prompt "" --output_dir output/phonemes --learning_rate 1e-3 --loraplus_lr_ratio 4 --lora_dropout 0 \\
        --max_steps 60
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import load_dataset
from instructions import SYSTEM, examples
from recipe_arguments import ModelArguments, RecipeArguments, parsed
from recipe_run import adapt, loading, report, train
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed
from transformers.hf_argparser import HfArg

from lora_plus.engines.transformers import LoraPlusTrainer


@dataclass
class InstructionData:
    data_path: str = HfArg(help="json, an object a line, with the keys instruction and output")
    eval_data_path: str | None = HfArg(default=None, help="the same, for the loss on held-out examples")
    system_prompt: str = HfArg(default=SYSTEM, help="what the prompts begin with")


@dataclass
class InstructionArguments(RecipeArguments):
    optim: str = HfArg(default="adamw_torch", help="optimizer")
    model_max_length: int = HfArg(default=512, help="tokens of an example at most")
    lora_alpha: float = HfArg(default=32.0, help="alpha; updates are scaled by alpha / r")
    target_modules: str | None = HfArg(
        default="q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        help="the adapted layers, with commas between",
    )
    loraplus_lr_ratio: float | None = HfArg(default=16.0, help="rate of B over rate of A")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program with these arguments, or those of the command line; returns the metrics of the evaluation."""
    source, data, args = parsed((ModelArguments, InstructionData, InstructionArguments), argv)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer_name or source.model_name_or_path, **loading(source))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        source.model_name_or_path, dtype=torch.bfloat16 if args.bf16 else torch.float32, **loading(source)
    )
    adapt(model, source.adapter_path, args)

    files = {split: file for split, file in (("train", data.data_path), ("held_out", data.eval_data_path)) if file}
    with args.main_process_first(desc="reading the data"):
        rows = load_dataset("json", data_files=files, cache_dir=source.cache_dir)
        tokens = {
            split: examples(part, tokenizer, args.model_max_length, data.system_prompt) for split, part in rows.items()
        }
    trainer = LoraPlusTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=tokens["train"],
        eval_dataset=tokens.get("held_out"),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    if args.do_train:
        train(trainer, args)
    found: dict[str, float] = {}
    if args.do_eval and "held_out" in tokens:
        found = trainer.evaluate()
        report(trainer, "eval", found)
    return found


if __name__ == "__main__":
    main()

"""Sequence classification with LoRA+.

After ``glue/src/run_glue.py`` of github.com/nikhil-ghosh-berkeley/loraplus, the code of the LoRA+ paper: its arguments
and settings are the defaults. Its run with RoBERTa, where there is a hub:

    python benchmarks/studies/recipes/run_glue.py --model_name_or_path roberta-base --task_name mnli \\
        --target_modules "query, value" --learning_rate 5e-5 --loraplus_lr_ratio 80 --lora_rank 8 --lora_alpha 8 \\
        --per_device_train_batch_size 32 --num_train_epochs 3 --adam_beta2 0.99 --output_dir output/mnli

Without, on what ``prepare_recipes.py`` has written:

    python benchmarks/studies/recipes/run_glue.py --model_name_or_path recipe-data/minilm \\
        --train_file recipe-data/glosses/train.json --validation_file recipe-data/glosses/validation.json \\
        --target_modules "query, key, value, dense" --learning_rate 1e-3 --loraplus_lr_ratio 4 \\
        --lora_use_original_init --no_pad_to_max_length --max_train_samples 3200 --num_train_epochs 1 \\
        --output_dir output/glosses
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from glue_data import DataArguments, classes, first, load, text_columns, tokenized
from glue_tasks import ACCURACY, TASKS, Task, measured, squared_error
from recipe_arguments import ModelArguments, RecipeArguments, parsed
from recipe_run import adapt, loading, report, train
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    default_data_collator,
    set_seed,
)
from transformers.hf_argparser import HfArg
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead

from lora_plus.engines.transformers import LoraPlusTrainer
from lora_plus.tensors.init import InitName


@dataclass
class ClassifierArguments(ModelArguments):
    ignore_mismatched_sizes: bool = HfArg(default=False, help="replace a head of another number of classes")


@dataclass
class GlueArguments(RecipeArguments):
    lora_use_original_init: bool = HfArg(default=False, help="A random and B = 0; otherwise A = 0 and B random")


def heads(model: PreTrainedModel) -> list[str]:
    """The names of the modules beside the pretrained body, which are trained in full."""
    return [
        name
        for name, module in model.named_children()
        if module is not model.base_model and any(True for _ in module.parameters())
    ]


def freeze_first_layer(module: nn.Module) -> None:
    """Leave the first of the two layers of RoBERTa's head as it was drawn; so does the original."""
    if isinstance(module, RobertaClassificationHead):
        module.dense.requires_grad_(False)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program with these arguments, or those of the command line; returns the metrics of the evaluation."""
    source, data, args = parsed((ClassifierArguments, DataArguments, GlueArguments), argv)
    set_seed(args.seed)
    with args.main_process_first(desc="loading the data"):
        splits = load(data, source.cache_dir)
    values = classes(splits["train"])
    metrics = ACCURACY if values is not None else {"mse": squared_error}
    task = TASKS[data.task_name] if data.task_name else Task(text_columns(splits["train"]), metrics)

    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer_name or source.model_name_or_path, **loading(source))
    names = {} if values is None else {"id2label": dict(enumerate(values.values()))}
    model = AutoModelForSequenceClassification.from_pretrained(
        source.model_name_or_path,
        num_labels=1 if values is None else len(values),
        ignore_mismatched_sizes=source.ignore_mismatched_sizes,
        dtype=torch.bfloat16 if args.bf16 else torch.float32,
        **names,
        **loading(source),
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    init: InitName = "kaiming" if args.lora_use_original_init else "kaiming_B"
    adapt(model, source.adapter_path, args, init=init, train_also=heads(model))
    model.apply(freeze_first_layer)
    model.accepts_loss_kwargs = False  # takes them, ignores them: its mean would count once for every process and part

    with args.main_process_first(desc="tokenizing"):
        splits = tokenized(splits, task.columns, values, tokenizer, data)
    validation = {
        suffix: first(splits[f"validation{ending}"], data.max_eval_samples) for ending, suffix in task.endings.items()
    }

    def predicted(logits: np.ndarray) -> np.ndarray:
        return logits.squeeze(-1) if values is None else logits.argmax(-1)

    def compute_metrics(outputs: EvalPrediction) -> dict[str, float]:
        return measured(task.metrics, predicted(outputs.predictions), outputs.label_ids)

    trainer = LoraPlusTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=first(splits["train"], data.max_train_samples) if args.do_train else None,
        eval_dataset=validation[""],
        data_collator=default_data_collator if data.pad_to_max_length else DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
    )
    if args.do_train:
        train(trainer, args)
    found: dict[str, float] = {}
    if args.do_eval:
        for suffix, rows in validation.items():
            found |= {f"{name}{suffix}": value for name, value in trainer.evaluate(rows).items()}
        report(trainer, "eval", found)
    if args.do_predict:
        for ending, suffix in task.endings.items():
            rows = first(splits[f"test{ending}"], data.max_predict_samples).remove_columns("label")
            guesses = predicted(trainer.predict(rows, metric_key_prefix="predict").predictions)
            if trainer.is_world_process_zero():
                said = guesses if values is None else [list(values.values())[number] for number in guesses]
                lines = ["index\tprediction", *(f"{n}\t{guess}" for n, guess in enumerate(said))]
                Path(args.output_dir, f"predict_results{suffix}.txt").write_text("\n".join(lines) + "\n")
    return found


if __name__ == "__main__":
    main()

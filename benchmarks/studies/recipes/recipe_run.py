"""A recipe from the model with its adapter to the files that are left: the same for both programs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe_arguments import ModelArguments, RecipeArguments
from transformers.trainer_utils import get_last_checkpoint

import lora_plus as lp
from lora_plus.engines.transformers import LoraPlusTrainer
from lora_plus.tensors.init import InitName


def loading(arguments: ModelArguments) -> dict[str, Any]:
    """What every ``from_pretrained`` is told about the hub."""
    return {"revision": arguments.model_revision, "cache_dir": arguments.cache_dir}


def adapt(
    model: Any,
    source: str | None,
    arguments: RecipeArguments,
    *,
    init: InitName = "kaiming",
    train_also: Sequence[str] = (),
) -> None:
    """Load the adapter at ``source``, or put the one in that the arguments describe.

    Raises:
        ValueError: if it is not said which layers are adapted.
    """
    if source is not None:
        lp.load_adapter(model, source, trainable=arguments.do_train)
    elif arguments.use_lora:
        if not arguments.target_modules:
            raise ValueError("--target_modules is missing: name the layers to adapt, such as 'query, value'")
        lp.inject_lora(
            model,
            [name.strip() for name in arguments.target_modules.split(",")],
            r=arguments.lora_rank,
            alpha=arguments.lora_alpha,
            dropout=arguments.lora_dropout,
            init=init,
            train_also=train_also,
        )


def train(trainer: LoraPlusTrainer, arguments: RecipeArguments) -> None:
    """Train, from the last checkpoint if there is one, and save the adapter, the metrics and the state."""
    folder = Path(arguments.output_dir)
    last = get_last_checkpoint(folder) if folder.is_dir() and not arguments.overwrite_output_dir else None
    done = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint or last)
    report(trainer, "train", done.metrics)
    trainer.save_model()
    trainer.save_state()
    if arguments.keep_checkpoints == "eval" and trainer.is_world_process_zero():
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def report(trainer: LoraPlusTrainer, split: str, metrics: dict[str, float]) -> None:
    """Print metrics and write them to ``<split>_results.json`` and ``all_results.json``."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)

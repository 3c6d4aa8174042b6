"""The arguments that both recipes take, by the names of the original programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from lora_plus.engines.transformers import LoraPlusTrainingArguments


@dataclass
class ModelArguments:
    model_name_or_path: str = HfArg(help="a folder, or a name on the hub")
    model_revision: str = HfArg(default="main", help="branch, tag or commit on the hub")
    tokenizer_name: str | None = HfArg(default=None, help="if it is not the model's")
    cache_dir: str | None = HfArg(default=None, help="where models, data and prepared data are kept")
    adapter_path: str | None = HfArg(default=None, help="a saved adapter to go on with, or to evaluate")


@dataclass
class RecipeArguments(LoraPlusTrainingArguments):
    """`LoraPlusTrainingArguments` with the original default rate of embeddings, LoRA's settings, and three arguments
    that transformers 5 has given up."""

    loraplus_lr_embedding: float | None = HfArg(default=1e-6, help="rate of adapters on embeddings; None for lr")
    do_train: bool = HfArg(default=True, help="train")
    do_eval: bool = HfArg(default=True, help="evaluate at the end")
    use_lora: bool = HfArg(default=True, help="train an adapter; the whole model otherwise")
    lora_rank: int = HfArg(default=8, aliases="--lora_r", help="r")
    lora_alpha: float = HfArg(default=16.0, help="alpha; updates are scaled by alpha / r")
    lora_dropout: float = HfArg(default=0.1, help="on the inputs of the adapters")
    target_modules: str | None = HfArg(default=None, help="the adapted layers, with commas between")
    keep_checkpoints: Literal["all", "eval"] = HfArg(default="all", help="eval: only the last adapter and the metrics")
    eval_strategy: str = HfArg(default="no", aliases="--evaluation_strategy", help="no, steps or epoch")
    overwrite_output_dir: bool = HfArg(default=False, help="do not resume from a checkpoint that is there")
    logging_dir: str | None = HfArg(default=None, help="for tensorboard")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.logging_dir is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir


@contextmanager
def deepspeed_on_cpu() -> Iterator[None]:
    """With ``DS_ACCELERATOR=cpu``, have the arguments set up DeepSpeed for several processes on the CPU.

    Accelerate joins the ranks of a CPU only where it is told of the CPU, and leaves DeepSpeed out where it is told for
    longer than that; without, each rank would take itself for the only one. DeepSpeed is kept from compiling a faster
    all-reduce, for which the ranks wait for minutes.
    """
    if os.environ.get("DS_ACCELERATOR") != "cpu":
        yield
        return
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        yield
    finally:
        del os.environ["ACCELERATE_USE_CPU"]
    if torch.distributed.is_initialized():
        deepspeed.init_distributed("gloo")


def parsed(kinds: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """One object of each kind, from the command line or from the JSON file that is its only argument."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(kinds)
    with deepspeed_on_cpu():
        if len(argv) == 1 and argv[0].endswith(".json"):
            return tuple(parser.parse_json_file(argv[0]))
        return tuple(parser.parse_args_into_dataclasses(argv))

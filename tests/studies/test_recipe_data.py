"""What the recipes read, how it becomes tokens and labels, what is measured, and the arguments of the originals."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

datasets = pytest.importorskip("datasets")
finetune_deepseekcoder = pytest.importorskip("finetune_deepseekcoder")
glue_data = pytest.importorskip("glue_data")
glue_tasks = pytest.importorskip("glue_tasks")
instructions = pytest.importorskip("instructions")
run_glue = pytest.importorskip("run_glue")
tokenizer = pytest.importorskip("recipe_models").tokenizer


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_torchmetrics(seed: int) -> None:
    functional = pytest.importorskip("torchmetrics.functional")
    generator = torch.Generator().manual_seed(seed)
    guesses, labels = torch.randint(2, (2, 40), generator=generator)
    numbers, truths = torch.randint(5, (2, 40), generator=generator).double()  # with ties
    for ours, theirs, pair in (
        (glue_tasks.accuracy, functional.accuracy(guesses, labels, task="binary"), (guesses, labels)),
        (glue_tasks.f1, functional.f1_score(guesses, labels, task="binary"), (guesses, labels)),
        (glue_tasks.correlation, functional.matthews_corrcoef(guesses, labels, task="binary"), (guesses, labels)),
        (glue_tasks.correlation, functional.pearson_corrcoef(numbers, truths), (numbers, truths)),
        (glue_tasks.rank_correlation, functional.spearman_corrcoef(numbers, truths), (numbers, truths)),
        (glue_tasks.squared_error, functional.mean_squared_error(numbers, truths), (numbers, truths)),
    ):
        assert ours(*(values.numpy() for values in pair)) == pytest.approx(float(theirs), abs=1e-6)


def test_metrics_that_have_no_value_are_zero() -> None:
    constant, labels = torch.zeros(4).numpy(), torch.tensor([0.0, 1.0, 1.0, 0.0]).numpy()
    assert glue_tasks.correlation(constant, labels) == glue_tasks.f1(constant, constant) == 0.0
    both = glue_tasks.measured(glue_tasks.TASKS["mrpc"].metrics, labels, labels)
    assert both == {"accuracy": 1.0, "f1": 1.0, "combined_score": 1.0}
    assert glue_tasks.measured(glue_tasks.ACCURACY, constant, labels) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([7, 3, 3], ["3", "7"], [1, 0, 0]),
        (["no", "yes", "no"], ["no", "yes"], [0, 1, 0]),
        ([0.5, 1.5, 2.0], None, [0.5, 1.5, 2.0]),
        ([1, 0, -1], ["not_entailment", "entailment"], [1, 0, -1]),
    ],
)
def test_labels_are_numbered(labels: list[Any], names: list[str] | None, numbers: list[Any]) -> None:
    rows = datasets.Dataset.from_dict(
        {"id": [1, 2, 3], "one": ["a", "b", "c"], "two": ["d", "e", "f"], "label": labels}
    )
    if names is not None and labels[-1] == -1:
        rows = rows.cast_column("label", datasets.ClassLabel(names=names))
    values = glue_data.classes(rows)
    assert (values and list(values.values())) == names
    assert glue_data.text_columns(rows) == ["one", "two"]
    data = glue_data.DataArguments(dataset_name="x", max_seq_length=2, pad_to_max_length=False)
    found = glue_data.tokenized(datasets.DatasetDict(train=rows), ["one", "two"], values, tokenizer(), data)["train"]
    assert found["label"][:] == numbers
    assert [len(tokens) for tokens in found["input_ids"]] == [2, 2, 2]
    others = rows.remove_columns("label").add_column("label", ["maybe"] * 3)
    if names is not None:
        with pytest.raises(ValueError, match=r"labels that no training example has: \['maybe'\]"):
            glue_data.tokenized(datasets.DatasetDict(validation=others), ["one"], values, tokenizer(), data)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no data: pass --task_name, --dataset_name, or --train_file and --validation_file"),
        ({"task_name": "mlni"}, "--task_name is 'mlni'; choose one of cola, mnli"),
        ({"train_file": "a.csv", "validation_file": "b.json"}, "all end in one of .csv, .json, .jsonl: a.csv, b.json"),
    ],
)
def test_data_that_cannot_be_read_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glue_data.DataArguments(**given)


PAIRS = [{"instruction": " Add 1 and 2. ", "output": "3"}, {"instruction": "Say é.", "output": "    é\n\né"}]


@pytest.mark.parametrize("special", [["<|EOT|>"], []])
def test_the_loss_is_on_the_response(special: list[str]) -> None:
    encoder = tokenizer(*special)
    end = special[0] if special else "<end>"
    found = instructions.examples(datasets.Dataset.from_list(PAIRS), encoder, 1000, "Be brief.")
    for row, pair in zip(found, PAIRS, strict=True):
        asked = f"Be brief.\n### Instruction:\n{pair['instruction'].strip()}\n### Response:\n"
        assert encoder.decode(row["input_ids"]) == f"{asked}{pair['output']}\n{end}"
        counted = [label for label in row["labels"] if label != instructions.IGNORED]
        assert encoder.decode(counted) == f"{pair['output']}\n{end}"
        assert row["labels"] == [instructions.IGNORED] * len(encoder(asked)["input_ids"]) + counted
    assert instructions.prompt("x", "") == "### Instruction:\nx\n### Response:\n"


def test_what_is_too_long_is_cut_or_dropped() -> None:
    rows = datasets.Dataset.from_list([*PAIRS, {"instruction": "x" * 50, "output": "y"}])
    whole = instructions.examples(rows, tokenizer(), 1000, "")["input_ids"][:]
    cut = instructions.examples(rows, tokenizer(), len(whole[0]) - 1, "")
    assert cut["input_ids"][:] == [tokens[: len(whole[0]) - 1] for tokens in whole[:2]]
    with pytest.raises(ValueError, match="none of 3 examples has a response within 10 tokens; raise"):
        instructions.examples(rows, tokenizer(), 10, "")
    with pytest.raises(ValueError, match=r"no column \['output'\], only \['instruction'\]"):
        instructions.examples(rows.remove_columns("output"), tokenizer(), 10, "")


ROBERTA = """--model_name_or_path roberta-base --task_name mnli --use_lora --target_modules "query, value" --do_train
    --per_device_train_batch_size 32 --per_device_eval_batch_size 128 --max_seq_length 128 --eval_steps 500
    --save_steps 500 --logging_steps 10 --num_train_epochs 3 --learning_rate 5e-5 --loraplus_lr_ratio 80 --lora_rank 8
    --lora_alpha 8 --lr_scheduler_type 'linear' --adam_beta1 0.9 --adam_beta2 0.99 --adam_epsilon 1e-8
    --output_dir out --logging_dir out/logs --evaluation_strategy steps --save_strategy steps --report_to tensorboard
    --keep_checkpoints eval --overwrite_output_dir --ignore_mismatched_sizes --save_total_limit 1"""
CODER = """--model_name_or_path m --data_path d --output_dir o --num_train_epochs 1 --model_max_length 1024
    --per_device_train_batch_size 4 --per_device_eval_batch_size 1 --gradient_accumulation_steps 4
    --evaluation_strategy "no" --save_strategy "steps" --save_steps 1562 --save_total_limit 100 --learning_rate 2e-4
    --warmup_steps 10 --logging_steps 1 --lr_scheduler_type "cosine" --gradient_checkpointing True
    --report_to "tensorboard" --bf16 False"""
"""The original scripts' command lines, without what asks for a GPU."""


def test_the_arguments_of_the_originals_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    kinds = run_glue.ClassifierArguments, run_glue.DataArguments, run_glue.GlueArguments
    source, data, args = run_glue.parsed(kinds, shlex.split(ROBERTA))
    assert (source.model_name_or_path, data.task_name, data.pad_to_max_length) == ("roberta-base", "mnli", True)
    assert (args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_use_original_init) == (8, 8, 0.1, False)
    assert (args.loraplus_lr_ratio, args.loraplus_lr_embedding, args.learning_rate) == (80, 1e-6, 5e-5)
    assert (args.eval_strategy, os.environ["TENSORBOARD_LOGGING_DIR"]) == ("steps", "out/logs")
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"model_name_or_path": "m", "task_name": "RTE", "output_dir": "o"}))
    assert run_glue.parsed(kinds, [str(file)])[1].task_name == "rte"

    coder = finetune_deepseekcoder
    with pytest.warns(FutureWarning, match="`gradient_checkpointing` is deprecated"):
        _, _, args = coder.parsed(
            (coder.ModelArguments, coder.InstructionData, coder.InstructionArguments), shlex.split(CODER)
        )
    assert (args.lora_rank, args.lora_alpha, args.lora_dropout, args.loraplus_lr_ratio) == (8, 32, 0.1, 16)


@pytest.mark.parametrize(
    "section",
    [
        {
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
            }
        },
        {"scheduler": {"type": "WarmupLR", "params": dict.fromkeys(["warmup_min_lr", "warmup_max_lr"], "auto")}},
    ],
    ids=lambda section: next(iter(section)),
)
def test_the_deepspeed_config_lacks_the_sections_that_are_refused(section: dict[str, Any]) -> None:
    check_config = pytest.importorskip("lora_plus.engines.deepspeed").check_config
    config = json.loads(Path(finetune_deepseekcoder.__file__).with_name("ds_config_zero3.json").read_text())
    check_config(config)
    with pytest.raises(ValueError, match=f"LoRA(.|\n)*{next(iter(section))}"):
        check_config(config | section)

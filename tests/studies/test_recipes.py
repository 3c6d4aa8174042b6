"""Whole runs of the recipes, on tiny models in one process and in two, and on pretrained ones."""

from __future__ import annotations

import json
import os
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_model import distance
from processes import Processes

import lora_plus as lp
from examples.demo.assets import AssetError
from lora_plus.files import adapter_state_dict

transformers = pytest.importorskip("transformers")
state = pytest.importorskip("accelerate.state")
finetune_deepseekcoder = pytest.importorskip("finetune_deepseekcoder")
run_glue = pytest.importorskip("run_glue")
recipe_models = pytest.importorskip("recipe_models")
prepare_recipes = pytest.importorskip("prepare_recipes")

CONFIG = Path(finetune_deepseekcoder.__file__).with_name("ds_config_zero3.json")
QUIET = shlex.split("--disable_tqdm True --dataloader_pin_memory False --report_to none --logging_strategy no")
ALONE = [*QUIET, "--use_cpu", "True"]


def forget_accelerate() -> None:
    """Forget what the run before was under; accelerate keeps that for the process, and in the environment."""
    state.AcceleratorState._reset_state(True)
    state.GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def classify(folder: Path, kind: str, out: str, *more: str) -> dict[str, float]:
    argv = f"""--model_name_or_path {folder / kind} --train_file {folder}/train.json --learning_rate 5e-3
        --validation_file {folder}/validation.json --cache_dir {folder}/cache --output_dir {folder / out}
        --target_modules '{recipe_models.CLASSIFIERS[kind][2]}' --loraplus_lr_ratio 4 --lora_rank 4 --max_seq_length 16
        --lora_dropout 0 --save_strategy no"""
    forget_accelerate()
    return run_glue.main([*shlex.split(argv), *ALONE, *more])


@pytest.mark.parametrize("kind", recipe_models.CLASSIFIERS)
def test_a_classifier_learns_and_its_adapter_gives_the_same_metrics(tmp_path: Path, kind: str) -> None:
    recipe_models.save_classifier(tmp_path / kind, kind)
    names = "even", "odd"
    recipe_models.write_sentences(tmp_path, names.__getitem__)
    (tmp_path / "test.json").write_text("".join((tmp_path / "validation.json").read_text().splitlines(True)[:5]))
    settings = f"""--lora_use_original_init --per_device_train_batch_size 16 --max_steps 40 --save_strategy steps
        --save_steps 20 --keep_checkpoints eval --test_file {tmp_path}/test.json --do_predict True"""
    found = classify(tmp_path, kind, "out", *shlex.split(settings))
    assert found["eval_accuracy"] >= 0.95
    assert json.loads((tmp_path / "out/eval_results.json").read_text()) == found
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    first, *predicted = (tmp_path / "out/predict_results.txt").read_text().splitlines()
    assert first == "index\tprediction"
    assert [line.partition("\t")[0] for line in predicted] == ["0", "1", "2", "3", "4"]
    assert {line.partition("\t")[2] for line in predicted} <= set(names)

    other_head = "--seed", "1", "--adapter_path", str(tmp_path / "out"), "--no_do_train"
    again = classify(tmp_path, kind, "again", *other_head)
    for metric in ("eval_loss", "eval_accuracy"):
        assert again[metric] == found[metric]


def test_numbers_are_predicted_and_the_first_layer_of_robertas_head_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_models.save_classifier(tmp_path / "roberta", "roberta")
    recipe_models.write_sentences(tmp_path, lambda n: n - 0.5)
    trainers: list[Any] = []
    build = run_glue.LoraPlusTrainer
    monkeypatch.setattr(run_glue, "LoraPlusTrainer", lambda **given: trainers.append(build(**given)) or trainers[0])
    found = classify(tmp_path, "roberta", "out", "--max_steps", "100")
    assert found["eval_mse"] < 0.15  # 0.25 without learning
    trained = {name for name, parameter in trainers[0].model.named_parameters() if parameter.requires_grad}
    assert {"classifier.out_proj.weight", "classifier.out_proj.bias"} <= trained
    assert not {"classifier.dense.weight", "classifier.dense.bias"} & trained


def test_layers_to_adapt_must_be_named(tmp_path: Path) -> None:
    recipe_models.save_classifier(tmp_path / "bert", "bert")
    recipe_models.write_sentences(tmp_path, str)
    with pytest.raises(ValueError, match="--target_modules is missing"):
        classify(tmp_path, "bert", "out", "--target_modules", "")


def instruct(folder: Path, out: str, *more: str) -> dict[str, float]:
    argv = f"""--model_name_or_path {folder}/llama --data_path {folder}/train.json --eval_data_path
        {folder}/validation.json --cache_dir {folder}/cache --output_dir {folder / out} --system_prompt ''
        --lora_dropout 0 --learning_rate 2e-3 --adam_epsilon 1e-4 --max_steps 4 --save_strategy no"""
    forget_accelerate()
    return finetune_deepseekcoder.main([*shlex.split(argv), *more])


def test_a_language_model_learns_and_its_adapter_gives_the_same_loss(tmp_path: Path) -> None:
    recipe_models.save_llama(tmp_path / "llama")
    recipe_models.write_instructions(tmp_path)
    before = instruct(tmp_path, "before", "--no_do_train", *ALONE)
    found = instruct(tmp_path, "out", "--activation_checkpointing", "True", *ALONE)
    assert found["eval_loss"] < before["eval_loss"] - 0.1
    saved = "--adapter_path", str(tmp_path / "out")
    assert instruct(tmp_path, "again", *saved, "--no_do_train", *ALONE)["eval_loss"] == found["eval_loss"]
    assert instruct(tmp_path, "more", *saved, *ALONE)["eval_loss"] < found["eval_loss"]


def test_training_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    recipe_models.save_llama(tmp_path / "llama")
    recipe_models.write_instructions(tmp_path)
    steady = [*ALONE, "--lr_scheduler_type", "constant", "--save_strategy", "steps", "--save_steps", "2"]
    whole = instruct(tmp_path, "whole", *steady)
    instruct(tmp_path, "parts", *steady, "--max_steps", "2")
    assert instruct(tmp_path, "parts", *steady)["eval_loss"] == whole["eval_loss"]
    anew = instruct(tmp_path, "parts", *steady, "--max_steps", "2", "--overwrite_output_dir")
    assert anew["eval_loss"] > whole["eval_loss"]


def instruct_on_a_rank(folder: Path, out: str, more: list[str]) -> dict[str, float]:
    for message in (r"`torch\.distributed\.\w+` is deprecated", r".*was deprecated, use"):  # DeepSpeed's own calls
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    half = "--per_device_train_batch_size 4 --per_device_eval_batch_size 8"
    return instruct(folder, out, *shlex.split(half), *QUIET, *more)


def adapter_of(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    return adapter_state_dict(lp.load_adapter(model, folder))


def test_two_processes_under_ddp_and_zero_3_train_as_one(tmp_path: Path, two_processes: Processes) -> None:
    pytest.importorskip("deepspeed")
    recipe_models.save_llama(tmp_path / "llama")
    recipe_models.write_instructions(tmp_path)
    whole = "--per_device_train_batch_size 8 --per_device_eval_batch_size 16"
    one = instruct(tmp_path, "one", *shlex.split(whole), *ALONE)
    runs = {"one": one}  # with an epsilon above the noise of gradients that are nearly zero
    for out, more in {"ddp": ["--use_cpu", "True"], "zero3": ["--deepspeed", str(CONFIG)]}.items():
        runs[out], other = two_processes(instruct_on_a_rank, tmp_path, out, more)
        assert other["eval_loss"] == runs[out]["eval_loss"]
    base = transformers.LlamaForCausalLM
    adapters = {out: adapter_of(base.from_pretrained(tmp_path / "llama"), tmp_path / out) for out in runs}
    for out, adapter in adapters.items():
        assert runs[out]["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-5)
        assert distance(adapter, adapters["one"]) <= 1e-6


def classify_on_a_rank(folder: Path, out: str) -> dict[str, float]:
    parts = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --max_grad_norm 0.1 --max_steps 3"
    return classify(folder, "bert", out, *shlex.split(parts))


def test_two_processes_classify_as_one(tmp_path: Path, two_processes: Processes) -> None:
    recipe_models.save_classifier(tmp_path / "bert", "bert")
    recipe_models.write_sentences(tmp_path, str)
    whole = "--per_device_train_batch_size 16 --max_grad_norm 0.1 --max_steps 3"
    runs = classify(tmp_path, "bert", "one", *shlex.split(whole)), two_processes(classify_on_a_rank, tmp_path, "two")[0]
    assert runs[0]["eval_loss"] == pytest.approx(runs[1]["eval_loss"], abs=1e-5)
    base = transformers.BertForSequenceClassification
    one, two = (adapter_of(base.from_pretrained(tmp_path / "bert"), tmp_path / out) for out in ("one", "two"))
    assert distance(one, two) <= 1e-6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretrained models and their data."""
    folder = tmp_path_factory.mktemp("recipe-data")
    try:
        for part, prepare in prepare_recipes.PARTS.items():
            prepare(folder / part)
    except AssetError as error:
        pytest.skip(str(error))
    return folder


def pretrained(program: Any, prepared: Path, out: Path, model: str, argv: str) -> list[dict[str, float]]:
    """The metrics before a run, after it, and of the adapter that it saved."""
    start = f"--model_name_or_path {prepared / model} --cache_dir {out}/cache --lora_dropout 0"
    found = []
    for name, more in {
        "before": ["--no_do_train"],
        "after": [],
        "again": ["--no_do_train", "--adapter_path", str(out / "after")],
    }.items():
        forget_accelerate()
        found.append(program.main([*shlex.split(f"{start} --output_dir {out / name} {argv}"), *ALONE, *more]))
    return found


@pytest.mark.slow
def test_a_pretrained_encoder_learns(prepared: Path, tmp_path: Path) -> None:
    data = prepared / "glosses"
    argv = f"""--train_file {data}/train.json --validation_file {data}/validation.json --lora_use_original_init
        --target_modules 'query, key, value, dense' --learning_rate 1e-3 --loraplus_lr_ratio 4 --no_pad_to_max_length
        --max_train_samples 1280 --max_eval_samples 100 --max_seq_length 32 --per_device_train_batch_size 16
        --num_train_epochs 1 --save_strategy no"""
    before, after, again = pretrained(run_glue, prepared, tmp_path, "minilm", argv)
    assert after["eval_loss"] < before["eval_loss"] - 0.3
    assert again["eval_loss"] == after["eval_loss"]


@pytest.mark.slow
def test_a_pretrained_language_model_learns(prepared: Path, tmp_path: Path) -> None:
    data, few = prepared / "phonemes", tmp_path / "few.json"
    few.write_text("".join((data / "validation.json").read_text().splitlines(True)[:8]))
    argv = f"""--data_path {data}/train.json --eval_data_path {few} --system_prompt '' --learning_rate 1e-3
        --loraplus_lr_ratio 4 --per_device_train_batch_size 4 --max_steps 8 --save_strategy no"""
    before, after, again = pretrained(finetune_deepseekcoder, prepared, tmp_path, "smollm2", argv)
    assert after["eval_loss"] < before["eval_loss"] - 2
    assert again["eval_loss"] == after["eval_loss"]

"""Sentences and their labels: from GLUE, another data set of the hub, or files; as the tokens that a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from glue_tasks import TASKS
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass
class DataArguments:
    task_name: str | None = HfArg(default=None, help=f"a task of GLUE: {', '.join(TASKS)}")
    dataset_name: str | None = HfArg(default=None, help="another data set of the hub")
    dataset_config_name: str | None = HfArg(default=None, help="its configuration")
    train_file: str | None = HfArg(default=None, help="a csv or json file with one or two texts and a label")
    validation_file: str | None = HfArg(default=None, help="the same for evaluation")
    test_file: str | None = HfArg(default=None, help="the same for --do_predict")
    use_local: bool = HfArg(default=False, help="read DATA_DIR/glue/TASK_NAME, written by save_to_disk")
    data_dir: str = HfArg(default="data", help="for --use_local")
    max_seq_length: int = HfArg(default=128, help="tokens of an example at most")
    pad_to_max_length: bool = HfArg(default=True, help="to one length; otherwise to that of the longest in a batch")
    overwrite_cache: bool = HfArg(default=False, help="tokenize again what was tokenized before")
    max_train_samples: int | None = HfArg(default=None, help="train on the first few examples only")
    max_eval_samples: int | None = HfArg(default=None, help="evaluate the first few examples only")
    max_predict_samples: int | None = HfArg(default=None, help="predict for the first few examples only")

    def __post_init__(self) -> None:
        files = [file for file in (self.train_file, self.validation_file, self.test_file) if file]
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in TASKS:
                raise ValueError(f"--task_name is {self.task_name!r}; choose one of {', '.join(TASKS)}")
        elif self.dataset_name is None and not (self.train_file and self.validation_file):
            raise ValueError("no data: pass --task_name, --dataset_name, or --train_file and --validation_file")
        kinds = {Path(file).suffix for file in files}
        if len(kinds) > 1 or not kinds <= BUILDERS.keys():
            raise ValueError(f"the data files must all end in one of {', '.join(BUILDERS)}: {', '.join(files)}")


def load(data: DataArguments, cache_dir: str | None) -> DatasetDict:
    """The splits, as they are stored."""
    if data.task_name is not None and data.use_local:
        return load_from_disk(Path(data.data_dir, "glue", data.task_name))
    if data.task_name is not None:
        return load_dataset("nyu-mll/glue", data.task_name, cache_dir=cache_dir)
    if data.dataset_name is not None:
        return load_dataset(data.dataset_name, data.dataset_config_name, cache_dir=cache_dir)
    files = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    given = {split: file for split, file in files.items() if file}
    return load_dataset(BUILDERS[Path(given["train"]).suffix], data_files=given, cache_dir=cache_dir)


def classes(rows: Dataset) -> dict[Any, str] | None:
    """The values that the column ``label`` can have, in the order of their numbers, with their names.

    None where the labels are numbers to be predicted: of a floating-point type.
    """
    kind = rows.features["label"]
    if isinstance(kind, ClassLabel):
        return dict(enumerate(kind.names))
    return None if kind.dtype.startswith("float") else {value: str(value) for value in sorted(rows.unique("label"))}


def text_columns(rows: Dataset) -> list[str]:
    """The first two columns with text, or the only one."""
    texts = [name for name, kind in rows.features.items() if getattr(kind, "dtype", "").endswith("string")]
    return [name for name in texts if name != "label"][:2]


def tokenized(
    splits: DatasetDict,
    columns: Sequence[str],
    values: dict[Any, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
) -> DatasetDict:
    """The splits with tokens, and the numbers of the labels; -1 stays, where GLUE keeps a label to itself.

    Raises:
        ValueError: if a split has a label that the training split lacks.
    """
    number = None if values is None else {-1: -1} | {value: n for n, value in enumerate(values)}
    settings = {
        "truncation": True,
        "max_length": min(data.max_seq_length, tokenizer.model_max_length),
        "padding": "max_length" if data.pad_to_max_length else False,
    }

    def encoded(rows: dict[str, list[Any]]) -> dict[str, Any]:
        found = dict(tokenizer(*(rows[column] for column in columns), **settings))
        if number is not None and "label" in rows:
            if unknown := set(rows["label"]) - number.keys():
                raise ValueError(f"labels that no training example has: {sorted(map(str, unknown))}")
            found["label"] = [number[label] for label in rows["label"]]
        return found

    return splits.map(encoded, batched=True, load_from_cache_file=not data.overwrite_cache)


def first(rows: Dataset, count: int | None) -> Dataset:
    """The first ``count`` rows, or all."""
    return rows if count is None else rows.select(range(min(count, len(rows))))

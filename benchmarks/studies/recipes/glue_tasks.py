"""The tasks of GLUE (Wang et al. 2018, arXiv:1804.07461): their columns, their splits and how each is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Values = np.ndarray[Any, np.dtype[Any]]


def accuracy(predictions: Values, labels: Values) -> float:
    return float((predictions == labels).mean())


def f1(predictions: Values, labels: Values) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where it is neither predicted nor meant."""
    found, wrong = ((predictions == 1) & (labels == 1)).sum(), ((predictions == 1) != (labels == 1)).sum()
    return float(2 * found / max(2 * found + wrong, 1))


def correlation(predictions: Values, labels: Values) -> float:
    """Pearson's, which for classes 0 and 1 is Matthews'; 0 where either is constant."""
    x, y = (values - values.mean(dtype=np.float64) for values in (predictions, labels))
    return float((x * y).sum() / (np.sqrt((x * x).sum() * (y * y).sum()) or 1.0))


def rank_correlation(predictions: Values, labels: Values) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing the mean of theirs."""
    return correlation(_ranks(predictions), _ranks(labels))


def _ranks(values: Values) -> Values:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Values = (counts.cumsum() - (counts - 1) / 2)[places]
    return ranks


def squared_error(predictions: Values, labels: Values) -> float:
    return float(((predictions - labels) ** 2).mean())


Metrics = Mapping[str, Callable[[Values, Values], float]]
ACCURACY: Metrics = {"accuracy": accuracy}


@dataclass(frozen=True)
class Task:
    """A task of GLUE on the hub."""

    columns: Sequence[str]
    """The sentence, or the two."""
    metrics: Metrics = field(default_factory=lambda: ACCURACY)
    endings: Mapping[str, str] = field(default_factory=lambda: {"": ""})
    """Of the names of its evaluation splits, and what they put behind the names of their metrics."""


TASKS = {
    "cola": Task(["sentence"], {"matthews_correlation": correlation}),
    "mnli": Task(["premise", "hypothesis"], endings={"_matched": "", "_mismatched": "_mm"}),
    "mrpc": Task(["sentence1", "sentence2"], {"accuracy": accuracy, "f1": f1}),
    "qnli": Task(["question", "sentence"]),
    "qqp": Task(["question1", "question2"], {"accuracy": accuracy, "f1": f1}),
    "rte": Task(["sentence1", "sentence2"]),
    "sst2": Task(["sentence"]),
    "stsb": Task(["sentence1", "sentence2"], {"pearson": correlation, "spearmanr": rank_correlation}),
    "wnli": Task(["sentence1", "sentence2"]),
}


def measured(metrics: Metrics, predictions: Values, labels: Values) -> dict[str, float]:
    """Each metric by its name, and the mean of several as ``combined_score``."""
    values = {name: metric(predictions, labels) for name, metric in metrics.items()}
    return values if len(values) == 1 else values | {"combined_score": float(np.mean(list(values.values())))}

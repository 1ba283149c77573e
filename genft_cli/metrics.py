"""Metrics of classification and regression, by the names that GLUE uses."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from genft_cli.console import UserError

Metric = Callable[[Any, Any, int], float]  # of the labels [M], the predictions [M] and the number of classes


class Glue(NamedTuple):
    """A task of GLUE: its text columns, the metrics that the benchmark reports, and its evaluation split."""

    columns: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    split: str = "validation"


GLUE = {
    "cola": Glue(("sentence",), ("matthews_correlation",)),
    "sst2": Glue(("sentence",)),
    "mrpc": Glue(("sentence1", "sentence2"), ("accuracy", "f1")),
    "stsb": Glue(("sentence1", "sentence2"), ("pearson", "spearman")),
    "qqp": Glue(("question1", "question2"), ("accuracy", "f1")),
    "mnli": Glue(("premise", "hypothesis"), split="validation_matched"),
    "qnli": Glue(("question", "sentence")),
    "rte": Glue(("sentence1", "sentence2")),
    "wnli": Glue(("sentence1", "sentence2")),
}


def _accuracy(labels: Any, found: Any, count: int) -> float:
    from sklearn.metrics import accuracy_score  # type: ignore[import-untyped] # has no types

    return float(accuracy_score(labels, found))


def _f1(labels: Any, found: Any, count: int) -> float:
    """Of class 1 if there are two classes, as in GLUE; else the mean over the classes."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, found, average="binary" if count == 2 else "macro", zero_division=0))


def _matthews(labels: Any, found: Any, count: int) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, found))


def _mean_per_class(labels: Any, found: Any, count: int) -> float:
    from sklearn.metrics import recall_score

    return float(recall_score(labels, found, labels=sorted(set(labels.tolist())), average="macro", zero_division=0))


def _correlation(name: str) -> Metric:
    def correlation(labels: Any, found: Any, count: int) -> float:
        from scipy import stats  # type: ignore[import-untyped] # has no types

        if len(labels) < 2:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            value = float(getattr(stats, name)(labels, found)[0])
        return value if math.isfinite(value) else 0.0  # predictions or labels are constant

    return correlation


CLASSES: dict[str, Metric] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "mean_per_class_accuracy": _mean_per_class,
}
NUMBERS: dict[str, Metric] = {
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}


def check_metrics(names: Sequence[str], regression: bool) -> None:
    """Raise UserError for a name that is unknown or does not fit, and if scikit-learn is missing."""
    known = NUMBERS if regression else CLASSES
    for name in names:
        if name not in known:
            kind = "numbers" if regression else "classes"
            raise UserError(f"--metrics {name}: the labels are {kind}; choose from {', '.join(known)}")
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("--metrics: needs scikit-learn: pip install 'genft[train]'")


def metric_function(names: Sequence[str], regression: bool) -> Callable[[Any], dict[str, float]]:
    """A function for the Trainer's `compute_metrics`: predictions and labels → {name: value}."""

    def compute(evaluation: Any) -> dict[str, float]:
        logits = evaluation.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits  # some models also return hidden states
        found = logits.reshape(-1) if regression else logits.argmax(-1)
        labels = evaluation.label_ids.reshape(-1)
        known = NUMBERS if regression else CLASSES
        return {name: known[name](labels, found, logits.shape[-1]) for name in names}

    return compute

"""Scores of classifiers, and intervals over seeds."""

from __future__ import annotations

import numpy as np
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score

CONFIDENCE = 0.95


def score_classes(truth: np.ndarray, predicted: np.ndarray, classes: list[str]) -> dict:
    """Return accuracy, balanced accuracy, macro-F1, per-class F1 and the confusion matrix.

    Parameters
    ----------
    truth, predicted
        int [cells], positions in `classes`. Only classes that occur in `truth` count in averages.
    """
    present = np.unique(truth)
    f1 = f1_score(truth, predicted, labels=present, average=None, zero_division=0.0)
    return {
        "accuracy": float((truth == predicted).mean()),
        "balanced_accuracy": float(
            balanced_accuracy_score(truth, predicted) if len(present) > 1 else np.nan
        ),
        "macro_f1": float(np.mean(f1)),
        "f1_by_class": {classes[c]: float(v) for c, v in zip(present, f1, strict=True)},
        "confusion": confusion_matrix(truth, predicted, labels=range(len(classes))).tolist(),
    }


def mean_and_interval(values: list[float]) -> dict[str, float]:
    """Return mean and Student's 95 % interval of a score over seeds (half-width NaN for one)."""
    array = np.asarray(values, dtype=np.float64)
    half = float("nan")
    if len(array) > 1:
        half = float(
            stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1)
            * array.std(ddof=1)
            / np.sqrt(len(array))
        )
    return {"mean": float(array.mean()), "half_width": half}

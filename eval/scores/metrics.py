"""Scores of classifiers, and confidence intervals over seeds."""

from __future__ import annotations

import numpy as np
from scipy import stats
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
)

CONFIDENCE = 0.95
CALIBRATION_BINS = 15


def score_classes(truth: np.ndarray, predicted: np.ndarray, classes: list[str]) -> dict:
    """Return accuracy, balanced accuracy, macro-F1, per-class F1 and the confusion matrix.

    Parameters
    ----------
    truth, predicted
        int [cells], indices into `classes`. Only classes that occur in `truth` count in averages.
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


def score_probabilities(truth: np.ndarray, probabilities: np.ndarray, classes: list[str]) -> dict:
    """Return the scores of the most likely classes, and scores of the probabilities.

    The first are those of `score_classes`. ``auprc`` is the mean over classes of the area under the
    precision-recall curve, one class against the others; NaN if the truth has only one class.
    ``ece`` and ``calibration``: see `calibration_error`.

    Parameters
    ----------
    truth
        int [cells], indices into `classes`.
    probabilities
        float [cells, classes], rows that sum to 1.

    Raises
    ------
    ValueError
        Shapes do not fit, a value is not finite, or rows do not sum to 1.
    """
    if probabilities.shape != (len(truth), len(classes)):
        raise ValueError(
            f"probabilities: shape {probabilities.shape}, expected {(len(truth), len(classes))}"
        )
    if not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3):
        raise ValueError("probabilities: not finite, or rows that do not sum to 1")
    present = np.unique(truth)
    areas = [average_precision_score(truth == c, probabilities[:, c]) for c in present]
    error, bins = calibration_error(truth, probabilities)
    return score_classes(truth, probabilities.argmax(axis=1), classes) | {
        "auprc": float(np.mean(areas)) if len(present) > 1 else float("nan"),
        "ece": error,
        "calibration": bins,
    }


def chance_macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return the average macro-F1 of these predictions if the truth were in random order.

    The value is exact, because F1 is linear in the hits if the sizes of the classes are fixed. Only
    classes that occur in `truth` count, as in `score_classes`.
    """
    classes, wanted = np.unique(truth, return_counts=True)
    given = np.array([(predicted == c).sum() for c in classes])
    return float(np.mean(2 * wanted * given / len(truth) / (wanted + given)))


def calibration_error(
    truth: np.ndarray, probabilities: np.ndarray, num_bins: int = CALIBRATION_BINS
) -> tuple[float, list[dict[str, float]]]:
    """Return the expected calibration error of the top probability, and its bins.

    Bins have equal width. The error is the mean over cells of the distance between a bin's mean top
    probability and its accuracy. A bin is ``{cells, confidence, accuracy}``; empty bins are left
    out.
    """
    top = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == truth
    place = np.clip(np.ceil(top * num_bins).astype(int) - 1, 0, num_bins - 1)
    bins = [
        {
            "cells": int((place == b).sum()),
            "confidence": float(top[place == b].mean()),
            "accuracy": float(right[place == b].mean()),
        }
        for b in np.unique(place)
    ]
    error = sum(b["cells"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(truth)
    return float(error), bins


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

"""Scores of genes told apart, with intervals over genes.

A gene counts once, however many cells it occurs in: an AUROC over occurrences weighs genes by how
common they are, and its folds hold thousands of dependent values of some dozen genes.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
    roc_curve,
)

from eval.scores.metrics import CONFIDENCE

HEADLINE = "auroc"
_ROC_POINTS = 51
_NUM_RESAMPLES = 1000


def score_genes(truth: np.ndarray, probability: np.ndarray) -> dict[str, float | None]:
    """Return AUROC, AUPRC, and balanced accuracy and macro-F1 at 0.5; both classes must occur.

    Parameters
    ----------
    truth
        int [genes], 0 or 1.
    probability
        float [genes], of class 1.
    """
    predicted = probability >= 0.5
    return {
        HEADLINE: float(roc_auc_score(truth, probability)),
        "auprc": float(average_precision_score(truth, probability)),
        "balanced_accuracy": float(balanced_accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0.0)),
    }


def mean_by_gene(gene: np.ndarray, probability: np.ndarray, num_genes: int) -> np.ndarray:
    """Return float64 [num_genes]: mean over a gene's occurrences, NaN where it has none.

    Parameters
    ----------
    gene
        int [occurrences], below `num_genes`.
    probability
        float [occurrences].
    """
    occurrences = np.bincount(gene, minlength=num_genes)
    total = np.bincount(gene, probability, minlength=num_genes)
    return np.divide(total, occurrences, out=np.full(num_genes, np.nan), where=occurrences > 0)


def mean_roc(truth: list[np.ndarray], probability: list[np.ndarray]) -> list[list[float]]:
    """Return [false positive rate, true positive rate] points: the mean curve of the folds.

    Averaged at fixed false positive rates, for probabilities of different folds have no common
    scale. The first point is (0, 0).
    """
    grid = np.linspace(0, 1, _ROC_POINTS)
    curves = []
    for labels, scores in zip(truth, probability, strict=True):
        false_rate, true_rate, _ = roc_curve(labels, scores)
        curves.append(np.interp(grid, false_rate, true_rate))
    mean = np.mean(curves, axis=0)
    points = zip(grid.tolist(), mean.round(4).tolist(), strict=True)
    return [[0.0, 0.0], *([round(false, 4), true] for false, true in points)]


def resample_genes(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return float32 [1000, genes]: how often each gene is drawn, with replacement, in its class.

    One matrix serves all folds, repetitions and contenders: a gene that is drawn twice counts
    twice wherever it is tested, so that repetitions do not pass for new genes.
    """
    rng = np.random.default_rng(seed)
    weights = np.zeros((_NUM_RESAMPLES, len(labels)), dtype=np.float32)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        share = np.full(len(of_class), 1 / len(of_class))
        weights[:, of_class] = rng.multinomial(len(of_class), share, size=_NUM_RESAMPLES)
    return weights


def resampled_auroc(
    labels: np.ndarray,
    tested: list[np.ndarray],
    probability: list[np.ndarray],
    weights: np.ndarray,
) -> np.ndarray:
    """Return float64 [resamples]: the mean AUROC of the folds for every resample of the genes.

    Parameters
    ----------
    labels
        int [genes], 0 or 1.
    tested
        Positions of the test genes of each fold.
    probability
        float [test genes] of each fold, out of fold.
    weights
        float32 [resamples, genes], see `resample_genes`. A fold in which a resample has one class
        only does not count for it.
    """
    values = []
    for genes, scores in zip(tested, probability, strict=True):
        is_positive = labels[genes] == 1
        positive, negative = scores[is_positive], scores[~is_positive]
        wins_PN = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
        weight_P, weight_N = weights[:, genes[is_positive]], weights[:, genes[~is_positive]]
        won = ((weight_P @ wins_PN.astype(np.float32)) * weight_N).sum(axis=1, dtype=np.float64)
        pairs = weight_P.sum(axis=1, dtype=np.float64) * weight_N.sum(axis=1, dtype=np.float64)
        values.append(np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0))
    return np.nanmean(values, axis=0)


def interval(values: np.ndarray) -> dict[str, float]:
    """Return the 95 % percentile interval of resampled values."""
    low, high = np.nanquantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"low": float(low), "high": float(high)}

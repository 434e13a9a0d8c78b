"""How well predicted shifts of expression fit measured ones."""

from __future__ import annotations

import math

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

# Genes with the largest measured shifts that scores look at.
TOP = (20, 100, 1000)
# Share of genes, those with the largest measured shifts, that count as affected.
AFFECTED = 0.05


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Return Pearson's correlation; 0.0 if one of the two does not vary, for it tells nothing."""
    one, other = first - first.mean(), second - second.mean()
    norm = float(np.linalg.norm(one) * np.linalg.norm(other))
    # Below this the spread is that of rounding.
    tiny = 1e-12 * (1 + float(np.abs(first).max()) * float(np.abs(second).max())) * len(first)
    return float(one @ other) / norm if norm > tiny else 0.0


def top_genes(measured: np.ndarray, number: int) -> np.ndarray:
    """Return int [number]: positions of the largest measured shifts, up or down, largest first."""
    return np.argsort(-np.abs(measured), kind="stable")[:number]


def affected_genes(measured: np.ndarray) -> np.ndarray:
    """Return bool [genes]: the 5 % that shift most, one gene at least.

    Of memberships (0 and 1), those that are 1.
    """
    if set(np.unique(measured)) <= {0.0, 1.0}:
        return measured == 1.0
    affected = np.zeros(len(measured), dtype=bool)
    affected[top_genes(measured, max(1, round(AFFECTED * len(measured))))] = True
    return affected


def score_shift(
    measured: np.ndarray, predicted: np.ndarray, typical: np.ndarray
) -> dict[str, float]:
    """Return the scores of one predicted shift.

    ``pearson_delta`` and ``l2`` (root of the summed squared error) over all genes and, where the
    data have so many, over the top 20, 100 and 1,000 of the measured shifts; ``pearson_specific``:
    Pearson's correlation after `typical` was taken from both.

    Parameters
    ----------
    measured, predicted, typical
        float [genes]; `typical` is the mean shift of the training perturbations.
    """
    scores = {
        "pearson_delta": pearson(measured, predicted),
        "pearson_specific": pearson(measured - typical, predicted - typical),
        "l2": float(np.linalg.norm(measured - predicted)),
    }
    for number in (n for n in TOP if n <= len(measured)):
        top = top_genes(measured, number)
        scores[f"pearson_delta_top{number}"] = pearson(measured[top], predicted[top])
        scores[f"l2_top{number}"] = float(np.linalg.norm(measured[top] - predicted[top]))
    return scores


def score_ranking(is_target: np.ndarray, strength: np.ndarray) -> dict[str, float]:
    """Return AUROC and AUPRC of genes ranked by `strength`; NaN where one class is empty."""
    if is_target.all() or not is_target.any():
        return {"auroc": float("nan"), "auprc": float("nan")}
    return {
        "auroc": float(roc_auc_score(is_target, strength)),
        "auprc": float(average_precision_score(is_target, strength)),
    }


def score_shifts(
    measured: np.ndarray,
    predicted: np.ndarray,
    scored: list[np.ndarray],
    typical: np.ndarray,
    only_ranks: bool,
) -> dict[str, float]:
    """Return means over perturbations of `score_ranking` of affected genes, and of `score_shift`.

    Parameters
    ----------
    measured, predicted
        float [perturbations, genes].
    scored
        bool [genes] of each perturbation: those that count.
    typical
        float [genes]: the mean shift of the training perturbations.
    only_ranks
        `predicted` orders genes by how much they move, and says nothing of shifts: it has no
        scores of these.
    """
    found = []
    for truth, row, keep in zip(measured, predicted, scored, strict=True):
        strength = row if only_ranks else np.abs(row)
        scores = score_ranking(affected_genes(truth[keep]), strength[keep])
        if not only_ranks:
            scores |= score_shift(truth[keep], row[keep], typical[keep])
        found.append(scores)
    return {k: mean_of_known([f[k] for f in found]) for k in found[0]}


def mean_of_known(values: list[float]) -> float:
    """Return the mean of what is finite; NaN where nothing is."""
    known = [v for v in values if math.isfinite(v)]
    return float(np.mean(known)) if known else math.nan


def rank_of_truth(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return float [perturbations]: share of the other measured shifts that fit worse than its own.

    1: a prediction fits its own perturbation best; 0.5: chance, and what a prediction that is the
    same for all perturbations gets on average. Fit is Pearson's correlation; ties count half. NaN
    for a single perturbation.

    Parameters
    ----------
    measured, predicted
        float [perturbations, genes].
    """
    number = len(measured)
    if number < 2:
        return np.full(number, np.nan)
    fit = _directions(predicted) @ _directions(measured).T
    own = np.diag(fit)[:, None]
    worse = (fit < own - 1e-12) + 0.5 * (np.abs(fit - own) <= 1e-12)
    return (worse.sum(axis=1) - 0.5) / (number - 1)


def _directions(rows: np.ndarray) -> np.ndarray:
    """Return rows of mean 0 and length 1; zeros for rows that do not vary."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    varies = length > 1e-9 * (1 + np.abs(rows).max())
    return np.divide(centred, length, out=np.zeros_like(centred), where=varies)

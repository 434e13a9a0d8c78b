"""Shifts of expression after perturbations that were not trained on, from those that were.

In all functions `values` are float64 [perturbations, genes], `train` and `test` int positions of
perturbations; they return float64 [test perturbations, genes].
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler

_ALPHAS = np.logspace(-1, 5, 7)


def ridge(features: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return float64 [wanted, genes]: shifts by a ridge regression on features of perturbations.

    One penalty for all genes, by leave-one-out on the training perturbations. A feature that is NaN
    takes its mean over them: a perturbation of which nothing is known gets about the mean shift.

    Parameters
    ----------
    features, values
        float [training perturbations, features] and [training perturbations, genes].
    wanted
        float [test perturbations, features].
    """
    known = np.isfinite(features)
    mean = np.where(known, features, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    scaler = StandardScaler().fit(np.where(known, features, mean))
    x = scaler.transform(np.where(known, features, mean))
    # Errors depend on inner products of rows alone: as many columns as rows do for the penalty.
    spread, axes = np.linalg.eigh(values @ values.T)
    penalty = RidgeCV(_ALPHAS).fit(x, axes * np.sqrt(np.maximum(spread, 0))).alpha_
    found = Ridge(penalty).fit(x, values)
    return found.predict(scaler.transform(np.where(np.isfinite(wanted), wanted, mean)))


def train_mean(values: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return the mean shift of training for every perturbation."""
    return np.tile(values[train].mean(axis=0), (len(test), 1))


def additive(
    values: np.ndarray,
    perturbed: list[tuple[str, ...]],
    train: np.ndarray,
    test: np.ndarray,
) -> np.ndarray:
    """Return sums of the shifts of single perturbations; an unmeasured one gets the mean single.

    `perturbed` are the genes of each perturbation.
    """
    single = {perturbed[i][0]: i for i in train if len(perturbed[i]) == 1}
    if not single:
        return train_mean(values, train, test)
    mean = values[list(single.values())].mean(axis=0)
    return np.stack(
        [
            np.sum([values[single[g]] if g in single else mean for g in genes], axis=0)
            for genes in (perturbed[i] for i in test)
        ]
    )


def scaled(
    similar: np.ndarray, values: np.ndarray, train: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """Return what is alike, float64 [perturbations, genes], scaled by least squares on training.

    The scale carries the sign: genes that go with a gene fall when it is knocked down.
    """
    known = similar[train]
    norm = float((known**2).sum())
    scale = float((known * values[train]).sum()) / norm if norm else 0.0
    return scale * similar[test]

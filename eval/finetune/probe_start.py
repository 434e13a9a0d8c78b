"""Start a head from the weights of a probe, a regression on states of the frozen encoder.

From random weights, a head that is trained on a few hundred labelled cells has hardly changed when
training ends, and its result says nothing reliable about pretraining: at 25 cells a class,
fine-tuning stayed .15 macro-F1 below logistic regression on the same frozen states. Therefore this
regression is fitted first, and its weights, folded into the linear layer, are the start of
fine-tuning.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from torch import nn

logger = logging.getLogger(__name__)

# The inverse strengths of the L2 penalty to try, and the number of folds that choose one.
PENALTIES = (0.003, 0.03, 0.3, 3.0)
_MOST_FOLDS = 3
# Where there are no folds. A choice among cells of the same donors says nothing about other donors:
# with it, COVID-19 was told from health .04 macro-F1 worse than with this (docs/results.md).
UNCHOSEN = 1.0
# A regression is fitted on at most so many states; a gene has one state in each cell that has it.
MOST_STATES = 20_000
_MOST_STEPS = 300


def start_from_probe(
    output: nn.Linear,
    states: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    balanced: bool,
    seed: int,
    each_group_once: bool = False,
) -> float:
    """Set a head to the weights of a regression on frozen states; return the chosen 1 / penalty.

    The states are standardised, and mean and scale are folded into the weights. The penalty is the
    one with the lowest log-loss in cross-validation by group, or `UNCHOSEN` where a class is in one
    group only. A class without examples gets a row of zeros and a bias below all others.

    Parameters
    ----------
    output
        The head's layer, [classes, width], which is overwritten.
    states, labels
        float32 [items, width] and int64 [items].
    groups
        [items], items of a group stay together in a fold: those of one cell or donor, or of one
        gene in all cells.
    balanced
        All classes have the same weight.
    each_group_once
        All groups have the same weight, however many items they have.
    """
    states, labels, groups = _at_most(states, labels, groups, seed)
    classes = np.unique(labels)
    if len(classes) < 2:
        return math.nan  # a regression cannot learn from one class
    scaler = StandardScaler().fit(states)
    scaled = scaler.transform(states)
    weigh = _Weights(groups, labels, balanced) if each_group_once else None
    losses = _losses(scaled, labels, groups, balanced, seed, weigh)
    strength = min(losses, key=lambda c: losses[c]) if losses else UNCHOSEN
    every = np.arange(len(labels))
    fitted = _fit(scaled, labels, strength, balanced, None if weigh is None else weigh.of(every))
    weights, bias = fitted.coef_, fitted.intercept_
    if len(classes) == 2:  # one row: log-odds of the second class
        weights, bias = np.stack([-weights[0], weights[0]]) / 2, np.array([-bias[0], bias[0]]) / 2
    weights = weights / scaler.scale_
    bias = bias - weights @ scaler.mean_
    with torch.no_grad():
        output.weight.zero_()
        output.bias.fill_(float(bias.min()) - 10)
        output.weight[classes] = torch.from_numpy(weights).to(output.weight)
        output.bias[classes] = torch.from_numpy(bias).to(output.bias)
    return strength


def heldout_loss(
    states: np.ndarray, labels: np.ndarray, groups: np.ndarray, balanced: bool, seed: int
) -> float:
    """Return the mean log-loss of held-out groups with the best penalty; 0 without folds.

    Parameters are those of `start_from_probe`.
    """
    states, labels, groups = _at_most(states, labels, groups, seed)
    if len(np.unique(labels)) < 2:
        return 0.0
    scaled = StandardScaler().fit_transform(states)
    return min(_losses(scaled, labels, groups, balanced, seed).values(), default=0.0)


def _at_most(
    states: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return at most `MOST_STATES` items."""
    if len(labels) <= MOST_STATES:
        return states, labels, groups
    random = np.random.default_rng(seed)
    chosen = np.sort(random.choice(len(labels), MOST_STATES, replace=False))
    return states[chosen], labels[chosen], groups[chosen]


@dataclass(frozen=True)
class _Weights:
    """Weights of items: all groups the same, and all classes, if they are to be balanced."""

    groups: np.ndarray
    labels: np.ndarray
    balanced: bool

    def of(self, items: np.ndarray) -> np.ndarray:
        """Return float64 [items], of items at some positions, with a mean of 1."""
        _, place, sizes = np.unique(self.groups[items], return_inverse=True, return_counts=True)
        weights = 1 / sizes[place]
        if self.balanced:
            labels = self.labels[items]
            weights /= np.maximum(np.bincount(labels, weights), 1e-300)[labels]
        return weights * len(items) / weights.sum()


def _losses(
    states: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    balanced: bool,
    seed: int,
    weigh: _Weights | None = None,
) -> dict[float, float]:
    """Return the mean log-loss over folds of each penalty; nothing where there are no folds."""
    folds = list(_folds(states, labels, groups, seed))
    losses = dict.fromkeys(PENALTIES, 0.0) if folds else {}
    for train, test in folds:
        known, asked = (None if weigh is None else weigh.of(x) for x in (train, test))
        for strength in losses:
            fitted = _fit(states[train], labels[train], strength, balanced, known)
            guessed = fitted.predict_proba(states[test])
            loss = log_loss(labels[test], guessed, labels=fitted.classes_, sample_weight=asked)
            losses[strength] += loss / len(folds)
    return losses


def _folds(
    states: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (training, test) items, in three folds, or in two if a class has only two groups."""
    fewest = min(len(np.unique(groups[labels == c])) for c in np.unique(labels))
    if fewest < 2:
        return
    number = min(fewest, _MOST_FOLDS)
    folds = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
    for train, test in folds.split(states, labels, groups):
        if set(labels[test]) <= set(labels[train]):
            yield train, test


def _fit(
    states: np.ndarray,
    labels: np.ndarray,
    strength: float,
    balanced: bool,
    weights: np.ndarray | None = None,
) -> LogisticRegression:
    """Return a regression; `weights` of the items replace those of the classes."""
    by_class = "balanced" if balanced and weights is None else None
    regression = LogisticRegression(C=strength, max_iter=_MOST_STEPS, class_weight=by_class)
    with warnings.catch_warnings():
        # A fit that has not quite converged is a good enough start.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return regression.fit(states, labels, sample_weight=weights)

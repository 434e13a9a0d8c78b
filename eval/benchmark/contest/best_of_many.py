"""How far the best of several baselines is ahead by chance: a max statistic over joint rotations.

Baselines meet the same folds, and all are compared with the same model, so that their differences
from it go together; a bound that takes them for unrelated (Bonferroni) asks for more than chance
gives. Here the folds are mixed anew, by the same rotation for all baselines, and the largest of
their t is looked at. Sign flips that are shared over baselines are the rotations that are usually
taken, but five folds have only 32 of them, and no p below 2 / 32 by a test of two sides. All
rotations together have no such limit: if the differences of a fold are normal, whatever their
dependence, each baseline's t over all rotations is Student's exactly (Langsrud, Statistics and
Computing 15, 2005), and one baseline alone has the p that it has by the t-test.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

# Rotations for each baseline; what a p is multiplied by is known to about 1 % of itself.
_DRAWS = 1_000
_HALVINGS = 40
_NO_SPREAD = 1e-12


class LargestT:
    """The largest of the t of several baselines in the same folds, if all are equally good."""

    def __init__(self, differences: np.ndarray, draws: int = _DRAWS) -> None:
        """Take float64 [folds, baselines], two folds or more; NaN where one is not known.

        A baseline that is not known in all folds is taken for unrelated to the others.
        """
        whole = np.isfinite(differences).all(axis=0)
        self._unrelated = int((~whole).sum())
        known = differences[:, whole]
        lengths = np.linalg.norm(known, axis=0)
        # One that always equals the model is never ahead.
        kept = lengths > _NO_SPREAD
        self._axes = known[:, kept] / lengths[kept]
        folds = len(differences)
        self._freedom = folds - 1
        # Of each baseline, the same draws whatever is asked: a direction beside its own, and a
        # place within its tail.
        beside = np.random.default_rng(0).normal(size=(draws, folds))
        self._beside = []
        for axis in self._axes.T:
            rest = beside - np.outer(beside @ axis, axis)
            self._beside.append(rest / np.linalg.norm(rest, axis=1, keepdims=True))
        self._places = (np.arange(draws) + 0.5) / draws

    def tail(self, t: float) -> float:
        """Return the probability that the largest t is at least `t`, a positive number.

        It is the sum over baselines of the probability that theirs is, which is Student's, times
        the mean of 1 / (how many are) where it is: between one such probability and their sum.
        """
        one = float(stats.t.sf(t, self._freedom))
        beyond = stats.t.isf(self._places * one, self._freedom)
        along = beyond / np.sqrt(self._freedom + beyond**2)
        least = t / np.sqrt(self._freedom + t**2) * (1 - 1e-9)
        total = float(self._unrelated)
        for axis, beside in zip(self._axes.T, self._beside, strict=True):
            directions = along[:, None] * axis + np.sqrt(1 - along**2)[:, None] * beside
            ahead = (directions @ self._axes >= least).sum(axis=1)
            total += float((1 / np.maximum(ahead, 1)).mean())
        return min(1.0, one * max(1.0, total))

    def critical(self, tail: float) -> float:
        """Return the t that the largest one reaches with this probability, below one half."""
        low = float(stats.t.isf(tail, self._freedom))
        number = max(1, self._axes.shape[1] + self._unrelated)
        high = float(stats.t.isf(tail / number, self._freedom))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.tail(middle) > tail else (low, middle)
        return high

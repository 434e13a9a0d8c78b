"""Estimate the null of a screen from the screen itself: the tails of genes without effect.

Standardised differences are a mixture of genes without effect, which follow a scaled t distribution
with unknown degrees of freedom, and of other genes further off. Both are fitted together, so that
true effects do not widen the null, and a heavy tail of the null is not taken for effects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special, stats

_FREEDOMS = (1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 11, 16, 25, 43)
# The weights are the likelihood to this power, which is below 1 because a fit is only nearly right.
_TEMPER = 0.5
_STEPS, _CONVERGED = 60, 1e-3
# The other genes lie at least so many robust standard deviations off, and their spread is at least
# so many.
_FURTHER_OFF, _NARROWEST = 2.5, 0.7
_UPPER_QUARTILE = float(stats.norm.ppf(0.75))


@dataclass(frozen=True)
class Null:
    """A mean of scaled t distributions, weighted by how well they fit.

    Attributes
    ----------
    weights, scales, freedoms
        float64 [t distributions]; the weights sum to 1.
    share_of_others
        Share of genes that do not belong to the null.
    """

    weights: np.ndarray
    scales: np.ndarray
    freedoms: np.ndarray
    share_of_others: float

    @property
    def deviation(self) -> float:
        """Return the robust standard deviation: that of the normal with the same quartiles."""
        quartiles = self.scales * stats.t.ppf(0.75, self.freedoms)
        return float(self.weights @ quartiles) / _UPPER_QUARTILE

    def p_values(self, z: np.ndarray) -> np.ndarray:
        """Return float64 [genes], two-sided tail probabilities, NaN where `z` is NaN."""
        tails = stats.t.sf(np.abs(z)[:, None] / self.scales, self.freedoms)
        return 2 * tails @ self.weights


def fit_null(z: np.ndarray) -> Null:
    """Return the null of standardised differences float [genes], NaN where unknown.

    The degrees of freedom are averaged over and not chosen: a heavier tail counts as far as it also
    explains the genes. Therefore few genes, or effects that merge into the null without a gap, give
    a null with heavy tails. If most differences are 0, nothing can be fitted, and the heaviest tail
    is used.
    """
    size = np.abs(z[np.isfinite(z)])
    if not len(size) or np.median(size) == 0:
        return Null(np.ones(1), np.ones(1), np.array(_FREEDOMS[:1]), 0.0)
    fits = np.array([_mixture(size, freedom) for freedom in _FREEDOMS])
    likelihoods, scales, shares = fits.T
    weights = np.exp(_TEMPER * (likelihoods - likelihoods.max()))
    weights /= weights.sum()
    return Null(weights, scales, np.array(_FREEDOMS), float(weights @ shares))


def _mixture(size: np.ndarray, freedom: float) -> tuple[float, float, float]:
    """Return log-likelihood, scale of the null and share of other genes, fitted by EM.

    The absolute values follow a folded t distribution, or a folded normal distribution for the
    others.
    """
    quartile = float(stats.t.ppf(0.75, freedom))
    peak = 2 * float(stats.t.pdf(0, freedom))
    scale = float(np.quantile(size, 0.4) / stats.t.ppf(0.7, freedom))
    far = size > 3 * np.median(size) / _UPPER_QUARTILE
    share = max(far.mean() / 2, _CONVERGED)
    middle = size[far].mean() if far.any() else size.max()
    width = max(size[far].std() if far.any() else 0.0, scale / 2)
    likelihood = -np.inf
    for _ in range(_STEPS):
        stretch = 1 + (size / scale) ** 2 / freedom
        null = peak / scale * stretch ** (-(freedom + 1) / 2)
        other = np.exp(-0.5 * ((size - middle) / width) ** 2)
        other /= width * np.sqrt(2 * np.pi) * special.ndtr(middle / width)
        both = (1 - share) * null + share * other
        before, likelihood = likelihood, float(np.log(both).sum())
        if likelihood - before < _CONVERGED:
            break
        is_other = share * other / both
        share = max(float(is_other.mean()), _CONVERGED / 10)
        pull = (1 - is_other) * (freedom + 1) / freedom / stretch
        scale = float(np.sqrt((pull * size**2).sum() / (1 - is_other).sum()))
        deviation = scale * quartile / _UPPER_QUARTILE
        middle = max((is_other * size).sum() / is_other.sum(), _FURTHER_OFF * deviation)
        spread = np.sqrt((is_other * (size - middle) ** 2).sum() / is_other.sum())
        width = max(spread, _NARROWEST * deviation)
    return likelihood, scale, share

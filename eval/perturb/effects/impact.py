"""Find a group of genes with impact by fitting one Gaussian and a mixture of two."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.mixture import GaussianMixture

FEWEST_GENES = 30
# A difference in BIC above this counts as very strong evidence (Kass & Raftery, 1995).
DECISIVE_BIC = 10.0


def impact_groups(values: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """Return whether one or two Gaussians fit better, and each gene's probability of impact.

    Parameters
    ----------
    values
        float [genes], NaN if unknown. The component with the larger mean square is the one with
        impact.

    Returns
    -------
    fit
        ``components`` (0: fewer than 30 genes; 2 only if its BIC is lower by more than 10),
        ``bic_one``, ``bic_two``, ``means``, ``deviations``, ``weights`` (the component with impact
        last).
    probability
        float [genes]; NaN unless there are two components.
    """
    probability = np.full(len(values), np.nan)
    known = np.isfinite(values)
    if known.sum() < FEWEST_GENES or np.ptp(values[known]) == 0:
        return {"components": 0}, probability
    scale = values[known].std()
    column = (values[known] / scale)[:, None]
    one, two = (
        GaussianMixture(n, n_init=5 if n > 1 else 1, random_state=0).fit(column) for n in (1, 2)
    )
    bic = {"bic_one": float(one.bic(column)), "bic_two": float(two.bic(column))}
    if bic["bic_one"] - bic["bic_two"] <= DECISIVE_BIC:
        return {"components": 1, **bic}, probability
    means, deviations = two.means_[:, 0], np.sqrt(two.covariances_[:, 0, 0])
    order = np.argsort(means**2 + deviations**2)
    probability[known] = two.predict_proba(column)[:, order[1]]
    fit = {
        "means": (means[order] * scale).tolist(),
        "deviations": (deviations[order] * scale).tolist(),
        "weights": two.weights_[order].tolist(),
    }
    return {"components": 2, **bic, **fit}, probability

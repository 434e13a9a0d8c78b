"""Compare a gene's effect with the null: the effects of genes with the same rank and detection.

Deleting any highly expressed gene changes a cell's embedding more than deleting a rare one. An
effect says something about a gene only if it differs from the effects of similar genes.
`match_genes` finds these genes, and `against_matched` compares every gene with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import stats
from scipy.spatial import cKDTree

from eval.perturb.effects.null import fit_null
from eval.perturb.effects.statistics import Test, over_donors

FEWEST_MATCHED = 10
# The robust standard deviations from which a gene is not used as null for others, for each pass.
# The first passes are stricter, because the standard deviations are too large while true effects
# are among the genes.
_OUTLYING = (2.0, 2.0, 2.0, 3.0, 3.0, 3.0)
_MAD_TO_SD, _MEAN_SIZE_TO_SD = 1.4826, 1.2533
# No gene is left out yet in the first pass. It therefore minimises absolute residuals, then uses
# Tukey's bisquare with this many robust standard deviations, for so many steps each.
_STEPS, _BISQUARE, _SMALLEST = 8, 2.0, 0.1
_BLOCK = 512  # genes at once: 512 x 50 matched x 20 donors are 4 MB
_RIDGE = 1e-3


def match_genes(mean_rank: np.ndarray, detection: np.ndarray, num_matched: int) -> np.ndarray:
    """Return for each gene the other genes nearest in mean rank and detection, nearest first.

    The distance is Euclidean between percentiles of both, so that their units do not matter.

    Parameters
    ----------
    mean_rank, detection
        float [genes], finite.

    Returns
    -------
    int [genes, min(num_matched, genes - 1)]
    """
    places = _percentiles(mean_rank, detection)
    wanted = min(num_matched, len(places) - 1)
    _, found = cKDTree(places).query(places, k=np.arange(1, wanted + 2))
    others = found != np.arange(len(places))[:, None]
    # If several genes have the same place, a gene may be missing among its own nearest genes.
    others[others.all(axis=1), -1] = False
    return found[others].reshape(len(places), wanted)


def _percentiles(*columns: np.ndarray) -> np.ndarray:
    return np.stack([stats.rankdata(c) / len(c) for c in columns], axis=1)


def against_matched(
    values: np.ndarray,
    mean_rank: np.ndarray,
    detection: np.ndarray,
    num_matched: int,
    test: Test = "t",
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return every gene's effect minus that of matched genes, and the differences by donor.

    The expected effect for a donor is computed from the effects of that donor's matched genes, by
    linear regression on rank and detection, evaluated at the gene's own place. This is the bias
    correction of Abadie & Imbens (2011): at the ends of the range all matched genes lie on one
    side. Genes that stand out must not be the null of others. A first regression, which a third of
    outlying genes on one side hardly changes, finds them, and further passes leave them out.

    Parameters
    ----------
    values
        float [genes, donors]: means over a donor's cells, NaN if there are none.

    Returns
    -------
    table
        Columns of `over_donors` for the differences, and ``num_matched``, ``null`` (mean expected
        effect), ``z`` (difference in robust standard deviations of similar genes), ``null_p`` (its
        tail in the null of all these genes, `fit_null`: is the gene further from similar genes than
        genes usually are?), ``empirical_p`` (share of matched genes that are as far off, at least 1
        / (num_matched + 1)).
    differences
        float [genes, donors]; NaN if fewer than 10 matched genes have a value.
    """
    matched = match_genes(mean_rank, detection, num_matched)
    places = _percentiles(mean_rank, detection)
    is_null = _first_nulls(values, places, matched)
    for cut in _OUTLYING[1:]:
        expected = _expected(values, places, matched, is_null)
        differences = values - expected
        distance = _row_means(differences)
        is_null = _are_null(distance, matched, is_null, cut)
    table = over_donors(differences, test)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = distance / _scale(distance, matched, is_null, _mean_size)
    z[distance == 0] = 0.0
    null = fit_null(z)
    size = np.abs(distance)
    usable = np.isfinite(size[matched])
    as_far = (usable & (size[matched] >= size[:, None])).sum(axis=1)
    table["num_matched"] = usable.sum(axis=1).astype(np.int32)
    table["null"] = _row_means(np.where(np.isfinite(differences), expected, np.nan))
    table["z"] = z / null.deviation
    table["null_p"] = null.p_values(z)
    table["empirical_p"] = np.where(
        np.isfinite(size), (1 + as_far) / (1 + usable.sum(axis=1)), np.nan
    )
    return table, differences


def _first_nulls(values: np.ndarray, places: np.ndarray, matched: np.ndarray) -> np.ndarray:
    """Return bool [genes]: False for outliers of the robust regression of the mean over donors."""
    every = np.ones(len(values), dtype=bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # for a donor without any value
        centred = _row_means(values - np.nanmedian(values, axis=0))[:, None]
    distance = (centred - _expected(centred, places, matched, every, robust=True))[:, 0]
    return _are_null(distance, matched, every, _OUTLYING[0])


def _are_null(
    distance: np.ndarray, matched: np.ndarray, is_null: np.ndarray, cut: float
) -> np.ndarray:
    return ~(np.abs(distance) > cut * _scale(distance, matched, is_null, _median_size))


def _expected(
    values: np.ndarray,
    places: np.ndarray,
    matched: np.ndarray,
    is_null: np.ndarray,
    robust: bool = False,
) -> np.ndarray:
    """Return float [genes, donors], the value of the local regression at each gene's place.

    The regression uses least squares, or is robust if `robust` is True.
    """
    expected = np.full(values.shape, np.nan)
    if matched.shape[1] < FEWEST_MATCHED:
        return expected
    for start in range(0, len(values), _BLOCK):
        near = matched[start : start + _BLOCK]
        offsets = places[near] - places[start : start + _BLOCK, None]
        offsets /= np.abs(offsets).max(axis=(1, 2), keepdims=True) + 1e-12
        terms = np.concatenate([np.ones((*near.shape, 1)), offsets], axis=2)
        known = (np.isfinite(values[near]) & is_null[near][:, :, None]).astype(np.float64)
        enough = known.sum(axis=1) >= FEWEST_MATCHED
        target = np.where(known > 0, values[near], 0.0)
        weights = known
        fitted = _solve(terms, target, weights, enough)
        for step in range(2 * _STEPS if robust else 0):
            size = np.abs(target - np.einsum("gki,gdi->gkd", terms, fitted))
            unit = size / (np.median(size, axis=1, keepdims=True) + 1e-300)
            if step < _STEPS:
                weights = known / np.maximum(unit, _SMALLEST)
            else:
                inside = 1 - (unit / (_BISQUARE * _MAD_TO_SD)) ** 2
                weights = known * (inside.clip(min=0) ** 2 + 1e-9)
            fitted = _solve(terms, target, weights, enough)
        expected[start : start + _BLOCK] = np.where(enough, fitted[..., 0], np.nan)
    return expected


def _solve(
    terms: np.ndarray, target: np.ndarray, weights: np.ndarray, enough: np.ndarray
) -> np.ndarray:
    """Return float [genes, donors, 3], the coefficients of the weighted regressions."""
    gram = np.einsum("gkij,gkd->gdij", terms[..., :, None] * terms[..., None, :], weights)
    right = np.einsum("gki,gkd->gdi", terms, target * weights)
    # The ridge is on the slopes alone, so that genes that all have the same place give the mean and
    # no error.
    total = np.maximum(weights.sum(axis=1), 1e-12)
    gram += _RIDGE * total[..., None, None] * np.diag([0.0, 1.0, 1.0])
    gram[~enough] = np.eye(3)
    return np.linalg.solve(gram, right[..., None])[..., 0]


def _median_size(sizes: np.ndarray) -> np.ndarray:
    return _MAD_TO_SD * np.nanmedian(sizes, axis=1)


def _mean_size(sizes: np.ndarray) -> np.ndarray:
    return _MEAN_SIZE_TO_SD * np.nanmean(sizes, axis=1)


def _scale(
    distance: np.ndarray,
    matched: np.ndarray,
    is_null: np.ndarray,
    of: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Return float [genes], the typical distance of those matched genes that belong to the null."""
    near = np.where(is_null[matched], np.abs(distance[matched]), np.nan)
    scale = np.full(len(distance), np.nan)
    enough = np.isfinite(near).sum(axis=1) >= FEWEST_MATCHED
    if enough.any():
        scale[enough] = of(near[enough])
    return scale


def _row_means(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=1) / known.sum(axis=1)

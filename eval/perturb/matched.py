"""What genes of the same rank and detection do: the null that a gene's effect is held against.

Deleting any highly expressed gene moves a cell's embedding more than deleting a rare one. An effect
says something about a gene only as far as it differs from the effects of genes like it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats
from scipy.spatial import cKDTree

from eval.perturb.statistics import Test, over_donors

FEWEST_MATCHED = 10
_OUTLYING = 3.5  # robust standard deviations: such a gene is no null for others
_MAD_TO_SD, _MAD_EFFICIENCY = 1.4826, 0.37
_BLOCK = 512  # genes at once: 512 x 50 matched x 20 donors are 4 MB
_RIDGE = 1e-3


def match_genes(mean_rank: np.ndarray, detection: np.ndarray, num_matched: int) -> np.ndarray:
    """Return for each gene the others nearest in mean rank and detection, nearest first.

    Distance is Euclid's between percentiles of both, so that neither unit counts.

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
    # Where genes share one place, a gene need not be among its own nearest.
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

    The expectation for a donor is the effect of that donor's matched genes, by linear regression
    on rank and detection read at the gene's own place (the bias correction of Abadie & Imbens,
    2011: at the ends of the range all matched genes lie on one side). Genes that stand out in a
    first pass are no null in the second.

    Parameters
    ----------
    values
        float [genes, donors]: means over a donor's cells, NaN where there are none.

    Returns
    -------
    table
        Columns of `over_donors` of the differences, and ``num_matched``, ``null`` (mean
        expectation), ``z`` (difference in robust standard deviations of the matched genes' own
        differences), ``null_p`` (its t tail: is the gene further off than matched genes are from
        each other?), ``empirical_p`` (share of matched genes as far off, at least
        1 / (num_matched + 1)).
    differences
        float [genes, donors]; NaN where fewer than 10 matched genes have a value.
    """
    matched = match_genes(mean_rank, detection, num_matched)
    places = _percentiles(mean_rank, detection)
    is_null = np.ones(len(values), dtype=bool)
    for _ in range(2):
        expected = _expected(values, places, matched, is_null)
        differences = values - expected
        table = over_donors(differences, test)
        z = _robust_z(table["mean"].to_numpy(), matched)
        is_null = ~(np.abs(z) > _OUTLYING)
    distance = table["mean"].abs().to_numpy()
    usable = np.isfinite(distance[matched])
    as_far = (usable & (distance[matched] >= distance[:, None])).sum(axis=1)
    freedom = _MAD_EFFICIENCY * (usable.sum(axis=1) - 1)
    known = np.isfinite(distance)
    table["num_matched"] = usable.sum(axis=1).astype(np.int32)
    table["null"] = _row_means(np.where(np.isfinite(differences), expected, np.nan))
    table["z"] = z
    table["null_p"] = 2 * stats.t.sf(np.abs(z), freedom)
    table["empirical_p"] = np.where(known, (1 + as_far) / (1 + usable.sum(axis=1)), np.nan)
    return table, differences


def _expected(
    values: np.ndarray, places: np.ndarray, matched: np.ndarray, is_null: np.ndarray
) -> np.ndarray:
    """Return float [genes, donors]: the local regression's value at each gene's place."""
    expected = np.full(values.shape, np.nan)
    if matched.shape[1] < FEWEST_MATCHED:
        return expected
    for start in range(0, len(values), _BLOCK):
        near = matched[start : start + _BLOCK]
        offsets = places[near] - places[start : start + _BLOCK, None]
        offsets /= np.abs(offsets).max(axis=(1, 2), keepdims=True) + 1e-12
        terms = np.concatenate([np.ones((*near.shape, 1)), offsets], axis=2)
        known = (np.isfinite(values[near]) & is_null[near][:, :, None]).astype(np.float64)
        gram = np.einsum("gkij,gkd->gdij", terms[..., :, None] * terms[..., None, :], known)
        target = np.einsum("gki,gkd->gdi", terms, np.where(known > 0, values[near], 0.0))
        count = known.sum(axis=1)
        # A ridge on the slopes alone: genes all at one place leave the mean, not an error.
        ridge = _RIDGE * np.maximum(count, 1)[..., None, None] * np.diag([0.0, 1.0, 1.0])
        gram += ridge
        enough = count >= FEWEST_MATCHED
        gram[~enough] = np.eye(3)
        fitted = np.linalg.solve(gram, target[..., None])[..., 0, 0]
        expected[start : start + _BLOCK] = np.where(enough, fitted, np.nan)
    return expected


def _robust_z(distance: np.ndarray, matched: np.ndarray) -> np.ndarray:
    """Return distances in standard deviations of the matched genes', from their median size."""
    near = np.abs(distance[matched])
    scale = np.full(len(distance), np.nan)
    enough = np.isfinite(near).sum(axis=1) >= FEWEST_MATCHED
    scale[enough] = _MAD_TO_SD * np.nanmedian(near[enough], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(distance == 0, 0.0, distance / scale)


def _row_means(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=1) / known.sum(axis=1)

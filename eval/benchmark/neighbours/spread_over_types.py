"""How much a gene's expression, or its rank, differs between types of cells."""

from __future__ import annotations

import numpy as np
import scipy.sparse


def indicator(groups: np.ndarray) -> scipy.sparse.csr_matrix:
    """Return CSR float32 [cells, groups]."""
    ones = np.ones(len(groups), dtype=np.float32)
    return scipy.sparse.csr_matrix((ones, (np.arange(len(groups)), groups)))


def seen_in_two_types(
    is_there: scipy.sparse.csr_matrix, types: np.ndarray, donors: np.ndarray, fewest: int
) -> np.ndarray:
    """Return bool [genes]: in `fewest` cells of each of two types of one donor.

    Parameters
    ----------
    is_there
        CSR bool [genes, cells].
    types, donors
        int64 [cells].
    """
    number = types.max() + 1
    counts = (is_there @ indicator(donors * number + types)).toarray() >= fewest
    donor_of = np.arange(counts.shape[1]) // number
    per_donor = [counts[:, donor_of == d].sum(axis=1) >= 2 for d in np.unique(donors)]
    return np.any(per_donor, axis=0)


def spread_over_types(
    profiles: scipy.sparse.csr_matrix, types: np.ndarray, donors: np.ndarray, where_found: bool
) -> np.ndarray:
    """Return float64 [genes]: standard deviation over types of their means, mean over donors.

    Parameters
    ----------
    profiles
        [genes, cells].
    types, donors
        int64 [cells].
    where_found
        Means over the cells that have the gene; types without one do not count. Else over all.
    """
    spreads = []
    for donor in np.unique(donors):
        cells = np.flatnonzero(donors == donor)
        of_type = indicator(np.unique(types[cells], return_inverse=True)[1])
        part = profiles[:, cells]
        sums = (part @ of_type).toarray()
        number = ((part > 0) @ of_type).toarray() if where_found else of_type.sum(axis=0)
        number = np.broadcast_to(np.asarray(number), sums.shape)
        means = np.divide(sums, number, out=np.full(sums.shape, np.nan), where=number > 0)
        spreads.append(np.where(np.isfinite(means).sum(axis=1) > 1, _std(means), np.nan))
    return np.nan_to_num(_mean(np.array(spreads)))


def _std(means: np.ndarray) -> np.ndarray:
    values = np.ma.masked_invalid(means)
    return np.ma.filled(values.std(axis=1), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    return np.ma.filled(np.ma.masked_invalid(values).mean(axis=0), np.nan)

"""Computes the sums of a block's cells and checks its values, in one pass over the values."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np


@dataclass(frozen=True)
class CountScan:
    """The result of one pass over a CSR block.

    Attributes
    ----------
    totals
        float64 [cells], sum of all counts of a cell.
    mitochondrial
        float64 [cells], sum of a cell's counts in mitochondrial genes.
    is_suspicious
        Whether some value is no natural number up to 2**53, zero included.
    """

    totals: np.ndarray
    mitochondrial: np.ndarray
    is_suspicious: bool


def scan_counts(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, mitochondrial: np.ndarray
) -> CountScan:
    """Return sums over the cells of a CSR block, and whether all its values may be counts.

    Parameters
    ----------
    mitochondrial
        bool [genes], True for mitochondrial genes.
    """
    weights = mitochondrial.astype(np.float64)
    totals, shares, suspicious = _scan(data, indices.view(np.uint32), indptr, weights)
    return CountScan(totals, shares, bool(suspicious))


@numba.njit(cache=True, nogil=True)
def _scan(data, indices, indptr, weights):
    num_cells = len(indptr) - 1
    totals, weighted = np.zeros(num_cells), np.zeros(num_cells)
    suspicious = False
    for cell in range(num_cells):
        total = special = 0.0
        # Unsigned indices: signed ones may be negative in Python, which costs a comparison each.
        for k in range(np.uintp(indptr[cell]), np.uintp(indptr[cell + 1])):
            value = np.float64(data[k])
            total += value
            special += value * weights[indices[k]]
            # The condition is false for NaN, infinities, negative values and fractions.
            suspicious |= not (0.0 <= value <= 2.0**53 and value - np.floor(value) == 0.0)
        totals[cell], weighted[cell] = total, special
    return totals, weighted, suspicious

"""Are these raw counts? One pass over the values, and the words for what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

# Largest distance from an integer that is still taken for rounding noise.
_INTEGER_TOLERANCE = 1e-6


@dataclass(frozen=True)
class CountScan:
    """Sums over cells, float64 [cells]; suspicious: some value is no finite natural number."""

    totals: np.ndarray
    mitochondrial: np.ndarray
    is_suspicious: bool


def scan_counts(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, mitochondrial: np.ndarray
) -> CountScan:
    """Return what one pass over a CSR block tells; `mitochondrial` is bool [genes]."""
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
        # Unsigned: signed indices may be negative in Python, which costs a comparison each.
        for k in range(np.uintp(indptr[cell]), np.uintp(indptr[cell + 1])):
            value = np.float64(data[k])
            total += value
            special += value * weights[indices[k]]
            # false for NaN, infinities, negative values and fractions
            suspicious |= not (0.0 <= value <= 2.0**53 and value - np.floor(value) == 0.0)
        totals[cell], weighted[cell] = total, special
    return totals, weighted, suspicious


def check_counts(path: str, data: np.ndarray, counts: str, choices: list[str]) -> None:
    """Raise ValueError unless all values are finite non-negative integers (raw counts).

    Parameters
    ----------
    path, counts
        Named in the message: the file, and where in it the values are.
    choices
        The other places that the file offers.
    """
    others = [c for c in choices if c != counts]
    advice = "raw counts are needed (rank value encoding divides by the cell's total)" + (
        f"; this file also has {others}: try --counts {others[0]}" if others else ""
    )
    if not np.isfinite(data).all():
        raise ValueError(f"{path}: '{counts}' holds NaN or infinite values; {advice}")
    if data.min() < 0:
        share = float((data < 0).mean())
        raise ValueError(
            f"{path}: {share:.1%} of the stored values in '{counts}' are negative "
            f"(smallest {data.min():.3g}): scaled data; {advice}"
        )
    if data.max() > 2.0**53:
        raise ValueError(f"{path}: '{counts}' holds {data.max():.3g}, more than 2**53; {advice}")
    fractional = np.abs(data - np.rint(data)) > _INTEGER_TOLERANCE
    if fractional.any():
        looks = "log-transformed" if data.max() < 30 else "normalised"
        raise ValueError(
            f"{path}: {fractional.mean():.1%} of the stored values in '{counts}' are no integers "
            f"(e.g. {data[fractional][0]:.4g}, largest {data.max():.4g}): looks {looks}; {advice}"
        )

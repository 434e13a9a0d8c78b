"""Checks whether the values of a count matrix are raw counts, and recognises other values.

Rank value encoding needs counts up to one factor per cell, because it divides by a cell's total and
by medians of counts. Estimated or corrected counts are fractional and can be accepted. Logarithms,
scores and matrices normalised to one total per cell are refused. `check_integers` looks at blocks
of integers, `fractional_values` at all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# The largest distance from an integer that still counts as rounding noise.
_INTEGER_TOLERANCE = 1e-6
# An estimated count this near to an integer comes from reads that fell on one gene only.
_NEAR = 0.01
_SAME_TOTAL = 0.01
# With fewer cells or fewer values, all may look alike by chance.
_FEWEST_CELLS, _FEWEST_VALUES = 10, 1000
# log2 of a million and one is 19.93: no logarithm of a normalised count is larger.
_LARGEST_LOGARITHM = 20.0
_LOOKED_AT = 64  # cells
_MOSTLY = 0.9


@dataclass(frozen=True)
class Place:
    """The origin of values, for messages: the file, its --counts, and the choices of --counts."""

    path: str
    counts: str
    choices: list[str]

    @property
    def advice(self) -> str:
        others = [c for c in self.choices if c != self.counts]
        return "raw counts are needed (rank value encoding divides by the cell's total)" + (
            f"; this file also has {others}: try --counts {others[0]}" if others else ""
        )


def fractional_values(
    place: Place,
    data: np.ndarray,
    indptr: np.ndarray,
    allowed: bool,
    wider: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None,
) -> int:
    """Return how many values of a CSR block are fractional, after checking that they are counts.

    Parameters
    ----------
    allowed
        Whether fractional counts are accepted. Logarithms, scores and normalised values never are.
    wider
        Returns data and index pointers of more cells of the file, if this block has too few to
        tell what its values are: two cells may have the same total by chance.

    Raises
    ------
    ValueError
        Values are not finite, are negative, are above 2**53, are no counts, or are fractional
        counts that are not allowed.
    """
    if not np.isfinite(data).all():
        raise ValueError(
            f"{place.path}: '{place.counts}' holds NaN or infinite values; {place.advice}"
        )
    if data.min() < 0:
        share = float((data < 0).mean())
        raise ValueError(
            f"{place.path}: {share:.1%} of the stored values in '{place.counts}' are negative "
            f"(smallest {data.min():.3g}): scaled data; {place.advice}"
        )
    if data.max() > 2.0**53:
        raise ValueError(
            f"{place.path}: '{place.counts}' holds {data.max():.3g}, more than 2**53; "
            f"{place.advice}"
        )
    is_fraction = np.abs(data - np.rint(data)) > _INTEGER_TOLERANCE
    number = int(is_fraction.sum())
    if not number:
        return 0
    said = (
        f"{place.path}: {number / len(data):.1%} of the stored values in '{place.counts}' are no "
        f"integers (e.g. {data[is_fraction][0]:.4g}, largest {data.max():.4g})"
    )
    wrong = _made_of_counts(*(wider() if wider else (data, indptr)))
    if wrong:
        raise ValueError(f"{said}: {wrong}; {place.advice}")
    if not allowed:
        near = float((np.abs(data - np.rint(data)) <= _NEAR).mean())
        kind = (
            "estimated, as RSEM, salmon and kallisto write them"
            if near > 1 / 3
            else "estimated or corrected, as RSEM, SoupX and DecontX write them"
        )
        raise ValueError(
            f"{said}: fractional counts ({kind}; {near:.0%} are within {_NEAR} of an integer). "
            "Take them with --fractional round (to whole counts) or --fractional keep (ranked as "
            f"they are), or give the counts before correction; {place.advice}"
        )
    return number


def _made_of_counts(data: np.ndarray, indptr: np.ndarray) -> str | None:
    """Return text that says why fractional values are no counts, None if they may be counts.

    The data must not be negative.
    """
    totals = _totals(data, indptr)
    if _are_equal(totals):
        return (
            f"looks normalised, every cell has the total {np.median(totals):.6g} within 1 % (CPM, "
            "TPM)"
        )
    if data.max() < _LARGEST_LOGARITHM:
        for base, undo in (("e", np.expm1), ("2", lambda x: np.exp2(x) - 1)):
            undone = undo(data.astype(np.float64))
            if _are_equal(_totals(undone, indptr)) or _are_scaled_integers(undone, indptr):
                return f"looks log-transformed (base {base})"
    if _are_scaled_integers(data.astype(np.float64), indptr):
        return "looks normalised, each cell's values are integers times one factor"
    is_near = np.abs(data - np.rint(data)) <= _NEAR
    if data.max() < _LARGEST_LOGARITHM and is_near.mean() < 1 / 2:
        return "looks log-transformed"
    return None


def _totals(data: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """Return float64, the sum of values of each cell, without the cells whose sum is zero."""
    sums = np.r_[0.0, np.cumsum(data, dtype=np.float64)]
    totals = sums[indptr[1:]] - sums[indptr[:-1]]
    return totals[totals > 0]


def _are_equal(totals: np.ndarray) -> bool:
    return len(totals) >= 2 and totals.max() <= (1 + _SAME_TOTAL) * totals.min()


def _are_scaled_integers(data: np.ndarray, indptr: np.ndarray) -> bool:
    """Return whether the values of most cells are multiples of the cell's smallest value.

    A cell whose smallest value is an integer does not count as such.
    """
    scaled = looked_at = 0
    for first, stop in zip(indptr[:_LOOKED_AT], indptr[1:], strict=False):
        values = data[first:stop]
        values = values[values > 0]
        if len(values) < 8:
            continue
        looked_at += 1
        smallest = values.min()
        multiples = values / smallest
        # A value far above the smallest one is always near some multiple of it, so it tells little.
        low = multiples[multiples < 20]
        distance = np.abs(low - np.rint(low))
        is_whole = abs(smallest - round(smallest)) <= _INTEGER_TOLERANCE
        scaled += not is_whole and len(low) >= 8 and (distance < _NEAR).mean() > _MOSTLY
    return looked_at > 0 and scaled > looked_at / 2


def check_integers(place: Place, data: np.ndarray, indptr: np.ndarray, totals: np.ndarray) -> None:
    """Raise ValueError for a block of integers that are no raw counts.

    Parameters
    ----------
    totals
        float64 [cells], sum of the values of each cell.

    Raises
    ------
    ValueError
        All values are the same (a binarised matrix), or all cells have the same total (rounded
        after normalisation, or downsampled).
    """
    filled = totals > 0
    if filled.sum() < _FEWEST_CELLS or len(data) < _FEWEST_VALUES:
        return
    first = data[: indptr[min(_LOOKED_AT, len(totals))]]
    first = first[first > 0]
    # All values are compared only where the first cells look binarised.
    if len(first) and first.min() == first.max() == data.max() and data[data > 0].min() == first[0]:
        raise ValueError(
            f"{place.path}: all values in '{place.counts}' that are not zero are {first[0]:g}: a "
            f"binarised matrix, without ranks; {place.advice}. --force-counts takes it all "
            "the same"
        )
    present = totals[filled]
    if _are_equal(present):
        raise ValueError(
            f"{place.path}: every cell of '{place.counts}' has the same total, "
            f"{np.median(present):.6g} within 1 %: rounded CPM or TPM, or counts drawn down to one "
            f"depth; {place.advice}. --force-counts takes them all the same"
        )

"""Filters cells by quality. Every cell gets one reason code; code 0 means that the cell is kept.

The filters are those of the paper (Geneformer, Nature 2023, Methods): total counts and
mitochondrial share within three standard deviations of the mean of the cell's data set, and at
least seven detected genes of the vocabulary, so that 15 % masking hides at least one gene.
`first_reasons` judges a cell by its own values, `moments_by_dataset` and `merge_moments` collect
the means and deviations of whole data sets, and `quality_reasons` applies them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

KEPT, NOT_PASSED, EMPTY, FEW_GENES, COUNTS, MITOCHONDRIAL, DUPLICATE = range(7)
# Kept, but in the other split than the chunk file says (`data_prep.encoding.duplicates`).
MOVED = 255
REASONS = (
    "kept",
    "filter_pass is not 1",
    "no counts at all",
    "too few genes of the vocabulary",
    "total counts far from the data set's mean",
    "mitochondrial share far from the data set's mean",
    "the same cell stood before",
)


_UNIT = 2**20  # values are rounded to multiples of 1 / _UNIT before they are summed


def is_kept(codes: np.ndarray) -> np.ndarray:
    """Return bool [cells], True where the reason code means that the cell is kept."""
    return (codes == KEPT) | (codes == MOVED)


def final_split(split: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return uint8 [cells], the final split of each cell: moved cells change their split."""
    return np.asarray(split) ^ (codes == MOVED)


@dataclass(frozen=True)
class Moments:
    """Number, sum and sum of squares of values, as integers, so that merging is exact."""

    number: int = 0
    total: int = 0
    squares: int = 0

    @staticmethod
    def of(values: np.ndarray) -> Moments:
        """Return the moments of the finite `values`, rounded to multiples of 2**-20."""
        units = np.rint(values[np.isfinite(values)] * _UNIT).astype(object)
        units = [int(u) for u in units]  # Python integers, since squares need more than 64 bits
        return Moments(len(units), sum(units), sum(u * u for u in units))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of values together."""
        return Moments(
            self.number + other.number, self.total + other.total, self.squares + other.squares
        )

    def interval(self, deviations: float) -> tuple[float, float]:
        """Return the interval of the mean -+ `deviations` (population) standard deviations.

        Without values, or with 0 deviations, it is (-inf, inf).
        """
        if not self.number or not deviations:
            return -np.inf, np.inf
        mean = self.total / self.number / _UNIT
        variance = (self.number * self.squares - self.total**2) / self.number**2 / _UNIT**2
        spread = deviations * float(np.sqrt(variance))
        return mean - spread, mean + spread


@dataclass(frozen=True)
class DatasetMoments:
    """Moments of total counts and mitochondrial share over a data set's cells with counts."""

    totals: Moments = Moments()
    mitochondrial: Moments = Moments()

    def merge(self, other: DatasetMoments) -> DatasetMoments:
        return DatasetMoments(
            self.totals.merge(other.totals), self.mitochondrial.merge(other.mitochondrial)
        )


def first_reasons(
    detected: np.ndarray, passes: np.ndarray, empty: np.ndarray, min_genes: int
) -> np.ndarray:
    """Return uint8 [cells], reason codes from a cell's own values; the first reason counts."""
    return np.select(
        [~passes, empty, detected < min_genes], [NOT_PASSED, EMPTY, FEW_GENES], default=KEPT
    ).astype(np.uint8)


def moments_by_dataset(
    datasets: np.ndarray, totals: np.ndarray, mitochondrial: np.ndarray, reasons: np.ndarray
) -> dict[str, DatasetMoments]:
    """Return the moments of each data set over cells with counts that the source lets pass.

    All arrays have the shape [cells]; `datasets` holds the names of the data sets.
    """
    counted = np.flatnonzero((reasons != NOT_PASSED) & (reasons != EMPTY))
    result = {name: DatasetMoments() for name in rows_by_value(datasets)}
    for name, rows in rows_by_value(datasets[counted]).items():
        here = counted[rows]
        result[name] = DatasetMoments(Moments.of(totals[here]), Moments.of(mitochondrial[here]))
    return result


def rows_by_value(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the ascending positions of each distinct value.

    The values are sorted once, so the time hardly depends on the number of distinct values.
    """
    if not len(values):
        return {}
    names, number = np.unique(values.astype(str), return_inverse=True)
    order = np.argsort(number, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(number))[:-1])
    return dict(zip(names.tolist(), parts, strict=True))


def merge_moments(parts: Iterable[dict[str, DatasetMoments]]) -> dict[str, DatasetMoments]:
    """Return the moments of each data set over all parts, merged in the given order."""
    merged: dict[str, DatasetMoments] = {}
    for part in parts:
        for name, moments in part.items():
            merged[name] = merged.get(name, DatasetMoments()).merge(moments)
    return merged


def quality_reasons(
    reasons: np.ndarray,
    totals: np.ndarray,
    mitochondrial: np.ndarray,
    moments: DatasetMoments,
    max_sd_counts: float,
    max_sd_mito: float,
) -> np.ndarray:
    """Return the reason codes of one data set's cells after the filters by standard deviations.

    Kept cells outside the intervals are rejected. A limit of 0 switches a filter off. Cells without
    a value (token corpora, no mitochondrial genes) pass.
    """
    reasons = reasons.copy()
    for code, values, part, limit in (
        (COUNTS, totals, moments.totals, max_sd_counts),
        (MITOCHONDRIAL, mitochondrial, moments.mitochondrial, max_sd_mito),
    ):
        low, high = part.interval(limit)
        rounded = np.rint(values * _UNIT) / _UNIT  # rounded as in `Moments.of`
        outside = (rounded < low) | (rounded > high)
        reasons[outside & (reasons == KEPT)] = code
    return reasons

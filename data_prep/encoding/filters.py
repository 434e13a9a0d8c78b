"""Which cells stay. Every cell has one reason code; 0 is kept.

The paper's filters (Geneformer, Nature 2023, Methods): total counts and mitochondrial share within
three standard deviations of the mean of the cell's data set, and at least seven detected genes of
the vocabulary, so that 15 % masking hides at least one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

KEPT, NOT_PASSED, EMPTY, FEW_GENES, COUNTS, MITOCHONDRIAL, DUPLICATE = range(7)
# Kept, on the other side of the split than the chunk file says (`data_prep.encoding.duplicates`).
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


_UNIT = 2**20  # values are summed as multiples of 1 / _UNIT


def is_kept(codes: np.ndarray) -> np.ndarray:
    """Return bool, which reason codes mean that a cell stays."""
    return (codes == KEPT) | (codes == MOVED)


def final_split(split: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return uint8, the side on which cells end up: moved ones on the other."""
    return np.asarray(split) ^ (codes == MOVED)


@dataclass(frozen=True)
class Moments:
    """Number, sum and sum of squares of values, as integers: merged exactly, in any order."""

    number: int = 0
    total: int = 0
    squares: int = 0

    @staticmethod
    def of(values: np.ndarray) -> Moments:
        """Return the moments of the finite ones of `values`, rounded to multiples of 2**-20."""
        units = np.rint(values[np.isfinite(values)] * _UNIT).astype(object)
        units = [int(u) for u in units]  # squares need more than 64 bits
        return Moments(len(units), sum(units), sum(u * u for u in units))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets together."""
        return Moments(
            self.number + other.number, self.total + other.total, self.squares + other.squares
        )

    def interval(self, deviations: float) -> tuple[float, float]:
        """Return mean -+ so many (population) standard deviations; all numbers without a value."""
        if not self.number or not deviations:
            return -np.inf, np.inf
        mean = self.total / self.number / _UNIT
        variance = (self.number * self.squares - self.total**2) / self.number**2 / _UNIT**2
        spread = deviations * float(np.sqrt(variance))
        return mean - spread, mean + spread


@dataclass(frozen=True)
class DatasetMoments:
    """Total counts and mitochondrial share over the cells of one data set that have counts."""

    totals: Moments = Moments()
    mitochondrial: Moments = Moments()

    def merge(self, other: DatasetMoments) -> DatasetMoments:
        return DatasetMoments(
            self.totals.merge(other.totals), self.mitochondrial.merge(other.mitochondrial)
        )


def first_reasons(
    detected: np.ndarray, passes: np.ndarray, empty: np.ndarray, min_genes: int
) -> np.ndarray:
    """Return uint8 [cells], what a cell's own values say; the first reason counts."""
    return np.select(
        [~passes, empty, detected < min_genes], [NOT_PASSED, EMPTY, FEW_GENES], default=KEPT
    ).astype(np.uint8)


def moments_by_dataset(
    datasets: np.ndarray, totals: np.ndarray, mitochondrial: np.ndarray, reasons: np.ndarray
) -> dict[str, DatasetMoments]:
    """Return the moments of each data set, over cells that the source passes and that have counts.

    All arrays [cells]; `datasets` holds names.
    """
    counted = np.flatnonzero((reasons != NOT_PASSED) & (reasons != EMPTY))
    result = {name: DatasetMoments() for name in rows_by_value(datasets)}
    for name, rows in rows_by_value(datasets[counted]).items():
        here = counted[rows]
        result[name] = DatasetMoments(Moments.of(totals[here]), Moments.of(mitochondrial[here]))
    return result


def rows_by_value(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return for each value the ascending places where it stands; time does not grow with them."""
    if not len(values):
        return {}
    names, number = np.unique(values.astype(str), return_inverse=True)
    order = np.argsort(number, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(number))[:-1])
    return dict(zip(names.tolist(), parts, strict=True))


def merge_moments(parts: Iterable[dict[str, DatasetMoments]]) -> dict[str, DatasetMoments]:
    """Return the moments of all parts together, merged in the given order."""
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
    """Return `reasons` of cells of one data set, with kept cells outside the intervals rejected.

    A limit of 0 switches a filter off. Cells without a value (token corpora, no mitochondrial
    genes) pass.
    """
    reasons = reasons.copy()
    for code, values, part, limit in (
        (COUNTS, totals, moments.totals, max_sd_counts),
        (MITOCHONDRIAL, mitochondrial, moments.mitochondrial, max_sd_mito),
    ):
        low, high = part.interval(limit)
        rounded = np.rint(values * _UNIT) / _UNIT  # as in the moments
        outside = (rounded < low) | (rounded > high)
        reasons[outside & (reasons == KEPT)] = code
    return reasons

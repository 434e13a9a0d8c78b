"""Computes the share of counts that are in genes of the vocabulary, by data set.

The share of genes tells less: a file with many unknown gene ids may still have most of its counts
in known genes, or the other way round, and the model sees the counts. `KnownCounter` sums up the
blocks of a stretch, `KnownCounts.merge` joins the stretches of a source, and `refuse_unknown` and
`warnings_of` judge the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numba
import numpy as np

from data_prep.encoding.filters import rows_by_value

WARN_BELOW = 0.9
_NAMED = 10
# Number of unknown genes kept for each stretch, the costliest ones (with the most counts).
_KEPT = 200


@dataclass(frozen=True)
class KnownCounts:
    """Sums of counts by data set, and the unknown genes with the most counts.

    Attributes
    ----------
    datasets
        For each data set: (counts in genes of the vocabulary, all counts).
    unknown
        Counts of each of the costliest unknown genes, by gene id as the source has it.
    """

    datasets: dict[str, tuple[float, float]] = field(default_factory=dict)
    unknown: dict[str, float] = field(default_factory=dict)

    def merge(self, other: KnownCounts) -> KnownCounts:
        """Return the sums of both."""
        datasets = dict(self.datasets)
        for name, (known, total) in other.datasets.items():
            before = datasets.get(name, (0.0, 0.0))
            datasets[name] = (before[0] + known, before[1] + total)
        unknown = dict(self.unknown)
        for gene, counts in other.unknown.items():
            unknown[gene] = unknown.get(gene, 0.0) + counts
        return KnownCounts(datasets, unknown)

    @property
    def share(self) -> float | None:
        """Share of all counts that is in genes of the vocabulary; None if there are no counts."""
        known, total = (sum(pair[i] for pair in self.datasets.values()) for i in (0, 1))
        return known / total if total else None

    @property
    def shares(self) -> dict[str, float]:
        """For each data set, the share of its counts that is in genes of the vocabulary."""
        return {n: known / total for n, (known, total) in self.datasets.items() if total}

    def costliest(self) -> list[tuple[str, float]]:
        """Return the unknown genes with the most counts, and the share of all counts in each."""
        total = sum(total for _, total in self.datasets.values())
        first = sorted(self.unknown.items(), key=lambda pair: (-pair[1], pair[0]))[:_NAMED]
        return [(gene, counts / total) for gene, counts in first if total]


class KnownCounter:
    """Sums up the counts in known and unknown genes over blocks of one source.

    Parameters
    ----------
    column_tokens
        int32 [genes of the source], token of each gene, -1 for unknown genes.
    """

    def __init__(self, column_tokens: np.ndarray) -> None:
        self._tokens = column_tokens
        self._unknown = np.zeros(len(column_tokens))
        self._datasets: dict[str, tuple[float, float]] = {}

    def add(
        self, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, datasets: list[str]
    ) -> None:
        """Add the cells of a CSR block; `datasets` holds the data set of each cell."""
        known, total = _sum(data, indices.view(np.uint32), indptr, self._tokens, self._unknown)
        # The first case is a shortcut: most files are one data set.
        rows = (
            {datasets[0]: slice(None)}
            if datasets.count(datasets[0]) == len(datasets)
            else rows_by_value(np.array(datasets, dtype=object))
        )
        for name, here in rows.items():
            before = self._datasets.get(name, (0.0, 0.0))
            self._datasets[name] = (
                before[0] + float(known[here].sum()), before[1] + float(total[here].sum()),
            )  # fmt: skip

    def result(self, names: list[str]) -> KnownCounts:
        """Return the sums of all blocks; `names` are the ids of the source's genes."""
        # A stable sort, so that genes of equal counts are cut off in their order in the source.
        counted = np.flatnonzero(self._unknown)
        order = counted[np.argsort(-self._unknown[counted], kind="stable")[:_KEPT]]
        unknown: dict[str, float] = {}
        for i in order.tolist():
            name = names[i] or "(without an id)"
            unknown[name] = unknown.get(name, 0.0) + float(self._unknown[i])
        return KnownCounts(dict(self._datasets), unknown)


@numba.njit(cache=True, nogil=True)
def _sum(data, indices, indptr, column_tokens, unknown):
    """Return float64 [cells] twice, counts in known genes and in all genes.

    The counts of each unknown gene are added to `unknown`.
    """
    num_cells = len(indptr) - 1
    known, total = np.zeros(num_cells), np.zeros(num_cells)
    for cell in range(num_cells):
        inside = outside = 0.0
        for k in range(np.uintp(indptr[cell]), np.uintp(indptr[cell + 1])):
            count = np.float64(data[k])
            column = np.uintp(indices[k])
            if column_tokens[column] >= 0:
                inside += count
            else:
                outside += count
                unknown[column] += count
        known[cell], total[cell] = inside, inside + outside
    return known, total


def _costs(counts: KnownCounts) -> str:
    return ", ".join(f"{gene} {share:.1%}" for gene, share in counts.costliest())


def refuse_unknown(path: str, counts: KnownCounts, min_overlap: float, advice: str) -> None:
    """Raise ValueError if less than `min_overlap` of a data set's counts are in known genes."""
    for dataset, share in sorted(counts.shares.items(), key=lambda pair: (pair[1], pair[0])):
        if share < min_overlap:
            raise ValueError(
                f"{path}: {share:.1%} of the counts of data set '{dataset}' are in genes of the "
                f"vocabulary, less than --min-overlap {min_overlap:g}; the costliest unknown genes "
                f"are {_costs(counts)} of all counts. {advice}"
            )


def warnings_of(path: str, counts: KnownCounts) -> Iterable[str]:
    """Yield a warning for each data set with less than 90% of its counts in known genes."""
    for dataset, share in counts.shares.items():
        if share < WARN_BELOW:
            yield (
                f"{path}: {share:.1%} of the counts of data set '{dataset}' are in genes of the "
                f"vocabulary, below {WARN_BELOW:.0%}; the costliest unknown genes are "
                f"{_costs(counts)} of all counts"
            )

"""Histograms of the values of each gene over cells, which add up exactly, and their medians.

`MedianSketch` is what `data_prep.prepare.medians` counts in its first pass, and what results of
earlier calls are merged by.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# The bin of a value is its exponent and the first 6 bits of its mantissa: 64 bins per octave, and
# values of a bin differ by a ratio of at most 1 + 1/64. The bins cover values from 2**-10 (one
# count among ten million) to 10,000.
_MANTISSA_BITS = 6
BIN_SHIFT = 52 - _MANTISSA_BITS
FIRST_BIN = int(np.float64(2.0**-10).view(np.int64)) >> BIN_SHIFT
NUM_BINS = 25 << _MANTISSA_BITS
RELATIVE_ERROR = 2.0**-_MANTISSA_BITS


@dataclass(frozen=True)
class MedianSketch:
    """Histogram of the values of each gene over cells.

    Attributes
    ----------
    genes
        Gene ids, ascending.
    counts
        int64 [genes, NUM_BINS], number of cells whose value of the gene is in the bin.
    aliases
        For each retired id or symbol, the gene that it was counted as.
    """

    genes: tuple[str, ...]
    counts: np.ndarray
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def detected(self) -> np.ndarray:
        """int64 [genes], the number of cells that express each gene."""
        return self.counts.sum(axis=1)

    def medians(self) -> np.ndarray:
        """Return float64 [genes], medians interpolated in their bins; NaN for genes in no cell."""
        before = np.cumsum(self.counts, axis=1)
        number, rows = before[:, -1], np.arange(len(self.genes))
        middle = []
        for rank, bins in zip(
            ((number - 1) // 2, number // 2), middle_bins(self.counts).T, strict=True
        ):
            inside = self.counts[rows, bins]
            with np.errstate(invalid="ignore", divide="ignore"):
                share = (rank + 0.5 - (before[rows, bins] - inside)) / inside
            low, high = _bin_edge(bins), _bin_edge(bins + 1)
            middle.append(np.where(number > 0, low + share * (high - low), np.nan))
        return (middle[0] + middle[1]) / 2

    def merge(self, other: MedianSketch) -> MedianSketch:
        """Return the sketch of all cells of both sketches."""
        genes = sorted({*self.genes, *other.genes})
        place = {g: i for i, g in enumerate(genes)}
        counts = np.zeros((len(genes), NUM_BINS), dtype=np.int64)
        for part in (self, other):
            counts[[place[g] for g in part.genes]] += part.counts
        return MedianSketch(tuple(genes), counts, self.aliases | other.aliases)

    def save(self, path: Path) -> None:
        """Write the sketch as parquet, with one row per gene and occupied bin."""
        rows, bins = np.nonzero(self.counts)
        table = pa.table(
            {
                "gene": pa.array(np.array(self.genes, dtype=object)[rows], pa.string()),
                "bin": pa.array(bins.astype(np.int16)),
                "cells": pa.array(self.counts[rows, bins]),
            }
        )
        names = json.dumps(self.aliases, sort_keys=True)
        pq.write_table(table.replace_schema_metadata({"aliases": names}), path, compression="zstd")

    @staticmethod
    def load(path: Path) -> MedianSketch:
        """Return the sketch that `save` wrote; raise ValueError for other files."""
        try:
            table = pq.read_table(path, columns=["gene", "bin", "cells"])
            aliases = json.loads((table.schema.metadata or {}).get(b"aliases", b"{}"))
            coded = table.column("gene").combine_chunks().dictionary_encode()
            names = coded.dictionary.to_pylist()
            order = np.argsort(names)
            counts = np.zeros((len(names), NUM_BINS), dtype=np.int64)
            place = (np.argsort(order)[coded.indices.to_numpy()], table.column("bin").to_numpy())
            np.add.at(counts, place, table.column("cells").to_numpy())
        except (pa.ArrowInvalid, OSError, KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{path}: not a sketch of `geneloom medians` ({error})") from error
        return MedianSketch(tuple(names[i] for i in order), counts, aliases)


def _bin_edge(bins: np.ndarray) -> np.ndarray:
    """Return float64, the smallest value of each bin."""
    return ((np.asarray(bins, dtype=np.int64) + FIRST_BIN) << BIN_SHIFT).view(np.float64)


def middle_bins(counts: np.ndarray) -> np.ndarray:
    """Return int64 [genes, 2], the bins of the lower and the upper middle value of each gene."""
    before = np.cumsum(counts, axis=1)
    number = before[:, -1:]
    lower, upper = (number - 1) // 2, number // 2
    bins = [(before <= rank).sum(axis=1) for rank in (lower, upper)]
    return np.stack(bins, axis=1).clip(max=NUM_BINS - 1)

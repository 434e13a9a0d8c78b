"""Encoded cells in memory: ranked tokens in one flat array, all other columns in an Arrow table."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class CellTable:
    """Encoded cells with their metadata.

    Attributes
    ----------
    tokens
        uint16 or uint32, the tokens of all cells one after the other.
    offsets
        int64 [cells + 1], where each cell begins in `tokens`.
    columns
        Arrow table with one row per cell: ids, data sets, metadata, and internal columns that the
        later passes need.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    columns: pa.Table

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> CellTable:
        """Return a copy of the cells at int64 positions `rows`, in the given order."""
        tokens, offsets = gather_rows(self.tokens, self.offsets, rows)
        return CellTable(tokens, offsets, self.columns.take(pa.array(rows)))

    def slice(self, start: int, stop: int) -> CellTable:
        """Return cells start..stop-1 without copying tokens."""
        low, high = self.offsets[start], self.offsets[stop]
        return CellTable(
            self.tokens[low:high],
            self.offsets[start : stop + 1] - low,
            self.columns.slice(start, stop - start),
        )

    def to_batch(self) -> pa.RecordBatch:
        """Return one Arrow record batch with ``input_ids`` and all columns."""
        lists = pa.ListArray.from_arrays(
            pa.array(self.offsets.astype(np.int32)), pa.array(self.tokens)
        )
        columns = [
            c.chunk(0) if c.num_chunks == 1 else c.combine_chunks() for c in self.columns.columns
        ]
        return pa.record_batch([lists, *columns], names=["input_ids", *self.columns.column_names])

    @staticmethod
    def concat(parts: list[CellTable]) -> CellTable:
        """Return all cells of one or more `parts`, in order."""
        if len(parts) == 1:
            return parts[0]
        offsets = np.zeros(sum(len(p) for p in parts) + 1, dtype=np.int64)
        np.cumsum(np.concatenate([p.lengths for p in parts]), out=offsets[1:])
        columns = pa.concat_tables([p.columns for p in parts]).combine_chunks()
        return CellTable(np.concatenate([p.tokens for p in parts]), offsets, columns)

    @staticmethod
    def in_order(parts: list[CellTable], order: np.ndarray) -> CellTable:
        """Return ``concat(parts).take(order)``, copying every token only once."""
        lengths = np.concatenate([p.lengths for p in parts])
        offsets, starts = place_rows(lengths, order)
        tokens = np.empty(int(offsets[-1]), dtype=parts[0].tokens.dtype)
        first = 0
        for part in parts:
            stop = first + len(part)
            scatter_rows(
                part.tokens, part.offsets, np.arange(len(part)), starts[first:stop], tokens
            )
            first = stop
        columns = pa.concat_tables([p.columns for p in parts]).combine_chunks()
        return CellTable(tokens, offsets, columns.take(pa.array(order)))


def place_rows(lengths: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of cells in a flat array of tokens after reordering.

    The first array, int64 [cells + 1], holds the offsets of the reordered cells; the second, int64
    [cells], holds where each cell, in its old order, begins.
    """
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths[order], out=offsets[1:])
    starts = np.empty(len(lengths), dtype=np.int64)
    starts[order] = offsets[:-1]
    return offsets, starts


def gather_rows(
    tokens: np.ndarray, offsets: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, offsets) of the chosen rows; Arrow's take is slower, it copies by value."""
    new_offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(offsets[rows + 1] - offsets[rows], out=new_offsets[1:])
    out = np.empty(int(new_offsets[-1]), dtype=tokens.dtype)
    scatter_rows(tokens, offsets, rows, new_offsets, out)
    return out, new_offsets


@numba.njit(cache=True, nogil=True)
def scatter_rows(tokens, offsets, rows, starts, out):
    """Copy the tokens of row ``rows[i]`` to ``out[starts[i]:]``, for each i."""
    for i in range(len(rows)):
        low, to = np.uintp(offsets[rows[i]]), np.uintp(starts[i])
        for j in range(np.uintp(offsets[rows[i] + 1]) - low):
            out[to + j] = tokens[low + j]


@numba.njit(cache=True, nogil=True)
def count_tokens(tokens, counts):
    """Add 1 to ``counts[token]`` for each token."""
    for token in tokens:
        counts[token] += 1

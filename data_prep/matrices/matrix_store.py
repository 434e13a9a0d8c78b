"""The interface of count matrices of all formats, `Store`, and conversion of values to text."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

# Numbers of names and of bytes that are typical for a gene table: such texts are cached.
_FEWEST, _MOST, _MOST_BYTES = 1000, 100_000, 4 << 20
# CSR arrays of consecutive cells: data, indices (gene numbers), and indptr, which begins with 0.
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


class Store(Protocol):
    """A count matrix, cells x genes, that is read in ranges of cells.

    `rows` reads a number of bytes proportional to the range; no method loads the whole matrix. The
    methods raise OSError for damaged files and ValueError for mistakes that the user must correct.
    """

    path: Path
    num_cells: int
    num_genes: int
    # Values that --counts may have for this file, for messages.
    counts_choices: list[str]

    def rows(self, start: int, stop: int) -> Rows:
        """Return the stored values of cells start..stop-1; explicit zeros are allowed."""
        ...

    def num_stored(self, start: int, stop: int) -> int:
        """Return how many values `rows` would return, to estimate the memory it needs."""
        ...

    def cell_ids(self, start: int, stop: int) -> list[str]: ...

    def obs_columns(self) -> list[str]: ...

    def obs(self, column: str, start: int, stop: int) -> np.ndarray:
        """Return the values of a column of obs; missing values are None, NaN or NA."""
        ...

    def var_columns(self) -> list[str]: ...

    def var(self, column: str | None) -> np.ndarray:
        """Return a column of var for all genes; `column` None means the index."""
        ...


_MTX = re.compile(r"^(.*?)matrix(.*)\.mtx(?:\.gz)?$")


def mtx_sample(path: Path) -> tuple[str, str] | None:
    """Return the parts of an mtx file's name before and after ``matrix``; None for other files.

    They are the same for the tables of the sample: ``GSM1_P1_matrix.mtx.gz`` lies beside
    ``GSM1_P1_barcodes.tsv.gz``, ``matrix_P1.mtx`` beside ``barcodes_P1.tsv``.
    """
    found = _MTX.match(path.name)
    return (found[1], found[2]) if found else None


def as_text(values: np.ndarray) -> list[str]:
    """Return values as strings; '' for missing values."""
    if values.dtype == object:
        texts = values.tolist()
        if {*map(type, texts)} == {str}:  # the usual case: no value is missing
            return texts
    series = pd.Series(values)
    missing = series.isna().to_numpy()
    text = series.astype(str).to_numpy(dtype=object)
    text[missing] = ""
    return text.tolist()


def decoded(values: np.ndarray) -> np.ndarray:
    """Return `values` with bytes decoded as UTF-8."""
    if values.dtype.kind not in "SO":
        return values
    items = values.tolist() if values.ndim == 1 else []
    if {*map(type, items)} == {bytes}:
        # All strings are decoded at once: one by one takes longer than reading a small file.
        joined = b"\0".join(items)
        is_table = _FEWEST <= len(items) <= _MOST and len(joined) <= _MOST_BYTES
        texts = _lately_decoded(joined) if is_table else _decode(joined)
        if len(texts) == len(items):  # otherwise a string has a zero byte inside
            return texts
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8").astype(object)
    return np.array([v.decode() if isinstance(v, bytes) else v for v in values], dtype=object)


def _decode(joined: bytes) -> np.ndarray:
    return np.array(joined.decode().split("\0"), dtype=object)


@lru_cache(maxsize=8)
def _lately_decoded(joined: bytes) -> np.ndarray:
    """Return decoded texts, cached because file after file has the same gene table."""
    texts = _decode(joined)
    texts.flags.writeable = False
    return texts

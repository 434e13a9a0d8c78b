"""Chooses the cells of a file to read by a query over obs, for formats without queries.

The query has the syntax of pandas (``is_primary_data == True and disease == 'normal'``, ``tissue in
['a', 'b']``). `choose_cells` evaluates it on stretches of the columns that it names, and returns
the matrix restricted to the chosen cells, a `ChosenCells`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.matrices.matrix_store import Rows, Store

_STRETCH_CELLS = 1 << 18
# A gap of up to so many rows between two chosen cells is read and dropped rather than skipped.
_SMALL_GAP = 64
_METHODS = frozenset({"str", "contains", "startswith", "endswith", "isin", "isna", "notna"})
_BOOLEANS = {"True": True, "False": False, "true": True, "false": False}


def choose_cells(path: str, store: Store, query: str) -> Store:
    """Return a matrix of the cells for which a query over obs is true.

    Raises
    ------
    ValueError
        The query names no column, cannot be evaluated, or is true for no cell.
    """
    _refuse_code(path, query)
    columns = [c for c in store.obs_columns() if _names(query, c)]
    if not columns:
        raise ValueError(
            f"{path}: the filter {query!r} names no column of obs; it has {store.obs_columns()}"
        )
    chosen: list[np.ndarray] = []
    for start in range(0, store.num_cells, _STRETCH_CELLS):
        stop = min(start + _STRETCH_CELLS, store.num_cells)
        table = pd.DataFrame({c: _column(store.obs(c, start, stop)) for c in columns})
        try:
            # Only columns can be named in a query, because others may have written the corpus list.
            found = table.eval(query, engine="python", local_dict={}, global_dict={})
        except Exception as error:  # noqa: BLE001  a wrong query may raise anything in pandas
            raise ValueError(
                f"{path}: the filter {query!r} is not understood ({error}); write it like: "
                f"cell_type == 'B cell'; the columns are {store.obs_columns()}"
            ) from error
        # String methods of pandas return a missing value for a missing value.
        said = pd.Series(found)
        if said.dtype in (object, "boolean") and {*said.dropna().unique()} <= {True, False}:
            said = said.astype("boolean").fillna(False).astype(bool)
        mask = said.to_numpy()
        if mask.shape != (stop - start,) or mask.dtype != bool:
            raise ValueError(
                f"{path}: the filter {query!r} is not true or false for each cell; write it like: "
                "cell_type == 'B cell'"
            )
        chosen.append(start + np.flatnonzero(mask))
    cells = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
    if not len(cells):
        raise ValueError(f"{path}: no cell passes the filter {query!r}")
    return ChosenCells(store, cells)


def _refuse_code(path: str, query: str) -> None:
    """Raise ValueError for a query that does more than compare columns and combine the results."""
    try:
        tree = ast.parse(re.sub(r"`[^`]*`", "column", query), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path}: the filter {query!r} is not understood ({error}); write it like: "
            "cell_type == 'B cell'"
        ) from error
    for node in ast.walk(tree):
        is_method = isinstance(node, ast.Attribute) and node.attr not in _METHODS
        is_call = isinstance(node, ast.Call) and not isinstance(node.func, ast.Attribute)
        if is_method or is_call or isinstance(node, ast.Lambda | ast.Subscript | ast.NamedExpr):
            raise ValueError(
                f"{path}: the filter {query!r} is not understood: it may compare columns, join by "
                f"and, or, not, and use {sorted(_METHODS)}"
            )


def _names(query: str, column: str) -> bool:
    """Return whether a query names a column; names inside quoted strings do not count."""
    plain = re.sub(r"'[^']*'|\"[^\"]*\"", "''", query)
    word = rf"(?<![\w.]){re.escape(column)}(?!\w)"
    return bool(re.search(word, plain) or f"`{column}`" in plain)


def _column(values: np.ndarray) -> pd.Series:
    """Return a column as a Series; the strings True and False become booleans."""
    series = pd.Series(values)
    if series.dtype != object:
        return series
    series = series.infer_objects()
    if series.dtype == object:
        present = set(series.dropna().unique()[:3])
        if present and present <= set(_BOOLEANS):
            series = series.map(_BOOLEANS).astype("boolean").fillna(False).astype(bool)
    return series


class ChosenCells:
    """A matrix that consists of some cells of another matrix.

    Parameters
    ----------
    cells
        int64, row numbers of the chosen cells in `store`, ascending.
    """

    def __init__(self, store: Store, cells: np.ndarray) -> None:
        self._store, self._cells = store, cells
        before_rows: np.ndarray | None = getattr(store, "row_numbers", None)
        # int64 [cells], where the cells stand in the file.
        self.row_numbers = cells if before_rows is None else before_rows[cells]
        self.cells_in_file: int = getattr(store, "cells_in_file", store.num_cells)
        self.path: Path = store.path
        self.num_cells, self.num_genes = len(cells), store.num_genes
        self.counts_choices = store.counts_choices
        before: int | None = getattr(store, "num_filtered_out", 0)
        left_out = store.num_cells - len(cells)
        # If the format does not know how many cells it left out, the sum is not known either.
        self.num_filtered_out = None if before is None else before + left_out
        self.other_modalities: dict[str, int] = getattr(store, "other_modalities", {})

    def _runs(self, start: int, stop: int) -> list[np.ndarray]:
        """Return the row numbers of the chosen cells, split into runs to be read as one range."""
        cells = self._cells[start:stop]
        return np.split(cells, np.flatnonzero(np.diff(cells) > _SMALL_GAP) + 1)

    def rows(self, start: int, stop: int) -> Rows:
        import scipy.sparse  # imported late: the import takes longer than reading a small file

        parts = []
        for run in self._runs(start, stop):
            data, indices, indptr = self._store.rows(int(run[0]), int(run[-1]) + 1)
            shape = (len(indptr) - 1, self.num_genes)
            rows = scipy.sparse.csr_matrix((data, indices, indptr), shape=shape, copy=False)
            parts.append(rows if len(run) == shape[0] else rows[run - run[0]])
        indptr = np.r_[0, np.cumsum(np.concatenate([np.diff(p.indptr) for p in parts]))]
        return (
            np.concatenate([p.data for p in parts]),
            np.concatenate([p.indices for p in parts]),
            indptr,
        )

    def num_stored(self, start: int, stop: int) -> int:
        return sum(
            self._store.num_stored(int(r[0]), int(r[-1]) + 1) for r in self._runs(start, stop)
        )

    def cell_ids(self, start: int, stop: int) -> list[str]:
        found: list[str] = []
        for run in self._runs(start, stop):
            ids = self._store.cell_ids(int(run[0]), int(run[-1]) + 1)
            found += [ids[i] for i in (run - run[0]).tolist()]
        return found

    def obs_columns(self) -> list[str]:
        return self._store.obs_columns()

    def obs(self, column: str, start: int, stop: int) -> np.ndarray:
        parts = [
            np.asarray(self._store.obs(column, int(r[0]), int(r[-1]) + 1))[r - r[0]]
            for r in self._runs(start, stop)
        ]
        return np.concatenate(parts)

    def var_columns(self) -> list[str]:
        return self._store.var_columns()

    def var(self, column: str | None) -> np.ndarray:
        return self._store.var(column)

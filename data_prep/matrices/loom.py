"""Reads loom files (v2, v3): HDF5 with a dense genes x cells matrix and row and column attributes.

The layout is described at https://linnarssonlab.org/loompy/format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_prep.matrices.compression import require_filters
from data_prep.matrices.matrix_store import Rows, decoded

_CELL_IDS = ("CellID", "cell_id", "obs_names", "cell_names", "barcode")
_GENE_IDS = ("ensembl_id", "Accession", "gene_ids", "var_names", "Gene", "gene_names")


class LoomStore:
    """The count matrix of a ``.loom`` file; `counts` is ``X`` (``/matrix``) or ``layers/NAME``."""

    def __init__(self, path: Path, counts: str) -> None:
        self.path = path
        if not h5py.is_hdf5(path):
            raise ValueError(f"{path}: is not an HDF5 file, or is truncated; expected a .loom file")
        root: Any = h5py.File(path, "r")
        require_filters(path, root)
        missing = [k for k in ("matrix", "row_attrs", "col_attrs") if k not in root]
        if missing:
            raise ValueError(f"{path}: has no {missing}, which every .loom file has; it is none")
        self.counts_choices = ["X", *(f"layers/{name}" for name in root.get("layers", {}))]
        if counts not in self.counts_choices:
            raise ValueError(
                f"{path}: has no '{counts}'; --counts may be one of {self.counts_choices}"
            )
        self._matrix = root["matrix" if counts == "X" else counts]
        if self._matrix.ndim != 2:
            raise ValueError(f"{path}: counts have {self._matrix.ndim} dimensions, not 2")
        self.num_genes, self.num_cells = (int(n) for n in self._matrix.shape)
        self._genes = _columns(root["row_attrs"], self.num_genes)
        self._cells = _columns(root["col_attrs"], self.num_cells)
        self._cell_id = next((c for c in _CELL_IDS if c in self._cells), None)
        gene_ids = [c for c in _GENE_IDS if c in self._genes]
        if not gene_ids:
            raise ValueError(
                f"{path}: no row attribute holds gene ids: expected one of {list(_GENE_IDS)}, it "
                f"has {list(self._genes)}"
            )
        self._gene_id = gene_ids[0]

    def rows(self, start: int, stop: int) -> Rows:
        dense = self._matrix[:, start:stop].T
        cells, genes = np.nonzero(dense)  # ordered by cell, then by gene
        indptr = np.r_[0, np.cumsum(np.bincount(cells, minlength=stop - start))]
        return dense[cells, genes], genes.astype(np.int32), indptr

    def num_stored(self, start: int, stop: int) -> int:
        return (stop - start) * self.num_genes

    def cell_ids(self, start: int, stop: int) -> list[str]:
        if self._cell_id is None:
            return [str(i) for i in range(start, stop)]
        return [str(v) for v in self.obs(self._cell_id, start, stop)]

    def obs_columns(self) -> list[str]:
        return list(self._cells)

    def obs(self, column: str, start: int, stop: int) -> np.ndarray:
        return decoded(self._cells[column][start:stop])

    def var_columns(self) -> list[str]:
        return list(self._genes)

    def var(self, column: str | None) -> np.ndarray:
        return decoded(self._genes[column or self._gene_id][:])


def _columns(attributes: Any, length: int) -> dict[str, Any]:
    """Return the attributes that hold one value per row; 2-D attributes (embeddings) do not."""
    return {name: values for name, values in attributes.items() if values.shape == (length,)}

"""Reads AnnData and MuData files, h5ad or zarr, in ranges of cells.

The counts may be X, raw or a layer, stored as CSR, CSC or dense. The readers of anndata load obs
and the index pointer whole. `AnnDataStore` reads both in slices, so that the memory does not grow
with the number of cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_prep.matrices.compression import require_filters
from data_prep.matrices.feature_kinds import KIND_COLUMNS, genes_among, is_gene_kind
from data_prep.matrices.matrix_store import Rows, as_text, decoded
from data_prep.matrices.row_copy import StagedRows, stage_rows

_STAGE_VALUES = 1 << 24


class AnnDataStore:
    """The count matrix of an ``.h5ad`` file or an AnnData ``.zarr`` folder or zip file.

    Of a MuData it is the matrix of the modality with gene expression.

    Parameters
    ----------
    path
        The file or folder.
    counts
        Where the counts are: ``X``, ``raw``, or ``layers/NAME``.
    staging
        Folder for a row-wise copy; used only if the matrix is stored column-wise (CSC).
    """

    def __init__(self, path: Path, counts: str, staging: Path) -> None:
        self.path = path
        self._root = self._open(path)
        # Of a MuData: number of features of each modality that is no gene expression.
        self.other_modalities: dict[str, int] = {}
        if "mod" in self._root and hasattr(self._root["mod"], "keys"):
            self._choose_modality(self._root["mod"])
        for key in ("obs", "var"):
            if key not in self._root:
                raise ValueError(f"{path}: has no '{key}'; it is no AnnData file")
        layers = [f"layers/{name}" for name in self._root.get("layers", {})]
        self.counts_choices = [
            *(c for c, place in (("X", "X"), ("raw", "raw/X")) if place in self._root),
            *layers,
        ]
        if counts not in self.counts_choices:
            raise ValueError(
                f"{path}: has no '{counts}'; --counts may be one of {self.counts_choices}"
            )
        element = self._root[{"raw": "raw/X"}.get(counts, counts)]
        self._obs, self._var = (
            self._root["obs"],
            self._root["raw/var" if counts == "raw" else "var"],
        )
        for name, frame in (("obs", self._obs), ("var", self._var)):
            if not hasattr(frame, "keys"):
                raise ValueError(
                    f"{path}: '{name}' is stored as by an anndata before 0.7; read and write the "
                    "file once with a newer anndata"
                )
        self._categories: dict[tuple[int, str], np.ndarray] = {}
        self._obs_columns, self._var_columns = _column_names(self._obs), _column_names(self._var)
        self._obs_index, self._var_index = _index_name(self._obs), _index_name(self._var)
        self._open_matrix(element, staging)

    @staticmethod
    def _open(path: Path) -> Any:
        if path.suffix == ".zarr" or path.is_dir() or path.name.endswith(".zarr.zip"):
            import zarr
            import zarr.errors
            import zarr.storage

            try:
                is_zip = path.name.endswith(".zip")
                store = zarr.storage.ZipStore(path, mode="r") if is_zip else str(path)
                return zarr.open_group(store, mode="r")
            except (zarr.errors.GroupNotFoundError, ValueError) as error:
                raise ValueError(f"{path}: not readable as a zarr group ({error})") from error
        if not h5py.is_hdf5(path):
            raise ValueError(
                f"{path}: is not an HDF5 file, or is truncated; expected an .h5ad with raw counts"
            )
        root = h5py.File(path, "r")
        require_filters(path, root)
        return root

    def _choose_modality(self, modalities: Any) -> None:
        """Make the modality that holds gene expression the root, by its name or its features."""
        sizes = {n: int(_index_of(modalities[n]["var"]).shape[0]) for n in modalities}
        named = [n for n in sizes if is_gene_kind(n)]
        if not named:
            named = [n for n in sizes if self._says_genes(modalities[n]["var"])]
        if len(named) != 1:
            raise ValueError(
                f"{self.path}: is a MuData whose modalities {sorted(sizes)} name gene expression "
                f"{len(named)} times; call one of them 'rna', or write it as an .h5ad"
            )
        self._root = modalities[named[0]]
        del sizes[named[0]]
        self.other_modalities = {f"modality {n}": size for n, size in sorted(sizes.items())}

    @staticmethod
    def _says_genes(var: Any) -> bool:
        for column in {*KIND_COLUMNS} & {*_column_names(var)}:
            kinds = as_text(read_column(var, column, 0, int(_index_of(var).shape[0]), {}))
            found = genes_among(kinds)
            if found is not None and found.any():
                return True
        return False

    def _open_matrix(self, element: Any, staging: Path) -> None:
        kind = element.attrs.get("encoding-type", element.attrs.get("h5sparse_format", ""))
        kind = kind.removesuffix("_matrix")
        self._staged: StagedRows | None = None
        self._sparse = hasattr(element, "keys")
        if not self._sparse:
            if len(element.shape) != 2:
                raise ValueError(f"{self.path}: counts have {len(element.shape)} dimensions, not 2")
            self._matrix, self._shape = element, element.shape
        elif kind in ("csr", "csc"):
            self._shape = element.attrs.get("shape", element.attrs.get("h5sparse_shape"))
            self._data, self._indices = element["data"], element["indices"]
            self._indptr = element["indptr"]
        else:
            raise ValueError(
                f"{self.path}: counts are stored as {kind or 'something unknown'!r}; readable are "
                "csr_matrix, csc_matrix and dense arrays"
            )
        self.num_cells, self.num_genes = (int(n) for n in self._shape)
        self._check_lengths(kind)
        if self._sparse and kind == "csc":
            self._staged = stage_rows(self._columns, self.num_cells, staging)

    def _check_lengths(self, kind: str) -> None:
        """Raise ValueError if lengths of arrays do not fit each other, or chunks are missing.

        Reading a slice beyond the end of an array raises no error, so this is checked first.
        """
        obs_index = _index_array(self._obs, self._obs_index)
        var_index = _index_array(self._var, self._var_index)
        lengths = [
            ("obs", obs_index.shape[0], self.num_cells),
            ("var", var_index.shape[0], self.num_genes),
        ]
        if self._sparse:
            major = self.num_cells if kind == "csr" else self.num_genes
            lengths += [
                ("indptr", self._indptr.shape[0], major + 1),
                ("indices", self._indices.shape[0], self._data.shape[0]),
            ]
        wrong = [
            f"{name} has {n} entries, not {wanted}" for name, n, wanted in lengths if n != wanted
        ]
        if wrong:
            raise ValueError(f"{self.path}: is damaged: {'; '.join(wrong)}")
        # zarr reads a missing chunk as zeros. Stored counts and gene numbers have no empty chunks.
        arrays = {"index of obs": obs_index, "index of var": var_index}
        if self._sparse:
            arrays |= {"data": self._data, "indices": self._indices}
        for name, array in arrays.items():
            if hasattr(array, "nchunks_initialized") and array.nchunks_initialized < array.nchunks:
                raise ValueError(
                    f"{self.path}: {array.nchunks - array.nchunks_initialized} of {array.nchunks} "
                    f"chunks of {name} are missing; was the folder copied completely?"
                )

    def _columns(self):
        """Yield the entries of a column-wise matrix in batches, as (cells, genes, values)."""
        indptr = self._indptr[:]
        if np.any(np.diff(indptr) < 0) or int(indptr[-1]) > self._data.shape[0]:
            raise OSError("index pointer is damaged")
        for start in range(0, int(indptr[-1]), _STAGE_VALUES):
            stop = min(start + _STAGE_VALUES, int(indptr[-1]))
            genes = np.searchsorted(indptr, np.arange(start, stop), side="right") - 1
            yield self._indices[start:stop], genes.astype(np.int32), self._data[start:stop]

    def rows(self, start: int, stop: int) -> Rows:
        if self._staged is not None:
            return self._staged.rows(start, stop)
        if not self._sparse:
            dense = np.asarray(self._matrix[start:stop])
            cells, genes = np.nonzero(dense)
            indptr = np.r_[0, np.cumsum(np.bincount(cells, minlength=stop - start))]
            return dense[cells, genes], genes.astype(np.int32), indptr
        indptr = np.asarray(self._indptr[start : stop + 1], dtype=np.int64)
        low, high = int(indptr[0]), int(indptr[-1])
        if np.any(np.diff(indptr) < 0) or high > self._data.shape[0]:
            raise OSError(f"index pointer of cells {start}-{stop} is damaged")
        return self._data[low:high], self._indices[low:high], indptr - low

    def num_stored(self, start: int, stop: int) -> int:
        if self._staged is not None:
            return self._staged.num_stored(start, stop)
        if not self._sparse:
            return (stop - start) * self.num_genes
        return int(self._indptr[stop]) - int(self._indptr[start])

    def cell_ids(self, start: int, stop: int) -> list[str]:
        return [
            str(v) for v in read_column(self._obs, self._obs_index, start, stop, self._categories)
        ]

    def obs_columns(self) -> list[str]:
        return self._obs_columns

    def obs(self, column: str, start: int, stop: int) -> np.ndarray:
        return read_column(self._obs, column, start, stop, self._categories)

    def var_columns(self) -> list[str]:
        return self._var_columns

    def var(self, column: str | None) -> np.ndarray:
        column = column or self._var_index
        return read_column(self._var, column, 0, self.num_genes, self._categories)


def _index_of(frame: Any) -> Any:
    """Return the array that holds the index of a data frame, the codes if it is categorical."""
    return _index_array(frame, _index_name(frame))


def _index_array(frame: Any, name: str) -> Any:
    index = frame[name]
    if not hasattr(index, "keys"):
        return index
    return index["codes"] if "codes" in index else index["values"]


def _index_name(frame: Any) -> str:
    name = frame.attrs.get("_index", "_index" if "_index" in frame else "index")
    return name.decode() if isinstance(name, bytes) else str(name)


def _column_names(frame: Any) -> list[str]:
    order = frame.attrs.get("column-order")
    if order is None:
        return sorted(set(frame.keys()) - {_index_name(frame), "__categories"})
    return [c.decode() if isinstance(c, bytes) else str(c) for c in order]


def read_column(
    frame: Any, name: str, start: int, stop: int, known: dict[tuple[int, str], np.ndarray]
) -> np.ndarray:
    """Return rows start..stop-1 of a column of an AnnData data frame.

    Missing values are None or NaN. Readable encodings are array, string-array, categorical (also of
    anndata 0.7), nullable integer, boolean and string
    (https://anndata.readthedocs.io/en/stable/fileformat-prose.html).

    Parameters
    ----------
    known
        Cache of the categories of columns, which is filled here: a column may have as many
        categories as there are cells.
    """
    element = frame[name]
    if not hasattr(element, "keys"):
        values = decoded(np.asarray(element[start:stop]))
        kept = element.attrs.get("categories")
        if kept is None:
            return values
        # anndata 0.7 stores a reference (HDF5), a path (zarr), or the categories themselves.
        if isinstance(kept, h5py.Reference):
            kept = frame.file[kept]
        elif isinstance(kept, str):
            kept = frame[kept]
        return _of_codes(values, _categories(frame, name, kept, known))
    if "codes" in element:
        categories = element["categories"]
        if hasattr(categories, "keys"):
            categories = categories["values"]
        codes = np.asarray(element["codes"][start:stop])
        return _of_codes(codes, _categories(frame, name, categories, known))
    if "values" in element and "mask" in element:
        values = decoded(np.asarray(element["values"][start:stop])).astype(object)
        values[np.asarray(element["mask"][start:stop])] = None
        return values
    raise ValueError(
        f"column '{name}' is stored as {element.attrs.get('encoding-type')!r}, which is not known; "
        "write it anew with a current anndata, or leave it out"
    )


def _categories(
    frame: Any, name: str, stored: Any, known: dict[tuple[int, str], np.ndarray]
) -> np.ndarray:
    """Return the categories of a column, followed by None, which code -1 (missing) points to."""
    key = (id(frame), name)
    if key not in known:
        known[key] = np.append(decoded(np.asarray(stored[:])).astype(object), np.array([None]))
    return known[key]


def _of_codes(codes: np.ndarray, categories: np.ndarray) -> np.ndarray:
    return categories[codes]

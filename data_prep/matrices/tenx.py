"""Reads the matrices of Cell Ranger: ``.h5`` files (v2 and later) and folders with ``matrix.mtx``.

Features of all kinds are read here; `data_prep.matrices.feature_kinds` chooses the genes later.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv

from data_prep.matrices.compression import require_filters
from data_prep.matrices.matrix_store import Rows, decoded, mtx_sample
from data_prep.matrices.row_copy import Entries, stage_rows

_BATCH_BYTES = 1 << 24  # bytes of text in a batch of entries
_BANNERS = [f"%%matrixmarket matrix coordinate {kind} general" for kind in ("integer", "real")]


class _Features:
    """Base class of matrices that have columns of var and no columns of obs."""

    counts_choices = ["X"]

    def __init__(self, path: Path, columns: dict[str, np.ndarray]) -> None:
        self.path = path
        self._columns = columns
        self.num_genes = len(columns["ensembl_id"])

    def obs_columns(self) -> list[str]:
        return []

    def obs(self, column: str, start: int, stop: int) -> np.ndarray:
        raise KeyError(column)

    def var_columns(self) -> list[str]:
        return list(self._columns)

    def var(self, column: str | None) -> np.ndarray:
        return self._columns[column or "ensembl_id"]


def is_tenx(path: Path) -> bool:
    """Return whether a file is an HDF5 file with a Cell Ranger matrix."""
    if not h5py.is_hdf5(path):
        return False
    with h5py.File(path, "r") as file:
        return bool(_matrix_groups(file))


def refuse_molecules(path: Path) -> None:
    """Raise ValueError for Cell Ranger's molecule info file, which holds no matrix."""
    with h5py.File(path, "r") as file:
        is_list = "matrix" not in file and {"umi", "barcode_idx"} <= {*file}
        is_list |= "matrix" not in file and {"umi", "barcode"} <= {*file}
    if is_list:
        raise ValueError(
            f"{path}: is Cell Ranger's molecule_info.h5, one entry for each molecule before cells "
            "are called; give filtered_feature_bc_matrix.h5 of the same run"
        )


def _matrix_groups(root: Any) -> list[str]:
    """Return the groups that hold a matrix: ``matrix``, or one group per genome (v2)."""
    groups = [name for name, item in root.items() if hasattr(item, "keys")]
    return [name for name in groups if "barcodes" in root[name] and "indptr" in root[name]]


class TenxStore(_Features):
    """The matrix of a Cell Ranger ``.h5`` file, features x cells, stored by cell."""

    def __init__(self, path: Path, genome: str | None = None) -> None:
        root: Any = h5py.File(path, "r")
        require_filters(path, root)
        groups = _matrix_groups(root)
        if genome in groups:
            groups = [genome]
        if len(groups) != 1:
            raise ValueError(
                f"{path}: holds {len(groups)} matrices, {groups}; expected one. Where these are "
                f"genomes, choose one: --genome {groups[0]}"
            )
        group, self.genome = root[groups[0]], groups[0]
        self._data, self._indices = group["data"], group["indices"]
        self._indptr, self._barcodes = group["indptr"], group["barcodes"]
        table, names = group, {"ensembl_id": "genes", "name": "gene_names"}
        if "features" in group:
            table, names = group["features"], {"ensembl_id": "id", "name": "name"}
            names |= {c: c for c in ("feature_type", "genome") if c in table}
        columns = {name: decoded(table[stored][:]) for name, stored in names.items()}
        num_features, self.num_cells = (int(n) for n in group["shape"][:])
        if {len(values) for values in columns.values()} != {num_features} or (
            {len(self._barcodes), len(self._indptr) - 1} != {self.num_cells}
        ):
            raise ValueError(
                f"{path}: is {num_features} features x {self.num_cells} cells, but has "
                f"{[len(values) for values in columns.values()]} features, {len(self._barcodes)} "
                f"barcodes and {len(self._indptr) - 1} index pointers; the file is damaged"
            )
        super().__init__(path, columns)

    def rows(self, start: int, stop: int) -> Rows:
        indptr = np.asarray(self._indptr[start : stop + 1], dtype=np.int64)
        low, high = int(indptr[0]), int(indptr[-1])
        if np.any(np.diff(indptr) < 0) or high > self._data.shape[0]:
            raise OSError(f"index pointer of cells {start}-{stop} is damaged")
        return self._data[low:high], self._indices[low:high].astype(np.int32), indptr - low

    def num_stored(self, start: int, stop: int) -> int:
        return int(self._indptr[stop]) - int(self._indptr[start])

    def cell_ids(self, start: int, stop: int) -> list[str]:
        return [str(v) for v in decoded(self._barcodes[start:stop])]


class MtxStore(_Features):
    """The count matrix of a 10x folder or of an mtx file.

    The folder holds ``matrix.mtx``, ``features.tsv`` or ``genes.tsv``, and ``barcodes.tsv``; each
    file may end in ``.gz``. `path` may also be an mtx file whose tables lie beside it and have
    the same prefix and suffix (`matrix_store.mtx_sample`). The matrix is a list of entries; it is
    copied to `staging`, by cell.
    """

    def __init__(self, path: Path, staging: Path) -> None:
        folder, before, behind = path, "", ""
        if path.is_file():
            folder, (before, behind) = path.parent, mtx_sample(path) or ("", "")
        self._matrix = path if path.is_file() else _one_of(folder, "matrix.mtx")
        names = ("ensembl_id", "name", "feature_type")
        tables = (f"{before}features{behind}.tsv", f"{before}genes{behind}.tsv")
        features = _read_tsv(_one_of(folder, *tables))
        super().__init__(path, {n: c.to_numpy() for n, c in zip(names, features, strict=False)})
        self._barcodes = _read_tsv(_one_of(folder, f"{before}barcodes{behind}.tsv"))[0]
        self.num_cells = len(self._barcodes)
        with _named(self._matrix):
            self._read_header()
        self._staged = stage_rows(self._entries, self.num_cells, staging)

    def _read_header(self) -> None:
        """Read the banner, the comments and the size line, and check them."""
        with pa.input_stream(str(self._matrix)) as stream:
            lines = io.TextIOWrapper(stream, encoding="utf-8", errors="replace")
            banner = " ".join(lines.readline().lower().split())
            if banner not in _BANNERS:
                raise ValueError(f"it begins with '{banner[:80]}', expected is one of {_BANNERS}")
            self._value_type = pa.int32() if " integer " in banner else pa.float64()
            self._header_lines = 2
            while (line := lines.readline()).startswith("%"):
                self._header_lines += 1
            # One character separates the numbers, and the first entry tells which one.
            self._delimiter = "\t" if "\t" in lines.readline() else " "
        size = line.split()
        if len(size) != 3 or not all(n.isdigit() for n in size):
            raise ValueError(f"'{line[:80]}' stands where features, cells and entries are counted")
        self._num_entries = int(size[2])
        tables = [self.num_genes, self.num_cells]
        if [int(n) for n in size[:2]] != tables:
            raise ValueError(
                f"it is {size[0]} features x {size[1]} cells, but the tables beside it name "
                f"{tables[0]} features and {tables[1]} barcodes"
            )

    def _entries(self) -> Entries:
        """Yield the entries in batches, as (cells, features, values) with numbers from 0."""
        types = {"feature": pa.int32(), "cell": pa.int32(), "value": self._value_type}
        num_entries = 0
        with _named(self._matrix), pa.input_stream(str(self._matrix)) as stream:
            batches = pyarrow.csv.open_csv(
                stream,
                pyarrow.csv.ReadOptions(
                    skip_rows=self._header_lines,
                    column_names=list(types),
                    block_size=_BATCH_BYTES,
                    use_threads=False,
                ),
                pyarrow.csv.ParseOptions(delimiter=self._delimiter),
                pyarrow.csv.ConvertOptions(column_types=types, null_values=[]),
            )
            for batch in batches:
                features, cells, values = (column.to_numpy() for column in batch.columns)
                for what, numbers, count in (
                    ("feature", features, self.num_genes),
                    ("cell", cells, self.num_cells),
                ):
                    if numbers.min() < 1 or numbers.max() > count:
                        wrong = numbers[(numbers < 1) | (numbers > count)][0]
                        raise ValueError(f"an entry names {what} {wrong} of 1 to {count}")
                num_entries += len(batch)
                yield cells - 1, features - 1, values
            if num_entries != self._num_entries:
                raise ValueError(
                    f"it has {num_entries} entries and should have {self._num_entries}; the file "
                    "is truncated"
                )

    def rows(self, start: int, stop: int) -> Rows:
        return self._staged.rows(start, stop)

    def num_stored(self, start: int, stop: int) -> int:
        return self._staged.num_stored(start, stop)

    def cell_ids(self, start: int, stop: int) -> list[str]:
        return self._barcodes[start:stop].to_pylist()


def _one_of(folder: Path, *names: str) -> Path:
    """Return the first of the named files, gzipped or plain, that exists in the folder."""
    for name in names:
        for path in (folder / f"{name}.gz", folder / name):
            if path.exists():
                return path
    raise ValueError(f"{folder}: has no {' or '.join(names)} (or .gz) beside its matrix")


def _read_tsv(path: Path) -> list[pa.ChunkedArray]:
    """Return the columns of a tsv table without a header line, the first three as text."""
    with _named(path), pa.input_stream(str(path)) as stream:
        table = pyarrow.csv.read_csv(
            stream,
            pyarrow.csv.ReadOptions(autogenerate_column_names=True, use_threads=False),
            pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
            pyarrow.csv.ConvertOptions(column_types={f"f{i}": pa.string() for i in range(3)}),
        )
    return table.columns


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise errors that occur while a file is read as ValueErrors that name the file."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable ({error})") from error

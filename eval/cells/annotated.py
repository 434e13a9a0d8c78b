"""Which files of cells can take new columns, and where in them the cells that were read stand.

Cells are read from every format, but results can only be written beside the cells of an AnnData
file. A file may also hold more cells and features than were read: those of another genome, or that
a query leaves out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np

from data_prep.sources.count_source import CountSource


def require_annotated(cells: Path, out: Path, instead: str) -> None:
    """Raise ValueError unless `cells` is an AnnData file, which `out` is to be a copy of.

    `instead` says what to give in place of `out`.
    """
    if not is_annotated(cells):
        raise ValueError(
            f"--out {out}: is written beside the cells, and {cells} is no AnnData file (.h5ad, "
            f".zarr) that could take columns; give --out {instead}"
        )


def is_annotated(cells: Path) -> bool:
    """Return whether a path is a file or folder that `read_annotated` reads."""
    if cells.is_dir() and ((cells / ".zgroup").exists() or (cells / "zarr.json").exists()):
        import zarr

        return _has_cells(zarr.open_group(str(cells), mode="r"))
    if not cells.is_file() or not h5py.is_hdf5(cells):
        return False
    with h5py.File(cells) as file:
        return _has_cells(file)


def _has_cells(root: Any) -> bool:
    return "obs" in root and "var" in root and "mod" not in root


def read_annotated(cells: Path) -> anndata.AnnData:
    """Return all of an AnnData file, whatever part of it was read as cells."""
    return anndata.read_zarr(cells) if cells.is_dir() else anndata.read_h5ad(cells)


def on_all_cells(values: np.ndarray, source: CountSource, fill: Any) -> np.ndarray:
    """Return values of the cells that were read, [cells, ...], for all cells of the file.

    Cells that were not read have `fill`.
    """
    return _spread(values, source.row_numbers, source.cells_in_file, fill)


def on_all_features(values: np.ndarray, source: CountSource, fill: Any) -> np.ndarray:
    """Return values of the genes that were read for all features of the file; others: `fill`."""
    if source.chosen_features is None:
        return values
    return _spread(
        values, np.flatnonzero(source.chosen_features), len(source.chosen_features), fill
    )


def _spread(values: np.ndarray, places: np.ndarray | None, number: int, fill: Any) -> np.ndarray:
    if places is None:
        return values
    whole = np.full((number, *values.shape[1:]), fill, dtype=values.dtype)
    whole[places] = values
    return whole

"""Copies matrices that are stored by gene, or as a list of entries, to row-wise files on disk.

`stage_rows` makes two passes over the entries. The first pass counts the values of each cell, the
second writes each value to its place in memory-mapped arrays. This takes 8 bytes of memory per
cell, and one batch of entries.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np

from data_prep.files import file_sha256, write_to_disk
from data_prep.matrices.matrix_store import Rows

ROWS_DONE = "done.json"
# Batches of entries as (cells, genes, values); the genes of a cell may come in any order.
Entries = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]


class StagedRows:
    """CSR arrays in memory-mapped files: int64 indptr, int32 indices, and data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _array(self, name: str) -> np.ndarray:
        # The file is mapped anew for each range, because the pages of an open mapping would count
        # as memory of this process for ever.
        return np.load(self._folder / f"{name}.npy", mmap_mode="r")

    def rows(self, start: int, stop: int) -> Rows:
        indptr = np.array(self._array("indptr")[start : stop + 1])
        chosen = slice(int(indptr[0]), int(indptr[-1]))
        data, indices = self._array("data")[chosen], self._array("indices")[chosen]
        return np.array(data), np.array(indices), indptr - indptr[0]

    def num_stored(self, start: int, stop: int) -> int:
        indptr = self._array("indptr")
        return int(indptr[stop] - indptr[start])


def stage_rows(entries: Callable[[], Entries], num_cells: int, folder: Path) -> StagedRows:
    """Return a row-wise copy of a matrix in `folder`, writing it unless an earlier call has.

    Several processes may call this at once for the same folder: each writes into a temporary folder
    of its own, and one of them renames it to `folder`.

    Parameters
    ----------
    entries
        Function that yields batches (cells, genes, values), arrays of equal length, with each entry
        once. It is called twice.
    """
    staged_folder(folder, lambda aside: _write(entries, num_cells, aside))
    return StagedRows(folder)


def staged_folder(folder: Path, write: Callable[[Path], dict[str, int]]) -> None:
    """Fill a folder by calling `write`, unless an earlier call has filled it.

    At every moment the folder is either complete or absent.

    Parameters
    ----------
    write
        Function that writes files into the folder it is given and returns sizes for the record.
    """
    if (folder / ROWS_DONE).exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=folder.name + "-", dir=folder.parent))
    try:
        record: dict[str, Any] = {**write(aside)}
        record["sha256"] = {p.name: file_sha256(p) for p in sorted(aside.iterdir())}
        write_to_disk(aside / ROWS_DONE, json.dumps(record))
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / ROWS_DONE).exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Return whether all files of a staged folder have their recorded sha256; reads every byte."""
    try:
        hashes = json.loads((folder / ROWS_DONE).read_text())["sha256"]
        return bool(hashes) and all(file_sha256(folder / n) == h for n, h in hashes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write(entries: Callable[[], Entries], num_cells: int, folder: Path) -> dict[str, int]:
    indptr = np.zeros(num_cells + 1, dtype=np.int64)
    dtype = np.dtype(np.int32)
    for cells, _, values in entries():
        if len(cells) and (cells.min() < 0 or cells.max() >= num_cells):
            raise OSError(f"an entry names cell {cells.max() + 1} of {num_cells}")
        indptr[1:] += np.bincount(cells, minlength=num_cells)
        dtype = np.result_type(dtype, values.dtype)
    np.cumsum(indptr, out=indptr)
    np.save(folder / "indptr.npy", indptr)
    size = (max(1, int(indptr[-1])),)
    indices = np.lib.format.open_memmap(folder / "indices.npy", "w+", np.int32, size)
    data = np.lib.format.open_memmap(folder / "data.npy", "w+", dtype, size)
    place = indptr[:-1].copy()
    for cells, genes, values in entries():
        _scatter(
            np.asarray(cells, np.int64), np.asarray(genes, np.int32), values.astype(dtype),
            place, indices, data,
        )  # fmt: skip
    indices.flush()
    data.flush()
    return {"cells": num_cells, "values": int(indptr[-1])}


@numba.njit(cache=True, nogil=True)
def _scatter(cells, genes, values, place, indices, data):
    """Write each entry to the next free place of its cell."""
    for i in range(len(cells)):
        at = place[cells[i]]
        indices[at] = genes[i]
        data[at] = values[i]
        place[cells[i]] = at + 1

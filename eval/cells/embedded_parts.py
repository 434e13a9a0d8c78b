"""Embeddings of cells part by part: kept until all are there, then written as one output.

The parts lie in ``.NAME.parts`` beside the output, each a parquet table that is complete or absent,
with a record of what decides their content. A part is read when it is written on, so memory does
not grow with the cells.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from anndata.io import write_elem

from data_prep.files import complete_file, write_to_disk
from data_prep.running.owner import Owner
from data_prep.sources.count_source import CountSource
from eval.cells.annotated import on_all_cells, read_annotated

_RECORD_NAME = "parts.json"
_COUNT, _UNS = "geneloom_tokens", "geneloom"


@dataclass(frozen=True)
class PartsOf:
    """What decides the content of what is kept until an output is written.

    Attributes
    ----------
    signature
        Of the cells, as of `data_prep.sources.source_spec.SourceSpec`.
    record
        Is written into the output.
    computed
        What else decides the bits: device, precision.
    """

    cells: Path
    signature: str
    reading: dict[str, Any]
    record: dict[str, Any]
    model_sha256: str
    part_cells: int
    computed: list[Any]

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON gives it back."""
        content = {
            "cells": [str(self.cells.absolute()), self.signature],
            "reading": self.reading, "record": self.record, "model_sha256": self.model_sha256,
            "part_cells": self.part_cells, "computed": self.computed,
        }  # fmt: skip
        return json.loads(json.dumps(content, default=str))


class KeptBeside:
    """What is finished of one output, beside it in ``.NAME.parts`` until the output is written.

    The folder is owned by one process inside a ``with`` block, and is gone when the output is
    there.

    Raises
    ------
    ValueError
        The folder holds what another call has finished.
    data_prep.running.owner.FolderInUse
        Another process makes the same output.
    """

    def __init__(self, out: Path, decides: PartsOf) -> None:
        self._out, self._decides = out, decides
        self.folder = out.with_name(f".{out.name}.parts")
        self._owner = Owner(self.folder, "embed")

    def __enter__(self) -> Self:
        self._owner.__enter__()
        try:
            self._owner.take()
            record, now = self.folder / _RECORD_NAME, self._decides.as_json()
            if not record.exists():
                write_to_disk(record, json.dumps(now) + "\n")
            begun = json.loads(record.read_text())
            changed = [k for k in now if begun.get(k) != now[k]]
            if changed:
                raise ValueError(
                    f"{self.folder}: holds parts that were made with another {', '.join(changed)}; "
                    "give the same file and options to go on with them, or remove that folder"
                )
        except BaseException:
            self._owner.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        is_done = self._out.exists()
        if kind is not None and not is_done and not any(self.folder.glob("0*")):
            (self.folder / _RECORD_NAME).unlink(missing_ok=True)
        self._owner.__exit__(kind, error, trace)
        if is_done:
            shutil.rmtree(self.folder, ignore_errors=True)


class Parts(KeptBeside):
    """Parts of the cells, each with the embeddings of its cells."""

    def __init__(self, out: Path, decides: PartsOf, width: int) -> None:
        super().__init__(out, decides)
        self._schema = pa.schema(
            {
                "cell_id": pa.string(),
                _COUNT: pa.int64(),
                "embedding": pa.list_(pa.float32(), width),
            },
            {_UNS: json.dumps(decides.record)},
        )
        self._number = 0

    def has(self, number: int) -> bool:
        """Return whether a part is there; numbers count up from 0."""
        self._number = number + 1
        return self._path(number).exists()

    def put(self, number: int, cell_ids: list[str], lengths: np.ndarray, found: np.ndarray) -> None:
        """Keep a part: cell ids, int64 [cells] and float32 [cells, width]."""
        self._owner.require()
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(found.ravel()), found.shape[1])
        columns = [pa.array(cell_ids, pa.string()), pa.array(lengths, pa.int64()), vectors]
        with complete_file(self._path(number), to_disk=True) as aside:
            pq.write_table(pa.table(columns, schema=self._schema), aside)

    def write(self, source: CountSource, key: str) -> None:
        """Write the output; `key` is the name in ``obsm``.

        A ``.parquet`` output has the cells that were read; others have all cells of the file, and
        NaN for those that were not.
        """
        cells = Path(source.path)
        self._owner.require()
        with complete_file(self._out) as aside:
            if self._out.suffix == ".parquet":
                with pq.ParquetWriter(aside, self._schema) as writer:
                    for table in self._tables():
                        writer.write_table(table)
            elif self._out.suffix == ".h5ad" and _takes_columns(cells):
                shutil.copyfile(cells, aside)
                with h5py.File(aside, "r+") as file:
                    self._add(file, key, source)
            elif self._out.suffix == ".zarr" and _takes_columns_of_zarr(cells):
                shutil.copytree(cells, aside)
                store = zarr.open_group(str(aside), mode="r+", use_consolidated=False)
                self._add(store, key, source)
                if zarr.open_group(str(cells), mode="r").metadata.consolidated_metadata:
                    zarr.consolidate_metadata(str(aside))
            else:
                self._write_whole(source, aside, key)

    def _add(self, file: h5py.File | zarr.Group, key: str, source: CountSource) -> None:
        """Add embeddings, lengths and record to a copy of the input, part by part."""
        width = self._schema.field("embedding").type.list_size
        cells, places = source.cells_in_file, source.row_numbers
        for name in ("obsm", "uns"):
            if name not in file:
                write_elem(file, name, {})
        for name in (f"obsm/{key}", f"obs/{_COUNT}", f"uns/{_UNS}"):
            if name in file:
                del file[name]
        rows = min(cells, self._decides.part_cells)
        vectors = _new_array(file, f"obsm/{key}", (cells, width), np.float32, np.nan, rows)
        counts = _new_array(file, f"obs/{_COUNT}", (cells,), np.int64, 0, rows)
        columns: Any = file["obs"].attrs
        names = [str(n) for n in np.atleast_1d(columns["column-order"]) if n != _COUNT]
        order: Any = [*names, _COUNT]
        if not isinstance(file, zarr.Group):
            order = np.array(order, dtype=h5py.string_dtype())
        columns["column-order"] = order
        start = 0
        for table in self._tables():
            stop = start + table.num_rows
            here = slice(start, stop) if places is None else places[start:stop]
            vectors[here] = _matrix(table, width)
            counts[here] = table[_COUNT].to_numpy()
            start = stop
        write_elem(file, f"uns/{_UNS}", self._decides.record)

    def _write_whole(self, source: CountSource, aside: Path, key: str) -> None:
        """Write by anndata, which reads the whole input: of another format, or an old version."""
        data, tables = read_annotated(Path(source.path)), list(self._tables())
        width = self._schema.field("embedding").type.list_size
        vectors = np.concatenate([_matrix(table, width) for table in tables])
        counts = np.concatenate([table[_COUNT].to_numpy() for table in tables])
        data.obsm[key] = on_all_cells(vectors, source, np.nan)
        data.obs[_COUNT] = on_all_cells(counts, source, 0)
        data.uns[_UNS] = self._decides.record
        (data.write_h5ad if self._out.suffix == ".h5ad" else data.write_zarr)(aside)

    def _tables(self) -> Iterator[pa.Table]:
        for number in range(self._number):
            yield pq.read_table(self._path(number))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.parquet"


def _matrix(table: pa.Table, width: int) -> np.ndarray:
    vectors = table["embedding"].combine_chunks()
    return np.asarray(vectors.values, dtype=np.float32).reshape(-1, width)


def _new_array(
    file: h5py.File | zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: type,
    fill: float,
    rows: int,
) -> h5py.Dataset | zarr.Array:
    """Return a new array that anndata reads, full of `fill`; in zarr in chunks of so many rows."""
    if isinstance(file, zarr.Group):
        chunks = (rows, *shape[1:])
        made = file.create_array(name, shape=shape, dtype=dtype, chunks=chunks, fill_value=fill)
    else:
        made = file.create_dataset(name, shape, dtype, fillvalue=fill)
    made.attrs["encoding-type"], made.attrs["encoding-version"] = "array", "0.2.0"
    return made


def _takes_columns(cells: Path) -> bool:
    """Return whether a file is an h5ad whose obs is a group of columns."""
    if not h5py.is_hdf5(cells):
        return False
    with h5py.File(cells) as file:
        return _is_group_of_columns(file.get("obs"))


def _takes_columns_of_zarr(cells: Path) -> bool:
    """Return whether a folder is an AnnData store whose obs is a group of columns."""
    return cells.is_dir() and _is_group_of_columns(zarr.open_group(str(cells), mode="r").get("obs"))


def _is_group_of_columns(obs: Any) -> bool:
    return isinstance(obs, (h5py.Group, zarr.Group)) and "column-order" in obs.attrs

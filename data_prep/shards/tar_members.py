"""How a member of a tar is found and read: columns of the index, open files, checksums."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

_MAX_OPEN_FILES = 64


def is_intact(payload: bytes, size: int, crc32: int) -> bool:
    """Return whether bytes are those of a member, by length and checksum."""
    return len(payload) == size and zlib.crc32(payload) == crc32


class _Descriptor:
    """An open file, closed when nobody holds it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)


class OpenFiles:
    """The files read last stay open, 64 at most; for any number of threads.

    A file that falls out is closed by the last thread that reads it: hold what `get` returns until
    the read is done. There is no lock, which a fork could copy while it is held.
    """

    def __init__(self) -> None:
        self._files: dict[str, _Descriptor] = {}

    def __reduce__(self) -> tuple:
        return OpenFiles, ()

    def get(self, name: str, opener: Callable[[], int]) -> _Descriptor:
        """Return an open file; `opener` returns its descriptor if it is not open."""
        # A plain dict keeps the order of insertion, and each of these operations is one piece for
        # the interpreter: two threads at worst open a file twice. (OrderedDict's own are not: a
        # closing descriptor lets another thread in halfway.)
        file = self._files.pop(name, None)
        if file is None:
            file = _Descriptor(opener())
        self._files[name] = file
        for oldest in list(self._files)[:-_MAX_OPEN_FILES]:
            self._files.pop(oldest, None)
        return file


class IndexColumns(Mapping[str, np.ndarray]):
    """The columns of ``index.parquet``, each read when it is first asked for.

    A billion cells are 3.9 million rows: 16 bytes of each find a block, all columns have 45.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._schema = pq.read_schema(path)
        self._columns: dict[str, np.ndarray] = {}

    def __reduce__(self) -> tuple:
        return IndexColumns, (self._path,)

    def __iter__(self) -> Iterator[str]:
        return iter(self._schema.names)

    def __len__(self) -> int:
        return len(self._schema)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = self._read(name)
        return self._columns[name]

    def _read(self, name: str) -> np.ndarray:
        dtype = self._schema.field(name).type.to_pandas_dtype()
        with pq.ParquetFile(self._path) as file:
            column = np.empty(file.metadata.num_rows, dtype)
            start = 0
            # Batch by batch: the column as a whole would be in memory twice. `to_numpy` would load
            # pandas, 40 MB.
            for batch in file.iter_batches(columns=[name], use_threads=False):
                values, count = batch.column(0), batch.num_rows
                column[start : start + count] = np.frombuffer(
                    values.buffers()[1], dtype, count, values.offset * column.itemsize
                )
                start += count
        # Arrow would keep what it needed for pages: 20 MB for every column.
        pa.default_memory_pool().release_unused()
        column.flags.writeable = False
        return column

"""Tools to find and read members of tars: columns of the index, open files, checksums."""

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
    """Return whether the bytes of a member have the recorded length and checksum."""
    return len(payload) == size and zlib.crc32(payload) == crc32


class _Descriptor:
    """An open file descriptor, which is closed when no reference to this object is left."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)


class OpenFiles:
    """A cache of at most 64 open files, those that were read last, for any number of threads.

    A file that leaves the cache is closed when the last thread has read it, so a thread must hold
    the result of `get` until its read is done. There is no lock, because a fork could copy a lock
    while it is held.
    """

    def __init__(self) -> None:
        self._files: dict[str, _Descriptor] = {}

    def __reduce__(self) -> tuple:
        return OpenFiles, ()

    def get(self, name: str, opener: Callable[[], int]) -> _Descriptor:
        """Return an open file; if it is not open, `opener` opens it and returns its descriptor."""
        # A plain dict keeps the order of insertion, and each of these operations is atomic in the
        # interpreter: in the worst case two threads both open a file. (The operations of
        # OrderedDict are not atomic: while a descriptor closes, another thread may run.)
        file = self._files.pop(name, None)
        if file is None:
            file = _Descriptor(opener())
        self._files[name] = file
        for oldest in list(self._files)[:-_MAX_OPEN_FILES]:
            self._files.pop(oldest, None)
        return file


class IndexColumns(Mapping[str, np.ndarray]):
    """The columns of ``index.parquet``, each of which is read when it is first used.

    The index of a billion cells has 3.9 million rows. Finding a block needs 16 bytes of a row,
    while all columns have 45 bytes.
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
            # The column is read in batches, since as a whole it would be in memory twice. Arrow's
            # `to_numpy` would import pandas, which takes 40 MB.
            for batch in file.iter_batches(columns=[name], use_threads=False):
                values, count = batch.column(0), batch.num_rows
                column[start : start + count] = np.frombuffer(
                    values.buffers()[1], dtype, count, values.offset * column.itemsize
                )
                start += count
        # Otherwise Arrow would keep the memory for pages, 20 MB for every column.
        pa.default_memory_pool().release_unused()
        column.flags.writeable = False
        return column

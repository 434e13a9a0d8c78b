"""The chunk files that pass 1 writes and the later passes read: their columns, and opening them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

_SMALL_BYTES = 64 << 10


class Column:
    """Names of columns that only chunk files have; a user's column cannot have these names."""

    KEY, SPLIT, ROW, REASON = "__key", "__split", "__row", "__reason"
    TOTAL, MITO, DETECTED, CONTENT = "__total", "__mito", "__detected", "__content"
    LENGTH, SAME = "__length", "__same"


INTERNAL = tuple(v for n, v in vars(Column).items() if n.isupper())


@dataclass(frozen=True)
class Chunk:
    """A chunk file of pass 1; `first` is the number of cells in the chunk files before it."""

    name: str
    source: int
    cells: int
    first: int


def tokens_path(chunk: Path) -> Path:
    """Return the path of the file that holds the tokens of a chunk."""
    return chunk.with_suffix(".tokens")


def open_chunk(path: Path) -> pa.RecordBatch:
    """Return the cells of a chunk file, memory-mapped so that only the columns used are read."""
    try:
        state = path.stat()
        if state.st_size <= _SMALL_BYTES:
            return _small_chunk(path, state.st_mtime_ns, state.st_size)
        return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except (pa.ArrowInvalid, OSError) as error:
        raise OSError(
            f"{path}: a file of the running work is damaged ({error}); remove the folder and start "
            "again"
        ) from error


@lru_cache(maxsize=1024)
def _small_chunk(path: Path, time_ns: int, size: int) -> pa.RecordBatch:  # noqa: ARG001
    """Return the cells of a small chunk file, cached in memory, since every pass opens it again."""
    return pa.ipc.open_file(pa.py_buffer(path.read_bytes())).get_batch(0)

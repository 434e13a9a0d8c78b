"""The decoder with which webdataset reads the blocks of shards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc


def decode(key: str, data: bytes) -> list[dict[str, Any]] | None:
    """Return the cells of a block, given the name and content of its tar member.

    This is a decoder for webdataset's ``.decode()``. Each cell is a dictionary of ``input_ids`` (an
    array of integers), ``cell_id``, ``dataset`` and the carried columns. For other members of a tar
    the function returns None, so that other decoders are tried.
    """
    if key.rpartition(".")[2] != "arrow":
        return None
    batch = pa.ipc.open_stream(data).read_next_batch()
    lists = batch.column("input_ids")
    tokens = np.split(np.asarray(lists.values), np.asarray(lists.offsets)[1:-1])
    names = [n for n in batch.schema.names if n != "input_ids"]
    columns = [batch.column(n).to_pylist() for n in names]
    return [
        {"input_ids": ids} | dict(zip(names, values, strict=True))
        for ids, *values in zip(tokens, *columns, strict=True)
    ]

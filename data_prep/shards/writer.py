"""Writes shards: the tars of a split and bucket, their index, and sums for the manifest.

`TarWriter` writes one tar. `write_index` and `summarise_buckets` take the manifest entries and the
members of all tars.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from data_prep.shards.format import INDEX_SCHEMA, SPLITS, member_name, tar_stem

_TAR_BLOCK = 512


class TarWriter:
    """Writes the blocks of one tar; equal blocks always give the same bytes.

    Parameters
    ----------
    number
        Number of the tar within its split and bucket.
    first_block
        Number of the tar's first block within its split and bucket.
    """

    def __init__(
        self, folder: Path, split: str, bucket_length: int, number: int, first_block: int
    ) -> None:
        self.members: list[dict] = []
        self._stem = tar_stem(split, bucket_length)
        self._name = f"{self._stem}-{number:05d}.tar"
        self._split, self._bucket_length, self._first_block = split, bucket_length, first_block
        self._file = (folder / self._name).open("wb")
        self._sha256 = hashlib.sha256()
        self._size = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Append one block as a tar member."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        payload = memoryview(sink.getvalue())
        info = tarfile.TarInfo(member_name(self._stem, self._first_block + len(self.members)))
        info.size, info.mode = len(payload), 0o644
        header = info.tobuf(format=tarfile.USTAR_FORMAT)
        self.members.append(
            {
                "offset": self._size + len(header),
                "bytes": len(payload),
                "cells": batch.num_rows,
                "tokens": len(batch.column("input_ids").values),
                "crc32": zlib.crc32(payload),
            }
        )
        for part in (header, payload, b"\0" * (-len(payload) % _TAR_BLOCK)):
            self._put(part)

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._size += len(data)

    def close(self) -> dict:
        """Finish the tar and return its entry for the manifest; the file is not synced to disk."""
        self._put(b"\0" * (2 * _TAR_BLOCK))
        self._file.close()
        return {
            "name": self._name,
            "split": self._split,
            "bucket_length": self._bucket_length,
            "cells": sum(m["cells"] for m in self.members),
            "tokens": sum(m["tokens"] for m in self.members),
            "bytes": self._size,
            "sha256": self._sha256.hexdigest(),
        }


def write_index(path: Path, shards: list[dict], members: list[list[dict]]) -> None:
    """Write ``index.parquet``: the `members` of each of `shards`, in the order of cell numbers."""
    rows: dict[str, list] = {name: [] for name in INDEX_SCHEMA.names}
    first_cell = 0
    for number, (shard, inside) in enumerate(zip(shards, members, strict=True)):
        for member in inside:
            row = member | {
                "split": SPLITS.index(shard["split"]),
                "bucket_length": shard["bucket_length"],
                "shard": number,
                "first_cell": first_cell,
            }
            for name in rows:
                rows[name].append(row[name])
            first_cell += member["cells"]
    pq.write_table(pa.table(rows, schema=INDEX_SCHEMA), path, compression="zstd")


def summarise_buckets(shards: list[dict], members: list[list[dict]]) -> list[dict]:
    """Return one manifest entry per split and bucket: cells, tokens, bytes, blocks, shards."""
    buckets: dict[tuple[str, int], dict] = {}
    for shard, inside in zip(shards, members, strict=True):
        key = (shard["split"], shard["bucket_length"])
        names = ("cells", "tokens", "bytes", "blocks", "shards")
        entry = buckets.setdefault(
            key, {"split": key[0], "length": key[1]} | dict.fromkeys(names, 0)
        )
        for name, value in zip(
            names, (shard["cells"], shard["tokens"], shard["bytes"], len(inside), 1), strict=True
        ):
            entry[name] += value
    return list(buckets.values())

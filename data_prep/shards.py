"""The on-disk format: webdataset tars of Arrow blocks, an index, a manifest.

A folder of shards holds

- ``{split}-L{length}-{number}.tar``: each member ``{number}.arrow`` is an Arrow IPC stream with one
  record batch of cells of one length bucket: ``input_ids`` (list<uint16>), ``cell_id``, ``dataset``
  and the metadata columns asked for. The tars are ordinary webdataset shards. All blocks of a
  bucket but its last hold the same number of cells.
- ``index.parquet``: one row per member: where it is, which cells it holds, its crc32.
- ``vocabulary.json``: the vocabulary the tokens were made with.
- ``statistics.json``: cells of each length, cells with each token.
- ``manifest.json``: what was read, kept and rejected, buckets, shards with SHA-256, and a
  fingerprint over all that decides the cells and their order.

Cells have one number each, 0..N-1, in the order split, bucket, block, place in the block.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from data_prep.vocab import Vocabulary, load_vocabulary

SHARD_FORMAT = "geneloom-shards/2"
# /1 had metadata columns as plain strings and no statistics.json.
READABLE_FORMATS = ("geneloom-shards/1", SHARD_FORMAT)
MANIFEST_NAME, INDEX_NAME, VOCABULARY_NAME = "manifest.json", "index.parquet", "vocabulary.json"
STATISTICS_NAME = "statistics.json"
SPLITS = ("train", "heldout")
_PARTIAL = ".partial"
_TAR_BLOCK = 512
_MAX_OPEN_FILES = 64

INDEX_SCHEMA = pa.schema(
    [
        ("split", pa.int8()),
        ("bucket_length", pa.int32()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("bytes", pa.int32()),
        ("first_cell", pa.int64()),
        ("cells", pa.int32()),
        ("tokens", pa.int64()),
        ("crc32", pa.uint32()),
    ]
)


class TarWriter:
    """Writes the blocks of one tar, the same bytes every time.

    Parameters
    ----------
    number
        Of the tar within its split and bucket.
    first_block
        Number of the first block within split and bucket.
    """

    def __init__(
        self, folder: Path, split: str, bucket_length: int, number: int, first_block: int
    ) -> None:
        self.members: list[dict] = []
        self._stem = f"{split}-L{bucket_length:04d}"
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
        # webdataset groups members by the name up to the first dot: unique over all shards.
        info = tarfile.TarInfo(f"{self._stem}-{self._first_block + len(self.members):08d}.arrow")
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
        """Finish the tar; return its entry of the manifest. It is not yet forced to disk."""
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


def require_new(out: Path) -> None:
    """Raise ValueError unless a folder to be written is absent or empty.

    What a killed writer left behind does not count.
    """
    if out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - {_PARTIAL}):
        raise ValueError(f"{out}: exists and is not an empty folder; give --out a new one")


@contextlib.contextmanager
def complete_folder(out: Path, record: str) -> Iterator[Path]:
    """Give a folder to write into, whose files become those of `out` at the end; or nothing at all.

    `record` names the file without which nobody reads the folder.

    The folder lies inside `out` (the same file system, also behind links and mount points). After
    an error it is removed, with the folders that were made for it.
    """
    made = [p for p in (out, *out.parents) if not p.exists()]
    partial = out / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        # The record comes last: a folder with a record is complete.
        for path in sorted(partial.iterdir(), key=lambda p: (p.name == record, p.name)):
            path.rename(out / path.name)
        partial.rmdir()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def write_index(path: Path, shards: list[dict], members: list[list[dict]]) -> None:
    """Write ``index.parquet``: `members` of each of `shards`, in the order that numbers cells."""
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
    """Return one entry per split and bucket: cells, tokens, bytes, blocks, tars."""
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


def fingerprint(manifest: dict) -> str:
    """Return the hash of what decides cells and order: vocabulary, shards, index, format."""
    decisive = {k: manifest[k] for k in ("format", "vocabulary_sha256", "shards", "index_sha256")}
    text = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Block:
    """Decoded cells of one tar member: `tokens` flat, `offsets` int64 [cells + 1]."""

    tokens: np.ndarray
    offsets: np.ndarray
    batch: pa.RecordBatch


@dataclass(frozen=True)
class BucketExtent:
    """Where the cells of one length bucket are: a range of cell numbers, in blocks, in tars.

    `block_cells` is the size of all its blocks but the last; `run_cells`, a multiple of it, the
    size of all its tars but the last: cells that lie in a row in one file.
    """

    length: int
    first_cell: int
    num_cells: int
    first_block: int
    block_cells: int
    run_cells: int

    @property
    def num_blocks(self) -> int:
        return -(-self.num_cells // self.block_cells)


class ShardSet:
    """A folder of shards, opened for reading any block without reading what comes before.

    Parameters
    ----------
    folder
        Output folder of ``geneloom prepare``.

    Raises
    ------
    ValueError
        No manifest, another format, or an index or vocabulary that does not belong to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / MANIFEST_NAME
        if not path.exists():
            raise ValueError(
                f"{folder}: no {MANIFEST_NAME}; expected a folder made by `geneloom prepare`"
            )
        try:
            self.manifest: dict = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error}); prepare the folder again") from error
        needed = {"format", "vocabulary_sha256", "index_sha256", "shards", "sources", "buckets"}
        if not isinstance(self.manifest, dict) or not needed <= self.manifest.keys():
            raise ValueError(f"{path}: is not the manifest of shards; prepare the folder again")
        if self.manifest.get("format") not in READABLE_FORMATS:
            raise ValueError(
                f"{path}: format {self.manifest.get('format')!r}, this version reads "
                f"{READABLE_FORMATS}"
            )
        self.vocabulary: Vocabulary = load_vocabulary(folder / VOCABULARY_NAME)
        if self.vocabulary.sha256 != self.manifest["vocabulary_sha256"]:
            raise ValueError(
                f"{folder}: {VOCABULARY_NAME} has hash {self.vocabulary.sha256[:12]}, the shards "
                f"were made with {self.manifest['vocabulary_sha256'][:12]}"
            )
        index_path = folder / INDEX_NAME
        wanted = self.manifest["index_sha256"]
        if not index_path.exists() or file_sha256(index_path) != wanted:
            raise ValueError(f"{index_path}: is missing or does not match the manifest; damaged?")
        index = pq.read_table(index_path)
        self.index = {name: index.column(name).to_numpy() for name in index.column_names}
        self._open_files: OrderedDict[int, int] = OrderedDict()

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def num_cells(self) -> int:
        return int(self.index["cells"].sum())

    def extents(self, split: str) -> list[BucketExtent]:
        """Return where the buckets of a split are, by ascending length; from the manifest alone."""
        block_cells = self.manifest["settings"]["block_cells"]
        tars: dict[tuple[str, int], list[int]] = {}
        for shard in self.manifest["shards"]:
            tars.setdefault((shard["split"], shard["bucket_length"]), []).append(shard["cells"])
        found, first_cell, first_block = [], 0, 0
        for (owner, length), cells in tars.items():
            uniform = len(set(cells[:-1])) <= 1 and cells[-1] <= cells[0]
            run_cells = cells[0] if uniform and len(cells) > 1 else block_cells
            extent = BucketExtent(
                length, first_cell, sum(cells), first_block, block_cells, run_cells
            )
            if owner == split:
                found.append(extent)
            first_cell += extent.num_cells
            first_block += extent.num_blocks
        return sorted(found, key=lambda e: e.length)

    def bucket_lengths(self, split: str) -> list[int]:
        """Return the ascending padded lengths that have cells in a split."""
        chosen = self.index["split"] == SPLITS.index(split)
        return [int(n) for n in np.unique(self.index["bucket_length"][chosen])]

    def block_numbers(self, split: str, bucket_length: int) -> np.ndarray:
        """Return the index rows of one bucket, in order."""
        chosen = (self.index["split"] == SPLITS.index(split)) & (
            self.index["bucket_length"] == bucket_length
        )
        return np.flatnonzero(chosen)

    def read_block(self, number: int) -> Block:
        """Return the decoded cells of one index row.

        Raises
        ------
        ValueError
            The shard is missing or short, or the bytes do not have the recorded checksum; the
            message names shard and member.
        """
        size = int(self.index["bytes"][number])
        shard = int(self.index["shard"][number])
        payload = os.pread(self._descriptor(shard), size, int(self.index["offset"][number]))
        if len(payload) != size or zlib.crc32(payload) != int(self.index["crc32"][number]):
            name = self.manifest["shards"][shard]["name"]
            raise ValueError(
                f"{self.folder / name}: the member at byte {self.index['offset'][number]} (block "
                f"{number}) is damaged: its checksum is wrong; copy or prepare the shards again"
            )
        batch = pa.ipc.open_stream(pa.py_buffer(payload)).read_next_batch()
        lists = batch.column("input_ids")
        offsets = np.asarray(lists.offsets, dtype=np.int64)
        return Block(np.asarray(lists.values), offsets, batch)

    def _descriptor(self, shard: int) -> int:
        if shard in self._open_files:
            self._open_files.move_to_end(shard)
            return self._open_files[shard]
        path = self.folder / self.manifest["shards"][shard]["name"]
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: shard is missing; copy or prepare it again") from error
        self._open_files[shard] = descriptor
        if len(self._open_files) > _MAX_OPEN_FILES:
            os.close(self._open_files.popitem(last=False)[1])
        return descriptor

    def iter_blocks(self, split: str) -> Iterator[Block]:
        """Yield all blocks of a split, in order."""
        for number in np.flatnonzero(self.index["split"] == SPLITS.index(split)):
            yield self.read_block(int(number))

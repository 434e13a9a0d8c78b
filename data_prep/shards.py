"""The on-disk format: webdataset tars of Arrow blocks, an index, a manifest.

A folder of shards holds

- ``{split}-L{length}-{number}.tar``: each member ``{split}-L{length}-{block}.arrow`` is an Arrow
  IPC stream with one record batch of cells of one length bucket: ``input_ids`` (list<uint16>),
  ``cell_id``, ``dataset`` and the metadata columns asked for. The tars are ordinary webdataset
  shards. All blocks of a bucket but its last hold the same number of cells.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from data_prep.files import made_folder, names_in
from data_prep.members import IndexColumns, OpenFiles, is_intact
from data_prep.members import decode as decode
from data_prep.vocab import Vocabulary, load_vocabulary

if TYPE_CHECKING:
    from data_prep.remote import ShardCache

SHARD_FORMAT = "geneloom-shards/2"
# /1 had metadata columns as plain strings and no statistics.json.
READABLE_FORMATS = ("geneloom-shards/1", SHARD_FORMAT)
MANIFEST_NAME, INDEX_NAME, VOCABULARY_NAME = "manifest.json", "index.parquet", "vocabulary.json"
STATISTICS_NAME = "statistics.json"
SPLITS = ("train", "heldout")
PARTIAL = ".partial"
_TAR_BLOCK = 512
_PLACE = ("offset", "bytes", "crc32")
# 32 seconds in all, and at most 20 s of silence before each: less than the 600 s that ranks wait
# in a collective.
RETRY_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

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
        self._stem = _stem(split, bucket_length)
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
        info = tarfile.TarInfo(_member_name(self._stem, self._first_block + len(self.members)))
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


def _stem(split: str, bucket_length: int) -> str:
    return f"{split}-L{bucket_length:04d}"


def _member_name(stem: str, block: int) -> str:
    # webdataset groups members by the name up to the first dot: unique over all shards.
    return f"{stem}-{block:08d}.arrow"


def require_new(out: Path) -> None:
    """Raise ValueError unless a folder to be written is absent, or empty but for what runs left."""
    if out.exists() and (not out.is_dir() or names_in(out) - {PARTIAL}):
        raise ValueError(f"{out}: exists and is not an empty folder; give --out a new one")


@contextlib.contextmanager
def complete_folder(out: Path, record: str) -> Iterator[Path]:
    """Give a folder to write into, whose files become those of `out` at the end; or nothing at all.

    `record` names the file without which nobody reads the folder.

    The folder lies inside `out` (the same file system, also behind links and mount points). After
    an error it is removed, with the folders that were made for it.
    """
    partial = out / PARTIAL
    with made_folder(out):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            # The record comes last: a folder with a record is complete.
            for path in sorted(partial.iterdir(), key=lambda p: (p.name == record, p.name)):
                path.rename(out / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


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

    def locate(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (block number, place in the block) of cell numbers of this bucket."""
        blocks, places = np.divmod(cells - self.first_cell, self.block_cells)
        return self.first_block + blocks, places


class DamagedBlock(ValueError):
    """The bytes of a block are not those that were written.

    `number` is that of the block, `shard` the name of the tar it is in.
    """

    def __init__(self, message: str, number: int, shard: str) -> None:
        super().__init__(message)
        self.number, self.shard = number, shard

    def __reduce__(self) -> tuple:
        return DamagedBlock, (self.args[0], self.number, self.shard)


class ShardSet:
    """Shards, opened for reading any block without reading what comes before.

    Threads may share it. A forked or pickled one opens its own connections.

    Parameters
    ----------
    location
        Output folder of ``geneloom prepare``, or its URL: whatever has ``://`` and fsspec opens.
    cache
        Folder for the local copy of what is read from a URL, one folder in it for each corpus.
    retry_pauses_s
        For a URL: seconds to wait after each failure that may pass; one failure more is an error.

    Raises
    ------
    ValueError
        No manifest, another format, or an index or vocabulary that does not belong to it; a URL
        without a cache.
    ConnectionError
        The URL could not be read.
    """

    def __init__(
        self,
        location: str | Path,
        cache: Path | None = None,
        retry_pauses_s: Sequence[float] = RETRY_PAUSES_S,
    ) -> None:
        self.location = location
        self._cache: ShardCache | None = None
        if "://" in str(location):
            # Imported where there is a URL: the network libraries take a third of a second.
            from data_prep.remote import open_remote

            self.manifest, self._cache = open_remote(str(location), cache, retry_pauses_s)
            self.folder = self._cache.folder
        else:
            self.folder = Path(location)
            self.manifest = _read_manifest(self.folder)
        self._open_files = OpenFiles()
        try:
            self._extents, self._first_blocks = _lay_out(self.manifest)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{location}: {MANIFEST_NAME} is incomplete or edited ({error!r})"
            ) from error
        self.vocabulary: Vocabulary = self._load_vocabulary()
        self.index = IndexColumns(self._find_index())
        # What every block needs is read before there are threads or forks: then all share it.
        for name in _PLACE:
            self.index[name]

    def _load_vocabulary(self) -> Vocabulary:
        wanted = self.manifest["vocabulary_sha256"]
        if self._cache:
            return load_vocabulary(
                self._cache.file(VOCABULARY_NAME, lambda path: _is_vocabulary(path, wanted))
            )
        vocabulary = load_vocabulary(self.folder / VOCABULARY_NAME)
        if vocabulary.sha256 != wanted:
            raise ValueError(
                f"{self.folder}: {VOCABULARY_NAME} has hash {vocabulary.sha256[:12]}, the shards "
                f"were made with {wanted[:12]}"
            )
        return vocabulary

    def _find_index(self) -> Path:
        wanted = self.manifest["index_sha256"]
        if self._cache:
            return self._cache.file(INDEX_NAME, lambda path: file_sha256(path) == wanted)
        path = self.folder / INDEX_NAME
        if not path.exists() or file_sha256(path) != wanted:
            raise ValueError(f"{path}: is missing or does not match the manifest; damaged?")
        return path

    def find_statistics(self) -> Path:
        """Return the path of ``statistics.json``, which may be missing or, in a folder, wrong."""
        wanted = self.manifest.get("statistics_sha256")
        if self._cache and wanted:
            return self._cache.file(STATISTICS_NAME, lambda path: file_sha256(path) == wanted)
        return self.folder / STATISTICS_NAME

    @property
    def name(self) -> str:
        """Name of the folder, the last part of a URL."""
        if self._cache:
            return str(self.location).rstrip("/").rsplit("/", 1)[-1]
        return self.folder.resolve().name

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def num_cells(self) -> int:
        return sum(e.num_cells for _, e in self._extents)

    def extents(self, split: str) -> list[BucketExtent]:
        """Return where the buckets of a split are, by ascending length; from the manifest alone."""
        return sorted((e for owner, e in self._extents if owner == split), key=lambda e: e.length)

    def bucket_lengths(self, split: str) -> list[int]:
        """Return the ascending padded lengths that have cells in a split."""
        return [e.length for e in self.extents(split)]

    def block_numbers(self, split: str, bucket_length: int) -> np.ndarray:
        """Return the index rows of one bucket, in order."""
        for extent in self.extents(split):
            if extent.length == bucket_length:
                return np.arange(extent.first_block, extent.first_block + extent.num_blocks)
        return np.arange(0)

    def read_block(self, number: int) -> Block:
        """Return the decoded cells of one index row.

        Raises
        ------
        DamagedBlock
            The bytes do not have the recorded checksum, or there are too few; the message names
            shard and member. With a URL: those at the source.
        ValueError
            The shard is missing.
        ConnectionError
            The URL could not be read.
        """
        offset, size, crc32 = (int(self.index[name][number]) for name in _PLACE)
        shard = int(np.searchsorted(self._first_blocks, number, side="right")) - 1
        tar = self.manifest["shards"][shard]["name"]
        if self._cache:
            payload = self._cache.read(tar, offset, size, crc32)
        else:
            payload = self._read_local(tar, offset, size, crc32)
        if payload is None:
            raise self._damaged(number, shard, offset)
        batch = pa.ipc.open_stream(pa.py_buffer(payload)).read_next_batch()
        lists = batch.column("input_ids")
        offsets = np.asarray(lists.offsets, dtype=np.int64)
        return Block(np.asarray(lists.values), offsets, batch)

    def _read_local(self, tar: str, offset: int, size: int, crc32: int) -> bytes | None:
        path = self.folder / tar
        try:
            file = self._open_files.get(tar, lambda: os.open(path, os.O_RDONLY))
        except FileNotFoundError as error:
            raise ValueError(f"{path}: shard is missing; copy or prepare it again") from error
        payload = os.pread(file.number, size, offset)
        return payload if is_intact(payload, size, crc32) else None

    def _damaged(self, number: int, shard: int, offset: int) -> DamagedBlock:
        entry = self.manifest["shards"][shard]
        first_block = max(e.first_block for _, e in self._extents if e.first_block <= number)
        member = _member_name(_stem(entry["split"], entry["bucket_length"]), number - first_block)
        tar = entry["name"]
        place = self._cache.address(tar) if self._cache else self.folder / tar
        where = " at the source" if self._cache else ""
        return DamagedBlock(
            f"{place}: the member {member} at byte {offset} (block {number}) is damaged{where}: "
            "its checksum is wrong; copy or prepare the shards again",
            number,
            tar,
        )

    def iter_blocks(self, split: str) -> Iterator[Block]:
        """Yield all blocks of a split, in order."""
        for owner, extent in self._extents:
            if owner == split:
                for number in range(extent.first_block, extent.first_block + extent.num_blocks):
                    yield self.read_block(number)


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise ValueError(
            f"{folder}: no {MANIFEST_NAME}; expected a folder made by `geneloom prepare`"
        )
    return parse_manifest(path.read_bytes(), path)


def parse_manifest(text: bytes, path: str | Path) -> dict:
    """Return the manifest of shards; ValueError, which names `path`, if it is none."""
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); prepare the folder again") from error
    needed = {
        "format", "vocabulary_sha256", "index_sha256", "shards", "sources", "buckets", "settings",
        "fingerprint",
    }  # fmt: skip
    if not isinstance(manifest, dict) or not needed <= manifest.keys():
        raise ValueError(f"{path}: is not the manifest of shards; prepare the folder again")
    if manifest["format"] not in READABLE_FORMATS:
        raise ValueError(
            f"{path}: format {manifest['format']!r}, this version reads {READABLE_FORMATS}"
        )
    return manifest


def _lay_out(manifest: dict) -> tuple[list[tuple[str, BucketExtent]], np.ndarray]:
    """Return (split, extent) of all buckets in the order of cells, and the first block of each tar.

    Computed from the manifest: all blocks of a bucket are full but the last.
    """
    block_cells = manifest["settings"]["block_cells"]
    tars: dict[tuple[str, int], list[int]] = {}
    for shard in manifest["shards"]:
        tars.setdefault((shard["split"], shard["bucket_length"]), []).append(shard["cells"])
    extents, first_cell, first_block = [], 0, 0
    for (split, length), cells in tars.items():
        uniform = len(set(cells[:-1])) <= 1 and cells[-1] <= cells[0]
        run_cells = cells[0] if uniform and len(cells) > 1 else block_cells
        extent = BucketExtent(length, first_cell, sum(cells), first_block, block_cells, run_cells)
        extents.append((split, extent))
        first_cell += extent.num_cells
        first_block += extent.num_blocks
    blocks = (-(-shard["cells"] // block_cells) for shard in manifest["shards"])
    first_blocks = np.fromiter(accumulate(blocks, initial=0), np.int64)[:-1]
    return extents, first_blocks


def _is_vocabulary(path: Path, sha256: str) -> bool:
    try:
        return load_vocabulary(path).sha256 == sha256
    except ValueError:
        return False

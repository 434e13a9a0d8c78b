"""Reads any block of shards, from a folder or a URL, without reading the blocks before it.

`ShardSet` opens a folder of shards. Its `extents` say which cells each bucket has, `read_block`
returns one block by its number, and `iter_blocks` yields all blocks of a split.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from data_prep.files import file_sha256
from data_prep.genes.vocabulary import Vocabulary, load_vocabulary
from data_prep.running.redact import without_credentials
from data_prep.shards.format import (
    INDEX_NAME,
    MANIFEST_NAME,
    STATISTICS_NAME,
    VOCABULARY_NAME,
    BucketExtent,
    lay_out,
    member_name,
    parse_manifest,
    tar_stem,
)
from data_prep.shards.tar_members import IndexColumns, OpenFiles, is_intact

if TYPE_CHECKING:
    from data_prep.shards.remote import ShardCache

_PLACE = ("offset", "bytes", "crc32")
# The pauses take 32 seconds in all, and before each the server may be silent for at most 20 s: this
# is less than the 600 s that ranks wait in a collective operation.
RETRY_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True)
class Block:
    """Decoded cells of one tar member.

    `tokens` holds the tokens of all cells one after the other; `offsets`, int64 [cells + 1], says
    where each cell begins; `batch` has all columns.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    batch: pa.RecordBatch


class DamagedBlock(ValueError):
    """Raised if the bytes of a block are not those that were written.

    `number` is the number of the block, `shard` the name of its tar.
    """

    def __init__(self, message: str, number: int, shard: str) -> None:
        super().__init__(message)
        self.number, self.shard = number, shard

    def __reduce__(self) -> tuple:
        return DamagedBlock, (self.args[0], self.number, self.shard)


class ShardSet:
    """Opened shards, of which any block can be read on its own.

    Threads may share the object. After a fork or after unpickling it opens its own connections.

    Parameters
    ----------
    location
        Output folder of ``geneloom prepare``, or its URL, which contains ``://`` and is opened by
        fsspec.
    cache
        Folder for local copies of what is read from URLs; each corpus gets a folder in it.
    retry_pauses_s
        For a URL: seconds to wait after each temporary failure. After the last pause, another
        failure raises an error.
    share
        Share of the training cells that this object shows, above 0 to 1: those with the smallest
        shuffle keys of each bucket. A smaller share is a part of a larger one. The fingerprint
        names the share if it is below 1; numbers of cells and blocks stay what they are.

    Raises
    ------
    ValueError
        There is no manifest, it has another format, its index or vocabulary do not belong to it, a
        URL is given without a cache, or the share leaves no training cell.
    ConnectionError
        The URL could not be read.
    """

    def __init__(
        self,
        location: str | Path,
        cache: Path | None = None,
        retry_pauses_s: Sequence[float] = RETRY_PAUSES_S,
        share: float = 1.0,
    ) -> None:
        self.location, self.share = without_credentials(str(location)), share
        self._cache: ShardCache | None = None
        if "://" in str(location):
            # Imported only if there is a URL: importing network libraries takes a third of a
            # second.
            from data_prep.shards.remote import open_remote

            self.manifest, self._cache = open_remote(str(location), cache, retry_pauses_s)
            self.folder = self._cache.folder
        else:
            self.folder = Path(location)
            self.manifest = _read_manifest(self.folder)
        self._open_files = OpenFiles()
        try:
            self._extents, self._first_blocks = lay_out(self.manifest, share)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.location}: {MANIFEST_NAME} is incomplete or edited ({error!r})"
            ) from error
        self._cut = self._cut_blocks() if share != 1 else {}
        self.vocabulary: Vocabulary = self._load_vocabulary()
        self.index = IndexColumns(self._find_index())
        # The columns that every block needs are read now, before threads or forks exist, so that
        # all of them share the columns.
        for name in _PLACE:
            self.index[name]

    def _cut_blocks(self) -> dict[int, int]:
        """Return for each block that only a part of its cells is shown of how many; or raise."""
        whole = {e.first_block: e.num_cells for _, e in lay_out(self.manifest)[0]}
        train = self.extents("train")
        if not 0 < self.share <= 1 or not train:
            raise ValueError(
                f"{self.location}: a share of {self.share} of the training cells leaves none, or "
                "is no share; give a number above 0 and at most 1"
            )
        return {
            e.first_block + e.num_blocks - 1: e.num_cells - (e.num_blocks - 1) * e.block_cells
            for e in train
            if e.num_cells < whole[e.first_block]
        }

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
        """Return the path of ``statistics.json``.

        The file may be missing. In a local folder its content is not checked.
        """
        wanted = self.manifest.get("statistics_sha256")
        if self._cache and wanted:
            return self._cache.file(STATISTICS_NAME, lambda path: file_sha256(path) == wanted)
        return self.folder / STATISTICS_NAME

    @property
    def name(self) -> str:
        """Name of the folder, or the last part of the URL."""
        if self._cache:
            return self.location.rstrip("/").rsplit("/", 1)[-1]
        return self.folder.resolve().name

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the cells that are shown, and their order."""
        whole = self.manifest["fingerprint"]
        if self.share == 1:
            return whole
        return hashlib.sha256(f"{whole} share {self.share!r}".encode()).hexdigest()

    @property
    def num_cells(self) -> int:
        return sum(e.num_cells for _, e in self._extents)

    def extents(self, split: str) -> list[BucketExtent]:
        """Return the extents of a split's buckets, by ascending length, from the manifest alone."""
        return sorted((e for owner, e in self._extents if owner == split), key=lambda e: e.length)

    def bucket_lengths(self, split: str) -> list[int]:
        """Return the ascending padded lengths that have cells in a split."""
        return [e.length for e in self.extents(split)]

    def block_numbers(self, split: str, bucket_length: int) -> np.ndarray:
        """Return the numbers of the blocks of one bucket, in order; they are rows of the index."""
        for extent in self.extents(split):
            if extent.length == bucket_length:
                return np.arange(extent.first_block, extent.first_block + extent.num_blocks)
        return np.arange(0)

    def cells_of_blocks(self, numbers: np.ndarray) -> np.ndarray:
        """Return int64 [blocks], how many cells `read_block` gives of each of these blocks."""
        cells = np.asarray(self.index["cells"])[numbers].astype(np.int64)
        for block, kept in self._cut.items():
            cells[np.asarray(numbers) == block] = kept
        return cells

    def read_block(self, number: int) -> Block:
        """Return the decoded cells of one block; its number is a row of the index.

        Raises
        ------
        DamagedBlock
            The bytes do not have the recorded checksum, or there are too few; the message names
            shard and member. For a URL, the damage is at the source.
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
        if number in self._cut:
            batch = batch.slice(0, self._cut[number])
        lists = batch.column("input_ids")
        offsets = np.asarray(lists.offsets, dtype=np.int64)
        return Block(np.asarray(lists.values)[: offsets[-1]], offsets, batch)

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
        member = member_name(tar_stem(entry["split"], entry["bucket_length"]), number - first_block)
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


def _is_vocabulary(path: Path, sha256: str) -> bool:
    try:
        return load_vocabulary(path).sha256 == sha256
    except ValueError:
        return False

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

import hashlib
import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.ipc

if TYPE_CHECKING:
    pass

SHARD_FORMAT = "geneloom-shards/2"
# /1 had metadata columns as plain strings and no statistics.json.
READABLE_FORMATS = ("geneloom-shards/1", SHARD_FORMAT)
MANIFEST_NAME, INDEX_NAME, VOCABULARY_NAME = "manifest.json", "index.parquet", "vocabulary.json"
STATISTICS_NAME = "statistics.json"
SPLITS = ("train", "heldout")
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


def tar_stem(split: str, bucket_length: int) -> str:
    return f"{split}-L{bucket_length:04d}"


def member_name(stem: str, block: int) -> str:
    # webdataset groups members by the name up to the first dot: unique over all shards.
    return f"{stem}-{block:08d}.arrow"


def fingerprint(manifest: dict) -> str:
    """Return the hash of what decides cells and order: vocabulary, shards, index, format."""
    decisive = {k: manifest[k] for k in ("format", "vocabulary_sha256", "shards", "index_sha256")}
    text = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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


def lay_out(manifest: dict) -> tuple[list[tuple[str, BucketExtent]], np.ndarray]:
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

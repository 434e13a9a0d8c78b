"""Defines the on-disk format of shards: webdataset tars of Arrow blocks, an index, a manifest.

A folder of shards holds

- ``{split}-L{length}-{number}.tar``: each member ``{split}-L{length}-{block}.arrow`` is an Arrow
  IPC stream with one record batch of cells of one length bucket: ``input_ids`` (list<uint16>),
  ``cell_id``, ``dataset`` and the metadata columns that the user asked for. The tars are ordinary
  webdataset shards. All blocks of a bucket except the last hold the same number of cells.
- ``index.parquet``: one row per tar member, with its place, its cells and its crc32.
- ``vocabulary.json``: the vocabulary that the tokens were made with.
- ``statistics.json``: the number of cells of each length, and of cells with each token.
- ``manifest.json``: what was read, kept and rejected, the buckets, the shards with SHA-256, and a
  fingerprint of everything that decides the cells and their order.

Every cell has a number, 0..N-1, in the order of split, bucket, block and place in the block.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc

SHARD_FORMAT = "geneloom-shards/2"
# Format 1 had metadata columns as plain strings and no statistics.json.
READABLE_FORMATS = ("geneloom-shards/1", SHARD_FORMAT)
MANIFEST_NAME, INDEX_NAME, VOCABULARY_NAME = "manifest.json", "index.parquet", "vocabulary.json"
STATISTICS_NAME = "statistics.json"
SPLITS = ("train", "heldout")
# The golden ratio: multiples of it, without their whole part, are spread evenly over 0..1.
_SPREAD = 0.6180339887498949
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
    # webdataset groups members by the name up to the first dot, so it is unique over all shards.
    return f"{stem}-{block:08d}.arrow"


def fingerprint(manifest: dict) -> str:
    """Return the hash of vocabulary, shards, index and format, which decide cells and order."""
    decisive = {k: manifest[k] for k in ("format", "vocabulary_sha256", "shards", "index_sha256")}
    text = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class BucketExtent:
    """The range of cell numbers of one length bucket, and its division into blocks and tars.

    `block_cells` is the number of cells in each block except the last. `run_cells`, a multiple of
    it, is the number of cells in each tar except the last; it equals `block_cells` where there is
    only one tar or the tars have different sizes.
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
        """Return (block number, place in the block) for cell numbers of this bucket."""
        blocks, places = np.divmod(cells - self.first_cell, self.block_cells)
        return self.first_block + blocks, places


def parse_manifest(text: bytes, path: str | Path) -> dict:
    """Return the manifest in `text`; raise ValueError, naming `path`, if it is no manifest."""
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


def lay_out(
    manifest: dict, share: float = 1.0
) -> tuple[list[tuple[str, BucketExtent]], np.ndarray]:
    """Return the extents of all buckets and the first block of each tar, from the manifest alone.

    The extents are pairs (split, extent) in the order of cell numbers. All blocks of a bucket
    except the last are full, so nothing else has to be read. With a share, the extents of the train
    split hold so many of their cells, and those that would hold none are left out.
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
    if share == 1:
        return extents, first_blocks
    train = [e for split, e in extents if split == "train"]
    shown = [(split, _share_of(e, share, train) if split == "train" else e) for split, e in extents]
    return [(split, e) for split, e in shown if e.num_cells], first_blocks


def _share_of(extent: BucketExtent, share: float, buckets: list[BucketExtent]) -> BucketExtent:
    """Return the first cells of a bucket, a share of them.

    The cells of a bucket are in the order of their shuffle keys, which are hashes. So its first
    cells are a random choice, and a smaller share is a part of a larger one. Its place among the
    `buckets` decides whether a part of a cell is rounded up, so that small buckets together have
    their share.
    """
    round_up = (buckets.index(extent) + 1) * _SPREAD % 1
    cells = int(share * extent.num_cells + round_up)
    is_one_tar = cells <= extent.run_cells
    return replace(
        extent, num_cells=cells, run_cells=extent.block_cells if is_one_tar else extent.run_cells
    )

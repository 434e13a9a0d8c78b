"""Fake cells: written as real files, read by the real code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse

from data_prep.files import file_sha256
from data_prep.genes.vocabulary import Vocabulary
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.shards.format import INDEX_SCHEMA, SHARD_FORMAT, SPLITS, fingerprint
from data_prep.shards.writer import summarise_buckets
from data_prep.sources.source_spec import SourceOptions, source_at

if TYPE_CHECKING:
    import anndata


def make_cells(
    num_cells: int = 120, num_genes: int = 200, seed: int = 0, detected: float = 0.4
) -> anndata.AnnData:
    """Return cells of three types with different expressed genes, raw counts, obs and var."""
    import anndata

    rng = np.random.default_rng(seed)
    kinds = np.arange(num_cells) % 3
    rates = rng.gamma(0.8, 2.0, size=(3, num_genes))
    depth = rng.uniform(0.3, 1.5, size=num_cells) * detected / 0.4
    counts = rng.poisson(rates[kinds] * depth[:, None]).astype(np.float32)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([f"type{k}" for k in kinds]),
            "donor": [f"donor{i % 4}" for i in range(num_cells)],
        },
        index=[f"cell{i}" for i in range(num_cells)],
    )
    var = pd.DataFrame(
        {"symbol": [f"G{i}" for i in range(num_genes)]},
        index=[f"ENSG{i:011d}" for i in range(num_genes)],
    )
    return anndata.AnnData(scipy.sparse.csr_matrix(counts), obs=obs, var=var)


def write_cells(path: Path, **kwargs) -> Path:
    """Write `make_cells` as h5ad and return the path."""
    make_cells(**kwargs).write_h5ad(path)
    return path


def make_shards(folder: Path, heldout: float = 0.1, block_cells: int = 16, **kwargs) -> Path:
    """Return a folder of shards of fake cells, with a vocabulary built from them."""
    source = write_cells(folder / "cells.h5ad", **kwargs)
    options = PrepareOptions(heldout_share=heldout, block_cells=block_cells, vocabulary_min_cells=1)
    spec = source_at(source, SourceOptions(columns=("cell_type", "donor")))
    prepare([spec], folder / "shards", None, options)
    return folder / "shards"


# Of the split, as `prepare` would choose them: 16 and 4 buckets.
_LARGE_BUCKETS = {"train": range(128, 2049, 128), "heldout": range(512, 2049, 512)}
_LARGE_BLOCK = 256


def make_large_manifest(folder: Path, cells: int = 10**9, shards: int = 40_000) -> Path:
    """Return a folder of shards without its tars: manifest, index and vocabulary agree.

    `cells` and `shards` are met exactly; every bucket has tars of one size but its last. A tar
    should have several blocks of 256 cells.
    """
    folder.mkdir()
    genes = tuple(f"ENSG{i:011d}" for i in range(25_000))
    vocabulary = Vocabulary(genes, np.linspace(0.5, 9, len(genes)), {"<pad>": 0, "<mask>": 1}, 2048)
    vocabulary.save(folder / "vocabulary.json")
    buckets = [(split, length) for split, found in _LARGE_BUCKETS.items() for length in found]
    tar_cells = _large_tars(cells, shards, len(buckets))
    owner = np.repeat(np.arange(len(buckets)), [len(c) for c in tar_cells])
    table, tar_bytes = _large_index(np.concatenate(tar_cells), owner, buckets)
    pq.write_table(table, folder / "index.parquet", compression="zstd")
    tar_tokens = np.bincount(table["shard"].to_numpy(), table["tokens"].to_numpy()).astype(int)
    entries = []
    for bucket, (split, length) in enumerate(buckets):
        for number, at in enumerate(np.flatnonzero(owner == bucket)):
            name = f"{split}-L{length:04d}-{number:05d}.tar"
            entries.append(
                {
                    "name": name,
                    "split": split,
                    "bucket_length": length,
                    "cells": int(tar_cells[bucket][number]),
                    "tokens": int(tar_tokens[at]),
                    "bytes": int(tar_bytes[at]),
                    "sha256": hashlib.sha256(name.encode()).hexdigest(),
                }
            )
    blocks = np.bincount(table["shard"].to_numpy())
    source = {"name": "cells", "cells_read": cells, "cells_kept": cells, "rejected": {}}
    manifest = {
        "format": SHARD_FORMAT,
        "sources": [source],
        "datasets": [source],
        "buckets": summarise_buckets(entries, [range(n) for n in blocks]),
        "shards": entries,
        "settings": {"block_cells": _LARGE_BLOCK},
        "num_tokens": vocabulary.num_tokens,
        "max_length": vocabulary.max_length,
        "vocabulary_sha256": vocabulary.sha256,
        "index_sha256": file_sha256(folder / "index.parquet"),
    }
    manifest["fingerprint"] = fingerprint(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return folder


def _large_tars(cells: int, shards: int, buckets: int) -> list[np.ndarray]:
    """Return the cells of the tars of each bucket: full ones of two sizes, and one rest each."""
    low = cells // shards // _LARGE_BLOCK * _LARGE_BLOCK
    full = shards - buckets
    # Half of the buckets have tars of `low` cells, half of a block more; so many of each that the
    # last tars are about half full.
    wanted = cells - buckets * low // 2
    num_low = round(((low + _LARGE_BLOCK) * full - wanted) / _LARGE_BLOCK)
    half = buckets // 2
    sizes = [low] * half + [low + _LARGE_BLOCK] * (buckets - half)
    counts = [num_low // half + (i < num_low % half) for i in range(half)]
    rest = full - num_low
    counts += [rest // (buckets - half) + (i < rest % (buckets - half)) for i in range(half)]
    left = cells - sum(s * c for s, c in zip(sizes, counts, strict=True))
    lasts = [left // buckets + (i < left % buckets) for i in range(buckets)]
    assert min(counts) > 0 and 0 < min(lasts) <= max(lasts) <= low, "other numbers, please"
    return [
        np.array([size] * count + [last])
        for size, count, last in zip(sizes, counts, lasts, strict=True)
    ]


def _large_index(
    tar_cells: np.ndarray, owner: np.ndarray, buckets: list[tuple[str, int]]
) -> tuple[pa.Table, np.ndarray]:
    """Return the index of tars with so many cells in such buckets, and the bytes of each tar."""
    rng = np.random.default_rng(0)
    num_blocks = -(-tar_cells // _LARGE_BLOCK)
    first_block = np.cumsum(num_blocks) - num_blocks
    shard = np.repeat(np.arange(len(tar_cells)), num_blocks)
    place = np.arange(len(shard)) - first_block[shard]
    cells = np.minimum(_LARGE_BLOCK, tar_cells[shard] - place * _LARGE_BLOCK)
    lengths = np.array([length for _, length in buckets])[owner][shard]
    tokens = (cells * lengths * rng.uniform(0.94, 1.0, len(shard))).astype(np.int64)
    size = 2 * tokens + 24 * cells + 1024
    member = 512 + -(-size // 512) * 512
    ends = np.cumsum(member)
    start = ends - member
    rows = {
        "split": np.array([SPLITS.index(split) for split, _ in buckets])[owner][shard],
        "bucket_length": lengths,
        "shard": shard,
        "offset": start - start[first_block][shard] + 512,
        "bytes": size,
        "first_cell": np.cumsum(cells) - cells,
        "cells": cells,
        "tokens": tokens,
        "crc32": rng.integers(0, 2**32, len(shard), dtype=np.uint32),
    }
    columns = [
        pa.array(rows[field.name].astype(field.type.to_pandas_dtype())) for field in INDEX_SCHEMA
    ]
    return pa.table(columns, schema=INDEX_SCHEMA), np.add.reduceat(member, first_block) + 1024

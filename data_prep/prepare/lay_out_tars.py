"""Decides, between the passes, which cells are kept and into which tar each cell goes.

Only small columns of the chunk files are read, one file at a time. `decide_reasons` writes one byte
per cell, its reason code, to a memory-mapped file; `report_datasets` and `length_histogram` count
the cells. `plan_writing` chooses the length buckets and assigns cells to tars by rank: tar number p
of a bucket holds the cells of ranks p*C..(p+1)*C-1 in the order of the shuffle key, with C a
multiple of the block size. The ranks are found from the number of cells per range of keys, so that
no list of all cells is ever needed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.encoding.chunk_files import Chunk, Column, open_chunk
from data_prep.encoding.duplicates import SameCells, settle_same_cells
from data_prep.encoding.filters import (
    DUPLICATE,
    KEPT,
    REASONS,
    DatasetMoments,
    final_split,
    is_kept,
    quality_reasons,
    rows_by_value,
)
from data_prep.files import file_sha256
from data_prep.genes.rank_genes import token_dtype
from data_prep.genes.vocabulary import Vocabulary
from data_prep.prepare.options import PrepareOptions
from data_prep.shards.buckets import bucket_of, choose_buckets
from data_prep.shards.format import SPLITS
from data_prep.sources.source_spec import SourceSpec

_MOST_BINS_BITS = 16
_CELLS_PER_BIN = 64
_CELL_BYTES = 64  # rough size of a cell's ids, offsets and metadata, in memory and on disk
_TASKS, _TASK_BYTES = 16, 128 << 20
_SORT_BYTES = 24  # memory per cell while duplicates are searched for


@dataclass(frozen=True)
class KeyWindow:
    """The cells of one bucket that one tar holds.

    Of the bucket's cells in the key bins first_bin..last_bin, in key order, the first `skip` belong
    to an earlier tar, and the next `take` belong to this one.
    """

    bucket: int
    first_block: int
    skip: int
    take: int
    first_bin: int
    last_bin: int


@dataclass(frozen=True)
class WritePlan:
    """The plan of pass 2; it does not depend on the number of processes and on the memory."""

    chunks: list[Chunk]
    decisions: str
    buckets: list[int]
    bin_bits: int
    # The windows of the buckets, for each split and each tar number.
    windows: list[list[list[KeyWindow]]]
    bytes_per_task: list[int]
    block_cells: int
    columns: list[str]
    num_tokens: int

    @property
    def digest(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass
class DatasetReport:
    """Numbers of one data set's cells in one source: read, kept, truncated and rejected."""

    source: str
    dataset: str
    cells_read: int
    cells_kept: int
    tokens: int
    truncated: int
    rejected: dict[str, int]


def decide_reasons(
    work: Path,
    chunks: list[Chunk],
    moments: dict[str, DatasetMoments],
    sources: list[SourceSpec],
    options: PrepareOptions,
) -> tuple[str, SameCells]:
    """Write the reason codes of all cells to a file; return its name and the numbers of copies.

    The file holds one byte per cell, in the order of the chunk files.

    Parameters
    ----------
    moments
        Per data set, for the quality filters.
    sources
        See `data_prep.encoding.duplicates.settle_same_cells`.
    """
    aside = work / "decisions.new"
    codes = np.lib.format.open_memmap(
        aside, "w+", np.uint8, (max(1, sum(c.cells for c in chunks)),)
    )
    for chunk, batch in _open_all(work, chunks):
        reasons = np.asarray(batch.column(Column.REASON)).copy()
        datasets = batch.column("dataset").to_numpy(zero_copy_only=False)
        totals, mito = np.asarray(batch.column(Column.TOTAL)), np.asarray(batch.column(Column.MITO))
        for dataset, here in rows_by_value(datasets).items():
            reasons[here] = quality_reasons(
                reasons[here],
                totals[here],
                mito[here],
                moments[dataset],
                options.max_sd_counts,
                options.max_sd_mito,
            )
        codes[chunk.first : chunk.first + chunk.cells] = reasons
    memory_gib = options.memory_gib
    if options.dedup:
        _reject_duplicates(work, chunks, codes, memory_gib)
    same = SameCells()
    if options.same_side:
        same = settle_same_cells(work, chunks, codes, sources, options.heldout_by, memory_gib)
    codes.flush()
    # The name contains a hash of the content, so a plan that refers to it is valid exactly if the
    # decisions are the same.
    name = f"decisions-{file_sha256(aside)[:24]}.npy"
    aside.rename(work / name)
    return name, same


def _open_all(work: Path, chunks: list[Chunk]) -> Iterator[tuple[Chunk, pa.RecordBatch]]:
    for chunk in chunks:
        yield chunk, open_chunk(work / chunk.name)


def _reject_duplicates(
    work: Path, chunks: list[Chunk], codes: np.ndarray, memory_gib: float
) -> None:
    """Mark kept cells as duplicates if an earlier kept cell (by source, row) has the same content.

    Contents are compared by 64-bit hashes: among 30 million different cells the probability that
    any two have the same hash is 2e-5. The hashes are divided into parts that fit into memory.
    """
    parts = 1 + int(len(codes) * _SORT_BYTES / (memory_gib * 2**30))
    for part in range(parts):
        found: list[np.ndarray] = []
        for chunk, batch in _open_all(work, chunks):
            content = np.asarray(batch.column(Column.CONTENT))
            here = np.flatnonzero(
                (content % np.uint64(parts) == part)
                & (codes[chunk.first : chunk.first + chunk.cells] == KEPT)
            )
            cells = np.empty((3, len(here)), dtype=np.uint64)
            cells[0] = content[here]
            cells[1] = (np.asarray(batch.column(Column.ROW))[here]) + (chunk.source << 40)
            cells[2] = chunk.first + here
            found.append(cells)
        content, age, place = np.concatenate(found, axis=1)
        order = np.lexsort((age, content))
        again = np.r_[False, content[order][1:] == content[order][:-1]]
        codes[place[order][again].astype(np.int64)] = DUPLICATE


def report_datasets(
    work: Path, chunks: list[Chunk], decisions: str, names: list[str], max_genes: int, specials: int
) -> list[DatasetReport]:
    """Return the numbers of cells by source and data set, in the order of the sources.

    Parameters
    ----------
    names
        Names of the sources.
    max_genes
        A cell with more detected genes is truncated.
    specials
        Number of special tokens in each cell.
    """
    codes = np.load(work / decisions, mmap_mode="r")
    reports: dict[tuple[int, str], DatasetReport] = {}
    for chunk, batch in _open_all(work, chunks):
        code = codes[chunk.first : chunk.first + chunk.cells]
        datasets = batch.column("dataset").to_numpy(zero_copy_only=False)
        detected = np.asarray(batch.column(Column.DETECTED))
        tokens = np.minimum(detected, max_genes).astype(np.int64) + specials
        for dataset, here in rows_by_value(datasets).items():
            kept = here[is_kept(code[here])]
            report = reports.setdefault(
                (chunk.source, dataset),
                DatasetReport(names[chunk.source], dataset, 0, 0, 0, 0, {}),
            )
            report.cells_read += len(here)
            report.cells_kept += len(kept)
            report.tokens += int(tokens[kept].sum())
            report.truncated += int((detected[kept] > max_genes).sum())
            rejected = Counter(REASONS[c] for c in code[here][~is_kept(code[here])])
            report.rejected = dict(Counter(report.rejected) + rejected)
    return [reports[k] for k in sorted(reports)]


def length_histogram(
    work: Path, chunks: list[Chunk], decisions: str, max_length: int
) -> np.ndarray:
    """Return int64 [splits, max_length + 1], the number of kept cells of each length."""
    codes = np.load(work / decisions, mmap_mode="r")
    histogram = np.zeros((len(SPLITS), max_length + 1), dtype=np.int64)
    for chunk, batch in _open_all(work, chunks):
        code = codes[chunk.first : chunk.first + chunk.cells]
        kept = is_kept(code)
        lengths = np.asarray(batch.column(Column.LENGTH)).astype(np.int64)
        split = final_split(batch.column(Column.SPLIT), code)[kept]
        flat = split * np.int64(max_length + 1) + lengths[kept]
        histogram += np.bincount(flat, minlength=histogram.size).reshape(histogram.shape)
    return histogram


def plan_writing(
    work: Path,
    chunks: list[Chunk],
    decisions: str,
    histogram: np.ndarray,
    vocabulary: Vocabulary,
    columns: list[str],
    options: PrepareOptions,
) -> WritePlan:
    """Return the plan of pass 2.

    The number of tars of each bucket follows from the bytes of the split. A tar has `shard_mib` MiB
    on average; but if there is enough work for 16 processes, there are at least 16 tar numbers.
    """
    buckets = choose_buckets(histogram.sum(axis=0), vocabulary.max_length)
    cells = int(histogram.sum())
    bin_bits = max(0, min(_MOST_BINS_BITS, (cells // _CELLS_PER_BIN).bit_length()))
    counts = _cells_per_bin(work, chunks, decisions, buckets, bin_bits)
    token_bytes = token_dtype(vocabulary.num_tokens).itemsize
    lengths = np.arange(histogram.shape[1])
    windows, bytes_per_task = [], []
    for split in range(len(SPLITS)):
        sizes = counts[split].sum(axis=1)
        split_bytes = int((histogram[split] * (lengths * token_bytes + _CELL_BYTES)).sum())
        used = max(1, int((sizes > 0).sum()))
        by_size = round(split_bytes / (options.shard_mib * 2**20 * used))
        tasks = max(1, by_size, min(_TASKS, split_bytes // _TASK_BYTES))
        windows.append(_windows(counts[split], tasks, options.block_cells))
        bytes_per_task.append(split_bytes // tasks)
    return WritePlan(
        chunks, decisions, buckets, bin_bits, windows, bytes_per_task,
        options.block_cells, columns, vocabulary.num_tokens,
    )  # fmt: skip


def key_bins(keys: np.ndarray, bin_bits: int) -> np.ndarray:
    """Return int64 [keys], the key bins: the first `bin_bits` bits of the shuffle keys."""
    if bin_bits == 0:
        return np.zeros(len(keys), dtype=np.int64)
    return (keys >> np.uint64(64 - bin_bits)).astype(np.int64)


def _cells_per_bin(
    work: Path, chunks: list[Chunk], decisions: str, buckets: list[int], bin_bits: int
) -> np.ndarray:
    """Return int64 [splits, buckets, key bins], the number of kept cells."""
    codes = np.load(work / decisions, mmap_mode="r")
    shape = (len(SPLITS), len(buckets), 1 << bin_bits)
    counts = np.zeros(int(np.prod(shape)), dtype=np.int64)
    for chunk, batch in _open_all(work, chunks):
        code = codes[chunk.first : chunk.first + chunk.cells]
        kept = np.flatnonzero(is_kept(code))
        lengths = np.asarray(batch.column(Column.LENGTH))[kept]
        split = final_split(batch.column(Column.SPLIT), code)[kept].astype(np.int64)
        bins = key_bins(np.asarray(batch.column(Column.KEY))[kept], bin_bits)
        flat = (split * shape[1] + bucket_of(lengths, buckets)) * shape[2] + bins
        np.add.at(counts, flat, 1)
    return counts.reshape(shape)


def _windows(counts: np.ndarray, tasks: int, block_cells: int) -> list[list[KeyWindow]]:
    """Return the windows of the buckets for each tar number.

    `counts` is int64 [buckets, key bins], the number of kept cells.
    """
    result: list[list[KeyWindow]] = [[] for _ in range(tasks)]
    for bucket, per_bin in enumerate(counts):
        before = np.r_[0, np.cumsum(per_bin)]
        size = int(before[-1])
        cells = -(-size // (tasks * block_cells)) * block_cells
        for number, start in enumerate(range(0, size, max(1, cells))):
            stop = min(start + cells, size)
            first = int(np.searchsorted(before, start, side="right")) - 1
            last = int(np.searchsorted(before, stop, side="left")) - 1
            result[number].append(
                KeyWindow(
                    bucket, start // block_cells, start - int(before[first]), stop - start, first,
                    last,
                )
            )  # fmt: skip
    return result

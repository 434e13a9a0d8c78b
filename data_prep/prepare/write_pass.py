"""Pass 2: writes the tars of one tar number, for all buckets of a split, from the chunk files.

`write_tars` reads its range of shuffle keys in parts that fit into memory. In each part `_gather`
puts the cells in key order, and they are passed to the `TarWriter` of their bucket. The number of
parts never changes the bytes of a tar. `finished_writing` finds the work of an earlier run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.encoding.chunk_files import Chunk, Column, open_chunk, tokens_path
from data_prep.encoding.encoded_cells import CellTable, count_tokens, place_rows, scatter_rows
from data_prep.encoding.filters import KEPT, MOVED
from data_prep.files import file_sha256, write_to_disk
from data_prep.genes.rank_genes import token_dtype
from data_prep.prepare.lay_out_tars import KeyWindow, WritePlan, key_bins
from data_prep.shards.buckets import bucket_of
from data_prep.shards.format import SPLITS
from data_prep.shards.writer import TarWriter

# Memory needed per byte of cells: tokens are held once; small columns are held twice, and blocks
# need memory too.
_COPIES = 1.5


@dataclass(frozen=True)
class WriteJob:
    """The work of writing tar number `number` of every bucket of a split."""

    work: Path
    plan_name: str
    split: int
    number: int
    memory_gib: float

    @property
    def folder(self) -> Path:
        """Folder for the tars; each plan has its own, so that tars of two plans are never mixed."""
        return self.work / f"tars-{Path(self.plan_name).stem}"

    @property
    def record_path(self) -> Path:
        return self.folder / f"written-{SPLITS[self.split]}-{self.number:05d}.json"


@dataclass(frozen=True)
class WriteRecord:
    """The result of a `WriteJob`: manifest entries of its tars, their members, cells per token."""

    shards: list[dict]
    members: list[list[dict]]
    cells_per_token: list[int]


def save_plan(work: Path, plan: WritePlan) -> str:
    """Write the plan to a file for all processes; return the name of the file."""
    name = f"plan-{plan.digest}.json"
    write_to_disk(work / name, json.dumps(asdict(plan)))
    return name


@lru_cache(maxsize=2)
def _load_plan(path: Path) -> WritePlan:
    content = json.loads(path.read_text())
    content["chunks"] = [Chunk(**c) for c in content["chunks"]]
    content["windows"] = [
        [[KeyWindow(**w) for w in windows] for windows in split] for split in content["windows"]
    ]
    return WritePlan(**content)


def finished_writing(job: WriteJob) -> WriteRecord | None:
    """Return the record of a job that an earlier run has finished, None if no valid one exists."""
    if not job.record_path.exists():
        return None
    try:
        record = WriteRecord(**json.loads(job.record_path.read_text()))
    except (ValueError, TypeError):  # the record itself is damaged
        return None
    for shard in record.shards:
        path = job.folder / shard["name"]
        if not path.exists() or path.stat().st_size != shard["bytes"]:
            return None
        if file_sha256(path) != shard["sha256"]:
            return None
    return record


def write_tars(job: WriteJob) -> WriteRecord:
    """Write the tars of one job; return their record, which is also written to a file."""
    plan = _load_plan(job.work / job.plan_name)
    job.folder.mkdir(exist_ok=True)
    windows = plan.windows[job.split][job.number]
    writers = {
        w.bucket: TarWriter(
            job.folder, SPLITS[job.split], plan.buckets[w.bucket], job.number, w.first_block
        )
        for w in windows
    }
    ready = {w.bucket: _Ready(w.skip, w.take) for w in windows}
    seen = np.zeros(plan.num_tokens, dtype=np.int64)
    for low, high in _parts(windows, plan.bytes_per_task[job.split], job.memory_gib):
        for number, cells in _gather(job, plan, windows, low, high).items():
            for block in ready[number].blocks(cells, plan.block_cells):
                _write_block(writers[number], block, plan.columns, seen)
    shards, members = [], []
    for number, writer in writers.items():
        for block in ready[number].rest():
            _write_block(writer, block, plan.columns, seen)
        shards.append(writer.close())
        members.append(writer.members)
        assert shards[-1]["cells"] == ready[number].taken, "cells were lost or doubled"
    record = WriteRecord(shards, members, seen.tolist())
    write_to_disk(job.record_path, json.dumps(vars(record)))
    return record


def _parts(windows: list[KeyWindow], num_bytes: int, memory_gib: float) -> list[tuple[int, int]]:
    """Return consecutive ranges of key bins whose cells fit into memory."""
    if not windows:
        return []
    first, last = min(w.first_bin for w in windows), max(w.last_bin for w in windows) + 1
    parts = 1 + int(num_bytes * _COPIES / (memory_gib * 2**30))
    edges = np.unique(np.linspace(first, last, min(parts, last - first) + 1).astype(np.int64))
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def _gather(
    job: WriteJob, plan: WritePlan, windows: list[KeyWindow], low: int, high: int
) -> dict[int, CellTable]:
    """Return, for each bucket, the cells of its window in the key bins low..high-1, in key order.

    The chunk files are read twice: first the keys and small columns, then the tokens, which are
    copied to their final place.
    """
    codes = np.load(job.work / plan.decisions, mmap_mode="r")
    first = np.full(len(plan.buckets), 1 << 62)
    last = np.full(len(plan.buckets), -1)
    for window in windows:
        first[window.bucket], last[window.bucket] = window.first_bin, window.last_bin
    found: list[tuple[Chunk, np.ndarray, np.ndarray]] = []
    keys, buckets, tables = [], [], []
    for chunk in plan.chunks:
        batch = open_chunk(job.work / chunk.name)
        code = codes[chunk.first : chunk.first + chunk.cells]
        lengths = np.asarray(batch.column(Column.LENGTH))
        all_keys = np.asarray(batch.column(Column.KEY))
        # Cells of this split, and cells of the other split that were moved to this one.
        for split, wanted in ((job.split, KEPT), (1 - job.split, MOVED)):
            begin, end = np.searchsorted(np.asarray(batch.column(Column.SPLIT)), [split, split + 1])
            bins = key_bins(all_keys[begin:end], plan.bin_bits)
            begin, end = begin + np.searchsorted(bins, [low, high])
            rows = begin + np.flatnonzero(code[begin:end] == wanted)
            bucket = bucket_of(lengths[rows], plan.buckets)
            bins = key_bins(all_keys[rows], plan.bin_bits)
            inside = (bins >= first[bucket]) & (bins <= last[bucket])
            rows, bucket = rows[inside], bucket[inside]
            if not rows.size:
                continue
            # The offsets of tokens in the file, beginning with the first chosen row.
            offsets = np.r_[0, np.cumsum(lengths[: rows[-1] + 1], dtype=np.int64)][rows[0] :]
            found.append((chunk, rows - rows[0], offsets))
            keys.append(all_keys[rows])
            buckets.append(bucket)
            names = ["cell_id", "dataset", *plan.columns]
            tables.append(pa.Table.from_batches([batch.select(names)]).take(pa.array(rows)))
    if not found:
        return {}
    bucket = np.concatenate(buckets)
    order = np.lexsort((np.concatenate(keys), bucket))
    lengths = np.concatenate([offsets[rows + 1] - offsets[rows] for _, rows, offsets in found])
    offsets, starts = place_rows(lengths, order)
    kind = token_dtype(plan.num_tokens)
    tokens = np.empty(int(offsets[-1]), dtype=kind)
    done = 0
    for chunk, rows, here in found:
        path = tokens_path(job.work / chunk.name)
        read = np.fromfile(path, kind, int(here[-1] - here[0]), offset=int(here[0]) * kind.itemsize)
        scatter_rows(read, here - here[0], rows, starts[done : done + len(rows)], tokens)
        done += len(rows)
    columns = pa.concat_tables(tables).combine_chunks().take(pa.array(order))
    together = CellTable(tokens, offsets, columns)
    edges = np.searchsorted(bucket[order], np.arange(len(plan.buckets) + 1))
    return {
        n: together.slice(int(edges[n]), int(edges[n + 1]))
        for n in range(len(plan.buckets))
        if edges[n] < edges[n + 1]
    }


class _Ready:
    """Divides the cells of one bucket into full blocks.

    The first `skip` cells are left out, because they belong to an earlier tar; after `take` cells
    the tar is complete.
    """

    def __init__(self, skip: int, take: int) -> None:
        self._skip, self._left = skip, take
        self._rest: CellTable | None = None
        self.taken = 0

    def blocks(self, cells: CellTable, block_cells: int) -> Iterator[CellTable]:
        """Yield full blocks of `cells` and the cells that remained from the last call."""
        start = min(self._skip, len(cells))
        self._skip -= start
        stop = min(start + self._left, len(cells))
        self._left -= stop - start
        self.taken += stop - start
        if self._rest is not None:
            missing = min(block_cells - len(self._rest), stop - start)
            self._rest = CellTable.concat([self._rest, cells.slice(start, start + missing)])
            start += missing
            if len(self._rest) == block_cells:
                yield self._rest
                self._rest = None
        while stop - start >= block_cells:
            yield cells.slice(start, start + block_cells)
            start += block_cells
        if start < stop:
            # The rest is copied, because a slice would keep all cells of this part in memory.
            self._rest = cells.slice(start, stop).take(np.arange(stop - start))

    def rest(self) -> list[CellTable]:
        """Return a list with the last, short block, or an empty list if there is none."""
        return [self._rest] if self._rest is not None else []


def _write_block(writer: TarWriter, cells: CellTable, columns: list[str], seen: np.ndarray) -> None:
    # The arrays are copied, because Arrow writes a slice with padding that depends on its position.
    coded = cells.columns.take(pa.array(np.arange(len(cells)))).combine_chunks()
    # A block has few different data sets, donors or cell types, so columns are stored as
    # dictionaries, with 2 bytes per cell.
    for name in ("dataset", *columns):
        values = coded.column(name).combine_chunks()
        place = coded.schema.get_field_index(name)
        coded = coded.set_column(place, name, _dictionary(values))
    writer.write(CellTable(cells.tokens, cells.offsets, coded).to_batch())
    count_tokens(cells.tokens, seen)


def _dictionary(values: pa.Array) -> pa.Array:
    values = values.chunk(0) if isinstance(values, pa.ChunkedArray) else values
    coded = values.dictionary_encode()
    small = pa.int16() if len(coded) < 1 << 15 else pa.int32()
    return pa.DictionaryArray.from_arrays(coded.indices.cast(small), coded.dictionary)

"""Pass 2: chunk files -> the tars of one tar number, all buckets of a split at once.

The key range of a task is read in parts that fit into memory; in each part the cells are put in key
order and handed to the writers of their buckets. Parts change when bytes are written, never which.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.buckets import bucket_of
from data_prep.cells import Cells
from data_prep.decide import Chunk, Window, WritePlan, key_bins
from data_prep.encode import KEY, SPLIT, open_chunk, write_text
from data_prep.filters import KEPT
from data_prep.rank import token_dtype
from data_prep.shards import SPLITS, TarWriter

# A cell is held as gathered from the files, joined, ordered, and in a writer's block.
_COPIES = 3.5


@dataclass(frozen=True)
class WriteJob:
    """Write tar number `number` of every bucket of a split."""

    work: Path
    plan_name: str
    split: int
    number: int
    memory_gib: float

    @property
    def record_path(self) -> Path:
        plan = Path(self.plan_name).stem
        return self.work / f"written-{plan}-{SPLITS[self.split]}-{self.number:05d}.json"


@dataclass(frozen=True)
class WriteRecord:
    """What a `WriteJob` left: manifest entries of its tars, their members, cells per token."""

    shards: list[dict]
    members: list[list[dict]]
    cells_per_token: list[int]


def save_plan(work: Path, plan: WritePlan) -> str:
    """Store the plan for all processes; return the file's name."""
    name = f"plan-{plan.digest}.json"
    write_text(work / name, json.dumps(asdict(plan)))
    return name


@lru_cache(maxsize=2)
def _load_plan(path: Path) -> WritePlan:
    content = json.loads(path.read_text())
    content["chunks"] = [Chunk(**c) for c in content["chunks"]]
    content["windows"] = [
        [[Window(**w) for w in windows] for windows in split] for split in content["windows"]
    ]
    return WritePlan(**content)


def finished_writing(job: WriteJob) -> WriteRecord | None:
    """Return the record of a job that an earlier run has finished."""
    if not job.record_path.exists():
        return None
    record = WriteRecord(**json.loads(job.record_path.read_text()))
    sizes = {s["name"]: s["bytes"] for s in record.shards}
    present = all(
        (job.work / name).exists() and (job.work / name).stat().st_size == size
        for name, size in sizes.items()
    )
    return record if present else None


def write_tars(job: WriteJob) -> WriteRecord:
    """Write the tars of one job; return their record, which is also stored."""
    plan = _load_plan(job.work / job.plan_name)
    windows = plan.windows[job.split][job.number]
    writers = {
        w.bucket: TarWriter(
            job.work, SPLITS[job.split], plan.buckets[w.bucket], job.number, w.first_block
        )
        for w in windows
    }
    ready = {w.bucket: _Ready(w.skip, w.take) for w in windows}
    seen = np.zeros(plan.num_tokens, dtype=np.int64)
    for low, high in _parts(windows, plan.bytes_per_task[job.split], job.memory_gib):
        cells, bucket = _gather(job, plan, windows, low, high)
        for number, waiting in ready.items():
            for block in waiting.blocks(cells, np.flatnonzero(bucket == number), plan.block_cells):
                _write_block(writers[number], block, plan.columns, seen)
    shards, members = [], []
    for number, writer in writers.items():
        for block in ready[number].rest():
            _write_block(writer, block, plan.columns, seen)
        shards.append(writer.close())
        members.append(writer.members)
        assert shards[-1]["cells"] == ready[number].taken, "cells were lost or doubled"
    record = WriteRecord(shards, members, seen.tolist())
    write_text(job.record_path, json.dumps(asdict(record)))
    return record


def _parts(windows: list[Window], num_bytes: int, memory_gib: float) -> list[tuple[int, int]]:
    """Return ranges of key bins, each as much as memory allows."""
    if not windows:
        return []
    first, last = min(w.first_bin for w in windows), max(w.last_bin for w in windows) + 1
    parts = 1 + int(num_bytes * _COPIES / (memory_gib * 2**30))
    edges = np.unique(np.linspace(first, last, min(parts, last - first) + 1).astype(np.int64))
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def _gather(
    job: WriteJob, plan: WritePlan, windows: list[Window], low: int, high: int
) -> tuple[Cells, np.ndarray]:
    """Return cells of key bins low..high-1 that belong to a window, in key order, and buckets."""
    codes = np.load(job.work / plan.decisions, mmap_mode="r")
    first = np.full(len(plan.buckets), 1 << 62)
    last = np.full(len(plan.buckets), -1)
    for window in windows:
        first[window.bucket], last[window.bucket] = window.first_bin, window.last_bin
    columns = ["cell_id", "dataset", *plan.columns, KEY]
    found: list[Cells] = []
    for chunk in plan.chunks:
        batch = open_chunk(job.work / chunk.name)
        begin, end = np.searchsorted(np.asarray(batch.column(SPLIT)), [job.split, job.split + 1])
        bins = key_bins(np.asarray(batch.column(KEY))[begin:end], plan.bin_bits)
        begin, end = begin + np.searchsorted(bins, [low, high])
        cells = Cells.of_batch(batch.slice(begin, end - begin).select(["input_ids", *columns]))
        lengths = cells.lengths
        bucket = bucket_of(lengths, plan.buckets)
        bins = key_bins(np.asarray(batch.column(KEY))[begin:end], plan.bin_bits)
        kept = codes[chunk.first + begin : chunk.first + end] == KEPT
        rows = np.flatnonzero(kept)
        rows = rows[(bins[rows] >= first[bucket[rows]]) & (bins[rows] <= last[bucket[rows]])]
        if rows.size:
            found.append(cells.take(rows))
    if not found:
        names = ["cell_id", "dataset", *plan.columns]
        columns = pa.table({n: pa.array([], pa.string()) for n in names})
        none = np.zeros(0, dtype=token_dtype(plan.num_tokens))
        return Cells(none, np.zeros(1, dtype=np.int64), columns), np.zeros(0, dtype=np.int64)
    joined = Cells.concat(found)
    found.clear()
    order = np.argsort(joined.columns.column(KEY).to_numpy(), kind="stable")
    ordered = joined.take(order)
    ordered = Cells(ordered.tokens, ordered.offsets, ordered.columns.drop_columns([KEY]))
    return ordered, bucket_of(ordered.lengths, plan.buckets)


class _Ready:
    """Cells of one bucket on their way into full blocks: the first `skip` are not ours."""

    def __init__(self, skip: int, take: int) -> None:
        self._skip, self._left = skip, take
        self._rest: Cells | None = None
        self.taken = 0

    def blocks(self, cells: Cells, rows: np.ndarray, block_cells: int) -> list[Cells]:
        """Return full blocks made of what was left over and of `rows` of `cells`."""
        skipped = min(self._skip, len(rows))
        self._skip -= skipped
        rows = rows[skipped : skipped + self._left]
        self._left -= len(rows)
        self.taken += len(rows)
        if not rows.size:
            return []
        mine = cells.take(rows)
        if self._rest is not None:
            mine = Cells.concat([self._rest, mine])
        full = len(mine) // block_cells * block_cells
        blocks = [mine.slice(at, at + block_cells) for at in range(0, full, block_cells)]
        self._rest = mine.take(np.arange(full, len(mine))) if full < len(mine) else None
        return blocks

    def rest(self) -> list[Cells]:
        """Return the last, short block, if any."""
        return [self._rest] if self._rest is not None else []


def _write_block(writer: TarWriter, cells: Cells, columns: list[str], seen: np.ndarray) -> None:
    # In a block few data sets, donors or cell types stand: a dictionary costs 2 bytes a cell.
    coded = cells.columns
    for name in ("dataset", *columns):
        values = coded.column(name).combine_chunks()
        place = coded.schema.get_field_index(name)
        coded = coded.set_column(place, name, _dictionary(values))
    writer.write(Cells(cells.tokens, cells.offsets, coded).to_batch())
    seen += np.bincount(cells.tokens, minlength=len(seen))


def _dictionary(values: pa.Array) -> pa.Array:
    values = values.chunk(0) if isinstance(values, pa.ChunkedArray) else values
    coded = values.dictionary_encode()
    small = pa.int16() if len(coded) < 1 << 15 else pa.int32()
    return pa.DictionaryArray.from_arrays(coded.indices.cast(small), coded.dictionary)

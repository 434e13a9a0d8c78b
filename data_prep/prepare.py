"""From sources to shards, in two passes of bounded memory.

Pass 1 reads and encodes the sources block by block. Each cell gets a 64-bit shuffle key, a function
of seed, source and row alone; the top bits of the key choose one of a few spill files. Pass 2 takes
the spill files in order, sorts each by key, and hands every cell to the writer of its bucket. So
all cells are in one global random order, no more than one spill file is ever in memory, and the
bytes do not depend on block sizes or on the number of spill files.
"""

from __future__ import annotations

import json
import logging
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from data_prep import shards as shards_format
from data_prep.buckets import bucket_of, choose_buckets
from data_prep.hashing import hash_strings, keyed_hash, stream_key, unit_interval
from data_prep.medians import build_vocabulary
from data_prep.rank import EncodedCells, encode_cells, token_dtype
from data_prep.shards import SPLITS, BucketWriter, complete_folder, require_new
from data_prep.sources import (
    CountBlock,
    H5adSource,
    Source,
    SourceOptions,
    TokenBlock,
    open_source,
)
from data_prep.vocab import Vocabulary

logger = logging.getLogger(__name__)

_ROW_BITS = 40  # rows of one source, beside the source's number, in one 64-bit integer
_READ_CELLS = 4096
# Columns of the spill files only; no user's column is called so.
_KEY, _SPLIT = "__shuffle_key", "__split"
_MAX_SPILL_TOKENS = 2**30  # Arrow's list offsets are int32
_SPILL_ROW_OVERHEAD_BYTES = 300

REASON_FILTER = "filter_pass is not 1"
REASON_EMPTY = "no counts at all"
REASON_FEW_GENES = "too few genes of the vocabulary"


@dataclass(frozen=True)
class PrepareOptions:
    """Settings of ``geneloom prepare`` beyond the sources.

    Attributes
    ----------
    min_genes
        Cells with fewer detected genes of the vocabulary are rejected. 7: the paper's filter, so
        that 15 % masking hides at least one gene (Geneformer, Nature 2023, Methods).
    min_overlap
        Smallest share of a source's genes that must be in the vocabulary.
    heldout_share
        Share of cells in the held-out split; whole groups are taken until it is reached.
    heldout_by
        ``cell``, ``dataset``, or a metadata column: its values are never split up.
    block_cells
        Cells of one tar member. 256: 333,000 cells/s read on one core and 2,230 B a cell at 1,107
        tokens, against 12,700 cells/s and 3,970 B at one cell a member (measured).
    memory_gib
        Bound of what pass 2 holds at a time.
    """

    seed: int = 0
    min_genes: int = 7
    min_overlap: float = 0.1
    heldout_share: float = 0.02
    heldout_by: str = "cell"
    block_cells: int = 256
    shard_mib: int = 256
    memory_gib: float = 2.0
    vocabulary_min_cells: int = 3
    max_length: int | None = None
    source: SourceOptions = field(default_factory=SourceOptions)


@dataclass
class _SourceReport:
    """What became of one source's cells; goes into the manifest."""

    name: str
    kind: str
    cells_read: int = 0
    cells_kept: int = 0
    tokens: int = 0
    truncated: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    genes: int = 0
    genes_in_vocabulary: int = 0
    duplicated_genes: int = 0
    counts_in_vocabulary: float | None = None


def prepare(
    paths: list[Path],
    out: Path,
    vocabulary: Vocabulary | None,
    options: PrepareOptions,
    progress: Callable[[int], None] = lambda kept: None,
) -> dict:
    """Write the shards of `paths` into `out` and return the manifest.

    Parameters
    ----------
    paths
        Count matrices and tokenised corpora, in the order that numbers them.
    out
        New or empty folder. It appears complete or not at all.
    vocabulary
        None: built from the count matrices.
    progress
        Called with the number of cells kept so far.

    Raises
    ------
    ValueError
        Wrong input, said with file and remedy. Nothing is left behind.
    """
    require_new(out)
    _check_options(options)
    sources = [open_source(p, options.source) for p in paths]
    _require_distinct_names(sources)
    vocabulary = vocabulary or _build_vocabulary(sources, options)
    for source in sources:
        if isinstance(source, H5adSource):
            source.column_tokens(vocabulary, options.min_overlap)
    with complete_folder(out, shards_format.MANIFEST_NAME) as partial:
        started = time.perf_counter()
        spill = _Spill(partial, sources, vocabulary, options)
        reports = [_encode_source(i, s, vocabulary, spill, progress) for i, s in enumerate(sources)]
        spill.close()
        logger.info("pass 1: %d cells in %.1f s", spill.cells, time.perf_counter() - started)
        manifest = _write_shards(partial, spill, reports, vocabulary, options)
    return manifest


def _check_options(options: PrepareOptions) -> None:
    if not 0 < options.heldout_share < 1:
        raise ValueError(f"--heldout {options.heldout_share}: must lie between 0 and 1")
    if options.heldout_by not in ("cell", "dataset", *options.source.columns):
        raise ValueError(
            f"--heldout-by {options.heldout_by}: must be cell, dataset, or a column given as --obs"
        )
    columns = options.source.columns
    reserved = {"input_ids", "cell_id", "dataset", _KEY, _SPLIT} & set(columns)
    if reserved:
        raise ValueError(f"--obs {sorted(reserved)}: these names are used by the shards themselves")
    if len(set(columns)) != len(columns):
        raise ValueError(f"--obs {list(columns)}: a column is given twice")
    for name, value in (
        ("--memory", options.memory_gib),
        ("--block-cells", options.block_cells),
        ("--shard-mib", options.shard_mib),
        ("--min-genes", options.min_genes),
        ("--min-cells", options.vocabulary_min_cells),
    ):
        if value <= 0:
            raise ValueError(f"{name} {value}: must be above 0")
    if options.max_length is not None and options.max_length < 8:
        raise ValueError(f"--max-length {options.max_length}: must be at least 8")
    if not 0 <= options.min_overlap <= 1:
        raise ValueError(f"--min-overlap {options.min_overlap}: must lie between 0 and 1")


def _require_distinct_names(sources: list[Source]) -> None:
    names = Counter(s.name for s in sources)
    double = [n for n, count in names.items() if count > 1]
    if double:
        raise ValueError(
            f"sources {double}: given more than once, or two files share a name; the name tells "
            "data sets apart, so rename one"
        )


def _build_vocabulary(sources: list[Source], options: PrepareOptions) -> Vocabulary:
    matrices = [s for s in sources if isinstance(s, H5adSource)]
    if len(matrices) != len(sources):
        raise ValueError(
            "--vocab build: needs count matrices only; tokenised corpora come with the vocabulary "
            "they were made with"
        )
    return build_vocabulary(matrices, options.vocabulary_min_cells, options.max_length)


def _allow_open_files(number: int) -> None:
    """Raise this process's limit of open files as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + 256
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    if hard < wanted:
        raise ValueError(
            f"about {wanted} files must be open at a time, this system allows {hard}: raise "
            "--memory, or the limit (ulimit -Hn)"
        )


class _Spill:
    """The files between the two passes: cells by the top bits of their shuffle key."""

    def __init__(
        self, folder: Path, sources: list[Source], vocabulary: Vocabulary, options: PrepareOptions
    ) -> None:
        self.options = options
        self.cells = 0
        self.token_type = pa.from_numpy_dtype(token_dtype(vocabulary.num_tokens))
        self.length_histogram = np.zeros((len(SPLITS), vocabulary.max_length + 1), dtype=np.int64)
        columns = options.source.columns
        self.schema = pa.schema(
            [
                ("input_ids", pa.list_(self.token_type)),
                ("cell_id", pa.string()),
                ("dataset", pa.string()),
                *[(c, pa.string()) for c in columns],
            ]
        )
        schema = self.schema.append(pa.field(_KEY, pa.uint64()))
        schema = schema.append(pa.field(_SPLIT, pa.uint8()))
        row_bytes = vocabulary.max_length * self.token_type.bit_width // 8
        whole = sum(s.num_cells for s in sources) * (row_bytes + _SPILL_ROW_OVERHEAD_BYTES)
        # A spill file is held twice while it is sorted, and once more in the writers' blocks.
        by_memory = 3 * whole / (options.memory_gib * 2**30)
        by_offsets = sum(s.num_cells for s in sources) * vocabulary.max_length / _MAX_SPILL_TOKENS
        self._bits = int(np.ceil(np.log2(max(1.0, by_memory, by_offsets))))
        _allow_open_files((1 << self._bits) + len(sources))
        self.paths = [folder / f"spill-{n:05d}.arrow" for n in range(1 << self._bits)]
        self._schema = schema
        self._writers = [pa.ipc.new_stream(str(p), schema) for p in self.paths]
        self._shuffle_key = stream_key(options.seed, "shuffle")
        self._split_key = stream_key(options.seed, "heldout")
        self._heldout_groups = self._choose_groups(sources)

    def add(
        self,
        source_number: int,
        dataset: str,
        rows: np.ndarray,
        encoded: EncodedCells,
        cell_ids: list[str],
        metadata: dict[str, list[str]],
    ) -> None:
        """Spill cells; `rows` are their row numbers in the source (int64, one per cell)."""
        identity = (np.int64(source_number) << _ROW_BITS) + rows
        keys = keyed_hash(self._shuffle_key, identity)
        split = self._split(dataset, identity, metadata)
        np.add.at(self.length_histogram, (split, encoded.lengths), 1)
        lists = pa.ListArray.from_arrays(
            pa.array(encoded.offsets.astype(np.int32)), pa.array(encoded.tokens, self.token_type)
        )
        batch = pa.record_batch(
            [
                lists,
                pa.array(cell_ids, pa.string()),
                pa.array([dataset] * len(rows), pa.string()),
                *[pa.array(metadata[c], pa.string()) for c in self.options.source.columns],
                pa.array(keys),
                pa.array(split.astype(np.uint8)),
            ],
            schema=self._schema,
        )
        files = (keys >> np.uint64(64 - self._bits)).astype(np.int64) if self._bits else keys * 0
        for number in np.unique(files):
            chosen = pa.array(np.flatnonzero(files == number))
            self._writers[int(number)].write_batch(batch.take(chosen))
        self.cells += len(rows)

    def _split(self, dataset: str, identity: np.ndarray, metadata: dict) -> np.ndarray:
        by = self.options.heldout_by
        if by == "cell":
            uniform = unit_interval(keyed_hash(self._split_key, identity))
            return (uniform < self.options.heldout_share).astype(np.int64)
        groups = [dataset] * len(identity) if by == "dataset" else metadata[by]
        return np.array([g in self._heldout_groups for g in groups], dtype=np.int64)

    def _choose_groups(self, sources: list[Source]) -> set[str]:
        """Return the groups that are held out: in hashed order, until the share is reached."""
        by = self.options.heldout_by
        if by == "cell":
            return set()
        sizes: Counter[str] = Counter()
        for source in sources:
            sizes.update(
                {source.name: source.num_cells} if by == "dataset" else source.group_sizes(by)
            )
        names = sorted(sizes)
        if len(names) < 2:
            raise ValueError(f"--heldout-by {by}: there is only one, {names}; nothing to hold out")
        wanted = self.options.heldout_share * sum(sizes.values())
        chosen: set[str] = set()
        for number in np.argsort(hash_strings(self._split_key, names)):
            if sum(sizes[n] for n in chosen) >= wanted or len(chosen) == len(names) - 1:
                break
            chosen.add(names[number])
        return chosen

    def close(self) -> None:
        for writer in self._writers:
            writer.close()

    def read(self, path: Path) -> pa.Table:
        """Return one spill file, sorted by key."""
        with pa.memory_map(str(path)) as mapped:
            table = pa.ipc.open_stream(mapped).read_all()
        return table.take(pa.array(np.argsort(table.column(_KEY).to_numpy(), kind="stable")))


def _encode_source(
    number: int,
    source: Source,
    vocabulary: Vocabulary,
    spill: _Spill,
    progress: Callable[[int], None],
) -> _SourceReport:
    """Read, encode, filter and spill one source."""
    report = _SourceReport(source.name, source.kind)
    column_tokens = None
    inside = total = 0.0
    if isinstance(source, H5adSource):
        column_tokens = source.column_tokens(vocabulary, spill.options.min_overlap)
        report.genes = source.num_genes
        report.genes_in_vocabulary = int((column_tokens >= 0).sum())
        report.duplicated_genes = source.duplicated_genes
    for block in source.blocks(_READ_CELLS):
        if isinstance(block, CountBlock):
            assert column_tokens is not None
            encoded = encode_cells(
                block.data, block.indices, block.indptr, block.totals, column_tokens, vocabulary
            )
            inside += float(block.data[column_tokens[block.indices] >= 0].sum())
            total += float(block.data.sum())
            empty = np.diff(block.indptr) == 0
            reasons = _reasons(encoded, block.passes, empty, spill.options.min_genes)
        else:
            source.check_tokens(block, vocabulary)  # type: ignore[union-attr]
            encoded = _as_encoded(block, vocabulary)
            passes = np.ones(len(block.cell_ids), dtype=bool)
            empty = encoded.detected <= 0
            reasons = _reasons(encoded, passes, empty, spill.options.min_genes)
        keep = np.flatnonzero(reasons == "")
        rows = report.cells_read + keep
        report.cells_read += len(reasons)
        report.rejected = dict(Counter(report.rejected) + Counter(reasons[reasons != ""].tolist()))
        if keep.size:
            kept = _take(encoded, keep)
            report.cells_kept += len(keep)
            report.tokens += len(kept.tokens)
            report.truncated += int((kept.detected > vocabulary.max_length).sum())
            ids = [block.cell_ids[k] for k in keep]
            metadata = {c: [v[k] for k in keep] for c, v in block.metadata.items()}
            spill.add(number, source.name, rows, kept, ids, metadata)
        progress(spill.cells)
    if total:
        report.counts_in_vocabulary = inside / total
    return report


def _as_encoded(block: TokenBlock, vocabulary: Vocabulary) -> EncodedCells:
    lengths = np.diff(block.offsets)
    genes = lengths - (2 if vocabulary.has_cls else 0)
    return EncodedCells(
        block.tokens.astype(token_dtype(vocabulary.num_tokens)),
        block.offsets,
        genes.astype(np.int32),
    )


def _reasons(
    encoded: EncodedCells, passes: np.ndarray, empty: np.ndarray, min_genes: int
) -> np.ndarray:
    """Return for each cell why it is rejected, '' if it is kept; the first reason counts."""
    return np.select(
        [~passes, empty, encoded.detected < min_genes],
        [REASON_FILTER, REASON_EMPTY, REASON_FEW_GENES],
        default="",
    )


def _take(encoded: EncodedCells, keep: np.ndarray) -> EncodedCells:
    lengths = encoded.lengths
    if len(keep) == len(lengths):
        return encoded
    mask = np.zeros(len(lengths), dtype=bool)
    mask[keep] = True
    offsets = np.r_[0, np.cumsum(lengths[keep])]
    return EncodedCells(
        encoded.tokens[np.repeat(mask, lengths)],
        offsets,
        encoded.detected[keep],
    )


def _write_shards(
    folder: Path,
    spill: _Spill,
    reports: list[_SourceReport],
    vocabulary: Vocabulary,
    options: PrepareOptions,
) -> dict:
    """Pass 2: permute, cut into buckets, write tars, index, vocabulary and manifest."""
    per_split = spill.length_histogram.sum(axis=1)
    if per_split.min() == 0:
        empty = SPLITS[int(per_split.argmin())]
        raise ValueError(
            f"the {empty} split is empty ({spill.cells} cells kept, --heldout "
            f"{options.heldout_share} by {options.heldout_by}): change --heldout, or hold out by "
            "cell; rejected: " + str({r.name: r.rejected for r in reports if r.rejected})
        )
    buckets = choose_buckets(spill.length_histogram.sum(axis=0), vocabulary.max_length)
    writers = {
        (split, b): BucketWriter(folder, name, length, options.shard_mib * 2**20)
        for split, name in enumerate(SPLITS)
        for b, length in enumerate(buckets)
    }
    pending: dict[tuple[int, int], list[pa.Table]] = {key: [] for key in writers}
    for path in spill.paths:
        table = spill.read(path)
        lengths = np.asarray(table.column("input_ids").combine_chunks().value_lengths())
        group = table.column(_SPLIT).to_numpy() * len(buckets) + bucket_of(lengths, buckets)
        cells = table.select(spill.schema.names)
        for number in np.unique(group):
            key = divmod(int(number), len(buckets))
            pending[key].append(cells.take(pa.array(np.flatnonzero(group == number))))
            pending[key] = _flush(writers[key], pending[key], options.block_cells, last=False)
        path.unlink()
    for key, writer in writers.items():
        _flush(writer, pending[key], options.block_cells, last=True)
        writer.close_shard()
    return _write_manifest(folder, list(writers.values()), buckets, reports, vocabulary, options)


def _flush(writer: BucketWriter, tables: list[pa.Table], block_cells: int, last: bool) -> list:
    """Write full blocks (all that is left, if `last`); return what remains."""
    if not tables:
        return []
    table = pa.concat_tables(tables).combine_chunks()
    done = 0
    while table.num_rows - done >= block_cells or (last and done < table.num_rows):
        part = table.slice(done, block_cells)
        # take() compacts: a slice would write the offsets of the whole table
        part = part.take(pa.array(np.arange(part.num_rows)))
        writer.write(part.combine_chunks().to_batches()[0])
        done += part.num_rows
    return [table.slice(done)] if done < table.num_rows else []


def _write_manifest(
    folder: Path,
    writers: list[BucketWriter],
    buckets: list[int],
    reports: list[_SourceReport],
    vocabulary: Vocabulary,
    options: PrepareOptions,
) -> dict:
    vocabulary.save(folder / shards_format.VOCABULARY_NAME)
    shards = shards_format.write_index(folder, writers)
    manifest = {
        "format": shards_format.SHARD_FORMAT,
        "vocabulary_sha256": vocabulary.sha256,
        "num_tokens": vocabulary.num_tokens,
        "max_length": vocabulary.max_length,
        "index_sha256": shards_format.file_sha256(folder / shards_format.INDEX_NAME),
        "buckets": [_bucket_summary(w) for w in writers if w.shards],
        "shards": shards,
        "columns": list(options.source.columns),
        # memory_gib changes how the work is cut, never its result: out of the record.
        "settings": {k: v for k, v in asdict(options).items() if k != "memory_gib"},
        "sources": [asdict(r) for r in reports],
    }
    manifest["fingerprint"] = shards_format.fingerprint(manifest)
    text = json.dumps(manifest, indent=1, sort_keys=True)
    (folder / shards_format.MANIFEST_NAME).write_text(text + "\n")
    return json.loads(text)


def _bucket_summary(writer: BucketWriter) -> dict:
    return {
        "split": writer.split,
        "length": writer.bucket_length,
        "cells": sum(s["cells"] for s in writer.shards),
        "tokens": sum(s["tokens"] for s in writer.shards),
        "bytes": sum(s["bytes"] for s in writer.shards),
        "blocks": len(writer.members),
        "shards": len(writer.shards),
    }

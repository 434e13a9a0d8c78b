"""Pass 1: encodes a stretch of one source into chunk files of cells, sorted by shuffle key.

Each cell gets a 64-bit shuffle key, which depends only on the seed, the source's name and the row.
`encode_stretch` reads the blocks of a stretch, encodes the cells and writes chunks. A chunk is two
files with its cells in the order (split, key): an Arrow file with ids, metadata and the values that
the filters need, and a file with the tokens only. Pass 2 takes ranges of keys out of all chunks.
The name of a chunk contains a hash of everything that decides its content, so that
`finished_record` reuses the work of a killed run exactly when it is still valid.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa
import pyarrow.ipc

from data_prep.encoding.chunk_files import Column, tokens_path
from data_prep.encoding.duplicates import hash_sequences
from data_prep.encoding.encoded_cells import CellTable
from data_prep.encoding.filters import (
    DatasetMoments,
    Moments,
    first_reasons,
    moments_by_dataset,
)
from data_prep.encoding.known_share import KnownCounter, KnownCounts
from data_prep.files import file_sha256, write_to_disk
from data_prep.genes.annotation import BIOTYPES, Annotation, read_annotation
from data_prep.genes.rank_genes import EncodedCells, encode_cells
from data_prep.genes.vocabulary import Vocabulary, load_vocabulary
from data_prep.hashing import keyed_hash, mix64, stream_key, unit_interval
from data_prep.shards.format import SPLITS
from data_prep.sources.count_source import CountBlock, CountSource
from data_prep.sources.open_source import Source, open_source
from data_prep.sources.source_spec import SourceSpec
from data_prep.sources.token_corpus import TokenBlock, TokenSource

_VERSION = 2  # format version of the chunk files; older files are not reused after a change


@dataclass(frozen=True)
class EncodeSettings:
    """Settings that decide the content of chunk files, together with source and vocabulary.

    `heldout_groups` are the values of column `heldout_by` that are held out. `chunk_cells` limits
    the size of a chunk file and changes nothing in the shards. With `with_content` the counts of
    every cell are hashed, to find duplicates.
    """

    seed: int
    min_genes: int
    min_overlap: float
    heldout_share: float
    heldout_by: str
    heldout_groups: tuple[str, ...]
    columns: tuple[str, ...]
    with_tokens: bool
    with_content: bool
    annotation_sha256: str | None
    chunk_cells: int


@dataclass(frozen=True)
class EncodeJob:
    """The work of encoding one stretch of a source; small enough to be sent to any process."""

    work: Path
    spec: SourceSpec
    signature: str
    quick_signature: str
    start: int
    stop: int
    vocabulary: Path
    vocabulary_sha256: str
    annotation: Path | None
    settings: EncodeSettings

    @cached_property
    def digest(self) -> str:
        """Hash of everything that decides the content of the chunk files."""
        parts = [_VERSION, self.signature, self.start, self.stop, self.vocabulary_sha256]
        parts += [asdict(self.settings)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def record_path(self) -> Path:
        return self.work / f"chunk-{self.digest}.json"


@dataclass(frozen=True)
class EncodeRecord:
    """The result of an `EncodeJob`.

    Attributes
    ----------
    chunks
        Name, number of cells and bytes of each chunk.
    sha256
        Hashes of both files of each chunk, joined.
    known
        Counts in known and unknown genes.
    moments
        Moments of the total counts and mitochondrial shares of each data set.
    fractional
        Number of stored values that are no integers, and of all stored values.
    """

    chunks: list[tuple[str, int, int]]
    sha256: list[str]
    known: KnownCounts
    moments: dict[str, DatasetMoments]
    fractional: tuple[int, int] = (0, 0)

    def to_json(self) -> str:
        moments = {
            name: {"totals": vars(m.totals), "mitochondrial": vars(m.mitochondrial)}
            for name, m in self.moments.items()
        }
        # `vars` instead of `asdict`, which would copy every number.
        return json.dumps(vars(self) | {"known": vars(self.known), "moments": moments})

    @staticmethod
    def from_json(text: str) -> EncodeRecord:
        content = json.loads(text)
        moments = {
            name: DatasetMoments(Moments(**m["totals"]), Moments(**m["mitochondrial"]))
            for name, m in content["moments"].items()
        }
        chunks = [(name, cells, size) for name, cells, size in content["chunks"]]
        known = content["known"]
        datasets = {name: (inside, total) for name, (inside, total) in known["datasets"].items()}
        return EncodeRecord(
            chunks, content["sha256"], KnownCounts(datasets, known["unknown"]), moments,
            (content["fractional"][0], content["fractional"][1]),
        )  # fmt: skip


def finished_record(job: EncodeJob) -> EncodeRecord | None:
    """Return the record of a job that an earlier run has finished, None if there is no valid one.

    The record is valid if all chunk files have the recorded sizes and hashes. Every byte is read,
    because files that lay on a disk between two runs may have been damaged.
    """
    if not job.record_path.exists():
        return None
    try:
        record = EncodeRecord.from_json(job.record_path.read_text())
    except (ValueError, KeyError, TypeError):  # the record itself is damaged
        return None
    for (name, _, size), sha256 in zip(record.chunks, record.sha256, strict=True):
        path = job.work / name
        if _size(path) != size or _chunk_sha256(path) != sha256:
            return None
    return record


def _chunk_sha256(chunk: Path) -> str:
    return file_sha256(chunk) + file_sha256(tokens_path(chunk))


def _size(chunk: Path) -> int:
    """Return the number of bytes in both files of a chunk; -1 if one is missing."""
    paths = (chunk, tokens_path(chunk))
    return sum(p.stat().st_size for p in paths) if all(p.exists() for p in paths) else -1


def encode_stretch(job: EncodeJob) -> EncodeRecord:
    """Read, check and encode one stretch, write its chunk files, and return their record.

    Raises
    ------
    ValueError
        The input is wrong or damaged, or the source was changed after the run started.
    """
    if job.spec.signature() != job.quick_signature:
        raise ValueError(_changed(job.spec))
    source, vocabulary, column_tokens = _opened(
        job.spec, job.signature, job.work, job.vocabulary, job.vocabulary_sha256,
        job.annotation, job.settings.annotation_sha256, job.settings.min_overlap,
    )  # fmt: skip
    counter = KnownCounter(column_tokens)
    fractional = stored = 0
    chunks: list[tuple[str, int, int]] = []
    hashes: list[str] = []
    moments: dict[str, DatasetMoments] = {}
    parts: list[CellTable] = []
    row = job.start

    def write() -> None:
        if parts:
            name = f"chunk-{job.digest}-{len(chunks):04d}.arrow"
            chunks.append((name, sum(len(p) for p in parts), _write_chunk(job.work / name, parts)))
            hashes.append(_chunk_sha256(job.work / name))
            parts.clear()

    for block in source.blocks(job.start, job.stop):
        if isinstance(block, CountBlock):
            cells = _of_counts(block, row, column_tokens, vocabulary, job)
            counter.add(block.data, block.indices, block.indptr, block.datasets)
            fractional, stored = fractional + block.fractional, stored + len(block.data)
        else:
            assert isinstance(source, TokenSource)
            tokens = source.checked_tokens(block, vocabulary)
            cells = _of_tokens(block, tokens, row, vocabulary, job)
        row += len(cells)
        parts.append(cells)
        for name, found in _moments(cells).items():
            moments[name] = moments.get(name, DatasetMoments()).merge(found)
        if sum(len(p) for p in parts) >= job.settings.chunk_cells:
            write()
    write()
    if row != job.stop or job.spec.signature() != job.quick_signature:
        raise ValueError(_changed(job.spec))
    known = counter.result(source.gene_ids) if isinstance(source, CountSource) else KnownCounts()
    record = EncodeRecord(chunks, hashes, known, moments, (fractional, stored))
    write_to_disk(job.record_path, record.to_json())
    return record


def _changed(spec: SourceSpec) -> str:
    return (
        f"{spec.path}: was changed or removed while it was read; start again when it is complete "
        "(finished work on other files is kept)"
    )


@lru_cache(maxsize=8)
def _opened(
    spec: SourceSpec,
    signature: str,  # noqa: ARG001  part of the cache key: a changed file is another source
    work: Path,
    vocabulary_path: Path,
    vocabulary_sha256: str,
    annotation: Path | None,
    annotation_sha256: str | None,
    min_overlap: float,
) -> tuple[Source, Vocabulary, np.ndarray]:
    """Return the opened source, the vocabulary, and the token of each column of the source.

    The last eight sources are kept open for further stretches.
    """
    vocabulary = _vocabulary(vocabulary_path, vocabulary_sha256)
    source = open_source(spec, work, _annotation(annotation, annotation_sha256))
    tokens = np.zeros(0, dtype=np.int32)
    if isinstance(source, CountSource):
        tokens = source.column_tokens(vocabulary, min_overlap)
    return source, vocabulary, tokens


# One vocabulary for each process: if it was opened before the work began, its file is not read.
_KEPT_VOCABULARY: dict[str, Vocabulary] = {}


def keep_vocabulary(sha256: str, vocabulary: Vocabulary) -> None:
    """Keep a vocabulary in this process under the hash of its file, in place of the last one."""
    _KEPT_VOCABULARY.clear()
    _KEPT_VOCABULARY[sha256] = vocabulary


def _vocabulary(path: Path, sha256: str) -> Vocabulary:
    if sha256 not in _KEPT_VOCABULARY:
        keep_vocabulary(sha256, load_vocabulary(path))
    return _KEPT_VOCABULARY[sha256]


@lru_cache(maxsize=2)
def _annotation(path: Path | None, sha256: str | None) -> Annotation | None:  # noqa: ARG001
    return read_annotation(path, BIOTYPES) if path else None


def _of_counts(
    block: CountBlock, row: int, column_tokens: np.ndarray, vocabulary: Vocabulary, job: EncodeJob
) -> CellTable:
    encoded = encode_cells(
        block.data, block.indices, block.indptr, block.totals, column_tokens, vocabulary
    )
    content = np.zeros(len(block.totals), dtype=np.uint64)
    if job.settings.with_content:
        content = mix64(_hash_counts(block.data, block.indices, block.indptr, column_tokens))
    reasons = first_reasons(
        encoded.detected, block.passes, block.totals <= 0, job.settings.min_genes
    )
    return _cells(block, row, encoded, content, block.totals, block.mitochondrial, reasons, job)


def _of_tokens(
    block: TokenBlock, tokens: np.ndarray, row: int, vocabulary: Vocabulary, job: EncodeJob
) -> CellTable:
    lengths = np.diff(block.offsets)
    detected = (lengths - (2 if vocabulary.has_cls else 0)).astype(np.int32)
    nothing = np.full(len(lengths), np.nan)
    passes = np.ones(len(lengths), dtype=bool)
    reasons = first_reasons(detected, passes, detected <= 0, job.settings.min_genes)
    content = np.zeros(len(lengths), dtype=np.uint64)
    if job.settings.with_content:
        content = mix64(hash_sequences(tokens, block.offsets))
    encoded = EncodedCells(tokens, block.offsets, detected)
    return _cells(block, row, encoded, content, nothing, nothing, reasons, job)


def _cells(
    block: CountBlock | TokenBlock,
    row: int,
    encoded: EncodedCells,
    content: np.ndarray,
    totals: np.ndarray,
    mitochondrial: np.ndarray,
    reasons: np.ndarray,
    job: EncodeJob,
) -> CellTable:
    """Return a block as `CellTable` with the internal columns; rejected cells have no tokens."""
    settings = job.settings
    rows = np.arange(row, row + len(reasons))
    columns = {
        "cell_id": pa.array(block.cell_ids, pa.string()),
        "dataset": pa.array(block.datasets, pa.string()),
    }
    nothing = [""] * len(rows)
    for name in settings.columns:
        columns[name] = pa.array(block.metadata.get(name, nothing), pa.string())
    columns |= {
        Column.KEY: pa.array(keyed_hash(stream_key(settings.seed, "shuffle", job.spec.name), rows)),
        Column.SPLIT: pa.array(_split(block, rows, job.spec.name, job.spec.split, settings)),
        Column.ROW: pa.array(rows),
        Column.REASON: pa.array(reasons),
        Column.TOTAL: pa.array(totals),
        Column.MITO: pa.array(mitochondrial),
        Column.DETECTED: pa.array(encoded.detected),
        Column.CONTENT: pa.array(content),
        Column.SAME: pa.array(hash_sequences(encoded.tokens, encoded.offsets)),
    }
    tokens, lengths = encoded.tokens, encoded.lengths
    drop = (reasons != 0) if settings.with_tokens else np.ones(len(rows), dtype=bool)
    if drop.any():
        tokens = tokens[np.repeat(~drop, lengths)]
        lengths = np.where(drop, 0, lengths)
    offsets = np.r_[0, np.cumsum(lengths)]
    return CellTable(tokens, offsets, pa.table(columns))


def _split(
    block: CountBlock | TokenBlock,
    rows: np.ndarray,
    source: str,
    given: str | None,
    settings: EncodeSettings,
) -> np.ndarray:
    """Return uint8 [cells], 1 for held-out cells and 0 for training cells."""
    if given is not None:
        return np.full(len(rows), SPLITS.index(given), dtype=np.uint8)
    if settings.heldout_by == "cell":
        uniform = unit_interval(keyed_hash(stream_key(settings.seed, "heldout", source), rows))
        return (uniform < settings.heldout_share).astype(np.uint8)
    by_dataset = settings.heldout_by == "dataset"
    empty = [""] * len(rows)
    groups = block.datasets if by_dataset else block.metadata.get(settings.heldout_by, empty)
    return np.isin(groups, settings.heldout_groups).astype(np.uint8)


def _moments(cells: CellTable) -> dict[str, DatasetMoments]:
    columns = cells.columns
    return moments_by_dataset(
        columns.column("dataset").to_numpy(),
        columns.column(Column.TOTAL).to_numpy(),
        columns.column(Column.MITO).to_numpy(),
        columns.column(Column.REASON).to_numpy(),
    )


def _write_chunk(path: Path, parts: list[CellTable]) -> int:
    """Write the cells of a chunk, sorted by split and key; return the number of bytes.

    The files are not forced to disk. If a power failure leaves a file shorter than its record says,
    the chunk is made again.
    """
    keys, splits = (
        np.concatenate([p.columns.column(name).to_numpy() for p in parts])
        for name in (Column.KEY, Column.SPLIT)
    )
    cells = CellTable.in_order(parts, np.lexsort((keys, splits)))
    columns = cells.columns.append_column(Column.LENGTH, pa.array(cells.lengths.astype(np.int32)))
    batch = columns.combine_chunks().to_batches()[0]
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)
    cells.tokens.tofile(tokens_path(path))
    return _size(path)


_ROUNDING_NOISE = 1e-6  # largest distance of a count from an integer by rounding


@numba.njit(cache=True, nogil=True)
def _mix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _hash_counts(data, indices, indptr, column_tokens):
    """Return uint64 [cells], the sum of the hashes of a cell's (token, count) pairs.

    Because it is a sum, the order of the genes in the file does not matter.
    """
    num_cells = len(indptr) - 1
    one = np.empty(1)
    bits = one.view(np.uint64)  # the float's bits distinguish fractional counts too
    hashes, sums = np.zeros(num_cells, np.uint64), np.zeros(column_tokens.max() + 1)
    for cell in range(num_cells):
        for k in range(indptr[cell], indptr[cell + 1]):
            token = column_tokens[indices[k]]
            if token >= 0 and data[k] > 0:
                sums[token] += data[k]
        total = np.uint64(0)
        for k in range(indptr[cell], indptr[cell + 1]):
            token = column_tokens[indices[k]]
            if token >= 0 and sums[token] > 0.0:
                whole = np.rint(sums[token])
                # 2.9999998 is taken as 3: the difference is rounding noise of a float32.
                one[0] = whole if abs(sums[token] - whole) <= _ROUNDING_NOISE else sums[token]
                total += _mix(_mix(np.uint64(token)) ^ bits[0])
                sums[token] = 0.0
        hashes[cell] = total
    return hashes

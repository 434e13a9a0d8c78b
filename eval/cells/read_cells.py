"""Encode all cells of an h5ad as ranked tokens of a model's vocabulary, in the file's order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse

from data_prep.encoding.known_share import KnownCounter, refuse_unknown, warnings_of
from data_prep.genes.rank_genes import encode_cells
from data_prep.genes.vocabulary import Vocabulary
from data_prep.sources.count_source import CountBlock, CountSource
from data_prep.sources.obs_columns import FILTER_COLUMN
from data_prep.sources.open_source import open_path
from data_prep.sources.remarks import entry_of, remarks
from data_prep.sources.source_spec import SourceOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CellSet:
    """The encoded cells of one file, with their raw counts.

    Attributes
    ----------
    tokens
        One array of token ids per cell, including special tokens. For a cell without a gene of the
        vocabulary it contains only special tokens, or nothing.
    has_genes
        bool [cells], False for cells in which no gene of the vocabulary is detected.
    counts
        CSR float32 [cells, genes of the file], raw.
    metadata
        The requested columns of obs as strings, indexed by cell ids.
    genes
        Gene ids of the columns of `counts`, as in the file; '' if a gene has no id.
    """

    tokens: list[np.ndarray]
    has_genes: np.ndarray
    counts: scipy.sparse.csr_matrix
    metadata: pd.DataFrame
    genes: list[str]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(t) for t in self.tokens], dtype=np.int64)

    def subset(self, cells: np.ndarray) -> CellSet:
        """Return the chosen cells (integer indices) in the given order."""
        return CellSet(
            [self.tokens[i] for i in cells],
            self.has_genes[cells],
            self.counts[cells],
            self.metadata.iloc[cells],
            self.genes,
        )


@dataclass(frozen=True)
class EncodedPart:
    """Consecutive cells of a file; `tokens` and `has_genes` as in `CellSet`.

    `metadata`: column of obs -> text of each cell.
    """

    start: int
    tokens: list[np.ndarray]
    has_genes: np.ndarray
    cell_ids: list[str]
    metadata: dict[str, list[str]]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(t) for t in self.tokens], dtype=np.int64)


def open_counts(path: Path, options: SourceOptions) -> CountSource:
    """Return an opened count matrix; ValueError if the file is something else."""
    source = open_path(path, options)
    if not isinstance(source, CountSource):
        raise ValueError(f"{path}: expected a count matrix, e.g. an .h5ad with raw counts")
    return source


class _Reading:
    """The cells of an opened source as tokens, and all that is to be said of the source.

    Every command that reads cells for a model goes through here: what `prepare` writes into tables
    and manifest is said by the log.
    """

    def __init__(self, source: CountSource, vocabulary: Vocabulary, min_overlap: float) -> None:
        self._source, self._vocabulary, self._min_overlap = source, vocabulary, min_overlap
        self._tokens = source.column_tokens(vocabulary, min_overlap)
        self._known = KnownCounter(self._tokens)
        self._fractional = self._stored = self._not_passing = 0
        for warning in source.warnings():
            logger.warning("%s", warning)

    def cells(
        self, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[CountBlock, list[np.ndarray], np.ndarray]]:
        """Yield blocks, with the tokens of their cells, and bool [cells] whether there are any."""
        for block in self._source.blocks(start, stop):
            self._known.add(block.data, block.indices, block.indptr, block.datasets)
            self._fractional += block.fractional
            self._stored += len(block.data)
            self._not_passing += int((~block.passes).sum())
            encoded = encode_cells(
                block.data, block.indices, block.indptr, block.totals, self._tokens,
                self._vocabulary,
            )  # fmt: skip
            tokens = np.split(encoded.tokens, encoded.offsets[1:-1])
            yield block, tokens, encoded.detected > 0

    def judge(self) -> None:
        """Say what all cells have shown; refuse a file whose counts are mostly unknown."""
        source = self._source
        for line in remarks(entry_of(source, self._vocabulary, (self._fractional, self._stored))):
            logger.info("%s", line)
        found = self._known.result(source.gene_ids)
        unseen = "A model sees nothing of the rest."
        refuse_unknown(str(source.path), found, self._min_overlap, unseen)
        for warning in warnings_of(source.name, found):
            logger.warning("%s", warning)
        if self._not_passing:
            logger.warning(
                "%s: %s of %s cells do not pass obs['%s']; `geneloom prepare` leaves such cells "
                "out, this command reads them",
                source.name, f"{self._not_passing:,}", f"{source.num_cells:,}", FILTER_COLUMN,
            )  # fmt: skip


def encode_parts(
    source: CountSource, vocabulary: Vocabulary, part_cells: int, min_overlap: float = 0.5
) -> Iterator[EncodedPart]:
    """Yield all cells of a file in parts of `part_cells` cells, without their counts.

    Raises
    ------
    ValueError
        As `encode_file`; what needs all cells to be seen, after the last part.
    """
    reading = _Reading(source, vocabulary, min_overlap)
    for start, stop in source.stretches(part_cells):
        tokens: list[np.ndarray] = []
        has_genes, ids = [], []
        metadata: dict[str, list[str]] = {c: [] for c in source.options.column_names}
        for block, of_cells, filled in reading.cells(start, stop):
            tokens += of_cells
            has_genes.append(filled)
            ids += block.cell_ids
            for name, values in block.metadata.items():
                metadata[name] += values
        yield EncodedPart(start, tokens, np.concatenate(has_genes), ids, metadata)
    reading.judge()


def encode_file(
    path: Path,
    vocabulary: Vocabulary,
    options: SourceOptions = SourceOptions(),  # noqa: B008  frozen
    min_overlap: float = 0.5,
) -> CellSet:
    """Return all cells of an h5ad, encoded with a vocabulary.

    Raises
    ------
    ValueError
        As in `geneloom prepare`: the file is no h5ad, has no raw counts, has genes that do not
        match, lacks columns, or has less than `min_overlap` of its counts in genes of the
        vocabulary.
    """
    return encode_source(open_counts(path, options), vocabulary, min_overlap)


def encode_source(source: CountSource, vocabulary: Vocabulary, min_overlap: float = 0.5) -> CellSet:
    """Return all cells of an opened source, as `encode_file` does."""
    reading = _Reading(source, vocabulary, min_overlap)
    tokens: list[np.ndarray] = []
    has_genes, counts, ids = [], [], []
    metadata: dict[str, list[str]] = {c: [] for c in source.options.column_names}
    for block, of_cells, filled in reading.cells():
        tokens += of_cells
        has_genes.append(filled)
        shape = (len(block.cell_ids), source.num_genes)
        counts.append(
            scipy.sparse.csr_matrix(
                (block.data.astype(np.float32), block.indices, block.indptr), shape=shape
            )
        )
        ids += block.cell_ids
        for name, values in block.metadata.items():
            metadata[name] += values
    reading.judge()
    return CellSet(
        tokens,
        np.concatenate(has_genes),
        scipy.sparse.vstack(counts).tocsr(),
        pd.DataFrame(metadata, index=pd.Index(ids)),
        source.gene_ids,
    )

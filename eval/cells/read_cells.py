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
from data_prep.sources.count_source import CountSource
from data_prep.sources.open_source import open_path
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


def encode_parts(
    source: CountSource, vocabulary: Vocabulary, part_cells: int, min_overlap: float = 0.5
) -> Iterator[EncodedPart]:
    """Yield all cells of a file in parts of `part_cells` cells, without their counts.

    Raises
    ------
    ValueError
        As `encode_file`; what needs all cells to be seen, after the last part.
    """
    column_tokens = source.column_tokens(vocabulary, min_overlap)
    known = KnownCounter(column_tokens)
    if source.num_cells == 0:
        raise ValueError(f"{source.path}: holds no cells")
    for start, stop in source.stretches(part_cells):
        tokens: list[np.ndarray] = []
        has_genes, ids = [], []
        metadata: dict[str, list[str]] = {c: [] for c in source.options.column_names}
        for block in source.blocks(start, stop):
            known.add(block.data, block.indices, block.indptr, block.datasets)
            encoded = encode_cells(
                block.data, block.indices, block.indptr, block.totals, column_tokens, vocabulary
            )
            tokens += np.split(encoded.tokens, encoded.offsets[1:-1])
            has_genes.append(encoded.detected > 0)
            ids += block.cell_ids
            for name, values in block.metadata.items():
                metadata[name] += values
        yield EncodedPart(start, tokens, np.concatenate(has_genes), ids, metadata)
    _judge(source, known, min_overlap)


def _judge(source: CountSource, known: KnownCounter, min_overlap: float) -> None:
    """Refuse a file whose counts are mostly unknown to the vocabulary; warn where some are."""
    found = known.result(source.gene_ids)
    refuse_unknown(str(source.path), found, min_overlap, "A model sees nothing of the rest.")
    for warning in warnings_of(source.name, found):
        logger.warning("%s", warning)


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
    source = open_counts(path, options)
    column_tokens = source.column_tokens(vocabulary, min_overlap)
    tokens: list[np.ndarray] = []
    has_genes, counts, ids = [], [], []
    metadata: dict[str, list[str]] = {c: [] for c in options.column_names}
    known = KnownCounter(column_tokens)
    for block in source.blocks():
        known.add(block.data, block.indices, block.indptr, block.datasets)
        encoded = encode_cells(
            block.data, block.indices, block.indptr, block.totals, column_tokens, vocabulary
        )
        tokens += np.split(encoded.tokens, encoded.offsets[1:-1])
        has_genes.append(encoded.detected > 0)
        shape = (len(block.cell_ids), source.num_genes)
        counts.append(
            scipy.sparse.csr_matrix(
                (block.data.astype(np.float32), block.indices, block.indptr), shape=shape
            )
        )
        ids += block.cell_ids
        for name, values in block.metadata.items():
            metadata[name] += values
    if not ids:
        raise ValueError(f"{path}: holds no cells")
    _judge(source, known, min_overlap)
    return CellSet(
        tokens,
        np.concatenate(has_genes),
        scipy.sparse.vstack(counts).tocsr(),
        pd.DataFrame(metadata, index=pd.Index(ids)),
        source.gene_ids,
    )

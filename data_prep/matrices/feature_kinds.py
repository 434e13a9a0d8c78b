"""Chooses the features of a count matrix that are genes, for matrices of all formats.

Antibodies, guide RNAs, peaks and genes of other genomes are left out. `genes_of` restricts a matrix
to its genes, `of_one_genome` to the genes of the genome that the user chose, and `cells_of_genome`
finds the cells of that genome.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np

from data_prep.matrices.gene_table import Names
from data_prep.matrices.matrix_store import Rows, Store, as_text

# Columns of var that may hold the kind of a feature. In some files the last one holds biotypes.
KIND_COLUMNS = ("feature_types", "feature_type", "modality", "gene_type")
# The words of 10x and of multimodal benchmarks, compared without case and punctuation.
_GENE_KINDS = frozenset({
    "geneexpression", "gex", "gene", "genes", "rna", "mrna", "scrna", "snrna", "transcriptome",
    "transcript", "expression", "wta",
})  # fmt: skip
_OTHER_KINDS = frozenset({
    "antibodycapture", "antibody", "antibodies", "adt", "adts", "protein", "proteins", "prot",
    "abseq", "cite", "citeseq", "crisprguidecapture", "crispr", "guide", "guides", "grna", "sgrna",
    "multiplexingcapture", "hto", "htos", "hashtag", "hashtags", "cmo", "custom", "antigencapture",
    "peak", "peaks", "atac", "chromatinaccessibility", "vdj", "vdjt", "vdjb", "spikein", "spikeins",
})  # fmt: skip
_UNNAMED = "no kind given"
_READ_CELLS, _READ_VALUES = 4096, 1 << 24  # the most that is read at a time


def _plain(kind: str) -> str:
    return re.sub(r"[^a-z0-9]", "", kind.lower())


def is_gene_kind(kind: str) -> bool:
    """Return whether a kind of features, or the name of a modality, means gene expression."""
    return _plain(kind) in _GENE_KINDS


def genes_among(kinds: list[str]) -> np.ndarray | None:
    """Return bool [features], True for genes; None if the values are no kinds of features.

    Biotypes (protein_coding, ...) are no kinds of features. Features of an unknown kind are genes
    only if no feature of the matrix is called a gene.
    """
    plain = {kind: _plain(kind) for kind in set(kinds)}
    known = {p for p in plain.values() if p in _GENE_KINDS or p in _OTHER_KINDS}
    if not known:
        return None
    names_genes = any(p in _GENE_KINDS for p in known) and "proteincoding" not in plain.values()
    is_gene = {
        kind: p in _GENE_KINDS or (p not in _OTHER_KINDS and not names_genes)
        for kind, p in plain.items()
    }
    return np.array([is_gene[kind] for kind in kinds], dtype=bool)


def genes_of(path: str, store: Store) -> tuple[Store, dict[str, int]]:
    """Return the matrix of a matrix's genes, and the number of other features by kind.

    Raises
    ------
    ValueError
        No feature is a gene.
    """
    columns = store.var_columns()
    # In a MuData each modality is a matrix of its own, and only one of them is opened.
    modalities: dict[str, int] = getattr(store, "other_modalities", {})
    for column in KIND_COLUMNS:
        if column not in columns:
            continue
        kinds = as_text(store.var(column))
        kept = genes_among(kinds)
        if kept is None:
            continue
        others = Counter(k or _UNNAMED for k, keep in zip(kinds, kept, strict=True) if not keep)
        if not kept.any():
            raise ValueError(
                f"{path}: has no features of type 'Gene Expression', only {sorted(others)} "
                f"(column '{column}' of var)"
            )
        left_out = dict(sorted(others.items())) | modalities
        return (ChosenFeatures(store, kept) if others else store), left_out
    return store, modalities


def of_one_genome(
    path: str, store: Store, ids: Names, wanted: str | None
) -> tuple[Store, dict[str, int]]:
    """Return the matrix of one genome's features, and the number of other features by genome.

    The genome of a feature is its value in column ``genome`` of var, or the prefix of its id.

    Raises
    ------
    ValueError
        There are several genomes and none is chosen, or the chosen genome is not there.
    """
    genomes: list[str] = []
    if "genome" in store.var_columns():
        genomes = as_text(store.var("genome"))
    if len(set(genomes) - {""}) < 2:
        genomes = ids.genomes if any(ids.genomes) else genomes
    found = Counter(genomes)
    named = sorted(set(found) - {""})
    if wanted is None and len(named) < 2:
        return store, {}
    if wanted is None:
        numbers = {name: found[name] for name in named}
        raise ValueError(
            f"{path}: holds features of {len(named)} genomes, {numbers}; choose one: --genome "
            f"{named[0]}"
        )
    if wanted == getattr(store, "genome", None):
        return store, {}
    if wanted not in named:
        raise ValueError(f"{path}: --genome {wanted}: its features name {named or 'no genome'}")
    kept = np.array([g == wanted for g in genomes], dtype=bool)
    left_out = {f"genome {g or 'not given'}": n for g, n in sorted(found.items()) if g != wanted}
    return (ChosenFeatures(store, kept) if left_out else store), left_out


def cells_of_genome(path: str, store: Store, chosen: Store) -> np.ndarray | None:
    """Return int64, the rows of the cells with at least half of their counts in the chosen genome.

    None means all cells. The other cells are of another species (or two cells in one droplet), and
    their counts in this genome are stray molecules. Cells without any count are kept; they are
    counted with the empty cells later.

    Parameters
    ----------
    store, chosen
        Matrices of the same cells: the genes of all genomes, and those of the chosen genome.

    Raises
    ------
    ValueError
        No cell has half of its counts in the chosen genome.
    """
    is_own: list[np.ndarray] = []
    start = 0
    while start < store.num_cells:
        stop = min(start + _READ_CELLS, store.num_cells)
        while stop - start > 1 and store.num_stored(start, stop) > _READ_VALUES:
            stop = start + (stop - start) // 2
        own, of_all = (_sums(part.rows(start, stop)) for part in (chosen, store))
        is_own.append(2 * own >= of_all)
        start = stop
    cells = np.flatnonzero(np.concatenate(is_own))
    if not len(cells):
        raise ValueError(f"{path}: no cell has half of its counts in the genome that was chosen")
    return cells if len(cells) < store.num_cells else None


def _sums(rows: Rows) -> np.ndarray:
    """Return float64 [cells], the sum of values in each row of a CSR matrix."""
    data, _, indptr = rows
    before = np.r_[0.0, np.cumsum(data, dtype=np.float64)]
    return before[indptr[1:]] - before[indptr[:-1]]


class ChosenFeatures:
    """A matrix that consists of some features of another matrix.

    Counts of the other features are not part of a cell's total.

    Parameters
    ----------
    kept
        bool [features of `store`], True for the features to keep.
    """

    def __init__(self, store: Store, kept: np.ndarray) -> None:
        self._store = store
        self._kept = np.flatnonzero(kept)
        # bool [features of the file's matrix], also if `store` itself is a choice of features.
        self.chosen = kept.copy()
        if isinstance(store, ChosenFeatures):
            self.chosen = store.chosen.copy()
            self.chosen[store.chosen] = kept
        self._number = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
        self.path: Path = store.path
        self.num_cells, self.num_genes = store.num_cells, len(self._kept)
        self.counts_choices = store.counts_choices
        self.num_filtered_out: int | None = getattr(store, "num_filtered_out", 0)
        self.row_numbers: np.ndarray | None = getattr(store, "row_numbers", None)
        self.cells_in_file: int = getattr(store, "cells_in_file", store.num_cells)

    def rows(self, start: int, stop: int) -> Rows:
        data, features, indptr = self._store.rows(start, stop)
        if features.size and (features.min() < 0 or features.max() >= len(self._number)):
            raise OSError(f"cells {start}-{stop} name feature {features.max()}")
        genes = self._number[features]
        kept = genes >= 0
        return data[kept], genes[kept], np.r_[0, np.cumsum(kept)][indptr]

    def num_stored(self, start: int, stop: int) -> int:
        return self._store.num_stored(start, stop)

    def cell_ids(self, start: int, stop: int) -> list[str]:
        return self._store.cell_ids(start, stop)

    def obs_columns(self) -> list[str]:
        return self._store.obs_columns()

    def obs(self, column: str, start: int, stop: int) -> np.ndarray:
        return self._store.obs(column, start, stop)

    def var_columns(self) -> list[str]:
        return self._store.var_columns()

    def var(self, column: str | None) -> np.ndarray:
        return self._store.var(column)[self._kept]

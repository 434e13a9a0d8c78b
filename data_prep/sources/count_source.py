"""Reads a count matrix of any format as a source of cells, in checked blocks of bounded size.

`CountSource` wraps a matrix that `data_prep.matrices` opened. It finds the genes and the cells to
read, `column_tokens` maps its genes to a vocabulary, and `blocks` yields the cells with their
totals and metadata. A wrong file raises a ValueError that names the file, the share of values
concerned and what to do. The other kind of source is `data_prep.sources.token_corpus`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from data_prep.genes.annotation import SYMBOL_COLUMNS, Annotation, species_of
from data_prep.genes.gene_names import ENSEMBL, FoundGenes, strip_version
from data_prep.genes.vocabulary import Vocabulary
from data_prep.matrices import gene_table
from data_prep.matrices.choose_cells import ChosenCells
from data_prep.matrices.compression import missing_codec
from data_prep.matrices.feature_kinds import (
    ChosenFeatures,
    cells_of_genome,
    genes_of,
    of_one_genome,
)
from data_prep.matrices.gene_table import ChosenGenes, GeneReport, GeneTable, Names, names_of
from data_prep.matrices.matrix_store import Store, as_text
from data_prep.sources import obs_columns
from data_prep.sources.count_kinds import Place, check_integers, fractional_values
from data_prep.sources.count_sums import CountScan, scan_counts
from data_prep.sources.obs_columns import (
    FILTER_COLUMN,
    PRIMARY,
    checked_totals,
    count_secondary,
)
from data_prep.sources.source_spec import INDEX, SourceSpec

_READ_CELLS = 4096
_READ_VALUES = 1 << 24  # values per block; each takes 12 to 16 bytes while a block is in use
_JUDGED_CELLS = 256  # so many tell whether fractions are counts
_FEWEST_KNOWN = 0.01  # share of genes that is enough, however large --min-overlap is
# Errors that the readers of formats raise for damaged files, also for sizes above memory.
DAMAGE = (
    OSError, KeyError, RuntimeError, IndexError, ValueError, TypeError, AttributeError, MemoryError,
    OverflowError,
)  # fmt: skip


@dataclass(frozen=True)
class CountBlock:
    """Consecutive cells of one count matrix.

    Attributes
    ----------
    data, indices, indptr
        CSR arrays of raw counts, cells x genes of the source; explicit zeros are possible.
    cell_ids, datasets
        Id of each cell, and name of the data set that it belongs to.
    metadata
        One string per cell for each carried column.
    passes
        bool [cells], False where the source itself marks a cell as filtered out (``filter_pass``).
    totals
        float64 [cells], sum of all counts of a cell.
    mitochondrial
        float64 [cells], share of the counts in mitochondrial genes; NaN where the source has none
        of these genes.
    fractional
        Number of values in the file that were no integers.
    """

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    cell_ids: list[str]
    datasets: list[str]
    metadata: dict[str, list[str]]
    passes: np.ndarray
    totals: np.ndarray
    mitochondrial: np.ndarray
    fractional: int = 0


class CountSource:
    """An opened count matrix, of which any range of cells can be read."""

    kind = "counts"

    def __init__(
        self, spec: SourceSpec, store: Store, annotation: Annotation | None = None
    ) -> None:
        self.spec, self.options, self._annotation = spec, spec.options, annotation
        self.path, self.name = spec.path, spec.name
        if store.num_cells == 0 or store.num_genes == 0:
            raise ValueError(
                f"{self.path}: is empty: {store.num_cells} cells, {store.num_genes} genes"
            )
        choice, self._genes = self._find_genes(store)
        # Number of features of each kind that are left out because they are no genes.
        self.left_out = choice.left_out
        self.store: Store = store
        # bool [features of the file], True for genes; None: all of them are.
        self.chosen_features = choice.features
        if choice.features is not None:
            self.store = ChosenFeatures(self.store, choice.features)
        if choice.cells is not None:
            self.store = ChosenCells(self.store, choice.cells)
        self._num_of_others = store.num_cells - self.store.num_cells
        self.num_cells, self.num_genes = self.store.num_cells, self.store.num_genes
        obs = store.obs_columns()
        wanted = [*self.options.column_sources.values()]
        wanted += [c for c in (self.options.total_column, self.options.dataset_column) if c]
        missing = [c for c in wanted if c not in obs]
        if missing:
            raise ValueError(f"{self.path}: obs has no column {missing}; it has {obs}")
        self._has_filter = FILTER_COLUMN in obs

    def _find_genes(self, store: Store) -> tuple[ChosenGenes, GeneTable]:
        """Return the features and cells to read of a matrix, and the names of its genes.

        A process opens a source twice, first to check it and then to read it. The names are read
        once only and kept in `gene_table.TABLES`.
        """
        options = self.options
        state = gene_table.state_of(
            self.path, options.counts, options.gene_column, options.genome, options.strip_versions,
            options.obs_filter,
        )  # fmt: skip
        known = gene_table.TABLES.get(state)
        if known is not None:
            return known
        genes, left_out = genes_of(self.path, store)
        ids, cells = self._read_ids(genes), None
        found, genomes = of_one_genome(self.path, genes, ids, options.genome)
        if found is not genes:
            ids, cells = self._read_ids(found), cells_of_genome(self.path, genes, found)
        table = gene_table.gene_table(ids, self._read_symbols(found), options.strip_versions)
        choice = ChosenGenes(getattr(found, "chosen", None), cells, left_out | genomes)
        gene_table.TABLES.put(state, choice, table)
        return choice, table

    @property
    def gene_ids(self) -> list[str]:
        """Gene id of each matrix column; '' where the source has none."""
        return self._genes.ids

    def _read_symbols(self, store: Store) -> Names | None:
        """Return the symbols of the genes, None if the source has no symbols beside the ids."""
        with self._damage_named("genes"):
            columns = [c for c in SYMBOL_COLUMNS if c in store.var_columns()]
            if columns:
                return names_of(as_text(store.var(columns[0])))
            if self.options.gene_column or "ensembl_id" in store.var_columns():
                return names_of(as_text(store.var(None)))  # the index may hold symbols
            return None

    def find_genes(self, vocabulary: Vocabulary) -> FoundGenes:
        """Return the result of looking up the source's genes in a vocabulary."""
        return self._genes.find(vocabulary)

    def _read_ids(self, store: Store) -> Names:
        column, columns = self.options.gene_column, store.var_columns()
        if column is not None and column not in columns and column != INDEX:
            raise ValueError(
                f"{self.path}: var has no column '{column}'; --gene-column may be {columns}, or "
                f"'{INDEX}' for its index"
            )
        if column is None and "ensembl_id" in columns:
            column = "ensembl_id"
        with self._damage_named("genes"):
            return names_of(as_text(store.var(column if column in columns else None)))

    @property
    def mitochondrial(self) -> np.ndarray:
        """bool [genes], True for mitochondrial genes by id, annotation table or symbol."""
        return self._genes.mitochondrial(self._annotation)

    def check_ids(self) -> None:
        """Raise ValueError if the gene ids are of another organism than the options state."""
        found, stated = self._genes.species, self.options.organism
        if found and stated and found != stated:
            said = f"gene ids are of {found}, but the organism is given as {stated}"
            raise ValueError(f"{self.path}: {said}")

    def column_tokens(self, vocabulary: Vocabulary, min_overlap: float) -> np.ndarray:
        """Return int32 [genes], the token of each gene, -1 for genes outside the vocabulary.

        Raises
        ------
        ValueError
            Hardly any gene of the source is in the vocabulary, or the ids are of another organism
            than the options state.
        """
        self.check_ids()
        ids = self.gene_ids
        species = self._genes.species
        tokens = self.find_genes(vocabulary).tokens
        known = int((tokens >= 0).sum())
        # This finds ids of another kind before any cell is read. Later, `min_overlap` is compared
        # with the share of counts that are in known genes.
        if known < max(1, min(min_overlap, _FEWEST_KNOWN) * len(ids)):
            raise ValueError(
                f"{self.path}: {known} of {len(ids)} gene ids ({known / max(1, len(ids)):.1%}) are "
                f"in the vocabulary; they look like "
                f"{[i for i in ids if i][:3]}, the vocabulary like {list(vocabulary.genes[:2])}. "
                + self._gene_advice(ids, species, species_of(vocabulary.genes[:1000]))
            )
        return tokens

    def _gene_advice(self, ids: list[str], species: str | None, expected: str | None) -> str:
        """Return advice for a user whose gene ids do not match the vocabulary."""
        candidates = []
        for column in self.store.var_columns():
            with self._damage_named("genes"):
                values = [strip_version(v) for v in as_text(self.store.var(column)[:200])]
            if sum(bool(ENSEMBL.match(v)) for v in values) > len(values) / 2:
                candidates.append(column)
        if candidates and not species:
            return f"Column {candidates} of var holds Ensembl ids: give --gene-column."
        if species and expected and species != expected:
            return f"These are ids of {species}, the vocabulary is of {expected}."
        if sum(not ENSEMBL.match(i) for i in ids) > len(ids) / 2:
            return (
                "For gene symbols give --gene-mapping FILE (symbol -> Ensembl id), or build a "
                "vocabulary of symbols with --vocab build."
            )
        return "Another annotation, or a small panel? Lower --min-overlap only if this is meant."

    def gene_report(self, vocabulary: Vocabulary | None) -> GeneReport:
        """Return how many of the source's genes a vocabulary knows, and by which names.

        Without a vocabulary: of the ids alone.
        """
        return replace(self._genes.report(vocabulary), left_out=self.left_out)

    def group_sizes(self, column: str) -> Counter[str]:
        """Return how many cells each value of a carried column (or ``dataset``) has."""
        name = self.options.column_sources.get(column)
        if column == "dataset":
            name = self.options.dataset_column
            if name is None:
                return Counter({self.spec.dataset: self.num_cells})
        if name is None:
            return Counter({"": self.num_cells})
        sizes: Counter[str] = Counter()
        for start in range(0, self.num_cells, 1 << 20):
            with self._damage_named(f"column '{name}'"):
                values = self.store.obs(name, start, min(start + (1 << 20), self.num_cells))
            sizes.update(as_text(values))
        return sizes

    @property
    def row_numbers(self) -> np.ndarray | None:
        """int64 [cells], where the cells stand in the file; None if all its cells are read."""
        return getattr(self.store, "row_numbers", None)

    @property
    def cells_in_file(self) -> int:
        """Number of cells of the file, those included that are not read."""
        return getattr(self.store, "cells_in_file", self.num_cells)

    @property
    def num_filtered_out(self) -> int | None:
        """Number of cells that the filter over obs leaves out; None if the format cannot tell."""
        return getattr(self.store, "num_filtered_out", 0)

    def warnings(self) -> list[str]:
        """Return warnings for the user that are known before any cell is read."""
        return [*self._of_other_genomes(), *self._not_primary()]

    def _of_other_genomes(self) -> list[str]:
        if not self._num_of_others:
            return []
        whole = self.num_cells + self._num_of_others
        return [
            f"{self.name}: {self._num_of_others:,} of {whole:,} cells are left out: most of their "
            f"counts are not in genes of --genome {self.options.genome}"
        ]

    def _not_primary(self) -> list[str]:
        if PRIMARY not in self.store.obs_columns() or PRIMARY in (self.options.obs_filter or ""):
            return []
        secondary = 0
        for start in range(0, self.num_cells, 1 << 20):
            stop = min(start + (1 << 20), self.num_cells)
            with self._damage_named(f"column '{PRIMARY}'"):
                values = as_text(self.store.obs(PRIMARY, start, stop))
            secondary += count_secondary(values)
        if not secondary:
            return []
        return [
            f"{self.name}: {secondary:,} of {self.num_cells:,} cells are not primary data: they "
            f"stand in another data set too; leave them out with --obs-filter '{PRIMARY} == True'"
        ]

    def stretches(self, chunk_cells: int) -> list[tuple[int, int]]:
        """Return ranges of about `chunk_cells` cells that can be read independently."""
        starts = range(0, self.num_cells, chunk_cells)
        return [(s, min(s + chunk_cells, self.num_cells)) for s in starts]

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[CountBlock]:
        """Yield the cells start..stop-1 in blocks of bounded memory.

        Raises
        ------
        ValueError
            The values are no raw counts, the file is damaged, or a given total is below the sum
            of counts or no number.
        """
        stop = self.num_cells if stop is None else stop
        while start < stop:
            end = min(start + _READ_CELLS, stop)
            with self._damage_named(f"cells {start}-{end}"):
                while end - start > 1 and self.store.num_stored(start, end) > _READ_VALUES:
                    end = start + (end - start) // 2
                data, indices, indptr = self.store.rows(start, end)
            yield self._block(start, end, data, indices, indptr)
            start = end

    def _block(
        self, start: int, stop: int, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray
    ) -> CountBlock:
        if not len(data) == len(indices) == indptr[-1] or len(indptr) != stop - start + 1:
            raise ValueError(
                f"{self.path}: cells {start}-{stop} have {len(data)} values, {len(indices)} gene "
                f"numbers and a pointer to {indptr[-1]}; the file is damaged"
            )
        data = data if data.dtype in (np.float32, np.int32) else data.astype(np.float64)
        indices, indptr = indices.astype(np.int32, copy=False), indptr.astype(np.int64, copy=False)
        if indices.size and (indices.min() < 0 or indices.max() >= self.num_genes):
            raise ValueError(
                f"{self.path}: cells {start}-{stop} name gene {indices.max()} of {self.num_genes}; "
                "the file is damaged"
            )
        data, fractional, scan = self._checked(start, data, indices, indptr)
        with self._damage_named(f"cells {start}-{stop}"):
            cell_ids = self.store.cell_ids(start, stop)
            metadata = {
                name: as_text(self.store.obs(column, start, stop))
                for name, column in self.options.column_sources.items()
            }
            words = as_text(self.store.obs(FILTER_COLUMN, start, stop)) if self._has_filter else []
            datasets = [self.spec.dataset] * (stop - start)
            if self.options.dataset_column:
                datasets = as_text(self.store.obs(self.options.dataset_column, start, stop))
        passes = np.ones(stop - start, dtype=bool)
        if self._has_filter:
            passes = obs_columns.passes(self.path, words)
        totals = self._totals(scan.totals, cell_ids, start, stop)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = scan.mitochondrial / scan.totals
        if not self.mitochondrial.any():
            share = np.full(stop - start, np.nan)
        return CountBlock(
            data, indices, indptr, cell_ids, datasets, metadata, passes, totals, share, fractional
        )

    def _checked(
        self, start: int, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray
    ) -> tuple[np.ndarray, int, CountScan]:
        """Return the values to be used, how many of them were fractional, and sums over cells."""
        place = Place(self.path, self.options.counts, self.store.counts_choices)
        scan = scan_counts(data, indices, indptr, self.mitochondrial)
        if not scan.is_suspicious:
            if not self.options.force_counts:
                check_integers(place, data, indptr, scan.totals)
            return data, 0, scan
        wanted = self.options.fractional
        is_small = len(indptr) - 1 < min(_JUDGED_CELLS, self.num_cells)
        wider = partial(self._around, start) if is_small else None
        number = fractional_values(place, data, indptr, wanted is not None, wider)
        if wanted == "round" and number:
            data = np.rint(data)
            scan = scan_counts(data, indices, indptr, self.mitochondrial)
        return data, number, scan

    def _around(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Return data and index pointers of the cells from `start` on, and of some before."""
        first = max(0, min(start, self.num_cells - _JUDGED_CELLS))
        stop = min(first + _JUDGED_CELLS, self.num_cells)
        with self._damage_named(f"cells {first}-{stop}"):
            data, _, indptr = self.store.rows(first, stop)
        return data, np.asarray(indptr, dtype=np.int64)

    def _totals(self, sums: np.ndarray, ids: list[str], start: int, stop: int) -> np.ndarray:
        if (column := self.options.total_column) is None:
            return sums
        with self._damage_named(f"column '{column}'"):
            values = as_text(self.store.obs(column, start, stop))
        return checked_totals(self.path, column, values, sums, ids)

    @contextlib.contextmanager
    def _damage_named(self, what: str) -> Iterator[None]:
        try:
            yield
        except DAMAGE as error:
            codec = missing_codec(error)
            if codec:
                raise ValueError(f"{self.path}: {codec}") from error
            raise ValueError(
                f"{self.path}: {what} cannot be read ({error}); the file is damaged or was changed "
                "while it was read"
            ) from error

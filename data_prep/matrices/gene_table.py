"""Caches results that depend on gene names only, for the different gene tables of a corpus.

A corpus has thousands of files but a handful of gene tables. Finding species, genomes,
mitochondrial genes and tokens of a table takes far longer than reading a small file, so the results
are kept for the tables that were seen last. `names_of` and `gene_table` return the same object for
equal columns; `TABLES` remembers the table of each file.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from data_prep.genes.annotation import Annotation, mitochondrial_columns, species_of
from data_prep.genes.gene_names import (
    FoundGenes,
    genome_of,
    plain_id,
    present,
    strip_version,
)
from data_prep.genes.vocabulary import Vocabulary
from data_prep.matrices.matrix_store import mtx_sample

_KEPT = 8
_SOURCES = 10_000
_NAMED = 20  # the most names of genes in a report


class Names:
    """A column of gene names as a file has them, with cleaned forms that are computed once."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self.texts = list(texts)

    @cached_property
    def present(self) -> list[str]:
        """The names; '' where a name is missing."""
        return [present(name) for name in self.texts]

    @cached_property
    def without_version(self) -> list[str]:
        """The names as in `present`, Ensembl ids without their version."""
        return [strip_version(name) for name in self.present]

    @cached_property
    def genomes(self) -> list[str]:
        """The genome in front of each name; '' if there is none."""
        return [genome_of(name) for name in self.texts]


@lru_cache(maxsize=2 * _KEPT)
def _names(texts: tuple[str, ...]) -> Names:
    return Names(texts)


def names_of(texts: list[str]) -> Names:
    """Return the `Names` of a column; columns equal to one seen lately share one object."""
    return _names(tuple(texts))


@dataclass(frozen=True)
class GeneReport:
    """How many of a source's genes a vocabulary knows, and by which names they were found.

    `left_out` is the number of features that are no genes, by kind (antibodies, another genome).
    For `found_as`, `upper_cased` and `case_collisions` see
    `data_prep.genes.gene_names.FoundGenes`.
    """

    genes: int
    known: int
    by_alias: int
    duplicated: int
    nameless: int
    species: str | None
    left_out: dict[str, int] = field(default_factory=dict)
    found_as: dict[str, int] = field(default_factory=dict)
    upper_cased: int = 0
    case_collisions: list[str] = field(default_factory=list)


class GeneTable:
    """Gene ids of a source, and gene symbols where the source has them.

    Attributes
    ----------
    ids
        Gene id of each matrix column; '' where the source has none.
    symbols
        Gene symbols as the file has them; None if it has none.
    """

    def __init__(self, ids: Names, symbols: Names | None, strip_versions: bool) -> None:
        self.ids = ids.without_version if strip_versions else ids.present
        self.symbols = symbols
        self._found: tuple[Vocabulary, FoundGenes] | None = None
        self._report: tuple[Vocabulary, GeneReport] | None = None
        self._mitochondrial: tuple[Annotation | None, np.ndarray] | None = None

    @cached_property
    def species(self) -> str | None:
        return species_of(self.ids)

    @property
    def _repeated(self) -> int:
        """Number of columns whose id stands in an earlier column too."""
        return sum(n - 1 for i, n in Counter(self.ids).items() if i and n > 1)

    @property
    def _nameless(self) -> int:
        return sum(not i for i in self.ids)

    def mitochondrial(self, annotation: Annotation | None) -> np.ndarray:
        """Return bool [genes], True for mitochondrial genes by id, annotation or symbol."""
        if self._mitochondrial is None or self._mitochondrial[0] != annotation:
            ids = [plain_id(i) for i in self.ids]
            texts = self.symbols.texts if self.symbols else None
            self._mitochondrial = annotation, mitochondrial_columns(ids, texts, annotation)
        return self._mitochondrial[1]

    def find(self, vocabulary: Vocabulary) -> FoundGenes:
        """Return the result of looking up the genes in a vocabulary."""
        if self._found is None or self._found[0] is not vocabulary:
            symbols = [self.symbols.present] if self.symbols else []
            self._found = vocabulary, vocabulary.lookup.find_all(self.ids, symbols)
        return self._found[1]

    def report(self, vocabulary: Vocabulary | None) -> GeneReport:
        """Return how many of the genes a vocabulary knows, and by which names.

        Without a vocabulary no gene is known, and only the ids are counted.
        """
        if vocabulary is None:
            return GeneReport(len(self.ids), 0, 0, self._repeated, self._nameless, self.species)
        if self._report is None or self._report[0] is not vocabulary:
            found = self.find(vocabulary)
            report = GeneReport(
                len(self.ids),
                int((found.tokens >= 0).sum()),
                sum(i in vocabulary.aliases for i in self.ids),
                self._repeated,
                self._nameless,
                self.species,
                {},
                found.found_as,
                found.upper_cased,
                found.case_collisions[:_NAMED],
            )
            self._report = vocabulary, report
        return self._report[1]


@lru_cache(maxsize=_KEPT)
def gene_table(ids: Names, symbols: Names | None, strip_versions: bool) -> GeneTable:
    """Return the gene table of two columns; columns equal to those seen lately share one object."""
    return GeneTable(ids, symbols, strip_versions)


# The present state of a file, and the options it is read with.
State = tuple[Hashable, ...]


def state_of(path: str, *options: Hashable) -> State | None:
    """Return a key for a file in its present state and the options it is read with.

    None for folders and mtx files: the contents of a folder, and the tables beside an mtx file, may
    change without a trace on the path itself.
    """
    file = Path(path)
    if not file.is_file() or mtx_sample(file) is not None:
        return None
    state = file.stat()
    now = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    return (path, *now, *options)


@dataclass(frozen=True)
class ChosenGenes:
    """The features and cells of a matrix that are read.

    Attributes
    ----------
    features
        bool [features], True for the genes of this source; None: all features.
    cells
        int64, row numbers of the cells of the chosen genome; None: all cells.
    left_out
        Number of features that are not read, by kind.
    """

    features: np.ndarray | None
    cells: np.ndarray | None
    left_out: dict[str, int]


class _Tables:
    """The choice of features and cells of each file, and its gene table while that is cached."""

    def __init__(self) -> None:
        self._known: dict[State, tuple[ChosenGenes, weakref.ref[GeneTable]]] = {}

    def get(self, state: State | None) -> tuple[ChosenGenes, GeneTable] | None:
        """Return the choice and the table that `put` stored, None if there are none any more."""
        if state not in self._known:
            return None
        choice, reference = self._known[state]
        table = reference()
        return None if table is None else (choice, table)

    def put(self, state: State | None, choice: ChosenGenes, table: GeneTable) -> None:
        """Remember the choice and the table of a source; if `state_of` is None, do nothing."""
        if len(self._known) >= _SOURCES:
            self._known.clear()
        if state is not None:
            self._known[state] = choice, weakref.ref(table)


TABLES = _Tables()

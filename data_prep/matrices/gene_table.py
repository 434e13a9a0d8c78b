"""What follows from the names of genes alone, worked out once for each different table of genes.

A corpus has thousands of files and a handful of tables. Which species, genomes and mitochondrial
genes there are, and which tokens of a vocabulary the genes have, takes far longer to find out than
reading a small file; so it is kept for the tables that were seen last.
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
_NAMED = 20  # names in a record


class Names:
    """A column of names as a file has them, and what they are without decoration."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self.texts = list(texts)

    @cached_property
    def present(self) -> list[str]:
        """The names, '' where one is missing."""
        return [present(name) for name in self.texts]

    @cached_property
    def without_version(self) -> list[str]:
        """As `present`, Ensembl ids without a version."""
        return [strip_version(name) for name in self.present]

    @cached_property
    def genomes(self) -> list[str]:
        """The genome in front of each name; '' without one."""
        return [genome_of(name) for name in self.texts]


@lru_cache(maxsize=2 * _KEPT)
def _names(texts: tuple[str, ...]) -> Names:
    return Names(texts)


def names_of(texts: list[str]) -> Names:
    """Return the names of a column: one and the same object for equal columns seen lately."""
    return _names(tuple(texts))


@dataclass(frozen=True)
class GeneReport:
    """What became of a source's genes under a vocabulary.

    `left_out`: kind of features that are no genes (antibodies, another genome) -> how many;
    `found_as`, `upper_cased`, `case_collisions`: see `data_prep.genes.gene_names.FoundGenes`.
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
    """Ids of genes and, where a source has them, symbols beside them.

    Attributes
    ----------
    ids
        One per matrix column; '' where the source has none.
    symbols
        As the file has them.
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

    def mitochondrial(self, annotation: Annotation | None) -> np.ndarray:
        """Return bool [genes], mitochondrial genes by id, table, or symbol."""
        if self._mitochondrial is None or self._mitochondrial[0] != annotation:
            ids = [plain_id(i) for i in self.ids]
            texts = self.symbols.texts if self.symbols else None
            self._mitochondrial = annotation, mitochondrial_columns(ids, texts, annotation)
        return self._mitochondrial[1]

    def find(self, vocabulary: Vocabulary) -> FoundGenes:
        """Return which genes of a vocabulary these are, and by which name."""
        if self._found is None or self._found[0] is not vocabulary:
            symbols = [self.symbols.present] if self.symbols else []
            self._found = vocabulary, vocabulary.lookup.find_all(self.ids, symbols)
        return self._found[1]

    def report(self, vocabulary: Vocabulary) -> GeneReport:
        """Return how the genes meet a vocabulary."""
        if self._report is None or self._report[0] is not vocabulary:
            found = self.find(vocabulary)
            report = GeneReport(
                len(self.ids),
                int((found.tokens >= 0).sum()),
                sum(i in vocabulary.aliases for i in self.ids),
                sum(n - 1 for i, n in Counter(self.ids).items() if i and n > 1),
                sum(not i for i in self.ids),
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
    """Return the table of two columns: one and the same object for equal ones seen lately."""
    return GeneTable(ids, symbols, strip_versions)


# A file as it is now, and how it is read.
State = tuple[Hashable, ...]


def state_of(path: str, *options: Hashable) -> State | None:
    """Return what tells a file and a way of reading it from all others; None for folders.

    A folder's parts may change without a trace on the folder, and so may the tables beside an mtx.
    """
    file = Path(path)
    if not file.is_file() or mtx_sample(file) is not None:
        return None
    state = file.stat()
    now = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    return (path, *now, *options)


@dataclass(frozen=True)
class Choice:
    """What is read of a matrix.

    Attributes
    ----------
    features
        bool [features], which are genes of this source; None: all.
    cells
        int64, places of the cells of the chosen genome; None: all.
    left_out
        Kind of features that are not read -> how many.
    """

    features: np.ndarray | None
    cells: np.ndarray | None
    left_out: dict[str, int]


class _Tables:
    """What is read of a source, and its table of genes as long as that itself is kept."""

    def __init__(self) -> None:
        self._known: dict[State, tuple[Choice, weakref.ref[GeneTable]]] = {}

    def get(self, state: State | None) -> tuple[Choice, GeneTable] | None:
        """Return what `put` was given, or None."""
        if state not in self._known:
            return None
        choice, reference = self._known[state]
        table = reference()
        return None if table is None else (choice, table)

    def put(self, state: State | None, choice: Choice, table: GeneTable) -> None:
        """Remember a source; `state`: see `state_of`, of None nothing is remembered."""
        if len(self._known) >= _SOURCES:
            self._known.clear()
        if state is not None:
            self._known[state] = choice, weakref.ref(table)


TABLES = _Tables()

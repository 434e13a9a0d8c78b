"""Choose the cells of a screen, its genes and gene sets, and the cell states.

`read_cells` reads the cells, `gene_names` the names of genes, `GeneChoice.sets` makes the gene
sets, and `describe_sets` describes them as a table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from data_prep.genes.annotation import SYMBOL_COLUMNS
from data_prep.genes.vocabulary import Vocabulary
from data_prep.matrices.matrix_store import as_text
from data_prep.options import Read
from data_prep.sources.count_source import CountSource
from data_prep.sources.open_source import open_path
from data_prep.sources.source_spec import SourceOptions
from eval.cells.read_cells import CellSet, encode_file
from eval.options import ConditionsOption
from eval.perturb.screen.edits import ABSENT, GeneSets, Kind, applicable, places_in

_MOST_SETS = 5_000_000
ALL = "all"


@dataclass(frozen=True)
class States:
    """The cell states between which a perturbation may move a cell: values of a column of obs.

    The cells in state `start` are perturbed; all states have a centroid.
    """

    key: str
    start: str
    goal: str
    alternatives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"--start, --goal, --alternative: {self.names} name one state twice")

    @property
    def names(self) -> list[str]:
        return [self.start, self.goal, *self.alternatives]


@dataclass(frozen=True)
class StateOptions:
    """The options that name `States`: all of them, or none."""

    state_key: Annotated[str | None, typer.Option(help="column of obs with states")] = None
    start: Annotated[str | None, typer.Option(help="state of the perturbed cells")] = None
    goal: Annotated[str | None, typer.Option(help="state to move to")] = None
    alternative: Annotated[
        tuple[str, ...], typer.Option(help="another state; may be repeated")
    ] = ()

    def states(self) -> States | None:
        """Return the states, if any are named; ValueError if one is missing."""
        if self == StateOptions():
            return None
        if self.state_key is None or self.start is None or self.goal is None:
            raise ValueError("states: --state-key COLUMN, --start A and --goal B go together")
        return States(self.state_key, self.start, self.goal, self.alternative)


@dataclass(frozen=True)
class CellChoice:
    """The choice of cells of a file that are perturbed.

    `keep` is for the cells of states too. Without `donor` all cells are of one.
    """

    keep: ConditionsOption = field(default_factory=dict)
    states: States | None = None
    donor: Annotated[str | None, typer.Option(help="column of obs")] = None
    columns: Annotated[
        tuple[str, ...], typer.Option("--column", help="of obs, to carry; may be repeated")
    ] = ()
    max_cells: Annotated[int | None, typer.Option(min=1, help="drawn; default all")] = None
    seed: Annotated[int, typer.Option(help="of the cells that are drawn")] = 0

    @property
    def carried(self) -> tuple[str, ...]:
        own = [self.donor] if self.donor else []
        own += [self.states.key] if self.states else []
        return tuple(dict.fromkeys([*own, *self.columns, *self.keep]))


@dataclass(frozen=True)
class ScreenCells:
    """The cells of a screen.

    Attributes
    ----------
    genes
        int64 gene tokens of each perturbed cell by rank, without special tokens.
    table
        One row for each of these cells: ``cell``, ``cell_id``, ``donor``, ``state``, the copied
        columns.
    state_cells
        State -> (genes as above, donors) of all its cells.
    """

    genes: list[np.ndarray]
    table: pd.DataFrame
    state_cells: dict[str, tuple[list[np.ndarray], np.ndarray]]

    def digest(self) -> str:
        """Return a hash of all cells and the columns copied with them."""
        found = hashlib.sha256(self.table.to_csv(index=False).encode())
        every = [self.genes, *(genes for genes, _ in self.state_cells.values())]
        for cells in every:
            found.update(np.array([len(c) for c in cells], dtype=np.int64).tobytes())
            for cell in cells:
                found.update(cell.tobytes())
        for name, (_, donors) in self.state_cells.items():
            found.update("\0".join([name, *map(str, donors)]).encode())
        return found.hexdigest()


def read_cells(
    path: Path, vocabulary: Vocabulary, options: SourceOptions, choice: CellChoice
) -> ScreenCells:
    """Return the cells to perturb, in the file's order, and the cells of the states.

    Raises
    ------
    ValueError
        The file lacks a column or value, a state has no cells, or no cell is left.
    """
    columns = tuple(dict.fromkeys([*options.columns, *choice.carried]))
    cells = encode_file(path, vocabulary, replace(options, columns=columns))
    kept = cells.has_genes.copy()
    for column, value in choice.keep.items():
        matches = (cells.metadata[column] == value).to_numpy()
        if not matches.any():
            raise ValueError(
                f"--cells {column}={value}: no such cell; {_values(cells, column, kept)}"
            )
        kept &= matches
    state_cells, perturbed = {}, kept
    if choice.states:
        of_state = cells.metadata[choice.states.key].to_numpy(dtype=str)
        for name in choice.states.names:
            members = np.flatnonzero(kept & (of_state == name))
            if not len(members):
                raise ValueError(
                    f"state {choice.states.key}={name}: has no cells; "
                    + _values(cells, choice.states.key, kept)
                )
            state_cells[name] = (
                _genes_of(cells, members, vocabulary), _column(cells, choice.donor)[members]
            )  # fmt: skip
        perturbed = kept & (of_state == choice.states.start)
    chosen = np.flatnonzero(perturbed)
    if not len(chosen):
        raise ValueError(f"{path}: no cell with a gene of the vocabulary is left to perturb")
    if choice.max_cells is not None and len(chosen) > choice.max_cells:
        rng = np.random.default_rng(choice.seed)
        chosen = np.sort(rng.choice(chosen, choice.max_cells, replace=False))
    table = pd.DataFrame(
        {
            "cell": np.arange(len(chosen), dtype=np.int32),
            "cell_id": cells.metadata.index[chosen].astype(str),
            "donor": _column(cells, choice.donor)[chosen],
            "state": choice.states.start if choice.states else "",
        }
    )
    for column in columns:
        if column != "donor" or choice.donor != "donor":
            name = f"obs_{column}" if column in table else column
            table[name] = cells.metadata[column].to_numpy()[chosen]
    return ScreenCells(_genes_of(cells, chosen, vocabulary), table, state_cells)


def _genes_of(cells: CellSet, chosen: np.ndarray, vocabulary: Vocabulary) -> list[np.ndarray]:
    inner = slice(1, -1) if vocabulary.has_cls else slice(None)
    return [cells.tokens[i][inner].astype(np.int64) for i in chosen]


def _column(cells: CellSet, name: str | None) -> np.ndarray:
    if name is None:
        return np.full(len(cells.tokens), "", dtype=object)
    return cells.metadata[name].to_numpy(dtype=object)


def _values(cells: CellSet, column: str, kept: np.ndarray) -> str:
    counts = cells.metadata[column][kept].value_counts().head(8)
    return f"'{column}' holds " + ", ".join(f"{v} ({n} cells)" for v, n in counts.items())


@dataclass(frozen=True)
class GeneNames:
    """The names of the genes of a vocabulary, from the file or from the vocabulary itself."""

    vocabulary: Vocabulary
    name_of: dict[int, str]
    tokens_of_name: dict[str, set[int]]

    def name(self, token: int) -> str:
        """Return the gene's symbol in the file, or its id if there is none."""
        return self.name_of.get(token, self.gene_id(token))

    def gene_id(self, token: int) -> str:
        return self.vocabulary.genes[token - self.vocabulary.first_gene_token]

    def tokens(self, genes: Iterable[str]) -> list[int]:
        """Return the tokens of genes given as ids or symbols, each once, in the given order.

        Raises
        ------
        ValueError
            A gene is not in the vocabulary, or a symbol belongs to several genes.
        """
        found, unknown = [], []
        for gene in genes:
            known = self.vocabulary.token_of.get(gene)
            tokens = {known} if known is not None else self.tokens_of_name.get(gene, set())
            if len(tokens) > 1:
                ids = [self.gene_id(t) for t in sorted(tokens)]
                raise ValueError(
                    f"gene {gene}: is the symbol of {', '.join(ids)}; give one of them"
                )
            found += tokens
            unknown += [] if tokens else [gene]
        if unknown:
            raise ValueError(
                f"genes not in the model's vocabulary: {', '.join(unknown[:10])}"
                f"{' ...' if len(unknown) > 10 else ''} ({len(unknown)} of them); give ids like "
                f"{self.vocabulary.genes[0]}, or symbols of the file's var"
            )
        return list(dict.fromkeys(found))


def gene_names(path: Path, vocabulary: Vocabulary, options: SourceOptions) -> GeneNames:
    """Return the names of a file's genes, from its column of symbols or else from its index."""
    source = open_path(path, options)
    assert isinstance(source, CountSource)  # `encode_file` has already read it
    columns = [c for c in SYMBOL_COLUMNS if c in source.store.var_columns()]
    symbols = as_text(source.store.var(columns[0] if columns else None))
    name_of: dict[int, str] = {}
    tokens_of: dict[str, set[int]] = {}
    for token, symbol in zip(vocabulary.tokens_of(source.gene_ids).tolist(), symbols, strict=True):
        if token >= 0 and symbol:
            name_of.setdefault(token, symbol)
            tokens_of.setdefault(symbol, set()).add(token)
    return GeneNames(vocabulary, name_of, tokens_of)


def named_genes(text: str) -> tuple[str, ...]:
    """Return the genes that ``--genes`` names: A,B,C, or @FILE with one a line."""
    if not text.startswith("@"):
        names = text.split(",")
    else:
        try:
            names = Path(text[1:]).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--genes {text}: cannot be read ({error})") from error
    found = tuple(n.strip() for n in names if n.strip())
    if not found:
        raise ValueError(f"--genes {text}: names no gene; give 'all', A,B,C or @FILE")
    return found


@dataclass(frozen=True)
class GeneChoice:
    """The choice of genes that are perturbed, and of those perturbed together.

    Attributes
    ----------
    genes
        ``all`` (every gene that a cell has), or ids and symbols.
    group
        All of `genes` form one set; in a cell, the set is limited to genes that the cell has.
    set_size
        Every combination of so many of `genes`: 1 single genes, 2 pairs, ... With sets of two and
        more, their genes are also perturbed singly, because a sum of single effects needs them.
    anchor
        A gene that is added to every set.
    """

    genes: Annotated[
        tuple[str, ...],
        typer.Option(help="all, or ids and symbols: A,B,C, or @FILE with one a line"),
        Read(named_genes),
    ] = (ALL,)
    group: Annotated[bool, typer.Option("--group", help="--genes as one set")] = False
    set_size: Annotated[int, typer.Option(help="all combinations of so many genes")] = 1
    anchor: Annotated[str | None, typer.Option(help="a gene in every set besides")] = None

    def __post_init__(self) -> None:
        if self.set_size < 1:
            raise ValueError(f"--set-size {self.set_size}: at least 1")
        if self.group and (self.set_size > 1 or self.anchor or self.genes == (ALL,)):
            raise ValueError(
                "--group: is one set of the genes named by --genes; neither 'all' nor --pairs, "
                "--set-size or --anchor go with it"
            )

    def sets(self, names: GeneNames, genes: list[np.ndarray], kind: Kind) -> GeneSets:
        """Return the gene sets.

        Raises
        ------
        ValueError
            A gene is not in the vocabulary, or no cell has it and the perturbation does not insert
            it; or there are too many sets.
        """
        detected = np.zeros(names.vocabulary.num_tokens, dtype=bool)
        for cell in genes:
            detected[cell] = True
        every = self.genes == (ALL,)
        tokens = np.flatnonzero(detected).tolist() if every else names.tokens(self.genes)
        anchor = names.tokens([self.anchor]) if self.anchor else []
        absent = [names.name(t) for t in [*anchor, *tokens] if not detected[t]]
        if absent and kind != "overexpress":
            raise ValueError(
                f"genes that none of the {len(genes):,} cells holds: {', '.join(absent[:10])}"
                f"{' ...' if len(absent) > 10 else ''} ({len(absent)} of them); there is nothing "
                f"to {kind}"
            )
        tokens = [t for t in tokens if t not in anchor]
        if self.group:
            return GeneSets(np.array([tokens]), np.zeros((1, len(tokens)), dtype=bool))
        found = [(t,) for t in [*anchor, *tokens]]
        if anchor or self.set_size > 1:
            _require_few(len(tokens), self.set_size)
            found += [(*anchor, *c) for c in combinations(tokens, self.set_size)]
        size = max(map(len, found))
        members = np.array([s + (ABSENT,) * (size - len(s)) for s in found])
        # A gene is inserted only if it was named; with all genes, each cell uses its own.
        required = members != ABSENT
        if kind == "overexpress":
            required &= ~np.isin(members, anchor) & every
        return GeneSets(members, required)


def _require_few(num_genes: int, set_size: int) -> None:
    count = 1
    for i in range(set_size):
        count = count * (num_genes - i) // (i + 1)
    if count == 0:
        raise ValueError(f"--set-size {set_size}: there are only {num_genes} genes")
    if count > _MOST_SETS:
        raise ValueError(
            f"--set-size {set_size}: {count:,} sets of {num_genes:,} genes are too many (at most "
            f"{_MOST_SETS:,}); name fewer genes, or a screen's best"
        )


def describe_sets(
    sets: GeneSets, names: GeneNames, genes: list[np.ndarray], kind: Kind, max_genes: int
) -> pd.DataFrame:
    """Return one row for each set that describes it, and in how many cells it applies.

    Columns ``kind``, ``genes``, ``name``, ``cells``, ``mean_rank`` (mean over its genes of their
    mean rank, 0 the highest; NaN for a gene that no cell has), ``detection`` (share of the cells
    that have all of its genes).

    Raises
    ------
    ValueError
        No set applies in any cell, because no cell has a whole set or no gene would be left to
        compare.
    """
    num_tokens = names.vocabulary.num_tokens
    applies, detected = np.zeros((2, len(sets)), dtype=np.int64)
    ranks, counts = np.zeros(num_tokens + 1), np.zeros(num_tokens + 1)
    is_none = sets.members == ABSENT
    for cell in genes:
        places = places_in(cell, sets.members, num_tokens)
        applies += applicable(sets, places, kind, len(cell), max_genes)
        detected += ((places != ABSENT) | is_none).all(axis=1)
        ranks[cell] += np.arange(len(cell))
        counts[cell] += 1
    if not applies.any():
        raise ValueError(
            "no perturbation applies: in no cell are there all genes of a set and another gene "
            "beside them to compare by"
        )
    with np.errstate(invalid="ignore"):
        mean_rank = np.ma.array((ranks / counts)[sets.members], mask=is_none)
    lists = [[t for t in row if t != ABSENT] for row in sets.members.tolist()]
    return pd.DataFrame(
        {
            "kind": kind,
            "genes": [[names.gene_id(t) for t in row] for row in lists],
            "name": ["+".join(names.name(t) for t in row) for row in lists],
            "cells": applies.astype(np.int32),
            "mean_rank": mean_rank.mean(axis=1).filled(np.nan).astype(np.float32),
            "detection": (detected / len(genes)).astype(np.float32),
        }
    )

"""Run a whole screen: cells of a file through the engine into a results folder, part by part.

`perturb_file` loads the model and cells (`load_subject`), prepares the folder (`_begin`) and writes
the parts (`_write_parts`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.files import complete_file
from data_prep.genes.vocabulary import Vocabulary
from data_prep.sources.source_spec import SourceOptions
from eval.owning import owned_by_ranks
from eval.perturb.screen.cells_and_genes import (
    ScreenCells,
    States,
    describe_sets,
)
from eval.perturb.screen.compare_copies import (
    CellShifts,
    centroid,
)
from eval.perturb.screen.edits import GeneSets
from eval.perturb.screen.results import ResultsWriter
from eval.perturb.screen.settings import ModelChoice, Screen
from eval.perturb.screen.subject import Subject, load_subject
from pretrain.ranks import dist
from pretrain.ranks.dist import Ranks
from pretrain.run_folder.run_record import environment

logger = logging.getLogger(__name__)

STATES_NAME, SCREEN_NAME = "states.parquet", "screen.parquet"
# A kill loses at most so many copies (a minute on a CPU core), or a thousandth of a larger screen.
_PART_COPIES, _MOST_PARTS = 1024, 1000
# The number of gene pairs that one part holds in memory if genes are compared.
_PART_PAIRS = 8_000_000
_MOST_CELLS = 4096
_COMPACT_ROWS = 4_000_000

Show = Callable[[str, int, int], None]


def perturb_file(
    path: Path,
    out: Path,
    screen: Screen,
    model: ModelChoice,
    reading: SourceOptions = SourceOptions(),
    ranks: Ranks | None = None,
    show: Show = lambda what, done, total: None,
) -> str:
    """Write the results folder of a screen and return a summary sentence.

    A killed screen continues when it is started with the same arguments; existing parts are kept.

    Parameters
    ----------
    ranks
        The result of `pretrain.ranks.dist.start`: parts are divided over ranks, with the same
        results as on one rank.

    Raises
    ------
    ValueError
        Cells, genes, states or settings are wrong, `out` contains another screen, or another job
        writes into it. Nothing is written then.
    """
    subject = load_subject(path, model, reading, screen)
    sets = screen.genes.sets(subject.names, subject.cells.genes, screen.edit.kind)
    if screen.top:
        from eval.perturb.screen.estimate import require_screenable

        require_screenable(screen, subject)
    is_first = ranks is None or ranks.is_first
    with owned_by_ranks(out, "perturb", ranks):
        if is_first:
            writer, sets = _begin(out, subject, screen, sets, True, show)
        if ranks is not None:
            dist.wait_for_all()
        if not is_first:
            writer, sets = _begin(out, subject, screen, sets, False, show)
        if writer.is_complete:
            return f"{out}: this screen is complete already"
        _write_parts(writer, subject, screen, sets, ranks, show)
        if ranks is not None:
            dist.wait_for_all()
        if is_first:
            writer.finish()
    cells = len(subject.cells.genes)
    return f"{out}: {len(sets):,} perturbations ({screen.edit.kind}) of {cells:,} cells"


def _begin(
    out: Path,
    subject: Subject,
    screen: Screen,
    sets: GeneSets,
    is_first: bool,
    show: Show,
) -> tuple[ResultsWriter, GeneSets]:
    """Return the writer and the sets to compute; the first rank writes everything before the parts.

    The other ranks call this after the first one, and read what it has written.
    """
    cells, most_genes = subject.cells, subject.engine.max_genes
    table = pd.DataFrame()
    identity = {
        "settings": screen.settings(),
        "model": subject.digest,
        "vocabulary_sha256": subject.vocabulary.sha256,
        "cells_sha256": cells.digest(),
    }
    per_part = cells_per_part(cells.genes, screen.num_computed(len(sets)), screen.gene_shifts)
    writer = ResultsWriter(out, identity, -(-len(cells.genes) // per_part))
    about: dict[str, Any] = {"cells": len(cells.genes), "cells_per_part": per_part}
    if is_first:
        writer.require_own()
        # This comes before anything is written, because it refuses a screen in which no set
        # applies.
        table = describe_sets(sets, subject.names, cells.genes, screen.edit.kind, most_genes)
    if screen.cells.states:
        subject.engine.set_centroids(
            _centroids(out / STATES_NAME, subject, screen.cells.states, writer.digest)
        )
    if screen.top:
        from eval.perturb.screen.estimate import screened_sets

        rows, found = screened_sets(out / SCREEN_NAME, subject, screen, sets, writer.digest, show)
        sets = GeneSets(sets.members[rows], sets.required[rows])
        about["screen_agreement"] = found
        table = table.iloc[rows] if is_first else table
    if is_first:
        about["environment"] = environment()
        writer.begin(table, subject.engine.columns, about)
        absent = [n for n, k in zip(table["name"], table["cells"], strict=True) if k == 0]
        if absent:
            logger.warning(
                "%d of %d perturbations apply in no cell, e.g. %s: they have no shifts",
                len(absent), len(table), ", ".join(absent[:5]),
            )  # fmt: skip
    return writer, sets


def cells_per_part(genes: list[np.ndarray], num_sets: int, gene_shifts: bool) -> int:
    """Return the number of cells in a part, a function of the cells and sets only."""
    typical = max(1.0, float(np.median([len(g) for g in genes])))
    copies = max(1.0, min(num_sets, typical))
    found = max(_PART_COPIES / copies, len(genes) / _MOST_PARTS)
    if gene_shifts:
        found = min(found, _PART_PAIRS / (copies * typical))
    return int(np.clip(found, 1, _MOST_CELLS))


def _centroids(path: Path, subject: Subject, states: States, digest: str) -> dict[str, np.ndarray]:
    """Return the states' centroids, from the file if it belongs to this screen, else new ones."""
    if path.exists():
        table = pq.read_table(path)
        if (table.schema.metadata or {}).get(b"geneloom_screen") == digest.encode():
            vectors = table["centroid"].to_pylist()
            return dict(zip(table["state"].to_pylist(), map(np.array, vectors), strict=True))
    found, rows = {}, []
    for name in states.names:
        genes, donors = subject.cells.state_cells[name]
        found[name] = centroid(subject.engine.embed(genes), donors)
        rows.append((name, len(genes), len(np.unique(donors)), found[name]))
    table = pa.table(dict(zip(("state", "cells", "donors", "centroid"), zip(*rows, strict=True),
                              strict=True)))  # fmt: skip
    with complete_file(path) as aside:
        pq.write_table(table.replace_schema_metadata({b"geneloom_screen": digest.encode()}), aside)
    return found


def _write_parts(
    writer: ResultsWriter,
    subject: Subject,
    screen: Screen,
    sets: GeneSets,
    ranks: Ranks | None,
    show: Show,
) -> None:
    """Compute and write the parts of this rank that do not exist yet."""
    rank, world = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
    mine = range(rank, writer.parts, world)
    cells = subject.cells
    per_part = cells_per_part(cells.genes, screen.num_computed(len(sets)), screen.gene_shifts)
    positions = np.arange(len(cells.genes))
    stretches = {p: positions[p * per_part : (p + 1) * per_part] for p in mine}
    # This is the number of copies if each gene of a cell is perturbed once; otherwise it is an
    # equally good measure of the work.
    work = np.array([min(len(sets), len(g)) for g in cells.genes])
    total, done = sum(int(work[s].sum()) for s in stretches.values()), 0
    for part, stretch in stretches.items():
        if writer.has_part(part):
            done += int(work[stretch].sum())
            continue
        found: dict[int, CellShifts] = {}
        sums = GeneSums(cells.table["donor"].iloc[stretch], len(sets), subject.vocabulary)
        # The cells are ordered by length, so that the memory freed by one cell's batches fits the
        # next cell's.
        for cell in sorted(stretch, key=lambda c: (len(cells.genes[c]), c)):
            shifts = subject.engine.perturb(
                cells.genes[cell], sets, screen.edit, screen.gene_shifts
            )
            sums.add(cells.table["donor"].iloc[cell], shifts)
            found[cell] = replace(shifts, genes=[])
            done += int(work[cell])
            show("copies", done, total)
        writer.write_part(
            part,
            _cells_table(cells, stretch, found),
            _shifts_table(stretch, found),
            sums.table() if screen.gene_shifts else None,
        )


def _cells_table(cells: ScreenCells, stretch: np.ndarray, found: dict[int, CellShifts]) -> pa.Table:
    table = cells.table.iloc[stretch].reset_index(drop=True)
    table["tokens"] = np.array([len(cells.genes[c]) for c in stretch], dtype=np.int32)
    for column in found[stretch[0]].before:
        table[column] = np.array([found[c].before[column] for c in stretch], dtype=np.float32)
    return pa.Table.from_pandas(table, preserve_index=False)


def _shifts_table(stretch: np.ndarray, found: dict[int, CellShifts]) -> pa.Table:
    every = [found[c] for c in stretch]
    counts = [len(f.sets) for f in every]
    columns = {
        "cell": np.repeat(stretch, counts).astype(np.int32),
        "perturbation": np.concatenate([f.sets for f in every]).astype(np.int32),
        "changed": np.concatenate([f.changed for f in every]),
    }
    for name in every[0].values:
        columns[name] = np.concatenate([f.values[name] for f in every])
    return pa.table(columns)


class GeneSums:
    """Sums of the shifts of genes by donor and perturbation, over the cells of one part."""

    def __init__(self, donors: pd.Series, num_sets: int, vocabulary: Vocabulary) -> None:
        self._donors = sorted(set(donors))
        self._num_sets, self._vocabulary = num_sets, vocabulary
        self._keys: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
        self._sums: list[np.ndarray] = [np.zeros((0, 3))]

    def add(self, donor: str, shifts: CellShifts) -> None:
        """Add the gene shifts of a cell."""
        first = self._donors.index(donor) * self._num_sets
        for sets, genes, compared, values in shifts.genes:
            keys = (first + sets[:, None]) * self._vocabulary.num_tokens + genes
            shift = values[compared].astype(np.float64)
            self._keys.append(keys[compared])
            self._sums.append(np.stack([np.ones_like(shift), shift, shift**2], axis=1))
            if sum(map(len, self._keys[1:])) > _COMPACT_ROWS:
                self._compact()

    def _compact(self) -> None:
        keys, place = np.unique(np.concatenate(self._keys), return_inverse=True)
        rows = np.concatenate(self._sums)
        sums = np.stack([np.bincount(place, rows[:, i], len(keys)) for i in range(3)], axis=1)
        self._keys, self._sums = [keys], [sums]

    def table(self) -> pa.Table:
        """Return a table with one row per donor, perturbation and gene."""
        self._compact()
        keys, sums = self._keys[0], self._sums[0]
        rest, token = np.divmod(keys, self._vocabulary.num_tokens)
        donor, number = np.divmod(rest, self._num_sets)
        ids = np.array(self._vocabulary.genes, dtype=object)
        return pa.table(
            {
                "donor": np.array(self._donors, dtype=object)[donor],
                "perturbation": number.astype(np.int32),
                "gene": ids[token - self._vocabulary.first_gene_token],
                "cells": sums[:, 0].astype(np.int32),
                "sum": sums[:, 1],
                "sum_of_squares": sums[:, 2],
            }
        )

"""How simulated cells truly move when a regulator is edited, and how well predictions fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse
from scipy.stats import rankdata

from data_prep.files import file_sha256
from eval.benchmark.material.gene_features import expression_of_tokens
from eval.benchmark.material.in_silico import chosen_holders, genes_of
from eval.benchmark.material.models_and_cells import Bench, TaskCells, load_cells
from eval.benchmark.scoring.shift_scores import pearson
from eval.benchmark.task_file import SimulatedShiftsTask, Size

_TOWARD = "toward_"
# A regulator in fewer cells has no correlation over cells.
_FEWEST_CELLS = 3
_FEWEST_REGULATORS = 3
_DECIMALS = 10  # of the largest value; true shifts of one table span nine orders


@dataclass(frozen=True)
class Moves:
    """How far cells move, and toward which types.

    Attributes
    ----------
    shift
        float64 [cells, regulators].
    toward
        float64 [types, cells, regulators]; None: nothing is said about directions.
    """

    shift: np.ndarray
    toward: np.ndarray | None

    def taken(self, cells: np.ndarray, regulators: np.ndarray) -> Moves:
        """Return chosen cells and regulators (int positions), in this order."""
        toward = None if self.toward is None else self.toward[:, cells][:, :, regulators]
        return Moves(self.shift[cells][:, regulators], toward)


@dataclass(frozen=True)
class Truth:
    """True moves: edit -> cells x regulators; `digest` is a hash of the file's bytes."""

    regulators: list[str]
    types: list[str]
    moves: dict[str, Moves]
    digest: str

    def of(self, chosen: np.ndarray) -> Truth:
        """Return chosen regulators (int positions)."""
        moves = {e: m.taken(np.arange(len(m.shift)), chosen) for e, m in self.moves.items()}
        return Truth([self.regulators[i] for i in chosen], self.types, moves, self.digest)


def read_truth(path: Path, edits: tuple[str, ...], cells: list[str]) -> Truth:
    """Return the true moves of some cells, from a simulation's ``shifts.parquet``.

    Regulators are those that all `edits` were simulated of, one gene at a time, sorted.

    Raises
    ------
    ValueError
        The file cannot be read, it lacks a column, an edit or one of the cells.
    """
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a table ({error})") from error
    missing = [c for c in ("perturbation", "kind", "origin", "shift") if c not in table]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(table)}")
    columns = [c for c in table if c.startswith(_TOWARD)]
    if not columns:
        raise ValueError(f"{path}: no column {_TOWARD}TYPE; it has {', '.join(table)}")
    table = table[~table["perturbation"].str.contains("+", regex=False)]
    by_edit = {e: table[table["kind"] == e] for e in edits}
    shared = set.intersection(*(set(t["perturbation"]) for t in by_edit.values()))
    regulators = sorted(shared)
    if not regulators:
        raise ValueError(
            f"{path}: no gene was changed by each of {', '.join(edits)}; simulate with "
            "--perturb all"
        )
    moves = {}
    for edit, part in by_edit.items():
        wide = part.pivot(index="origin", columns="perturbation", values=["shift", *columns])
        unknown = [c for c in cells if c not in wide.index]
        if unknown:
            raise ValueError(
                f"{path}: no cell {unknown[0]} ({len(unknown)} of {len(cells)} are missing); cells "
                "and shifts have to be of one simulation (controls.h5ad and shifts.parquet)"
            )
        wide = wide.loc[cells]
        values = [wide[c][regulators].to_numpy(dtype=np.float64) for c in ("shift", *columns)]
        moves[edit] = Moves(values[0], np.stack(values[1:]))
    types = [c.removeprefix(_TOWARD) for c in columns]
    return Truth(regulators, types, moves, file_sha256(path))


@dataclass(frozen=True)
class SimulatedCells:
    """Cells of origin, and what is edited in which of them.

    Attributes
    ----------
    kinds
        str [cells]: type of each cell.
    context
        CSR float32 [tokens of the first model, cells of the context], log-normalised.
    truth, asked
        True moves; bool [cells, regulators], which of them count.
    """

    cells: TaskCells
    kinds: np.ndarray
    context: scipy.sparse.csr_matrix
    truth: Truth
    asked: np.ndarray


def load_simulated(task: SimulatedShiftsTask, size: Size, bench: Bench) -> SimulatedCells:
    """Return the cells of origin, the truth of drawn regulators, and where these are edited.

    `size.max_cells` are drawn from the context, regulators (at most `max_perturbed`) from those
    that all models know and read in `min_cells` of the cells.

    Raises
    ------
    ValueError
        As `load_cells` and `read_truth`; a type has no cells, or fewer than 3 regulators are left.
    """
    first = bench.models[0]
    assert bench.data is not None, "a task with files needs --data"
    cells = bench.cells(task.cells, (task.label,))
    context = cells
    if task.context:
        context = load_cells(
            task.context, (), bench.models[:1], bench.data, size.max_cells, bench.seed
        )
    truth = read_truth(bench.data / task.shifts, task.edits, cells.metadata.index.tolist())
    kinds = cells.metadata[task.label].to_numpy(dtype=str)
    missing = sorted(set(truth.types) - set(kinds))
    if missing:
        raise ValueError(f"{task.name}: no cell has '{missing[0]}' in '{task.label}'")
    held = np.ones((len(kinds), len(truth.regulators)), dtype=bool)
    for model in bench.models:
        genes = genes_of(model, cells.tokens[model.name])
        tokens = model.reading_vocabulary.tokens_of(truth.regulators)
        held &= np.stack([np.isin(tokens, cell) for cell in genes])
    possible = np.flatnonzero(held.sum(axis=0) >= task.min_cells)
    if len(possible) < _FEWEST_REGULATORS:
        raise ValueError(
            f"{task.name}: {len(possible)} regulators are in {task.min_cells} of the cells; "
            f"{_FEWEST_REGULATORS} are needed. Has the model the simulation's vocabulary?"
        )
    drawn = np.random.default_rng(bench.seed).permutation(possible)[: size.max_perturbed]
    truth = truth.of(np.sort(drawn))
    # The first model's cells, as far as the others hold the gene there as well.
    asked = np.zeros((len(kinds), len(drawn)), dtype=bool)
    chosen = chosen_holders(
        genes_of(first, cells.tokens[first.name]),
        first.reading_vocabulary.tokens_of(truth.regulators),
        size.max_cells_per_gene,
        bench.seed,
    )
    for column, places in enumerate(chosen):
        asked[places, column] = True
    asked &= held[:, np.sort(drawn)]
    expression = expression_of_tokens(context.counts, context.genes, first.reading_vocabulary)
    return SimulatedCells(cells, kinds, expression, truth, asked)


def score_moves(truth: Moves, predicted: Moves, asked: np.ndarray) -> dict[str, float]:
    """Return Spearman's correlations of predicted with true moves; NaN where not defined.

    ``spearman`` over cells and regulators, ``spearman_within`` over the cells of a regulator (mean
    over regulators), ``spearman_between`` of the regulators' mean shifts, ``spearman_toward`` of
    moves toward a type, over cells and regulators (mean over types). A constant prediction has 0.

    Parameters
    ----------
    asked
        bool [cells, regulators]: what counts.
    """
    used = np.flatnonzero(asked.any(axis=0))
    by_regulator = [(truth.shift[asked[:, i], i], predicted.shift[asked[:, i], i]) for i in used]
    within = [spearman(t, p) for t, p in by_regulator if len(t) >= _FEWEST_CELLS]
    means = np.array([(t.mean(), p.mean()) for t, p in by_regulator])
    scores = {
        "spearman": spearman(truth.shift[asked], predicted.shift[asked]),
        "spearman_within": float(np.mean(within)) if within else float("nan"),
        "spearman_between": spearman(means[:, 0], means[:, 1]),
        "spearman_toward": float("nan"),
    }
    if truth.toward is not None and predicted.toward is not None:
        pairs = zip(truth.toward, predicted.toward, strict=True)
        found = [spearman(t[asked], p[asked]) for t, p in pairs]
        scores["spearman_toward"] = float(np.mean(found))
    return scores


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's correlation; 0.0 if one of the two does not vary.

    Values that are equal but for rounding are ties.
    """
    return pearson(*(rankdata(np.round(v / _largest(v), _DECIMALS)) for v in (first, second)))


def _largest(values: np.ndarray) -> float:
    """Return the largest absolute value; 1 where all are 0."""
    return float(np.abs(values).max()) or 1.0


def shuffled(truth: Moves, rng: np.random.Generator) -> Moves:
    """Return the true moves of other regulators in other cells.

    Both are exchanged: cells that move far on any edit would else keep a prediction off chance.
    """
    cells, regulators = truth.shift.shape
    return truth.taken(rng.permutation(cells), rng.permutation(regulators))

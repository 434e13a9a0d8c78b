"""How simulated cells truly move when a regulator is edited, and how well predictions fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from data_prep.files import file_sha256
from eval.benchmark.scoring.shift_scores import pearson

_TOWARD = "toward_"
# A regulator in fewer cells has no correlation over cells.
_FEWEST_CELLS = 3
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

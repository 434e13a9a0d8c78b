"""Simulated shifts: do edits in silico move cells as far, and where, as they truly move?

Predictions and truth are compared by Spearman's correlation, for they have no common scale.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import scipy.sparse

from eval.benchmark.contest.folds import seed_of_fold
from eval.benchmark.contest.verdicts import ZERO_SHOT
from eval.benchmark.material.gene_features import expression_of_tokens, ranks_of_tokens
from eval.benchmark.material.in_silico import chosen_holders, engine_of, genes_of, sets_of
from eval.benchmark.material.models_and_cells import Bench, Model, TaskCells, load_cells
from eval.benchmark.material.simulated_truth import (
    Moves,
    Truth,
    read_truth,
    score_moves,
    shuffled,
)
from eval.benchmark.material.twin_encoders import kept_threads
from eval.benchmark.neighbours.gene_correlation import correlations
from eval.benchmark.outcome import Outcome, Role, TaskRun
from eval.benchmark.task_file import SimulatedShiftsTask, Size
from eval.perturb.screen.compare_copies import centroid
from eval.perturb.screen.edits import Edit

_DRAWN_SHARE = 0.8
_NUM_SHUFFLES = 20
# Of cells of a type, so many place its centroid well enough.
_MOST_CELLS_A_TYPE = 20
_FEWEST_REGULATORS = 3
# What is high and is taken away moves a cell far; what is put in front, where it was low.
_SIGN = {"delete": 1.0, "overexpress": -1.0}


@dataclass(frozen=True)
class World:
    """Cells, what is edited in which of them, and what is known without a model.

    Attributes
    ----------
    kinds
        str [cells]: type of each cell.
    context
        CSR float32 [tokens of the first model, cells of the context], log-normalised.
    truth, asked
        True moves; bool [cells, regulators], which of them count.
    """

    task: SimulatedShiftsTask
    bench: Bench
    cells: TaskCells
    kinds: np.ndarray
    context: scipy.sparse.csr_matrix
    truth: Truth
    asked: np.ndarray

    @cached_property
    def expression(self) -> np.ndarray:
        """float32 [cells, tokens of the first model], log-normalised."""
        first = self.bench.models[0].reading_vocabulary
        return expression_of_tokens(self.cells.counts, self.cells.genes, first).toarray().T

    @cached_property
    def regulators(self) -> np.ndarray:
        """int64 [regulators] tokens of the first model."""
        return self.tokens(self.bench.models[0])

    @cached_property
    def correlations(self) -> np.ndarray:
        """float64 [regulators, tokens], over the context's cells."""
        return correlations(self.context, self.regulators, np.arange(self.context.shape[0]))

    def tokens(self, model: Model) -> np.ndarray:
        """Return int64 [regulators] tokens."""
        return model.reading_vocabulary.tokens_of(self.truth.regulators).astype(np.int64)


@dataclass(frozen=True)
class Draw:
    """A fold: bool [cells, regulators], what of `World.asked` is looked at."""

    number: int
    seed: int
    asked: np.ndarray


@dataclass(frozen=True)
class Contender:
    """A row of the table; `predict` gives for each edit how cells move."""

    name: str
    role: Role
    model: Model | None
    predict: Callable[[Draw], dict[str, Moves]]


def run(task: SimulatedShiftsTask, size: Size, bench: Bench) -> TaskRun:
    """Return the outcomes of all contenders; a fold draws 80 % of the cells and regulators.

    Raises
    ------
    ValueError
        As `load_cells` and `read_truth`; fewer than 3 regulators are in enough cells.
    """
    world = load_world(task, size, bench)
    rows = contenders(world)
    outcomes = []
    for number in range(size.seeds):
        draw = _draw(world, number)
        for row in rows:
            compute = partial(_compete, row, draw, world)
            outcomes.append(bench.store.outcome(_key(row, draw, world), compute))
    held = world.asked.sum(axis=0).tolist()
    return TaskRun(
        cells=int(world.asked.any(axis=1).sum()),
        classes=[],
        split=f"{len(held)} regulators, each edited ({' and '.join(task.edits)}) in {min(held)} to "
        f"{max(held)} cells that hold it; {size.seeds} seeds draw 80 % of the regulators and 80 % "
        "of the cells each. Nothing is trained. Subsamples overlap: intervals say how scores vary "
        "with regulators and cells",
        headline="spearman",
        chance=0.0,
        excluded=world.cells.excluded,
        outcomes=outcomes,
        details={
            "test_share": _DRAWN_SHARE,
            "regulators": dict(zip(world.truth.regulators, held, strict=True)),
        },
    )


def num_units(task: SimulatedShiftsTask, size: Size, models: list[Model]) -> int:
    """Return how many outcomes `run` asks its store for."""
    return size.seeds * (len(_BASELINES) + 3 * len(models))


def load_world(task: SimulatedShiftsTask, size: Size, bench: Bench) -> World:
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
    cells = load_cells(task.cells, (task.label,), bench.models, bench.data, None, bench.seed)
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
    return World(task, bench, cells, kinds, expression, truth, asked)


def contenders(world: World) -> list[Contender]:
    """Return who takes part in every fold."""
    known: dict[str, dict[str, Moves]] = {}

    def once(name: str, make: Callable[[], dict[str, Moves]], _: Draw) -> dict[str, Moves]:
        if name not in known:
            known[name] = make()
        return known[name]

    def baseline(name: str, draw: Draw) -> dict[str, Moves]:
        edits = world.task.edits
        return once(name, lambda: {e: _BASELINES[name](world, e) for e in edits}, draw)

    rows = [Contender(n, "baseline", None, partial(baseline, n)) for n in _BASELINES]
    for model in world.bench.models:
        every = partial(model_moves, world, model, None, world.asked)
        own = partial(once, model.name, every)
        rows.append(Contender(ZERO_SHOT, "model", model, own))
        rows.append(Contender(ZERO_SHOT, "twin", model, partial(_twin, world, model)))
        rows.append(Contender(f"shuffled truth, {ZERO_SHOT}", "control", model, own))
    return rows


def _twin(world: World, model: Model, draw: Draw) -> dict[str, Moves]:
    return model_moves(world, model, draw.seed, draw.asked)


def model_moves(
    world: World, model: Model, twin_seed: int | None, asked: np.ndarray
) -> dict[str, Moves]:
    """Return how a model's states of cells move, by edit; NaN where it was not asked."""
    engine = engine_of(model, twin_seed, world.bench)
    genes = genes_of(model, world.cells.tokens[model.name])
    types = {}
    for kind in world.truth.types:
        of_kind = np.flatnonzero(world.kinds == kind)[:_MOST_CELLS_A_TYPE]
        states = engine.embed([genes[i] for i in of_kind])
        types[kind] = centroid(states, np.zeros(len(of_kind), dtype=int))
    engine.set_centroids(types)
    tokens = world.tokens(model)
    moves = {}
    for edit in world.task.edits:
        values = np.full((len(engine.columns), *asked.shape), np.nan)
        for cell in np.flatnonzero(asked.any(axis=1)):
            columns = np.flatnonzero(asked[cell])
            found = engine.perturb(genes[cell], sets_of(tokens[columns]), Edit(edit))
            for row, column in enumerate(engine.columns):
                values[row, cell, columns[found.sets]] = found.values[column]
        moves[edit] = Moves(values[0], values[1:])
    return moves


def _draw(world: World, number: int) -> Draw:
    seed = seed_of_fold(world.bench.seed, number)
    rng = np.random.default_rng(seed)
    asked = world.asked.copy()
    for axis in (0, 1):
        used = rng.permutation(np.flatnonzero(world.asked.any(axis=1 - axis)))
        left_out = used[math.ceil(_DRAWN_SHARE * len(used)) :]
        asked[(slice(None),) * axis + (left_out,)] = False
    return Draw(number, seed, asked)


def _key(row: Contender, draw: Draw, world: World) -> dict[str, Any]:
    """Return everything that decides an outcome, beside the store's base."""
    chosen = [world.truth.regulators, np.argwhere(draw.asked).tolist()]
    return {
        "contender": row.name,
        "role": row.role,
        "model": [row.model.name, row.model.digest, world.bench.bf16] if row.model else None,
        "fold": draw.number,
        "seed": [world.bench.seed, draw.seed],
        "cells": world.cells.digest,
        "truth": world.truth.digest,
        "asked": hashlib.sha256(repr(chosen).encode()).hexdigest(),
    }


def _compete(row: Contender, draw: Draw, world: World) -> Outcome:
    started = time.perf_counter()
    with kept_threads():
        predicted = row.predict(draw)
    seconds = time.perf_counter() - started
    rng = np.random.default_rng([draw.seed, draw.number])
    by_edit = {}
    for edit in world.task.edits:
        truth, own = world.truth.moves[edit], predicted[edit]
        if row.role == "control":
            found = [
                score_moves(shuffled(truth, rng), own, draw.asked) for _ in range(_NUM_SHUFFLES)
            ]
            by_edit[edit] = {k: float(np.mean([f[k] for f in found])) for k in found[0]}
        else:
            by_edit[edit] = score_moves(truth, own, draw.asked)
    scores = {k: float(np.mean([s[k] for s in by_edit.values()])) for k in _first(by_edit)}
    if len(by_edit) > 1:
        scores |= {f"{k}_{e}": v for e, found in by_edit.items() for k, v in found.items()}
    name = row.model.name if row.model else None
    # A single cell of a regulator, or no direction, leaves scores undefined.
    defined = {k: v if math.isfinite(v) else None for k, v in scores.items()}
    return Outcome(row.name, row.role, name, draw.number, defined, seconds)


def _first(by_edit: dict[str, dict[str, float]]) -> dict[str, float]:
    return next(iter(by_edit.values()))


def _nothing(world: World, edit: str) -> Moves:
    toward = np.zeros((len(world.truth.types), *world.asked.shape))
    return Moves(np.zeros(world.asked.shape), toward)


def _expressed(world: World, edit: str) -> Moves:
    return Moves(_SIGN[edit] * world.expression[:, world.regulators], None)


def _ranked(world: World, edit: str) -> Moves:
    first = world.bench.models[0]
    ranks = ranks_of_tokens(world.cells.tokens[first.name], first.vocabulary)
    return Moves(_SIGN[edit] * ranks[world.regulators].toarray().T, None)


def _connected(world: World, edit: str) -> Moves:
    """Return the sum of a regulator's absolute correlations with the other genes of a cell."""
    together = np.abs(world.correlations)
    together[np.arange(len(together)), world.regulators] = 0
    return Moves((world.expression > 0) @ together.T, None)


def _linear(world: World, edit: str) -> Moves:
    """Return moves of log-normalised profiles along the genes' regressions on a regulator.

    A deleted regulator goes to 0, an overexpressed one to the cell's highest value.
    """
    before = world.expression.astype(np.float64)
    spread = np.sqrt(_variances(world.context))
    types = np.stack([before[world.kinds == t].mean(axis=0) for t in world.truth.types])
    shift = np.zeros(world.asked.shape)
    toward = np.zeros((len(types), *world.asked.shape))
    for column, token in enumerate(world.regulators):
        own = spread[token]
        slopes = world.correlations[column] * spread / own if own > 0 else np.zeros_like(spread)
        slopes[token] = 0
        goal = before.max(axis=1) if edit == "overexpress" else 0.0
        after = before + (goal - before[:, token])[:, None] * slopes
        others = np.arange(len(spread)) != token
        old, new, goals = (_unit(m[:, others]) for m in (before, after, types))
        shift[:, column] = ((new - old) ** 2).sum(axis=1) / 2  # 1 - cosine of unit vectors
        toward[:, :, column] = goals @ (new - old).T
    return Moves(shift, toward)


def _variances(profiles: scipy.sparse.csr_matrix) -> np.ndarray:
    """Return float64 [tokens]: variances over cells."""
    wide = profiles.astype(np.float64)
    mean = np.asarray(wide.mean(axis=1)).ravel()
    return np.asarray(wide.multiply(wide).mean(axis=1)).ravel() - mean**2


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


_BASELINES: dict[str, Callable[[World, str], Moves]] = {
    "no change": _nothing,
    "expression of the regulator": _expressed,
    "rank of the regulator": _ranked,
    "correlation with the cell's genes": _connected,
    "linear shift by correlation": _linear,
}

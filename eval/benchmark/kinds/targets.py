"""Targets tasks: which genes does a deleted regulator move, and are they its known targets?

Every target has a partner of nearly the same rank, expression and detection (`matched_genes`), for
any deletion moves highly ranked genes most, whoever regulates them.
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
from sklearn.ensemble import RandomForestRegressor

from eval.benchmark.contest.folds import seed_of_fold
from eval.benchmark.contest.verdicts import ZERO_SHOT
from eval.benchmark.matched.matched_genes import MATCHED
from eval.benchmark.matched.regulators import Regulator, choose_regulators
from eval.benchmark.material.gene_features import expression_of_tokens
from eval.benchmark.material.gene_pairs import read_edges
from eval.benchmark.material.in_silico import (
    chosen_holders,
    engine_of,
    gene_effects,
    genes_of,
)
from eval.benchmark.material.models_and_cells import Bench, Model, TaskCells, load_cells
from eval.benchmark.material.twin_encoders import kept_threads
from eval.benchmark.neighbours.gene_correlation import correlations
from eval.benchmark.outcome import Outcome, Role, TaskRun
from eval.benchmark.scoring.shift_scores import score_ranking
from eval.benchmark.task_file import Size, TargetsTask

DRAWN_SHARE = 0.8
_NUM_SHUFFLES = 20
_TREES = 30


@dataclass(frozen=True)
class Question:
    """All that contenders are asked about, the same for every fold."""

    regulators: list[Regulator]
    cells: TaskCells
    bench: Bench
    most_cells: int | None

    def tokens(self, model: Model, genes: list[str]) -> np.ndarray:
        """Return int64 tokens of gene ids."""
        return model.reading_vocabulary.tokens_of(genes).astype(np.int64)

    @cached_property
    def expression(self) -> scipy.sparse.csr_matrix:
        """Log-normalised, CSR float32 [tokens of the first model, cells]."""
        first = self.bench.models[0]
        return expression_of_tokens(self.cells.counts, self.cells.genes, first.reading_vocabulary)

    @property
    def digest(self) -> str:
        """Hash of regulators, targets and partners."""
        whole = repr([(r.gene, r.genes) for r in self.regulators])
        return hashlib.sha256(whole.encode()).hexdigest()


@dataclass(frozen=True)
class Draw:
    """What one fold asks about: some regulators, and of each some targets with their partners.

    `genes` holds int positions among a regulator's genes: targets, then their partners.
    """

    number: int
    seed: int
    regulators: np.ndarray
    genes: list[np.ndarray]


@dataclass(frozen=True)
class Contender:
    """A row of the table; `rank` gives, for chosen regulators, how much each gene is moved."""

    name: str
    role: Role
    model: Model | None
    rank: Callable[[np.ndarray, int], list[np.ndarray]]


Baseline = Callable[[Question], list[np.ndarray]]


def run(task: TargetsTask, size: Size, bench: Bench) -> TaskRun:
    """Return the outcomes of all contenders; a fold is a draw of 80 % of the regulators.

    Raises
    ------
    ValueError
        As `load_cells` and `read_edges`; fewer than 3 regulators with enough targets.
    """
    cells = load_cells(task.cells, (), bench.models, bench.data, size.max_cells, bench.seed)
    pairs = read_edges(task.edges, bench.data)
    regulators, excluded = choose_regulators(task, size, cells, pairs, bench)
    question = Question(regulators, cells, bench, size.max_cells_per_gene)
    rows = contenders(question, _BASELINES, (ZERO_SHOT,), _deleted)
    draws = [draw_regulators(question, number) for number in range(size.seeds)]
    return TaskRun(
        cells=cells.counts.shape[0],
        classes=["expressed alike", "target"],
        split=f"{len(regulators)} regulators with {task.min_targets} to {task.max_targets} known "
        f"targets, each beside a gene of nearly the same mean rank, mean expression and detection "
        f"rate; {size.seeds} seeds draw 80 % of the regulators each, the cells are the same. "
        "Nothing is trained. Subsamples overlap: intervals say how scores vary with regulators",
        headline="auroc",
        chance=0.5,
        excluded=cells.excluded | excluded,
        outcomes=outcomes_of(question, rows, draws),
        details={
            "test_share": DRAWN_SHARE,
            "regulators": {r.gene: len(r.genes) // 2 for r in regulators},
        },
    )


def draw_regulators(question: Question, number: int) -> Draw:
    """Return a fold of 80 % of the regulators, with all of their targets."""
    seed, total = seed_of_fold(question.bench.seed, number), len(question.regulators)
    drawn = np.random.default_rng(seed).permutation(total)
    drawn = np.sort(drawn[: math.ceil(DRAWN_SHARE * total)])
    genes = [np.arange(len(question.regulators[i].genes)) for i in drawn]
    return Draw(number, seed, drawn, genes)


def outcomes_of(question: Question, rows: list[Contender], draws: list[Draw]) -> list[Outcome]:
    """Return the outcomes of all contenders in all folds, from the store where it has them."""
    store = question.bench.store
    return [
        store.outcome(_key(row, draw, question), partial(_compete, row, draw, question))
        for draw in draws
        for row in rows
    ]


def num_units(task: TargetsTask, size: Size, models: list[Model]) -> int:
    """Return how many outcomes `run` asks its store for."""
    return size.seeds * (len(_BASELINES) + len(MATCHED) + 3 * len(models))


def contenders(
    question: Question,
    baselines: dict[str, Baseline],
    readings: tuple[str, ...],
    delete: Callable[[Question, Model, int | None, np.ndarray], list[list[np.ndarray]]],
) -> list[Contender]:
    """Return who takes part in every fold.

    Parameters
    ----------
    baselines
        Name -> how much each gene of each regulator is moved.
    readings, delete
        Names of what a model says of a deletion, the first with a control; and for a model, a
        twin's seed and chosen regulators the values of each reading.
    """
    known: dict[object, list] = {}

    def once(key: object, make: Callable[[], list]) -> list:
        if key not in known:
            known[key] = make()
        return known[key]

    def baseline(name: str, drawn: np.ndarray, seed: int) -> list[np.ndarray]:
        every = once(name, lambda: baselines[name](question))
        return [every[i] for i in drawn]

    def static(column: int, drawn: np.ndarray, seed: int) -> list[np.ndarray]:
        return [question.regulators[i].static[:, column] for i in drawn]

    def zero_shot(model: Model, number: int, drawn: np.ndarray, seed: int) -> list[np.ndarray]:
        everything = np.arange(len(question.regulators))
        every = once((model.name, None), lambda: delete(question, model, None, everything))
        return [every[number][i] for i in drawn]

    def of_twin(model: Model, number: int, drawn: np.ndarray, seed: int) -> list[np.ndarray]:
        key = (model.name, seed)  # a seed draws its regulators
        return once(key, lambda: delete(question, model, seed, drawn))[number]

    rows = [Contender(n, "baseline", None, partial(baseline, n)) for n in baselines]
    for column, name in enumerate(MATCHED):
        rows.append(Contender(f"{name} alone", "baseline", None, partial(static, column)))
    for model in question.bench.models:
        for number, name in enumerate(readings):
            rows.append(Contender(name, "model", model, partial(zero_shot, model, number)))
            rows.append(Contender(name, "twin", model, partial(of_twin, model, number)))
        name = f"shuffled targets, {readings[0]}"
        rows.append(Contender(name, "control", model, partial(zero_shot, model, 0)))
    return rows


def _key(row: Contender, draw: Draw, question: Question) -> dict[str, Any]:
    """Return everything that decides an outcome, beside the store's base."""
    return {
        "contender": row.name,
        "role": row.role,
        "model": [row.model.name, row.model.digest] if row.model else None,
        "bf16": question.bench.bf16 if row.model else None,
        "fold": draw.number,
        "seed": [question.bench.seed, draw.seed],
        "drawn": draw.regulators.tolist(),
        "genes": hashlib.sha256(repr([g.tolist() for g in draw.genes]).encode()).hexdigest(),
        "cells": question.cells.digest,
        "question": question.digest,
    }


def _compete(row: Contender, draw: Draw, question: Question) -> Outcome:
    started = time.perf_counter()
    with kept_threads():
        every = row.rank(draw.regulators, draw.seed)
    seconds = time.perf_counter() - started
    asked = [question.regulators[i] for i in draw.regulators]
    truths = [r.is_target[g] for r, g in zip(asked, draw.genes, strict=True)]
    ranked = [values[g] for values, g in zip(every, draw.genes, strict=True)]
    scores = score_regulators(truths, ranked)
    details: dict[str, Any] = {}
    if row.role == "control":
        rng = np.random.default_rng([draw.seed, draw.number])
        found = [
            score_regulators([_exchanged(t, rng) for t in truths], ranked)
            for _ in range(_NUM_SHUFFLES)
        ]
        scores = {k: float(np.mean([f[k] for f in found])) for k in scores}
    else:
        details["auroc_by_regulator"] = {
            r.gene: round(score_ranking(t, v)["auroc"], 4)
            for r, t, v in zip(asked, truths, ranked, strict=True)
        }
    name = row.model.name if row.model else None
    return Outcome(row.name, row.role, name, draw.number, dict(scores), seconds, details)


def score_regulators(truths: list[np.ndarray], ranked: list[np.ndarray]) -> dict[str, float]:
    """Return the means over regulators of AUROC and AUPRC; each regulator counts once."""
    found = [score_ranking(t, v) for t, v in zip(truths, ranked, strict=True)]
    return {k: float(np.mean([f[k] for f in found])) for k in found[0]}


def _exchanged(is_target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return labels in which about half of the targets have changed places with their partners."""
    half = len(is_target) // 2
    stays = rng.random(half) < 0.5
    return np.concatenate([stays, ~stays])


def _deleted(
    question: Question, model: Model, twin_seed: int | None, drawn: np.ndarray
) -> list[list[np.ndarray]]:
    """Return the mean shift of each gene's state when its regulator is deleted."""
    bench = question.bench
    asked = [question.regulators[i] for i in drawn]
    genes = genes_of(model, question.cells.tokens[model.name])
    tokens = question.tokens(model, [r.gene for r in asked])
    cells = chosen_holders(genes, tokens, question.most_cells, bench.seed)
    moved = gene_effects(engine_of(model, twin_seed, bench), genes, tokens, cells)
    return [[row[question.tokens(model, r.genes)] for row, r in zip(moved, asked, strict=True)]]


def _together(question: Question, profiles: scipy.sparse.csr_matrix) -> list[np.ndarray]:
    """Return absolute correlations: a regulator may raise or lower its targets."""
    first = question.bench.models[0]
    return [
        np.abs(
            correlations(
                profiles, question.tokens(first, [r.gene]), question.tokens(first, r.genes)
            )[0]
        )
        for r in question.regulators
    ]


def _correlation(question: Question) -> list[np.ndarray]:
    return _together(question, question.expression)


def _codetection(question: Question) -> list[np.ndarray]:
    detected = question.expression.copy()
    detected.data[:] = 1
    return _together(question, detected)


def _random_forest(question: Question) -> list[np.ndarray]:
    """Return how much a regulator helps to predict a gene from all regulators' expression.

    As GENIE3 (Huynh-Thu et al., PLoS ONE 2010), with fewer trees; a gene's own expression is left
    out where it is a regulator itself.
    """
    first = question.bench.models[0]
    profiles = question.expression
    regulators = question.tokens(first, [r.gene for r in question.regulators])
    x = profiles[regulators].toarray().T
    importance: dict[str, np.ndarray] = {}
    for gene in sorted({g for r in question.regulators for g in r.genes}):
        (token,) = question.tokens(first, [gene])
        others = np.flatnonzero(regulators != token)
        forest = RandomForestRegressor(
            _TREES, max_features="sqrt", min_samples_leaf=3, random_state=question.bench.seed
        )
        y = profiles[[token]].toarray()[0]
        found = np.zeros(len(regulators))
        found[others] = forest.fit(x[:, others], y).feature_importances_
        importance[gene] = found
    return [
        np.array([importance[g][i] for g in r.genes]) for i, r in enumerate(question.regulators)
    ]


_BASELINES: dict[str, Baseline] = {
    "correlation": _correlation,
    "co-detection": _codetection,
    "random forest importance": _random_forest,
}

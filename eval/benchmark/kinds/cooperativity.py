"""Cooperativity tasks: two regulators deleted together, against the sum of both deletions alone.

Genes that both regulate stand beside genes that only one of them regulates, of nearly the same
rank, expression and detection (`matched_genes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np

from eval.benchmark.contest.folds import seed_of_fold
from eval.benchmark.contest.verdicts import ZERO_SHOT
from eval.benchmark.kinds.targets import (
    DRAWN_SHARE,
    Baseline,
    Draw,
    Question,
    contenders,
    outcomes_of,
)
from eval.benchmark.matched.matched_genes import MATCHED
from eval.benchmark.matched.regulators import Candidate, Panel, Regulator, with_partners
from eval.benchmark.material.gene_pairs import GenePairs, read_edges
from eval.benchmark.material.in_silico import (
    chosen_holders,
    engine_of,
    gene_effects,
    genes_of,
)
from eval.benchmark.material.models_and_cells import Bench, Model, load_cells
from eval.benchmark.neighbours.gene_correlation import correlations
from eval.benchmark.outcome import TaskRun
from eval.benchmark.task_file import CooperativityTask, Size

# What a model says of a gene: how much more both deletions move it together than one by one (this
# stands for the model), and the two that this is the difference of.
_READINGS = (ZERO_SHOT, "combined deletion", "sum of single deletions")


def run(task: CooperativityTask, size: Size, bench: Bench) -> TaskRun:
    """Return the outcomes of all contenders; a fold is a draw of 80 % of the genes of each pair.

    Raises
    ------
    ValueError
        As `load_cells` and `read_edges`; no pair of regulators with enough shared targets.
    """
    cells = load_cells(task.cells, (), bench.models, bench.data, size.max_cells, bench.seed)
    edges = read_edges(task.edges, bench.data)
    panel = Panel(cells, bench, size.max_cells_per_gene)
    candidates = candidate_pairs(task, edges, panel, bench.seed)
    chosen = with_partners(candidates, panel, task, size.max_perturbed, bench.seed)
    if not chosen:
        raise ValueError(
            f"{task.name}: no two regulators share {task.min_targets} targets that have partners "
            "in the cells that hold both. Use more cells, or another `min_targets` or `min_cells`"
        )
    question = Question(chosen, cells, bench, size.max_cells_per_gene)
    rows = contenders(question, _BASELINES, _READINGS, _deleted)
    draws = [draw_genes(question, number) for number in range(size.seeds)]
    return TaskRun(
        cells=cells.counts.shape[0],
        classes=["regulated by one", "regulated by both"],
        split=f"{len(chosen)} pairs of regulators with {task.min_targets} to {task.max_targets} "
        "shared targets, each beside a gene that one of the two regulates, of nearly the same mean "
        f"rank, mean expression and detection rate; {size.seeds} seeds draw 80 % of the genes, the "
        "cells and regulators are the same. Nothing is trained. Subsamples overlap: intervals say "
        "how scores vary with the genes",
        headline="auroc",
        chance=0.5,
        excluded=cells.excluded,
        outcomes=outcomes_of(question, rows, draws),
        details={
            "test_share": DRAWN_SHARE,
            "regulators": {r.gene: len(r.genes) // 2 for r in chosen},
        },
    )


def num_units(task: CooperativityTask, size: Size, models: list[Model]) -> int:
    """Return how many outcomes `run` asks its store for."""
    of_model = 2 * len(_READINGS) + 1
    return size.seeds * (len(_BASELINES) + len(MATCHED) + of_model * len(models))


def candidate_pairs(
    task: CooperativityTask, edges: GenePairs, panel: Panel, seed: int
) -> Iterator[Candidate]:
    """Yield pairs of regulators with enough usable shared targets: the task's, or in random order.

    Raises
    ------
    ValueError
        A regulator of the task's own pairs has no target in the table, or is in no cell.
    """
    wanted = {g for pair in task.pairs for g in pair} or set(np.unique(edges.source).tolist())
    place = {g: own for g in sorted(wanted) if (own := panel.place(g)) is not None}
    targets = {g: panel.flags(edges.targets_of(g).tolist()) for g in place}
    missing = [g for g in sorted(wanted) if g not in place or not targets[g].any()]
    if task.pairs and missing:
        raise ValueError(
            f"{task.name}: {', '.join(missing)} of `pairs` has no target in {task.edges.file} or "
            "is in none of the cells; name regulators as the table does"
        )
    pairs = list(task.pairs)
    if not pairs:
        every = list(combinations(place, 2))
        pairs = [every[i] for i in np.random.default_rng(seed).permutation(len(every))]
    for first, second in pairs:
        both = targets[first] & targets[second]
        own = (place[first], place[second])
        if both.sum() < task.min_targets:
            continue
        usable = panel.usable(own, task.min_cells)
        positive = np.flatnonzero(usable & both)
        negative = np.flatnonzero(usable & (targets[first] ^ targets[second]))
        if len(positive) >= task.min_targets:
            yield Candidate(own, positive, negative)


def draw_genes(question: Question, number: int) -> Draw:
    """Return a fold of every pair of regulators, with 80 % of its targets and their partners."""
    seed = seed_of_fold(question.bench.seed, number)
    rng = np.random.default_rng(seed)
    genes = []
    for regulator in question.regulators:
        half = len(regulator.genes) // 2
        drawn = np.sort(rng.permutation(half)[: math.ceil(DRAWN_SHARE * half)])
        genes.append(np.concatenate([drawn, half + drawn]))
    return Draw(number, seed, np.arange(len(question.regulators)), genes)


def _deleted(
    question: Question, model: Model, twin_seed: int | None, drawn: np.ndarray
) -> list[list[np.ndarray]]:
    """Return, for each of `_READINGS` and each pair, the values of its genes."""
    bench = question.bench
    asked = [question.regulators[i] for i in drawn]
    genes = genes_of(model, question.cells.tokens[model.name])
    tokens = np.stack([question.tokens(model, _two(r)) for r in asked])
    # All three in the cells that hold both.
    cells = chosen_holders(genes, tokens, question.most_cells, bench.seed)
    engine = engine_of(model, twin_seed, bench)
    combined, first, second = (
        gene_effects(engine, genes, edited, cells)
        for edited in (tokens, tokens[:, :1], tokens[:, 1:])
    )
    readings = (combined - (first + second), combined, first + second)
    places = [question.tokens(model, r.genes) for r in asked]
    return [[row[p] for row, p in zip(values, places, strict=True)] for values in readings]


def _two(regulator: Regulator) -> list[str]:
    """Return the ids of a pair's two regulators."""
    return regulator.gene.split("+")


def _correlations(question: Question) -> list[np.ndarray]:
    """Return float64 [2, genes] for each pair: absolute correlations with its two regulators."""
    first, profiles = question.bench.models[0], question.expression
    return [
        np.abs(
            correlations(profiles, question.tokens(first, _two(r)), question.tokens(first, r.genes))
        )
        for r in question.regulators
    ]


_BASELINES: dict[str, Baseline] = {
    "product of correlations": lambda q: [c.prod(axis=0) for c in _correlations(q)],
    "sum of correlations": lambda q: [c.sum(axis=0) for c in _correlations(q)],
}

"""Listed genes against partners that are expressed alike, ordered by a score.

A pair's genes have nearly the same mean rank, mean expression and detection rate in the cells, so
a score that only measures these orders a pair one way as often as the other: AUROC 0.5.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from eval.benchmark.contest.folds import seed_of_fold
from eval.benchmark.contest.verdicts import display_name
from eval.benchmark.material.gene_features import (
    STATIC_NAMES,
    expression_of_tokens,
    ranks_of_tokens,
    static_features,
)
from eval.benchmark.material.gene_labels import table_path
from eval.benchmark.material.models_and_cells import Bench, Model, TaskCells
from eval.benchmark.material.twin_encoders import kept_threads
from eval.benchmark.outcome import Outcome, Role, TaskRun
from eval.benchmark.scoring.gene_scores import (
    HEADLINE,
    interval,
    mean_roc,
    resample_genes,
    resampled_auroc,
)
from eval.benchmark.task_file import MatchedGenesTask, Size
from eval.cells.gene_lists import read_genes

MATCHED = ("mean rank", "mean expression", "detection rate")
# Largest distance of partners: percentiles of the three among all genes that could be paired.
CALIPER = 0.1
FEWEST_PAIRS = 10
_FOREIGN = 1e3  # distance of genes that are no partners
_DRAWN_SHARE = 0.8
_NUM_SHUFFLES = 100
_DECIMALS = 6


@dataclass(frozen=True)
class GenePairs:
    """Listed genes and their partners.

    Attributes
    ----------
    ids, symbols
        All listed genes, then their partners in the same order; '' for an unknown symbol.
    tokens
        Model name -> int64 [2 x pairs].
    static
        float64 [2 x pairs, 3], columns as in `MATCHED`.
    excluded
        Reason -> genes that were left out.
    """

    ids: list[str]
    symbols: list[str]
    tokens: dict[str, np.ndarray]
    static: np.ndarray
    excluded: dict[str, int]

    @property
    def num_pairs(self) -> int:
        return len(self.ids) // 2


@dataclass(frozen=True)
class Fold:
    """Some of the pairs: `genes` are positions of listed genes, then of their partners."""

    number: int
    seed: int
    genes: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """int64 [genes], 1 for listed ones."""
        return np.repeat([1, 0], len(self.genes) // 2)

    def twin_seed(self, role: Role) -> int | None:
        """Return the seed of a twin's random weights; None: pretrained ones."""
        return self.seed if role == "twin" else None


@dataclass(frozen=True)
class Scored:
    """What a contender makes of a fold.

    Attributes
    ----------
    values
        float [genes], larger for what is thought to be listed; [repeats, genes]: scores are means
        over repeats.
    scores
        Further scores.
    details
        Of the outcome; under ``genes``: gene id -> what is known of it, collected over folds.
    """

    values: np.ndarray
    scores: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Contender:
    """A row of the task's table."""

    name: str
    role: Role
    model: Model | None
    score: Callable[[Fold], Scored]

    @property
    def display_name(self) -> str:
        return display_name(self.name, self.role, self.model.name if self.model else None)


def pair_genes(
    task: MatchedGenesTask,
    cells: TaskCells,
    bench: Bench,
    is_usable: Callable[[Model], np.ndarray],
) -> GenePairs:
    """Return listed genes, each with another partner: the division that is nearest as a whole.

    Parameters
    ----------
    is_usable
        Model -> bool [num_tokens]: tokens of genes that are in enough cells.

    Raises
    ------
    ValueError
        A list cannot be read, or fewer than 10 pairs are left.
    """
    first = bench.models[0]
    usable = _usable_everywhere(bench.models, is_usable)
    excluded = {f"cells: {k}": v for k, v in cells.excluded.items()}
    listed, symbols = [], {}
    for genes in task.lists:
        path = table_path(genes.file, bench.data, task.cells.recipe)
        found = read_genes(path, genes.keep)
        tokens = first.reading_vocabulary.tokens_of(list(found)).astype(np.int64)
        symbols |= dict(zip(tokens.tolist(), found.values(), strict=True))
        known = np.unique(tokens[tokens >= 0])
        excluded[f"{genes.name}: not in the vocabulary"] = int((tokens < 0).sum())
        excluded[f"{genes.name}: in too few cells"] = int((~usable[known]).sum())
        listed.append(known)
    others = listed[1] if len(listed) > 1 else np.arange(len(usable))
    both = np.intersect1d(listed[0], listed[1]) if len(listed) > 1 else np.empty(0, np.int64)
    excluded["in both lists"] = len(both)
    positive = np.setdiff1d(listed[0][usable[listed[0]]], both)
    negative = np.setdiff1d(others[usable[others]], listed[0])
    static = matched_features(cells, first, np.concatenate([positive, negative]))
    pairs = nearest_pairs(static[: len(positive)], static[len(positive) :])
    excluded[f"{task.positive.name}: no partner"] = len(positive) - len(pairs)
    shown = {k: v for k, v in excluded.items() if v}
    if len(pairs) < FEWEST_PAIRS:
        raise ValueError(
            f"{task.name}: {len(pairs)} pairs of '{task.positive.name}' and genes expressed alike; "
            f"{FEWEST_PAIRS} are needed. {len(positive)} and {len(negative)} genes are in enough "
            f"cells (left out: {shown}); use more cells or longer lists"
        )
    chosen = np.concatenate([pairs[:, 0], len(positive) + pairs[:, 1]])
    tokens = np.concatenate([positive, negative])[chosen]
    ids = [first.vocabulary.genes[t - first.vocabulary.first_gene_token] for t in tokens]
    by_model = {m.name: m.reading_vocabulary.tokens_of(ids).astype(np.int64) for m in bench.models}
    return GenePairs(
        ids, [symbols.get(int(t), "") for t in tokens], by_model, static[chosen], shown
    )


def _usable_everywhere(models: list[Model], is_usable: Callable[[Model], np.ndarray]) -> np.ndarray:
    """Return bool [tokens of the first model]: usable genes, for every model."""
    first = models[0]
    usable = is_usable(first).copy()
    usable[: first.vocabulary.first_gene_token] = False
    for model in models[1:]:
        tokens = model.reading_vocabulary.tokens_of(list(first.vocabulary.genes))
        usable[first.vocabulary.first_gene_token :] &= (tokens >= 0) & is_usable(model)[tokens]
    return usable


def matched_features(cells: TaskCells, model: Model, tokens: np.ndarray) -> np.ndarray:
    """Return float64 [tokens, 3]: what partners have in common; columns as in `MATCHED`."""
    expression = expression_of_tokens(cells.counts, cells.genes, model.reading_vocabulary)
    ranks = ranks_of_tokens(cells.tokens[model.name], model.vocabulary)
    static = static_features(expression, ranks, tokens, model.vocabulary)
    return static[:, [STATIC_NAMES.index(name) for name in MATCHED]]


def nearest_pairs(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Return int64 [pairs, 2], positions in both: most pairs within `CALIPER`, then the nearest."""
    if not len(positive) or not len(negative):
        return np.empty((0, 2), dtype=np.int64)
    every = np.concatenate([positive, negative])
    percentile = rankdata(every, axis=0) / len(every)
    distance = cdist(percentile[: len(positive)], percentile[len(positive) :])
    distance[distance > CALIPER] = _FOREIGN
    rows, columns = linear_sum_assignment(distance)
    return np.column_stack([rows, columns])[distance[rows, columns] <= CALIPER]


def matched_baselines(pairs: GenePairs) -> list[Contender]:
    """Return what the pairs were matched by, as scores: at chance where they are matched well."""

    def score(column: int, fold: Fold) -> Scored:
        return Scored(pairs.static[fold.genes, column])

    return [
        Contender(f"{name} alone", "baseline", None, partial(score, number))
        for number, name in enumerate(MATCHED)
    ]


def shuffled_control(contender: Contender) -> Contender:
    """Return the same contender with partners exchanged at random: chance, mean of 100 times."""

    def score(fold: Fold) -> Scored:
        by_pair = contender.score(fold).values.reshape(2, -1)
        swapped = np.random.default_rng(fold.seed).random((_NUM_SHUFFLES, by_pair.shape[1])) < 0.5
        first = np.where(swapped, by_pair[1], by_pair[0])
        return Scored(np.hstack([first, by_pair.sum(axis=0) - first]))

    return Contender(f"shuffled labels, {contender.name}", "control", contender.model, score)


def compete(
    task: MatchedGenesTask,
    size: Size,
    bench: Bench,
    cells: TaskCells,
    pairs: GenePairs,
    rows: list[Contender],
) -> TaskRun:
    """Return the outcomes of contenders; a fold is a draw of 80 % of the pairs, one a seed."""
    folds, outcomes = [], {c: [] for c in rows}
    for number in range(size.seeds):
        seed = seed_of_fold(bench.seed, number)
        drawn = np.random.default_rng(seed).permutation(pairs.num_pairs)
        drawn = np.sort(drawn[: math.ceil(_DRAWN_SHARE * pairs.num_pairs)])
        fold = Fold(number, seed, np.concatenate([drawn, pairs.num_pairs + drawn]))
        folds.append(fold)
        for row in rows:
            key = _key(row, fold, pairs, cells, bench.bf16)
            outcomes[row].append(bench.store.outcome(key, partial(_compute, row, fold)))
    negative = task.negative.name if task.negative else "other genes"
    half = pairs.num_pairs
    return TaskRun(
        cells=cells.counts.shape[0],
        classes=[negative, task.positive.name],
        split=f"{half} pairs of a listed gene and a gene with nearly the same mean rank, mean "
        f"expression and detection rate; {size.seeds} seeds draw 80 % of the pairs each, the cells "
        "are the same. Nothing is trained. Subsamples overlap: intervals say how scores vary with "
        "the genes, not with the cells",
        headline=HEADLINE,
        chance=0.5,
        excluded=pairs.excluded,
        outcomes=[_small(o) for found in outcomes.values() for o in found],
        details={
            "test_share": _DRAWN_SHARE,
            "pairs": half,
            "matched": {
                name: [float(np.mean(part)) for part in (values[:half], values[half:])]
                for name, values in zip(MATCHED, pairs.static.T, strict=True)
            },
        }
        | _gene_details(outcomes, folds, bench.seed),
    )


def _key(
    row: Contender, fold: Fold, pairs: GenePairs, cells: TaskCells, bf16: bool
) -> dict[str, Any]:
    """Return everything that decides an outcome, beside the store's base."""
    genes = [pairs.ids[g] for g in fold.genes]
    return {
        "contender": row.name,
        "role": row.role,
        "model": [row.model.name, row.model.digest, bf16] if row.model else None,
        "cells": cells.digest,
        "fold": fold.number,
        "seed": fold.seed,
        "genes": hashlib.sha256(repr(genes).encode()).hexdigest(),
    }


def _compute(row: Contender, fold: Fold) -> Outcome:
    started = time.perf_counter()
    with kept_threads():
        found = row.score(fold)
    # Scores that are equal but for rounding are ties.
    values = np.round(np.atleast_2d(found.values), _DECIMALS)
    assert np.isfinite(values).all(), row.name
    each = [score_pairs(fold.labels, v) for v in values]
    scores = {k: float(np.mean([e[k] for e in each])) for k in each[0]} | found.scores
    details = dict(found.details)
    if row.role != "control":
        details["values"] = values[0].tolist()
    name = row.model.name if row.model else None
    seconds = time.perf_counter() - started
    return Outcome(row.name, row.role, name, fold.number, dict(scores), seconds, details)


def score_pairs(labels: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Return AUROC, AUPRC, and the share of pairs whose listed gene has more; a tie is half one."""
    listed, partner = values[labels == 1], values[labels == 0]
    return {
        HEADLINE: float(roc_auc_score(labels, values)),
        "auprc": float(average_precision_score(labels, values)),
        "pairs_won": float(np.mean((listed > partner) + 0.5 * (listed == partner))),
    }


def _small(outcome: Outcome) -> Outcome:
    """Return an outcome for `results.json`, without what is known of single genes."""
    details = {k: v for k, v in outcome.details.items() if k not in ("values", "genes")}
    return replace(outcome, details=details)


def _gene_details(
    outcomes: dict[Contender, list[Outcome]], folds: list[Fold], seed: int
) -> dict[str, Any]:
    """Return ROC curves, intervals over genes, and what is known of single genes, by contender."""
    known = {c: o for c, o in outcomes.items() if c.role != "control"}
    truth = [f.labels for f in folds]
    positions = np.unique(np.concatenate([f.genes for f in folds]))
    labels = np.zeros(len(positions), dtype=np.int64)
    tested = [np.searchsorted(positions, f.genes) for f in folds]
    for place, of_fold in zip(tested, truth, strict=True):
        labels[place] = of_fold
    weights = resample_genes(labels, seed)
    roc, intervals, genes = {}, {}, {}
    for row, found in known.items():
        values = [np.array(o.details["values"]) for o in found]
        roc[row.display_name] = mean_roc(truth, values)
        resampled = resampled_auroc(labels, tested, values, weights)
        mean = float(np.mean(np.array([o.scores[HEADLINE] for o in found], dtype=np.float64)))
        intervals[row.display_name] = {"mean": mean} | interval(resampled)
        merged = {g: v for o in found for g, v in o.details.get("genes", {}).items()}
        if merged:
            genes[row.display_name] = merged
    return {"roc": roc, "intervals_over_genes": intervals, "genes": genes}

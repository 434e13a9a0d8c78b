"""A contest of scores that put listed genes before others that are expressed alike."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from eval.benchmark.contest.contest import (
    DRAWN_SHARE,
    Contender,
    Contest,
    Fold,
    Results,
    Scored,
    baselines,
    draw_share,
    hash_of,
    mean_scores,
)
from eval.benchmark.contest.over_genes import over_genes
from eval.benchmark.matched.matched_genes import MATCHED, MatchedPairs, pair_genes
from eval.benchmark.material.models_and_cells import Model, TaskCells
from eval.benchmark.outcome import TaskRun
from eval.benchmark.scoring.gene_scores import HEADLINE
from eval.benchmark.task_file import MatchedGenesTask

_NUM_SHUFFLES = 100
_DECIMALS = 6
MatchedT = TypeVar("MatchedT", bound=MatchedGenesTask)


@dataclass(frozen=True)
class Ordered:
    """What a contender makes of a fold's genes.

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


class MatchedContest(Contest[MatchedT, Fold]):
    """Nothing is trained; a fold is a draw of 80 % of the pairs, one a seed.

    `Fold.test` holds positions of listed genes, then of their partners.
    """

    headline = HEADLINE

    @property
    @abstractmethod
    def cells(self) -> TaskCells:
        """The cells of the task, read when they are first needed."""

    @abstractmethod
    def is_usable(self, model: Model) -> np.ndarray:
        """Return bool [num_tokens]: tokens of genes that are in enough cells."""

    @cached_property
    def pairs(self) -> MatchedPairs:
        """Listed genes and their partners."""
        return pair_genes(self.task, self.cells, self.bench, self.is_usable)

    def matched_baselines(self) -> list[Contender[Fold]]:
        """Return what the pairs were matched by, as scores: at chance where they match well."""

        def score(column: int, fold: Fold) -> Ordered:
            return Ordered(self.pairs.static[fold.test, column])

        return baselines({f"{n} alone": partial(score, i) for i, n in enumerate(MATCHED)})

    def shuffled_control(self, own: Contender[Fold]) -> Contender[Fold]:
        """Return a contender with partners exchanged at random: chance, mean of 100 times."""

        def score(fold: Fold) -> Ordered:
            by_pair = own.predict(fold).values.reshape(2, -1)
            rng = np.random.default_rng(fold.seed)
            swapped = rng.random((_NUM_SHUFFLES, by_pair.shape[1])) < 0.5
            first = np.where(swapped, by_pair[1], by_pair[0])
            return Ordered(np.hstack([first, by_pair.sum(axis=0) - first]))

        return Contender(f"shuffled labels, {own.name}", "control", own.model, score)

    def folds(self, number: int) -> list[Fold]:
        """Return a draw of pairs."""
        seed, half = self.seed_of(number), self.pairs.num_pairs
        drawn = draw_share(half, np.random.default_rng(seed))
        return [Fold(number, seed, np.concatenate([drawn, half + drawn]))]

    def decides(self, contender: Contender[Fold], fold: Fold) -> dict[str, Any]:
        """Return the cells, the genes, and how models compute."""
        model, genes = contender.model, [self.pairs.ids[g] for g in fold.test]
        return {
            "model": [model.name, model.digest, self.bench.bf16] if model else None,
            "cells": self.cells.digest,
            "genes": hash_of(genes),
        }

    def score(self, contender: Contender[Fold], fold: Fold, predicted: Ordered) -> Scored:
        """Return means over repeats; the values are kept in the store."""
        # Scores that are equal but for rounding are ties.
        values = np.round(np.atleast_2d(predicted.values), _DECIMALS)
        assert np.isfinite(values).all(), contender.name
        each = [score_pairs(_labels(fold), v) for v in values]
        scores = mean_scores(each)
        details = dict(predicted.details)
        if contender.role != "control":
            details["values"] = values[0].tolist()
        return scores | predicted.scores, details

    def report(self, results: Results[Fold]) -> TaskRun:
        """Return the outcomes, with ROC curves, intervals, and what is known of single genes."""
        task, pairs, half = self.task, self.pairs, self.pairs.num_pairs
        # Of the genes that some fold drew, in their order.
        positions = np.unique(np.concatenate([f.test for f in results.folds]))
        tested = [np.searchsorted(positions, f.test) for f in results.folds]
        labels = (positions < half).astype(np.int64)
        roc, intervals = over_genes(results, "values", labels, tested, self.bench.seed)
        genes = {
            row.display_name: {g: v for o in found for g, v in o.details["genes"].items()}
            for row, found in results.of.items()
            if row.role != "control" and "genes" in found[0].details
        }
        return TaskRun(
            cells=self.cells.counts.shape[0],
            classes=[task.negative.name if task.negative else "other genes", task.positive.name],
            split=f"{half} pairs of a listed gene and a gene with nearly the same mean rank, mean "
            f"expression and detection rate; {self.size.seeds} seeds draw 80 % of the pairs each, "
            "the cells are the same. Nothing is trained. Subsamples overlap: intervals say how "
            "scores vary with the genes, not with the cells",
            headline=HEADLINE,
            chance=0.5,
            excluded=pairs.excluded,
            outcomes=results.without("values", "genes"),
            details={
                "test_share": DRAWN_SHARE,
                "pairs": half,
                "matched": {
                    name: [float(np.mean(part)) for part in (values[:half], values[half:])]
                    for name, values in zip(MATCHED, pairs.static.T, strict=True)
                },
                "roc": roc,
                "intervals_over_genes": intervals,
                "genes": genes,
            },
        )


def _labels(fold: Fold) -> np.ndarray:
    """Return int64 [genes], 1 for listed ones."""
    return np.repeat([1, 0], len(fold.test) // 2)


def score_pairs(labels: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Return AUROC, AUPRC, and the share of pairs whose listed gene has more; a tie is half one."""
    listed, partner = values[labels == 1], values[labels == 0]
    return {
        HEADLINE: float(roc_auc_score(labels, values)),
        "auprc": float(average_precision_score(labels, values)),
        "pairs_won": float(np.mean((listed > partner) + 0.5 * (listed == partner))),
    }

"""Perturb-seq tasks: measured shifts of expression, predicted for perturbations not trained on.

Every contender of a fold has the same training and test perturbations. A linear map from what is
known of the perturbed gene is the strongest family of published re-evaluations (Ahlmann-Eltze,
Huber & Anders, Nature Methods 22, 2025), so a model is asked what its embeddings add to it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np

from eval.benchmark.contest.contest import (
    ROLES,
    Contender,
    Contest,
    Fold,
    Results,
    Scored,
    baselines,
    hash_of,
)
from eval.benchmark.contest.verdicts import RIDGE
from eval.benchmark.material.gene_features import reduce_profiles
from eval.benchmark.material.in_silico import engine_of, genes_of, moved_by_deletions
from eval.benchmark.material.measured_shifts import Shifts, load_shifts, perturbation_folds
from eval.benchmark.material.models_and_cells import Model, TaskCells
from eval.benchmark.material.twin_encoders import features_of_model, settings_of
from eval.benchmark.neighbours.gene_correlation import correlations
from eval.benchmark.neighbours.shift_baselines import additive, ridge, scaled, train_mean
from eval.benchmark.outcome import Role, TaskRun
from eval.benchmark.scoring.shift_scores import mean_of_known, rank_of_truth, score_shifts
from eval.benchmark.task_file import PerturbSeqTask

# Mean of so many shuffles in each fold.
_NUM_SHUFFLES = 10
# Their values order genes by how much they move, and are no shifts.
_ONLY_RANKS = ("size of training shifts", "mean expression", "in silico deletion")
# Name -> kind of `features_of_model`: a row of the table, or a gene's mean state in the context.
_EMBEDDINGS = {RIDGE: "input embeddings", "ridge on contextual embedding": "frozen embedding"}
# Genes -> float [genes, features].
Features = Callable[[list[str]], np.ndarray]


class MeasuredShifts(Contest[PerturbSeqTask, Fold]):
    """Each seed has its own folds over perturbations, reductions and twins."""

    @property
    def folds_per_seed(self) -> int:
        """How many parts perturbed genes, or combinations, are divided into."""
        return self.task.folds

    @cached_property
    def loaded(self) -> tuple[Shifts, TaskCells]:
        """Measured shifts, and the cells that tell what the perturbed genes are like."""
        return load_shifts(self.task, self.size, self.bench)

    @property
    def shifts(self) -> Shifts:
        """Measured shifts."""
        return self.loaded[0]

    @property
    def context(self) -> TaskCells:
        """Cells of the task or of others."""
        return self.loaded[1]

    @property
    def headline(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What can be scored: which genes move, or how all do, or the twenty that move most."""
        if self.shifts.are_memberships:
            return "auroc"
        return "pearson_delta_top20" if len(self.shifts.genes) > 20 else "pearson_delta"

    def contenders(self) -> list[Contender[Fold]]:
        """Return ridge regressions on what is known; deletions only where the size says so."""
        rows = baselines(
            {
                "no change": lambda f: np.zeros((len(f.test), len(self.shifts.genes))),
                "train mean": lambda f: train_mean(self.shifts.values, f.train, f.test),
                "ridge on PCA": lambda f: self.ridge(f, partial(self.components, f)),
                "correlation": self.correlation,
                # Whatever is perturbed: usual suspects.
                "size of training shifts": lambda f: train_mean(
                    np.abs(self.shifts.values), f.train, f.test
                ),
                "mean expression": self.mean_expression,
            }
        )
        if self.task.split == "combinations":
            rows += baselines(
                {
                    "additive": lambda f: additive(
                        self.shifts.values, self.shifts.perturbed, f.train, f.test
                    )
                }
            )
        for model in self.models:
            for role in ROLES:
                for name, kind in _EMBEDDINGS.items():
                    predict = partial(self.ridge_on, model, role, kind)
                    rows.append(Contender(name, role, model, predict))
                if self.size.max_cells_per_gene is not None:
                    predict = partial(self.deletion, model, role)
                    rows.append(Contender("in silico deletion", role, model, predict))
            predict = partial(self.ridge_on, model, "model", _EMBEDDINGS[RIDGE])
            rows.append(Contender(f"shuffled genes, {RIDGE}", "control", model, predict))
        return rows

    def folds(self, number: int) -> list[Fold]:
        """Return the folds of a repetition, numbered on through all of them."""
        first, seed = number * self.task.folds, self.seed_of(number)
        divided = perturbation_folds(self.shifts, self.task.split, self.task.folds, seed)
        return [Fold(first + i, seed, test, train) for i, (train, test) in enumerate(divided)]

    def decides(self, contender: Contender[Fold], fold: Fold) -> dict[str, Any]:
        """Return shifts, context and how perturbations are divided."""
        return {
            "vocabulary": self.models[0].reading_vocabulary.sha256,
            "split": hash_of((fold.train.tolist(), fold.test.tolist())),
            "context": self.context.digest,
            "shifts": self.shifts.digest,
            "bf16": self.bench.bf16 if contender.model else None,
        }

    def score(self, contender: Contender[Fold], fold: Fold, predicted: np.ndarray) -> Scored:
        """Return scores of float [test perturbations, genes]; a control's genes are shuffled."""
        details = {"test_perturbations": len(fold.test)}
        if contender.role == "control":
            return self._score_shuffled(predicted, fold), details
        only_ranks = contender.name in _ONLY_RANKS
        scores = self._scores(predicted, fold, only_ranks)
        if not only_ranks:
            # Of residuals: what all perturbations share tells none from another.
            values, typical = self.shifts.values, self._typical(fold)
            ranks = rank_of_truth(values[fold.test] - typical, predicted - typical)
            scores["rank_of_truth"] = mean_of_known(ranks.tolist())
        return scores, details

    def _typical(self, fold: Fold) -> np.ndarray:
        return self.shifts.values[fold.train].mean(axis=0)

    def _scores(self, predicted: np.ndarray, fold: Fold, only_ranks: bool) -> dict[str, float]:
        shifts, scored = self.shifts, [self.shifts.scored_genes(p) for p in fold.test]
        measured, only_ranks = shifts.values[fold.test], only_ranks or shifts.are_memberships
        return score_shifts(measured, predicted, scored, self._typical(fold), only_ranks)

    def _score_shuffled(self, predicted: np.ndarray, fold: Fold) -> dict[str, float]:
        """Return mean scores of predictions whose genes were shuffled: those of chance."""
        rng, number = np.random.default_rng([fold.seed, fold.number]), predicted.shape[1]
        drawn = [predicted[:, rng.permutation(number)] for _ in range(_NUM_SHUFFLES)]
        found = [self._scores(p, fold, False) for p in drawn]
        # Distances, and what is measured against the mean of training, have no chance of their own.
        kept = [k for k in found[0] if k.startswith(("pearson_delta", "auroc", "auprc"))]
        return {k: mean_of_known([f[k] for f in found]) for k in kept}

    def report(self, results: Results[Fold]) -> TaskRun:
        """Return the outcomes, with how well two replicates agree."""
        shifts, task, context = self.shifts, self.task, self.context
        what = {
            "genes": "genes: no test perturbation is of genes that training saw alone",
            "combinations": "combinations; single perturbations are all trained on",
        }
        split = f"{len(shifts.names)} perturbations, {len(shifts.genes)} genes; {task.folds} folds "
        split += f"over {what[task.split]}"
        if shifts.agreement is not None:
            split += f"; two replicates agree with r = {shifts.agreement:.2f}"
        return TaskRun(
            cells=context.counts.shape[0],
            classes=[],
            split=split + (f"; {self.size.seeds} repetitions" if self.size.seeds > 1 else ""),
            headline=self.headline,
            chance=0.5 if shifts.are_memberships else 0.0,
            excluded=context.excluded | shifts.excluded,
            outcomes=results.outcomes,
            details={
                "test_share": 1 / task.folds,
                "perturbations": len(shifts.names),
                "genes": len(shifts.genes),
                "replicate_agreement": shifts.agreement,
            },
        )

    def components(self, fold: Fold, genes: list[str]) -> np.ndarray:
        """Return float64 [genes, components]: loadings in a PCA of the cells, NaN: not detected."""
        tokens = self.models[0].tokens_of(genes)
        expression = self.expression_of(self.context)
        found = reduce_profiles(expression, np.maximum(tokens, 0), fold.seed)
        found[(tokens < 0) | (np.diff(expression.indptr)[tokens] == 0)] = np.nan
        return found

    def embedding(
        self, model: Model, role: Role, kind: str, fold: Fold, genes: list[str]
    ) -> np.ndarray:
        """Return float [genes, width] of a model or its twin, NaN where a gene has none."""
        settings = settings_of(self.size, self.bench.device, self.bench.bf16)
        twin_seed = fold.twin_seed(role)
        make = partial(features_of_model, kind, model, twin_seed, self.context, settings)
        states = self.once.get((model.name, kind), twin_seed, make)
        tokens = model.tokens_of(genes)
        return np.where(tokens[:, None] >= 0, states[np.maximum(tokens, 0)], np.nan)

    def ridge(self, fold: Fold, features: Features) -> np.ndarray:
        """Return shifts by a ridge regression on features of the perturbed genes."""
        known = self.shifts.sums(features, np.arange(len(self.shifts.names)))
        return ridge(known[fold.train], self.shifts.values[fold.train], known[fold.test])

    def ridge_on(self, model: Model, role: Role, kind: str, fold: Fold) -> np.ndarray:
        """Return shifts by a ridge regression on a model's embeddings."""
        return self.ridge(fold, partial(self.embedding, model, role, kind, fold))

    def deletion(self, model: Model, role: Role, fold: Fold) -> np.ndarray:
        """Return how far the states of genes move when the perturbed gene is deleted from cells.

        Nothing is trained. Sums over several perturbed genes; 0 where two genes never meet.
        """
        engine = engine_of(model, fold.twin_seed(role), self.bench)
        cells = genes_of(model, self.context.tokens[model.name])
        wanted, most = model.tokens_of(self.shifts.genes), self.size.max_cells_per_gene

        def moved(genes: list[str]) -> np.ndarray:
            deleted = model.tokens_of(genes)
            return moved_by_deletions(engine, cells, deleted, wanted, most, fold.seed)

        return self.shifts.sums(moved, fold.test)

    def mean_expression(self, fold: Fold) -> np.ndarray:
        """Return the mean expression of genes, whatever is perturbed."""
        tokens = self.models[0].tokens_of(self.shifts.genes)
        mean = np.asarray(self.expression_of(self.context).mean(axis=1)).ravel()
        found = np.where(tokens >= 0, mean[np.maximum(tokens, 0)], 0)
        return np.tile(found, (len(fold.test), 1))

    def correlation(self, fold: Fold) -> np.ndarray:
        """Return correlations with the perturbed gene over the context's cells, scaled."""
        first, genes = self.models[0], self.shifts.genes

        def correlated(perturbed: list[str]) -> np.ndarray:
            tokens = first.tokens_of(perturbed), first.tokens_of(genes)
            return correlations(self.expression_of(self.context), *tokens)

        similar = self.shifts.sums(correlated, np.arange(len(self.shifts.names)))
        return scaled(similar, self.shifts.values, fold.train, fold.test)

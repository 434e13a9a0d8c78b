"""Gene tasks: classes of genes told apart by their states in cells, with folds over genes.

All contenders meet the same genes in the same folds and the same cells, and a gene counts once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from eval.benchmark.contest.contest import (
    ROLES,
    Contender,
    Contest,
    Fold,
    Results,
    Scored,
    Trained,
    hash_of,
    mean_scores,
)
from eval.benchmark.contest.over_genes import over_genes, table_of_genes
from eval.benchmark.contest.verdicts import FINE_TUNED
from eval.benchmark.material.gene_features import features_without_model
from eval.benchmark.material.gene_labels import (
    DrawnGenes,
    LabelledGenes,
    draw_genes,
    gene_folds,
)
from eval.benchmark.material.models_and_cells import Model, TaskCells
from eval.benchmark.material.twin_encoders import (
    GeneTraining,
    features_of_model,
    settings_of,
    tune_on_genes,
)
from eval.benchmark.neighbours.gene_baselines import LOGISTIC, predict_classes
from eval.benchmark.outcome import Role, TaskRun
from eval.benchmark.scoring.gene_scores import HEADLINE, score_genes
from eval.benchmark.task_file import GeneTask
from eval.finetune.classifier import FinetuneSettings

LOADINGS = "corpus SVD's loadings"
_SHUFFLED = "shuffled labels"
# Mean of so many shuffles in each fold: a single one of some dozen test genes is off by 0.1.
_NUM_SHUFFLES = 10
_CLASSIFIERS = {
    "counts": (LOGISTIC, "random forest", "SVM", "MLP"),
    "ranks": (LOGISTIC, "random forest", "SVM", "MLP"),
    "static features": (LOGISTIC, "random forest", "SVM"),
}


@dataclass(frozen=True)
class Guess:
    """What a contender says of test genes: labels and probabilities, [repeats, test genes]."""

    truth: np.ndarray
    probability: np.ndarray
    by_occurrence: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


class ClassesOfGenes(Contest[GeneTask, Fold]):
    """A seed has its own folds, cells, heads and random weights.

    Ranks and medians of the baselines are those of the first model's vocabulary.
    """

    headline = HEADLINE

    @property
    def folds_per_seed(self) -> int:
        """How many parts the genes are divided into."""
        return self.task.folds

    @property
    def settings(self) -> FinetuneSettings:
        """Without early stopping: there are no genes to spare for a validation."""
        return replace(settings_of(self.size, self.bench.device, self.bench.bf16), patience=0)

    @cached_property
    def drawn(self) -> DrawnGenes:
        """Genes, and the cells of each seed."""
        seeds = [self.seed_of(number) for number in range(self.size.seeds)]
        return draw_genes(self.task, self.size.max_cells, seeds, self.bench)

    @property
    def genes(self) -> LabelledGenes:
        """Genes that every model reads in the cells of every seed."""
        return self.drawn.genes

    def seed_of(self, number: int) -> int:
        """Return the seed itself, and the ones after it."""
        return self.bench.seed + number

    def contenders(self) -> list[Contender[Fold]]:
        """Return models by three readings, and classifiers of what is known without them."""
        rows: list[Contender[Fold]] = []

        def add(name: str, role: Role, features: str, way: str, model: Model | None = None) -> None:
            predict = partial(self.classified, features, way, model, role)
            rows.append(Contender(name, role, model, predict))

        for model in self.models:
            for role in ROLES:
                rows.append(Contender(FINE_TUNED, role, model, partial(self.tuned, model, role)))
                for features in ("frozen embedding", "input embeddings"):
                    add(features, role, features, LOGISTIC, model)
            if model.svd:
                add(LOADINGS, "baseline", "loadings", LOGISTIC, model)
            add(f"{_SHUFFLED}, frozen embedding", "control", "frozen embedding", LOGISTIC, model)
        for features, ways in _CLASSIFIERS.items():
            for way in ways:
                add(f"{way} on {features}", "baseline", features, way)
        add("detection rate alone", "baseline", "detection rate", LOGISTIC)
        add(f"{_SHUFFLED}, {LOGISTIC} on counts", "control", "counts", LOGISTIC)
        return rows

    def folds(self, number: int) -> list[Fold]:
        """Return the folds of a repetition, numbered on through all of them."""
        first, seed = number * self.task.folds, self.seed_of(number)
        divided = gene_folds(self.genes.labels, self.task.folds, seed)
        return [Fold(first + i, seed, test, train) for i, (train, test) in enumerate(divided)]

    def cells(self, fold: Fold) -> TaskCells:
        """Return the cells that a fold looks at."""
        return self.drawn.draws[fold.number // self.task.folds]

    def decides(self, contender: Contender[Fold], fold: Fold) -> dict[str, Any]:
        """Return the cells, the genes, and settings where something is trained or computed."""
        model = contender.model
        examples = [self.genes.ids, self.genes.labels.tolist(), fold.test.tolist()]
        key: dict[str, Any] = {
            "model": model.digest if model else None,
            "vocabulary": self.models[0].reading_vocabulary.sha256,
            "cells": self.cells(fold).digest,
            "genes": hash_of(examples),
        }
        if model:
            key["bf16"] = self.bench.bf16
        if contender.name == FINE_TUNED:
            key["settings"] = self.settings.deciding() | self.settings.of_training_on_genes
        return key

    def features(self, kind: str, model: Model | None, role: Role, fold: Fold) -> np.ndarray:
        """Return float [genes, features], made once for all folds of a seed."""
        first, cells = model or self.models[0], self.cells(fold)

        def make() -> np.ndarray:
            tokens = first.tokens_of(self.genes.ids)
            if model:
                return features_of_model(
                    kind, model, fold.twin_seed(role), cells, self.settings
                )[tokens]  # fmt: skip
            expression, ranks = (f(cells, fold.seed) for f in (self.expression_of, self.ranks_of))
            return features_without_model(
                kind, expression, ranks, tokens, first.vocabulary, fold.seed
            )

        whose = (model.name, role == "twin") if model else ()
        return self.once.get((kind, *whose), fold.seed, make)

    def classified(
        self, features: str, way: str, model: Model | None, role: Role, fold: Fold
    ) -> Guess:
        """Return probabilities of test genes by a classifier that is trained on the others.

        A control's labels are shuffled among training and among test genes. Apart, for a label that
        is used up in training is missing in the test: shuffled over all genes, the mean AUROC is
        below 0.5.
        """
        known, drawn = self.features(features, model, role, fold), [self.genes.labels]
        if role == "control":
            rng = np.random.default_rng([fold.seed, fold.number])
            drawn = [_shuffle(self.genes.labels, fold, rng) for _ in range(_NUM_SHUFFLES)]
        found = [predict_classes(way, known, y, fold.train, fold.test, fold.seed) for y in drawn]
        return Guess(np.stack([y[fold.test] for y in drawn]), np.stack(found))

    def training(self, model: Model, role: Role, fold: Fold) -> GeneTraining:
        """Return how a model is trained in a fold."""
        return GeneTraining(self.settings, fold.seed, ranks=self.bench.ranks)

    def tuned(self, model: Model, role: Role, fold: Fold) -> Trained:
        """Return the `Guess` of a head on the states of genes, trained on training genes."""
        labels, task = self.genes.labels, self.task
        tokens = model.tokens_of(self.genes.ids)
        found = tune_on_genes(
            fold.encoder(model, role), model, self.cells(fold).tokens[model.name],
            (tokens[fold.train], labels[fold.train]), tokens[fold.test],
            (task.negative, task.positive), self.training(model, role, fold),
        )  # fmt: skip
        truth = labels[fold.test]
        by_occurrence = float(roc_auc_score(truth[found.gene], found.by_occurrence))
        details = {
            "occurrences": np.bincount(found.gene, minlength=len(truth)).tolist(),
            "freeze_layers": found.freeze_layers,
        }
        guess = Guess(truth[None], found.probability[None], by_occurrence, details)
        return Trained(guess, found.training)

    def score(self, contender: Contender[Fold], fold: Fold, predicted: Guess) -> Scored:
        """Return means over repeats; probabilities are kept in the store."""
        each = [score_genes(*p) for p in zip(predicted.truth, predicted.probability, strict=True)]
        scores = dict[str, Any](mean_scores(each))
        truth = self.genes.labels[fold.test]
        details: dict[str, Any] = {"prevalence": float(truth.mean()), "test_genes": len(truth)}
        if contender.role != "control":  # six significant digits: small ones stay apart
            details["probability"] = [float(f"{p:.6g}") for p in predicted.probability[0]]
        scores["auroc_occurrence"] = predicted.by_occurrence
        return scores, details | predicted.details

    def report(self, results: Results[Fold]) -> TaskRun:
        """Return the outcomes, with intervals over genes, ROC curves and the tuned models' genes.

        Differences are the first model's fine-tuned AUROC minus the contender's, in the same
        resamples.
        """
        task, genes = self.task, self.genes
        seeds = self.size.seeds
        split = f"{task.folds} folds over genes, stratified by class, no gene on both sides"
        split += f"; {seeds} repetitions with other folds and cells" if seeds > 1 else ""
        tuned = [r for r in results.of if r.name == FINE_TUNED and r.role == "model"]
        tested = [f.test for f in results.folds]
        roc, intervals = over_genes(
            results, "probability", genes.labels, tested, self.bench.seed, tuned[0]
        )
        return TaskRun(
            cells=self.drawn.draws[0].counts.shape[0],
            classes=[task.negative, task.positive],
            split=split,
            headline=HEADLINE,
            chance=0.5,
            excluded=self.drawn.excluded,
            outcomes=results.without("probability", "occurrences"),
            details={
                "test_share": 1 / task.folds,
                "prevalence": float(genes.labels.mean()),
                "genes": np.bincount(genes.labels, minlength=2).tolist(),
                "settings": asdict(self.settings),
                "intervals_over_genes": intervals,
                "roc": roc,
                "predictions": {
                    r.display_name: table_of_genes(results.of[r], tested, genes) for r in tuned
                },
            },
        )


def _shuffle(labels: np.ndarray, fold: Fold, rng: np.random.Generator) -> np.ndarray:
    shuffled = labels.copy()
    for side in (fold.train, fold.test):
        shuffled[side] = rng.permutation(shuffled[side])
    return shuffled

"""What kinds of task about classes of cells share: the cells, their keys, and how one classifies.

`CellContest` knows labelled cells; `ClassifiedCells` divides and scores what predicts a class.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np

from eval.benchmark.contest.contest import Contender, Contest, Fold, FoldT, Results, Scored, TaskT
from eval.benchmark.contest.verdicts import FINE_TUNED
from eval.benchmark.material.labelled_cells import LabelledCells, divide, labelled_cells
from eval.benchmark.material.models_and_cells import Model, at_most
from eval.benchmark.material.twin_encoders import Embeddings, mean_of_inputs, settings_of
from eval.benchmark.neighbours.cell_baselines import (
    MOST_TRAINING_CELLS,
    SCVI,
    gene_features,
    predict_probabilities,
    predict_scvi,
    scvi_missing,
)
from eval.benchmark.outcome import Role, TaskRun
from eval.benchmark.task_file import AnnotationTask, CellTask
from eval.finetune.settings import SEARCHED, FinetuneSettings
from eval.scores.metrics import chance_macro_f1, score_probabilities
from eval.scores.splits import FEWEST_VALIDATION_CELLS, limit_per_class

BAG_OF_GENES = "bag of genes"
SHUFFLED = "shuffled labels"
_SCORES = ("macro_f1", "balanced_accuracy", "accuracy", "auprc", "ece")
# Features of training and test cells.
Features = tuple[Any, Any]
ClassTaskT = TypeVar("ClassTaskT", CellTask, AnnotationTask)


class CellContest(Contest[TaskT, FoldT]):
    """A contest about labelled cells, in which models may be fine-tuned."""

    @property
    @abstractmethod
    def known(self) -> LabelledCells:
        """The cells, read when they are first needed."""

    @property
    def settings(self) -> FinetuneSettings:
        """How a model is fine-tuned."""
        return settings_of(self.size, self.bench.device, self.bench.bf16)

    def embeddings(self, layer: int) -> Embeddings:
        """Return embeddings of the cells, by layer as in `eval.cells.embed.embed_cells`."""
        device, bf16 = self.bench.device, self.bench.bf16
        make = partial(Embeddings, self.known.cells.tokens, layer, device, bf16)
        return self.once.get(("embeddings", layer), None, make)

    def described(self, fold: FoldT) -> dict[str, Any]:
        """Return what is said about a fold beside its scores: numbers of cells, test groups."""
        found: dict[str, Any] = {"train_cells": len(fold.train), "test_cells": len(fold.test)}
        if self.known.groups is not None:
            found["test_groups"] = np.unique(self.known.groups[fold.test]).tolist()
        return found

    def decides(self, contender: Contender[FoldT], fold: FoldT) -> dict[str, Any]:
        """Return the cells, how they are divided, and how models are fine-tuned."""
        chosen = hashlib.sha256(fold.train.astype(np.int64).tobytes() + b"|")
        chosen.update(fold.test.astype(np.int64).tobytes())
        settings, trials = self.settings, self.size.search_trials
        key = {
            "cells": self.known.cells.digest,
            "split": chosen.hexdigest(),
            "settings": settings.deciding() | {"device": settings.device},
            "search_trials": trials,
        }
        if contender.name.startswith(FINE_TUNED):
            key |= settings.of_training_on_cells
            key |= settings.reading(bool(contender.model and contender.model.state))
            key |= {"fewest_validation_cells": FEWEST_VALIDATION_CELLS} if settings.patience else {}
            key |= {"searched": SEARCHED} if trials else {}
        return key


@dataclass(frozen=True, eq=False, kw_only=True)
class CellFold(Fold):
    """Training and test cells.

    Attributes
    ----------
    capped
        Those of `train` that scikit-learn and scVI get.
    embedded
        Sorted positions of the cells that may be embedded.
    copies
        Test cells that were removed, for they have the counts of a training cell.
    shots
        Training cells a class, where these are few.
    """

    capped: np.ndarray
    embedded: np.ndarray
    copies: int
    shots: int | None = None


class ClassifiedCells(CellContest[ClassTaskT, CellFold]):
    """Every contender predicts the classes of the same test cells, one fold a seed."""

    headline = "macro_f1"
    # Of the embeddings.
    layer: int

    @cached_property
    def known(self) -> LabelledCells:
        """The cells that can be classified."""
        return labelled_cells(self.task, self.task.group, self.size, self.bench)

    def folds(self, number: int) -> list[CellFold]:
        """Return the fold of a seed; groups stay whole and no cell is on both sides."""
        known, seed = self.known, self.seed_of(number)
        train, test, copies = divide(known.cells, known.labels, known.groups, self.size, seed)
        capped = at_most(train, MOST_TRAINING_CELLS, seed)
        embedded = np.sort(np.concatenate([capped, test]))
        return [
            CellFold(number, seed, test, train, capped=capped, embedded=embedded, copies=copies)
        ]

    def few(self, fold: CellFold, shots: int) -> CellFold:
        """Return the same fold with at most so many training cells of each class."""
        chosen = limit_per_class(fold.capped, self.known.labels, shots, fold.seed)
        return replace(fold, train=chosen, capped=chosen, shots=shots)

    def decides(self, contender: Contender[CellFold], fold: CellFold) -> dict[str, Any]:
        """Return what `CellContest` does; a contender with few cells says how many."""
        return super().decides(contender, fold) | {"shots": None}

    def score(
        self, contender: Contender[CellFold], fold: CellFold, predicted: np.ndarray
    ) -> Scored:
        """Return scores of float64 [test cells, classes] probabilities."""
        truth = self.known.labels[fold.test]
        found = score_probabilities(truth, predicted, self.known.classes)
        details = {k: found[k] for k in ("f1_by_class", "confusion", "calibration")}
        if contender.role == "control":
            details["chance"] = chance_macro_f1(truth, predicted.argmax(axis=1))
        return {s: found[s] for s in _SCORES}, details

    def report(self, results: Results[CellFold]) -> TaskRun:
        """Return the outcomes; chance is that of shuffled labels' guesses."""
        known, divided = self.known, [self.described(f) for f in results.folds]
        excluded = dict(known.excluded)
        if copies := sum(f.copies for f in results.folds):
            excluded["test cells with the counts of a training cell (over all folds)"] = copies
        shares = [d["test_cells"] / (d["test_cells"] + d["train_cells"]) for d in divided]
        test_share = float(np.mean(shares))
        table = {row: found for row, found in results.of.items() if not row.settings}
        outcomes = Results(results.folds, table).outcomes
        controls = [o for o in outcomes if o.role == "control" and o.model is None]
        return TaskRun(
            cells=len(known.labels),
            classes=known.classes,
            split=self._split_sentence(divided),
            headline=self.headline,
            chance=float(np.mean([o.details["chance"] for o in controls])),
            excluded=excluded,
            outcomes=outcomes,
            details={
                "test_share": test_share,
                "folds": divided,
                "cells_by_class": known.cells.metadata[self.task.label].value_counts().to_dict(),
                "few_shot": self.curves(results, test_share),
                "skipped": {SCVI: why} if (why := scvi_missing()) else {},
            },
        )

    def curves(self, results: Results[CellFold], test_share: float) -> dict[str, Any]:
        """Return curves over the number of training cells; here none."""
        return {}

    def classify(
        self,
        make: Callable[[np.ndarray, int, int], Any],
        features: Callable[[CellFold], Features],
        fold: CellFold,
        shuffled: bool = False,
    ) -> np.ndarray:
        """Return float64 [test cells, classes] of an estimator fitted on the training cells.

        Parameters
        ----------
        make
            Labels, number of features and seed -> estimator of scikit-learn.
        features
            Fold -> features of `fold.capped` and of `fold.test`.
        shuffled
            Train on the labels in another order.
        """
        fitted, test = features(fold)
        known = self.known.labels[fold.capped]
        if shuffled:
            known = np.random.default_rng(fold.seed).permutation(known)
        estimator = make(known, fitted.shape[1], fold.seed)
        return predict_probabilities(estimator, fitted, known, test, len(self.known.classes))

    def genes(self, fold: CellFold) -> Features:
        """Return log-normalised variable genes of training and test cells."""
        counts = self.known.cells.counts
        make = partial(gene_features, counts, fold.capped, fold.test)
        return self.once.get(("genes", fold.shots), fold.seed, make)

    def states(self, model: Model, role: Role, fold: CellFold) -> Features:
        """Return embeddings of training and test cells."""
        used = np.concatenate([fold.capped, fold.test])
        states = self.embeddings(self.layer).of(model, fold.twin_seed(role), used, fold.embedded)
        return states[: len(fold.capped)], states[len(fold.capped) :]

    def inputs(self, model: Model, role: Role, fold: CellFold) -> Features:
        """Return mean input embeddings of training and test cells."""
        encoder, tokens = fold.encoder(model, role), self.known.cells.tokens[model.name]
        fitted, test = (mean_of_inputs(encoder, model, tokens, c) for c in (fold.capped, fold.test))
        return fitted, test

    def scvi(self, fold: CellFold) -> np.ndarray:
        """Return float64 [test cells, classes] by nearest neighbours in scVI's latent space."""
        known = self.known
        number = len(known.classes)
        return predict_scvi(
            known.cells.counts, known.labels, fold.capped, fold.test, number, fold.seed
        )

    def _split_sentence(self, divided: list[dict[str, Any]]) -> str:
        if self.task.group is None:
            return (
                f"{self.size.seeds} seeds, stratified by class; cells of a donor may be on both "
                f"sides: {self.task.group_missing}"
            )
        sets = {tuple(d["test_groups"]) for d in divided}
        return (
            f"{self.size.seeds} seeds, each '{self.task.group}' whole on one side, every class on "
            f"both; {len(sets)} different sets of test groups"
        )

"""Integration: do embeddings keep cell types together and batches mixed?"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np

from eval.benchmark.contest.cell_contest import CellContest
from eval.benchmark.contest.contest import (
    FINE_TUNED,
    ROLES,
    Contender,
    Fold,
    Results,
    Scored,
    baselines,
)
from eval.benchmark.contest.verdicts import ZERO_SHOT
from eval.benchmark.material.labelled_cells import (
    LabelledCells,
    divide_batches,
    held_out_batches,
    how_batches_are_divided,
    labelled_cells,
)
from eval.benchmark.material.models_and_cells import Model, at_most
from eval.benchmark.material.planted_batches import add_planted_batch
from eval.benchmark.material.twin_encoders import train
from eval.benchmark.neighbours import batch_correction as correct
from eval.benchmark.outcome import Role, TaskRun
from eval.benchmark.scoring.integration_scores import HEADLINE, score_embedding
from eval.benchmark.task_file import IntegrationTask
from eval.scores.splits import require_clean_split

_MOST_DRAWN_CELLS = 2_000


class Integration(CellContest[IntegrationTask, Fold]):
    """Every contender embeds the same cells and is scored on all of them, one fold a seed.

    A fine-tuned model has learnt labels of other cells: of other batches, where these are three.
    """

    headline = HEADLINE

    @cached_property
    def known(self) -> LabelledCells:
        """Cells with classes and batches."""
        change = partial(add_planted_batch, column=self.task.batch, seed=self.bench.seed)
        planted = change if self.task.planted_batch else None
        return labelled_cells(self.task, self.task.batch, self.size, self.bench, planted)

    def contenders(self) -> list[Contender[Fold]]:
        """Return methods that take out batches, and every model without and with training."""
        ways: dict[str, Callable[[Fold], np.ndarray]] = {
            "highly variable genes": self.genes,
            "PCA": self.components,
            "Harmony": lambda f: correct.harmony(
                self.components(f), self.known.batches[f.test], f.seed
            ),
            "ComBat": lambda f: correct.combat(self.genes(f), self.known.batches[f.test], f.seed),
            "scVI": lambda f: correct.scvi_states(
                self.known.cells.counts[f.test], self.known.batches[f.test], f.seed
            ),
        }
        missing = correct.missing_methods()
        rows = baselines({name: way for name, way in ways.items() if name not in missing})
        for model in self.models:
            for role in ROLES:
                rows.append(Contender(ZERO_SHOT, role, model, partial(self.states, model, role)))
                rows.append(Contender(FINE_TUNED, role, model, partial(self.tuned, model, role)))
        return rows

    def folds(self, number: int) -> list[Fold]:
        """Return cells that are scored, and others that a model may learn labels from."""
        seed = self.seed_of(number)
        train, test = divide_batches(self.known.labels, self.known.batches, self.size, seed)
        require_clean_split(
            train, test, held_out_batches(self.known.batches), self.known.cells.counts
        )
        return [Fold(number, seed, test, train)]

    def genes(self, fold: Fold) -> np.ndarray:
        """Return float32 [scored cells, genes], log-normalised variable genes."""
        make = partial(correct.log_variable_genes, self.known.cells.counts[fold.test])
        return self.once.get("genes", fold.seed, make)

    def components(self, fold: Fold) -> np.ndarray:
        """Return float32 [scored cells, components], a PCA of `genes`."""
        make = partial(correct.components, self.genes(fold), fold.seed)
        return self.once.get("components", fold.seed, make)

    def states(self, model: Model, role: Role, fold: Fold) -> np.ndarray:
        """Return float32 [scored cells, width] of the second-to-last layer, without training."""
        return self.embeddings(-1).of(model, fold.twin_seed(role), fold.test, fold.test)

    def tuned(self, model: Model, role: Role, fold: Fold) -> np.ndarray:
        """Return float32 [scored cells, width] of a model that learnt labels of other cells."""
        known = self.known
        classifier = train(
            fold.encoder(model, role), model, known.cells.tokens[model.name],
            known.labels, held_out_batches(self.known.batches), fold.train, known.classes,
            self.settings, fold.seed, self.size.search_trials,
        )  # fmt: skip
        # The last layer: it is what the head read.
        return self.embeddings(0).embed(classifier.encoder, model, fold.test)

    def score(self, contender: Contender[Fold], fold: Fold, predicted: np.ndarray) -> Scored:
        """Return scores of an embedding; the first fold's has a picture."""
        labels, batches = self.known.labels[fold.test], self.known.batches[fold.test]
        scores = score_embedding(predicted, labels, batches, self.components(fold))
        details: dict[str, Any] = {"width": predicted.shape[1]}
        if fold.number == 0:
            place = np.searchsorted(fold.test, self._drawn(fold))
            details["umap"] = correct.umap(predicted[place], fold.seed)
        return scores, details

    def report(self, results: Results[Fold]) -> TaskRun:
        """Return the outcomes, with pictures of the first fold beside them."""
        known, shown = self.known, self._drawn(results.folds[0])
        how = how_batches_are_divided(known.batches, self.task.batch)
        planted = "the batch effect is planted; " if self.task.planted_batch else ""
        test_cells = float(np.mean([len(f.test) for f in results.folds]))
        return TaskRun(
            cells=len(known.labels),
            classes=known.classes,
            split=f"{planted}{self.size.seeds} seeds: {how}, and all contenders are scored on 80 % "
            "of these cells; only fine-tuned models have seen labels, of the other cells. "
            "Subsamples overlap: intervals say how scores vary with the cells, not with the data "
            "set",
            headline=HEADLINE,
            chance=None,
            excluded=known.excluded,
            outcomes=[o.without("umap") for o in results.outcomes],
            details={
                "test_share": test_cells / len(known.labels),
                "folds": [self.described(f) for f in results.folds],
                "umap": {row.display_name: o[0].details["umap"] for row, o in results.of.items()},
                "labels": [known.classes[i] for i in known.labels[shown]],
                "batches": known.batches[shown].tolist(),
                "skipped": correct.missing_methods(),
            },
        )

    def _drawn(self, fold: Fold) -> np.ndarray:
        """Return the scored cells that UMAPs show (int positions, sorted)."""
        return at_most(fold.test, _MOST_DRAWN_CELLS, fold.seed)

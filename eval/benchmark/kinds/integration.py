"""Integration: do embeddings keep cell types together and batches mixed?"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from eval.benchmark.contest.cell_contest import CellContest
from eval.benchmark.contest.contest import (
    ROLES,
    Contender,
    Fold,
    Results,
    Scored,
    Trained,
    baselines,
    hash_of,
)
from eval.benchmark.contest.verdicts import FINE_TUNED, ZERO_SHOT
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
from eval.finetune.results import training_record
from eval.finetune.settings import FinetuneSettings
from eval.scores.splits import require_clean_split

_MOST_DRAWN_CELLS = 2_000


@dataclass(frozen=True, eq=False, kw_only=True)
class Part(Fold):
    """Scored cells, and all those of its seed, which are embedded together.

    Attributes
    ----------
    pool
        Sorted positions; the parts of a seed have these cells among themselves.
    """

    pool: np.ndarray

    @property
    def place(self) -> np.ndarray:
        """Positions of the scored cells in `pool`."""
        return np.searchsorted(self.pool, self.test)


class Integration(CellContest[IntegrationTask, Part]):
    """Every contender embeds the same cells of a seed, and is scored on each part of them.

    A fine-tuned model has learnt labels of other cells: of other batches, where these are three.
    What is fitted, trained or drawn is so once for all parts of a seed.
    """

    headline = HEADLINE

    @property
    def settings(self) -> FinetuneSettings:
        """Heads read means: what is scored after a training is what its head read."""
        return replace(super().settings, features="mean")

    @property
    def folds_per_seed(self) -> int:
        """How many parts the scored cells of a seed have."""
        return self.task.folds

    @cached_property
    def known(self) -> LabelledCells:
        """Cells with classes and batches."""
        change = partial(add_planted_batch, column=self.task.batch, seed=self.bench.seed)
        planted = change if self.task.planted_batch else None
        return labelled_cells(self.task, self.task.batch, self.size, self.bench, planted)

    def contenders(self) -> list[Contender[Part]]:
        """Return methods that take out batches, and every model without and with training."""
        ways: dict[str, Callable[[Part], np.ndarray]] = {
            "highly variable genes": self.genes,
            "PCA": self.components,
            "Harmony": lambda f: correct.harmony(
                self.components(f), self.known.batches[f.pool], f.seed
            ),
            "ComBat": lambda f: correct.combat(self.genes(f), self.known.batches[f.pool], f.seed),
            "scVI": lambda f: correct.scvi_states(
                self.known.cells.counts[f.pool], self.known.batches[f.pool], f.seed
            ),
        }
        missing = correct.missing_methods()
        rows = baselines({n: partial(self.once_for_all, n, w) for n, w in ways.items()
                          if n not in missing})  # fmt: skip
        for model in self.models:
            for role in ROLES:
                rows.append(Contender(ZERO_SHOT, role, model, partial(self.states, model, role)))
                rows.append(Contender(FINE_TUNED, role, model, partial(self.tuned, model, role)))
        return rows

    def folds(self, number: int) -> list[Part]:
        """Return the parts of the scored cells; a model may learn labels from the others."""
        seed, folds = self.seed_of(number), self.folds_per_seed
        train, parts = divide_batches(self.known.labels, self.known.batches, self.size, seed, folds)
        pool = np.sort(np.concatenate(parts))
        require_clean_split(
            train, pool, held_out_batches(self.known.batches), self.known.cells.counts
        )
        return [
            Part(number * folds + i, seed, test, train, pool=pool) for i, test in enumerate(parts)
        ]

    def decides(self, contender: Contender[Part], fold: Part) -> dict[str, Any]:
        """Return what `CellContest` does, and the cells that are embedded together."""
        key = super().decides(contender, fold)
        if len(fold.pool) > len(fold.test):
            key["pool"] = hash_of(fold.pool.tolist())
        return key

    def once_for_all(self, key: Hashable, make: Callable[[Part], Any], fold: Part) -> Any:
        """Return what is made of the cells of a seed, for all parts of them."""
        return self.once.get(("of all parts", key), fold.seed, partial(make, fold))

    def genes(self, fold: Part) -> np.ndarray:
        """Return float32 [cells of the seed, genes], log-normalised variable genes."""
        make = partial(correct.log_variable_genes, self.known.cells.counts[fold.pool])
        return self.once.get("genes", fold.seed, make)

    def components(self, fold: Part) -> np.ndarray:
        """Return float32 [cells of the seed, components], a PCA of `genes`."""
        make = partial(correct.components, self.genes(fold), fold.seed)
        return self.once.get("components", fold.seed, make)

    def states(self, model: Model, role: Role, fold: Part) -> np.ndarray:
        """Return float32 [cells of the seed, width] of the second-to-last layer, untrained."""
        return self.embeddings(-1).of(model, fold.twin_seed(role), fold.pool, fold.pool)

    def tuned(self, model: Model, role: Role, fold: Part) -> Trained:
        """Return float32 [cells of the seed, width] of a model that learnt others' labels."""

        def make(fold: Part) -> Trained:
            known = self.known
            classifier = train(
                fold.encoder(model, role), model, known.cells.tokens[model.name],
                known.labels, held_out_batches(self.known.batches), fold.train, known.classes,
                self.settings, fold.seed, self.size.search_trials,
            )  # fmt: skip
            # The last layer: it is what the head read.
            states = self.embeddings(0).embed(classifier.encoder, model, fold.pool)
            return Trained(states, training_record(classifier))

        return self.once_for_all((FINE_TUNED, model.name, role), make, fold)

    def score(self, contender: Contender[Part], fold: Part, predicted: np.ndarray) -> Scored:
        """Return scores of the part in an embedding; the first fold's has a picture of all."""
        labels, batches = self.known.labels[fold.test], self.known.batches[fold.test]
        before = self.components(fold)
        part = before[fold.place]
        # One array, where it is compared with itself: bits may depend on where a copy lies.
        embedding = part if predicted is before else predicted[fold.place]
        scores = score_embedding(embedding, labels, batches, part)
        details: dict[str, Any] = {"width": predicted.shape[1]}
        if fold.number == 0:
            shown = np.searchsorted(fold.pool, self._drawn(fold))
            details["umap"] = correct.umap(predicted[shown], fold.seed)
        return scores, details

    def report(self, results: Results[Part]) -> TaskRun:
        """Return the outcomes, with pictures of the first fold beside them."""
        known, shown = self.known, self._drawn(results.folds[0])
        how = how_batches_are_divided(known.batches, self.task.batch)
        planted = "the batch effect is planted; " if self.task.planted_batch else ""
        test_cells = float(np.mean([len(f.test) for f in results.folds]))
        return TaskRun(
            cells=len(known.labels),
            classes=known.classes,
            split=f"{planted}{self.size.seeds} seeds: {how}, and all contenders embed 80 % of "
            f"these cells and are scored on {self.folds_per_seed} disjoint parts of them; only "
            "fine-tuned models have seen labels, of the other cells. Intervals say how scores vary "
            "with the cells and the seed, not with the data set",
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

    def _drawn(self, fold: Part) -> np.ndarray:
        """Return the cells that UMAPs show (int positions, sorted)."""
        return at_most(fold.pool, _MOST_DRAWN_CELLS, fold.seed)

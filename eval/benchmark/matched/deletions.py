"""A contest about deleted regulators: which genes they move, beside genes expressed alike."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np

from eval.benchmark.contest.contest import (
    DRAWN_SHARE,
    Contender,
    Contest,
    Fold,
    Results,
    Scored,
    baselines,
    hash_of,
    mean_scores,
)
from eval.benchmark.matched.matched_genes import MATCHED
from eval.benchmark.matched.regulators import Regulator
from eval.benchmark.material.gene_pairs import GenePairs, read_edges
from eval.benchmark.material.models_and_cells import Model, TaskCells
from eval.benchmark.outcome import Role, TaskRun
from eval.benchmark.scoring.shift_scores import score_ranking
from eval.benchmark.task_file import RegulatorsTask

_NUM_SHUFFLES = 20
RegulatorsT = TypeVar("RegulatorsT", bound=RegulatorsTask)
# Values of each asked gene, for each regulator.
Values = list[np.ndarray]


@dataclass(frozen=True, eq=False, kw_only=True)
class Draw(Fold):
    """Some regulators (`test`), and of each some targets with their partners.

    `genes` holds int positions among a regulator's genes: targets, then their partners.
    """

    genes: list[np.ndarray]


class DeletionContest(Contest[RegulatorsT, Draw]):
    """Nothing is trained: genes of a regulator are ordered by how much its deletion moves them."""

    headline = "auroc"
    # What a model says of a deletion; the first stands for the model and has a control.
    readings: tuple[str, ...]

    @cached_property
    def cells(self) -> TaskCells:
        """The cells in which regulators are deleted."""
        return self.bench.cells(self.task.cells, (), self.size.max_cells)

    @cached_property
    def edges(self) -> GenePairs:
        """Regulators and their targets."""
        return read_edges(self.task.edges, self.bench.data)

    @property
    @abstractmethod
    def regulators(self) -> list[Regulator]:
        """Regulators with targets and partners, read when they are first needed."""

    @abstractmethod
    def without_model(self, name: str) -> Values:
        """Return how much each gene of all regulators is moved, by a baseline."""

    @abstractmethod
    def deleted(self, model: Model, twin_seed: int | None, drawn: np.ndarray) -> list[Values]:
        """Return the values of each of `readings`, for drawn regulators."""

    def rows_of(self, names: tuple[str, ...]) -> list[Contender[Draw]]:
        """Return baselines of these names and of what partners share, and every model's rows."""
        rows = baselines({n: partial(self.known_before, n) for n in names})
        rows += baselines({f"{n} alone": partial(self.static, i) for i, n in enumerate(MATCHED)})
        for model in self.models:
            for reading, name in enumerate(self.readings):
                for role in ("model", "twin"):
                    moved = partial(self.moved, model, role, reading)
                    rows.append(Contender(name, role, model, moved))
            moved = partial(self.moved, model, "model", 0)
            rows.append(Contender(f"shuffled targets, {self.readings[0]}", "control", model, moved))
        return rows

    def known_before(self, name: str, fold: Draw) -> Values:
        """Return a baseline's values, made once for all folds."""
        every = self.once.get(name, None, lambda: self.without_model(name))
        return [every[i] for i in fold.test]

    def static(self, column: int, fold: Draw) -> Values:
        """Return what partners have in common."""
        return [self.regulators[i].static[:, column] for i in fold.test]

    def moved(self, model: Model, role: Role, reading: int, fold: Draw) -> Values:
        """Return a reading of a model; the pretrained one deletes all regulators once."""
        if role == "twin":  # its seed draws its regulators
            make = partial(self.deleted, model, fold.seed, fold.test)
            return self.once.get(model.name, fold.seed, make)[reading]
        make = partial(self.deleted, model, None, np.arange(len(self.regulators)))
        every = self.once.get(model.name, None, make)[reading]
        return [every[i] for i in fold.test]

    def decides(self, contender: Contender[Draw], fold: Draw) -> dict[str, Any]:
        """Return the cells, the regulators with their genes, and what is drawn of them."""
        return {
            "bf16": self.bench.bf16 if contender.model else None,
            "seed": [self.bench.seed, fold.seed],
            "drawn": fold.test.tolist(),
            "genes": hash_of([g.tolist() for g in fold.genes]),
            "cells": self.cells.digest,
            "question": hash_of([(r.gene, r.genes) for r in self.regulators]),
        }

    def score(self, contender: Contender[Draw], fold: Draw, predicted: Values) -> Scored:
        """Return means over regulators; a control's targets change places with partners."""
        asked = [self.regulators[i] for i in fold.test]
        truths = [r.is_target[g] for r, g in zip(asked, fold.genes, strict=True)]
        ranked = [values[g] for values, g in zip(predicted, fold.genes, strict=True)]
        if contender.role == "control":
            rng = np.random.default_rng([fold.seed, fold.number])
            found = [
                score_regulators([_exchanged(t, rng) for t in truths], ranked)
                for _ in range(_NUM_SHUFFLES)
            ]
            return mean_scores(found), {}
        by_regulator = {
            r.gene: round(score_ranking(t, v)["auroc"], 4)
            for r, t, v in zip(asked, truths, ranked, strict=True)
        }
        return score_regulators(truths, ranked), {"auroc_by_regulator": by_regulator}

    def task_run(
        self, results: Results[Draw], classes: list[str], split: str, excluded: dict[str, int]
    ) -> TaskRun:
        """Return the outcomes, with how many targets each regulator has."""
        return TaskRun(
            cells=self.cells.counts.shape[0],
            classes=classes,
            split=split,
            headline=self.headline,
            chance=0.5,
            excluded=excluded,
            outcomes=results.outcomes,
            details={
                "test_share": DRAWN_SHARE,
                "regulators": {r.gene: len(r.genes) // 2 for r in self.regulators},
            },
        )


def score_regulators(truths: list[np.ndarray], ranked: list[np.ndarray]) -> dict[str, float]:
    """Return the means over regulators of AUROC and AUPRC; each regulator counts once."""
    return mean_scores([score_ranking(t, v) for t, v in zip(truths, ranked, strict=True)])


def _exchanged(is_target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return labels in which about half of the targets have changed places with their partners."""
    half = len(is_target) // 2
    stays = rng.random(half) < 0.5
    return np.concatenate([stays, ~stays])

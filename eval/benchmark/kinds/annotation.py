"""Annotation without training: a cell gets the class of the reference cells nearest to it.

What an embedding knows of cell types shows in its neighbours; only they have labels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from eval.benchmark.contest.cell_contest import (
    BAG_OF_GENES,
    SHUFFLED,
    CellFold,
    ClassifiedCells,
    Features,
)
from eval.benchmark.contest.contest import ROLES, Contender, baselines
from eval.benchmark.contest.verdicts import ZERO_SHOT
from eval.benchmark.neighbours.cell_baselines import (
    BASELINES,
    KNN_ON_PCA,
    SCVI,
    nearest_neighbours,
    scvi_missing,
)
from eval.benchmark.task_file import AnnotationTask


class Annotation(ClassifiedCells[AnnotationTask]):
    """Cells get the class of the nearest reference cells."""

    layer = -1  # the second-to-last, as in `geneloom embed`

    def contenders(self) -> list[Contender[CellFold]]:
        """Return neighbours of genes, of ranks and of every model's states, and two controls."""
        named = ("majority class", "nearest centroid", KNN_ON_PCA)
        by_genes = {n: partial(self.classify, BASELINES[n], self.genes) for n in named}
        rows = baselines(by_genes)
        rows += baselines({"kNN on variable genes": partial(self.classify, _vote, self.genes)})
        rows += baselines({"kNN on ranks": partial(self.classify, _cosine_vote, self.ranks)})
        if scvi_missing() is None:
            rows += baselines({SCVI: self.scvi})
        shuffled = partial(self.classify, BASELINES[KNN_ON_PCA], self.genes, shuffled=True)
        rows.append(Contender(f"{SHUFFLED}, {KNN_ON_PCA}", "control", None, shuffled))
        for model in self.models:
            for role in ROLES:
                for name, features in ((ZERO_SHOT, self.states), (BAG_OF_GENES, self.inputs)):
                    predict = partial(self.classify, _vote, partial(features, model, role))
                    rows.append(Contender(name, role, model, predict))
            own = partial(self.states, model, "model")
            shuffled = partial(self.classify, _vote, own, shuffled=True)
            rows.append(Contender(f"{SHUFFLED}, {ZERO_SHOT}", "control", model, shuffled))
        return rows

    def ranks(self, fold: CellFold) -> Features:
        """Return CSR [cells, tokens]: what the first model reads of a cell, without the model."""
        ranks = self.ranks_of(self.known.cells).T.tocsr()
        return ranks[fold.capped], ranks[fold.test]


def _vote(labels: np.ndarray, width: int, seed: int) -> Any:
    return nearest_neighbours(labels)


def _cosine_vote(labels: np.ndarray, width: int, seed: int) -> Any:
    return nearest_neighbours(labels, "cosine")

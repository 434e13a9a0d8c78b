"""Annotation without training: a cell gets the class of the reference cells nearest to it.

What an embedding knows of cell types shows in its neighbours; only they have labels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from eval.benchmark.contest.verdicts import ZERO_SHOT
from eval.benchmark.kinds.cell_tasks import (
    BAG_OF_GENES,
    SHUFFLED,
    Contender,
    Fold,
    compete,
    scvi_neighbours,
    states,
)
from eval.benchmark.material.gene_features import ranks_of_tokens
from eval.benchmark.material.models_and_cells import Bench, Model
from eval.benchmark.material.twin_encoders import mean_of_inputs
from eval.benchmark.neighbours.cell_baselines import (
    BASELINES,
    KNN_ON_PCA,
    SCVI,
    nearest_neighbours,
    predict_probabilities,
    scvi_missing,
)
from eval.benchmark.outcome import Role, TaskRun
from eval.benchmark.task_file import AnnotationTask, Size

# The second-to-last layer, as in `geneloom embed`.
_LAYER = -1
_FROM_BASELINES = ("majority class", "nearest centroid", KNN_ON_PCA)
# Features of training and test cells.
_Pair = tuple[Any, Any]


def run(task: AnnotationTask, size: Size, bench: Bench) -> TaskRun:
    """Return the outcomes of all contenders, one fold a seed; see `cell_tasks.compete`."""
    return compete(task, size, bench, contenders(bench.models), _LAYER)


def num_units(task: AnnotationTask, size: Size, models: list[Model]) -> int:
    """Return how many outcomes `run` stores."""
    return size.seeds * len(contenders(models))


def contenders(models: list[Model]) -> list[Contender]:
    """Return who takes part in every fold."""
    rows = [Contender(n, "baseline", None, partial(_fitted, n)) for n in _FROM_BASELINES]
    rows.append(Contender("kNN on variable genes", "baseline", None, partial(_vote, _genes)))
    ranks = partial(_vote, partial(_ranks, models[0]), metric="cosine")
    rows.append(Contender("kNN on ranks", "baseline", None, ranks))
    if scvi_missing() is None:
        rows.append(Contender(SCVI, "baseline", None, scvi_neighbours))
    shuffled = partial(_fitted, KNN_ON_PCA, shuffled=True)
    rows.append(Contender(f"{SHUFFLED}, {KNN_ON_PCA}", "control", None, shuffled))
    roles: tuple[Role, ...] = ("model", "twin")
    for model in models:
        for role in roles:
            for name, features in ((ZERO_SHOT, states), (BAG_OF_GENES, _inputs)):
                vote = partial(_vote, partial(features, model, role))
                rows.append(Contender(name, role, model, vote))
        vote = partial(_vote, partial(states, model, "model"), shuffled=True)
        rows.append(Contender(f"{SHUFFLED}, {ZERO_SHOT}", "control", model, vote))
    return rows


def _vote(
    features: Callable[[Fold], _Pair],
    fold: Fold,
    metric: str = "euclidean",
    shuffled: bool = False,
) -> np.ndarray:
    """Return float64 [test cells, classes]: what the nearest reference cells say."""
    fitted, test = features(fold)
    known = _known(fold, shuffled)
    estimator = nearest_neighbours(known, metric)
    return predict_probabilities(estimator, fitted, known, test, len(fold.classes))


def _fitted(name: str, fold: Fold, shuffled: bool = False) -> np.ndarray:
    fitted, test = fold.genes
    known = _known(fold, shuffled)
    estimator = BASELINES[name](known, fitted.shape[1], fold.seed)
    return predict_probabilities(estimator, fitted, known, test, len(fold.classes))


def _known(fold: Fold, shuffled: bool) -> np.ndarray:
    return (fold.shuffled if shuffled else fold.labels)[fold.capped]


def _genes(fold: Fold) -> _Pair:
    return fold.genes


def _ranks(model: Model, fold: Fold) -> _Pair:
    """Return CSR [cells, tokens]: what the model reads of a cell, without the model."""
    ranks = ranks_of_tokens(fold.cells.tokens[model.name], model.vocabulary).T.tocsr()
    return ranks[fold.capped], ranks[fold.test]


def _inputs(model: Model, role: Role, fold: Fold) -> _Pair:
    tokens, encoder = fold.cells.tokens[model.name], fold.encoder(model, role)
    fitted, test = (mean_of_inputs(encoder, model, tokens, c) for c in (fold.capped, fold.test))
    return fitted, test

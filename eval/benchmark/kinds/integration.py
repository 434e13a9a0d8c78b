"""Integration: do embeddings keep cell types together and batches mixed?"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import anndata
import numpy as np
import scanpy
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split

from eval.benchmark.contest.folds import FINE_TUNED, CellContender, CellFold, seed_of_fold
from eval.benchmark.contest.verdicts import ZERO_SHOT, display_name
from eval.benchmark.kinds.cell_tasks import usable_cells
from eval.benchmark.material.models_and_cells import Bench, Model, load_cells
from eval.benchmark.material.planted_batches import add_planted_batch
from eval.benchmark.material.twin_encoders import Embeddings, kept_threads, train
from eval.benchmark.neighbours.cell_baselines import (
    scvi_latent,
    scvi_missing,
    variable_genes,
)
from eval.benchmark.outcome import Outcome, Role, TaskRun
from eval.benchmark.scoring.integration_scores import HEADLINE, score_embedding
from eval.benchmark.task_file import IntegrationTask, Size
from eval.scores.baselines import log_normalise
from eval.scores.splits import limit_per_class, require_clean_split, split_cells

_COMPONENTS = 50
_SCORED_SHARE = 0.5
# Of the held-out cells, so that seeds differ even where batches can be held out in one way only.
_DRAWN_SHARE = 0.8
_FEWEST_BATCHES_TO_HOLD_OUT = 3
_MOST_DRAWN_CELLS = 2_000


@dataclass(frozen=True)
class Fold(CellFold):
    """Cells that are scored (`test`), and others that a fine-tuned model may learn labels from.

    `batches` is str [cells].
    """

    batches: np.ndarray
    zero_shot: Embeddings

    @cached_property
    def genes(self) -> np.ndarray:
        """float32 [scored cells, genes], log-normalised variable genes."""
        features = log_normalise(self.cells.counts[self.test])
        return features[:, variable_genes(features)].toarray()

    @cached_property
    def components(self) -> np.ndarray:
        """float32 [scored cells, components], PCA of `genes`."""
        return _pca(self.genes, self.seed)

    @property
    def scored_batches(self) -> np.ndarray:
        return self.batches[self.test]


@dataclass(frozen=True)
class Contender(CellContender):
    """A row of the table; `embed` gives float32 [scored cells, width]."""

    embed: Callable[[Fold], np.ndarray]


def run(task: IntegrationTask, size: Size, bench: Bench) -> TaskRun:
    """Return the outcomes of all contenders of an integration task, one fold a seed.

    Every contender of a fold embeds the same cells and is scored on all of them. A fine-tuned model
    has learnt the labels of other cells: of other batches, where there are three or more.

    Raises
    ------
    ValueError
        The cells cannot be had, or fewer than two classes or batches are left.
    """
    change = partial(add_planted_batch, column=task.batch, seed=bench.seed)
    loaded = load_cells(
        task.cells, (task.label, task.batch), bench.models, bench.data,
        size.max_cells, bench.seed,
        change if task.planted_batch else None,
    )  # fmt: skip
    cells, excluded = usable_cells(loaded, task.label, task.batch)
    classes = sorted(set(cells.metadata[task.label]))
    labels = np.array([classes.index(v) for v in cells.metadata[task.label]], dtype=np.int64)
    batches = cells.metadata[task.batch].to_numpy(dtype=str)
    zero_shot = Embeddings(cells.tokens, -1, bench.device, bench.bf16)
    outcomes, places, folds = [], {}, []
    for number in range(size.seeds):
        fold_seed = seed_of_fold(bench.seed, number)
        training, scored = divide(labels, batches, size, fold_seed)
        require_clean_split(training, scored, _held_out(batches), cells.counts)
        fold = Fold(
            number, fold_seed, cells, labels, classes, training, scored, size, bench.device,
            bench.bf16, batches, zero_shot,
        )  # fmt: skip
        folds.append(fold)
        for contender in contenders(bench.models):
            outcome = bench.store.outcome(contender.key(fold), partial(_compete, contender, fold))
            name = display_name(outcome.contender, outcome.role, outcome.model)
            details = dict(outcome.details)
            if "umap" in details:
                places[name] = details.pop("umap")
            outcomes.append(replace(outcome, details=details))
    shown = _drawn(folds[0])
    return TaskRun(
        cells=len(labels),
        classes=classes,
        split=_split_sentence(task, size, batches),
        headline=HEADLINE,
        chance=None,
        excluded=excluded,
        outcomes=outcomes,
        details={
            "test_share": float(np.mean([len(f.test) for f in folds]) / len(labels)),
            "folds": [_described(f) for f in folds],
            "umap": places,
            "labels": [classes[i] for i in labels[shown]],
            "batches": batches[shown].tolist(),
            "skipped": _skipped(),
        },
    )


def num_units(task: IntegrationTask, size: Size, models: list[Model]) -> int:
    """Return how many outcomes `run` stores."""
    return size.seeds * len(contenders(models))


def divide(
    labels: np.ndarray, batches: np.ndarray, size: Size, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return cells to learn labels from, and cells to score (int positions, sorted).

    With three batches or more, about half of them, two at least, are scored; with two, half of the
    cells of each class and batch. Of these, 80 % of each class and batch are drawn.

    Raises
    ------
    ValueError
        Fewer than two batches, or no division has every class on both sides.
    """
    names = np.unique(batches)
    if len(names) < 2:
        raise ValueError(f"batches: {len(names)} ({', '.join(names)}); integration needs two")
    held_out = _held_out(batches)
    strata = np.unique(np.char.add(labels.astype(str), batches), return_inverse=True)[1]
    if held_out is not None:
        training, scored = split_cells(labels, held_out, seed, _SCORED_SHARE, 2)
    else:
        # A class with one cell in a batch cannot be halved there: it is halved over batches.
        rare = np.bincount(strata)[strata] < 2
        by = np.where(rare, strata.max() + 1 + labels, strata)
        by = np.where(np.bincount(by)[by] < 2, -1, by)
        everywhere = np.arange(len(labels))
        halves = train_test_split(
            everywhere[by >= 0], test_size=_SCORED_SHARE, stratify=by[by >= 0], random_state=seed
        )
        training, scored = (np.sort(h) for h in halves)
    rng = np.random.default_rng(seed)
    drawn = [
        rng.permutation(part)[: math.ceil(_DRAWN_SHARE * len(part))]
        for part in (scored[strata[scored] == s] for s in np.unique(strata[scored]))
    ]
    training = limit_per_class(training, labels, size.max_train_per_class, seed)
    scored = limit_per_class(np.concatenate(drawn), labels, size.max_test_per_class, seed)
    return training, np.sort(scored)


def contenders(models: list[Model]) -> list[Contender]:
    """Return who takes part in every fold."""
    rows = [Contender(n, "baseline", None, f) for n, f in _BASELINES.items() if n not in _skipped()]
    roles: tuple[Role, ...] = ("model", "twin")
    for model in models:
        for role in roles:
            rows.append(Contender(ZERO_SHOT, role, model, partial(_zero_shot, model, role)))
            rows.append(Contender(FINE_TUNED, role, model, partial(_fine_tuned, model, role)))
    return rows


def _skipped() -> dict[str, str]:
    """Return baseline -> why it cannot run here."""
    found = {}
    if importlib.util.find_spec("harmonypy") is None:
        found["Harmony"] = "the package harmonypy is not installed"
    if why := scvi_missing():
        found["scVI"] = why
    return found


def _compete(contender: Contender, fold: Fold) -> Outcome:
    with kept_threads():
        started = time.perf_counter()
        embedding = contender.embed(fold)
        seconds = time.perf_counter() - started
        scores = score_embedding(
            embedding, fold.labels[fold.test], fold.scored_batches, fold.components
        )
        details: dict[str, Any] = {"width": embedding.shape[1]}
        if fold.number == 0:
            place = np.searchsorted(fold.test, _drawn(fold))
            details["umap"] = _umap(embedding[place], fold.seed)
    return contender.outcome(fold, scores, seconds, details)


def _pca(features: np.ndarray, seed: int) -> np.ndarray:
    num = min(_COMPONENTS, *(s - 1 for s in features.shape))
    return PCA(num, random_state=seed).fit_transform(features).astype(np.float32)


def _variable_genes(fold: Fold) -> np.ndarray:
    return fold.genes


def _components(fold: Fold) -> np.ndarray:
    return fold.components


def _harmony(fold: Fold) -> np.ndarray:
    import harmonypy
    import pandas as pd

    obs = pd.DataFrame({"batch": fold.scored_batches})
    found = harmonypy.run_harmony(
        fold.components.astype(np.float64), obs, ["batch"], verbose=False, random_state=fold.seed
    )
    corrected = np.asarray(found.Z_corr, dtype=np.float32)
    # Cells are rows in new versions and columns in old ones.
    return corrected if len(corrected) == len(fold.test) else corrected.T


def _combat(fold: Fold) -> np.ndarray:
    data = anndata.AnnData(fold.genes.astype(np.float64))
    data.obs["batch"] = fold.scored_batches
    data.obs["batch"] = data.obs["batch"].astype("category")
    # A gene without any spread within batches has no correction, and nothing to tell.
    with np.errstate(divide="ignore", invalid="ignore"):
        corrected = np.asarray(scanpy.pp.combat(data, inplace=False))
    return _pca(corrected[:, np.isfinite(corrected).all(axis=0)], fold.seed)


def _scvi(fold: Fold) -> np.ndarray:
    counts = fold.cells.counts[fold.test]
    counts = counts[:, variable_genes(log_normalise(counts))]
    return scvi_latent(counts, counts, fold.seed, fold.scored_batches)[1]


_BASELINES: dict[str, Callable[[Fold], np.ndarray]] = {
    "highly variable genes": _variable_genes,
    "PCA": _components,
    "Harmony": _harmony,
    "ComBat": _combat,
    "scVI": _scvi,
}


def _zero_shot(model: Model, role: Role, fold: Fold) -> np.ndarray:
    return fold.zero_shot.of(model, fold.twin_seed(role), fold.test, fold.test)


def _fine_tuned(model: Model, role: Role, fold: Fold) -> np.ndarray:
    classifier = train(
        fold.encoder(model, role), model, fold.cells.tokens[model.name],
        fold.labels, _held_out(fold.batches), fold.train, fold.classes,
        fold.settings, fold.seed, fold.size.search_trials,
    )  # fmt: skip
    # The last layer: it is what the head read.
    states = Embeddings(fold.cells.tokens, 0, fold.device, fold.bf16)
    return states.embed(classifier.encoder, model, fold.test)


def _held_out(batches: np.ndarray) -> np.ndarray | None:
    """Return the batches if they are held out whole; None: cells of each are on both sides."""
    return batches if len(np.unique(batches)) >= _FEWEST_BATCHES_TO_HOLD_OUT else None


def _drawn(fold: Fold) -> np.ndarray:
    """Return the scored cells that UMAPs show (int positions, sorted)."""
    if len(fold.test) <= _MOST_DRAWN_CELLS:
        return fold.test
    rng = np.random.default_rng(fold.seed)
    return np.sort(rng.choice(fold.test, _MOST_DRAWN_CELLS, replace=False))


def _umap(embedding: np.ndarray, seed: int) -> list[list[float]]:
    """Return [x, y] of each cell, to 2 decimals: a picture, scores do not use it."""
    data = anndata.AnnData(obsm={"X": embedding}, shape=(len(embedding), 0))
    scanpy.pp.neighbors(data, min(15, len(embedding) - 1), use_rep="X", random_state=seed)
    scanpy.tl.umap(data, random_state=seed)
    return np.asarray(data.obsm["X_umap"], dtype=np.float64).round(2).tolist()


def _described(fold: Fold) -> dict[str, Any]:
    return {
        "train_cells": len(fold.train),
        "test_cells": len(fold.test),
        "test_groups": np.unique(fold.scored_batches).tolist(),
    }


def _split_sentence(task: IntegrationTask, size: Size, batches: np.ndarray) -> str:
    if _held_out(batches) is not None:
        how = f"about half of the '{task.batch}', two at least, are held out whole"
    else:
        how = f"half of the cells of each class and '{task.batch}' are held out"
    planted = "the batch effect is planted; " if task.planted_batch else ""
    return (
        f"{planted}{size.seeds} seeds: {how}, and all contenders are scored on 80 % of these "
        "cells; only fine-tuned models have seen labels, of the other cells. Subsamples overlap: "
        "intervals say how scores vary with the cells, not with the data set"
    )

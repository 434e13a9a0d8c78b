"""Classification of cells: every contender on the same training and test cells, fold by fold."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from eval.benchmark.contest.folds import FINE_TUNED, CellContender, CellFold, seed_of_fold
from eval.benchmark.contest.verdicts import corrected_interval, display_name
from eval.benchmark.material.models_and_cells import Bench, Model, TaskCells, load_cells
from eval.benchmark.material.twin_encoders import (
    HEAD_NAME,
    Embeddings,
    kept_threads,
    mean_of_inputs,
    train,
)
from eval.benchmark.neighbours.cell_baselines import (
    BASELINES,
    LOGISTIC_REGRESSION,
    MOST_TRAINING_CELLS,
    SCVI,
    embedding_classifier,
    gene_features,
    predict_probabilities,
    predict_scvi,
    scvi_missing,
)
from eval.benchmark.outcome import Outcome, Role, TaskRun
from eval.benchmark.task_file import AnnotationTask, CellTask, Size
from eval.finetune.score_cells import FEWEST_CELLS_OF_CLASS, NO_VALUE
from eval.scores.baselines import CELL_STATE, CORPUS_SVD
from eval.scores.metrics import chance_macro_f1, score_probabilities
from eval.scores.splits import (
    limit_per_class,
    require_clean_split,
    seen_in_training,
    split_cells,
)
from pretrain.cell_states.cell_state import reduced

HEADLINE = "macro_f1"
FROZEN = "frozen embedding"
BAG_OF_GENES = "bag of genes"
SHUFFLED = "shuffled labels"
_SCORES = ("macro_f1", "balanced_accuracy", "accuracy", "auprc", "ece")
# A handful of training cells gives a handful of steps; so many are taken at least.
_FEWEST_STEPS = 20


@dataclass(frozen=True)
class Fold(CellFold):
    """A fold with what its contenders share.

    Attributes
    ----------
    groups
        str [cells], or None.
    capped
        Those of `train` that scikit-learn and scVI get.
    embedded
        Sorted positions of the cells that may be embedded.
    """

    groups: np.ndarray | None
    capped: np.ndarray
    embedded: np.ndarray
    embeddings: Embeddings

    @cached_property
    def genes(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-normalised variable genes of `capped` and `test` cells."""
        return gene_features(self.cells.counts, self.capped, self.test)

    @cached_property
    def shuffled(self) -> np.ndarray:
        """Labels int64 [cells], those of `capped` in another order."""
        labels = self.labels.copy()
        labels[self.capped] = np.random.default_rng(self.seed).permutation(labels[self.capped])
        return labels

    def few(self, shots: int) -> Fold:
        """Return the same fold with at most so many training cells of each class."""
        chosen = limit_per_class(self.capped, self.labels, shots, self.seed)
        return replace(self, train=chosen, capped=chosen)


@dataclass(frozen=True)
class Contender(CellContender):
    """A row of the table, or a point of the few-shot curve; `predict` gives [test, classes]."""

    predict: Callable[[Fold], np.ndarray]
    shots: int | None = None


def run(task: CellTask, size: Size, bench: Bench) -> TaskRun:
    """Return the outcomes of all contenders of a cell task, one fold a seed; see `compete`."""
    return compete(task, size, bench, contenders(size, bench.models), 0)


def compete(
    task: CellTask | AnnotationTask, size: Size, bench: Bench, rows: list[Contender], layer: int
) -> TaskRun:
    """Return the outcomes of contenders on the same training and test cells, one fold a seed.

    Parameters
    ----------
    layer
        Of the embeddings, as in `eval.cells.embed.embed_cells`.

    Raises
    ------
    ValueError
        The cells cannot be had, fewer than two classes are left, or no split keeps groups whole
        with every class on both sides.
    """
    columns = (task.label, *([task.group] if task.group else []))
    loaded = load_cells(task.cells, columns, bench.models, bench.data, size.max_cells, bench.seed)
    cells, excluded = usable_cells(loaded, task.label, task.group)
    classes = sorted(set(cells.metadata[task.label]))
    labels = np.array([classes.index(v) for v in cells.metadata[task.label]], dtype=np.int64)
    groups = cells.metadata[task.group].to_numpy(dtype=str) if task.group else None
    embeddings = Embeddings(cells.tokens, layer, bench.device, bench.bf16)
    outcomes, few_shot, divided = [], [], []
    copies = 0
    for number in range(size.seeds):
        fold_seed = seed_of_fold(bench.seed, number)
        training, test, removed = divide(cells, labels, groups, size, fold_seed)
        copies += removed
        capped = _capped(training, fold_seed)
        fold = Fold(
            number, fold_seed, cells, labels, classes, training, test, size, bench.device,
            bench.bf16, groups, capped, np.sort(np.concatenate([capped, test])), embeddings,
        )  # fmt: skip
        divided.append(_described(fold))
        for contender in rows:
            key = contender.key(fold) | {"shots": contender.shots}
            outcome = bench.store.outcome(key, partial(_compete, contender, fold))
            (outcomes if contender.shots is None else few_shot).append(outcome)
    if copies:
        excluded["test cells with the counts of a training cell (over all folds)"] = copies
    test_share = float(np.mean([d["test_cells"] / (d["test_cells"] + d["train_cells"])
                                for d in divided]))  # fmt: skip
    controls = [o for o in outcomes if o.role == "control" and o.model is None]
    return TaskRun(
        cells=len(labels),
        classes=classes,
        split=_split_sentence(task, size, divided),
        headline=HEADLINE,
        chance=float(np.mean([o.details["chance"] for o in controls])),
        excluded=excluded,
        outcomes=outcomes,
        details={
            "test_share": test_share,
            "folds": divided,
            "cells_by_class": cells.metadata[task.label].value_counts().to_dict(),
            "few_shot": _curves(few_shot, test_share),
            "skipped": {SCVI: why} if (why := scvi_missing()) else {},
        },
    )


def num_units(task: CellTask, size: Size, models: list[Model]) -> int:
    """Return how many outcomes `run` stores."""
    return size.seeds * len(contenders(size, models))


def usable_cells(
    cells: TaskCells, label: str, group: str | None
) -> tuple[TaskCells, dict[str, int]]:
    """Return the cells that can be classified, and reason -> cells that were left out.

    Left out are cells without a label or group, classes below 5 cells, and, where groups stay
    whole, classes that only one group has: they cannot be in training and in test.

    Raises
    ------
    ValueError
        Fewer than two classes are left.
    """
    labels = cells.metadata[label]
    reasons = {"no label": labels.isin(NO_VALUE).to_numpy()}
    if group:
        reasons["no group"] = cells.metadata[group].isin(NO_VALUE).to_numpy()
    kept = ~np.any(list(reasons.values()), axis=0)
    sizes = labels[kept].value_counts()
    small = sizes.index[sizes < FEWEST_CELLS_OF_CLASS]
    reasons[f"class below {FEWEST_CELLS_OF_CLASS} cells"] = labels.isin(small).to_numpy()
    if group:
        spread = cells.metadata[kept].groupby(label, observed=True)[group].nunique()
        alone = spread.index[spread < 2].difference(small)
        reasons[f"class in one {group} only"] = labels.isin(alone).to_numpy()
    excluded = dict(cells.excluded)
    left = np.ones(len(labels), dtype=bool)
    for reason, wrong in reasons.items():
        excluded[reason] = int((left & wrong).sum())
        left &= ~wrong
    if labels[left].nunique() < 2:
        found = labels.value_counts().head(5).to_dict()
        raise ValueError(
            f"column '{label}': fewer than two classes can be told apart"
            + (f" with '{group}' kept whole" if group else "")
            + f"; it holds {found}, left out: { {k: v for k, v in excluded.items() if v} }"
        )
    kept_reasons = {k: v for k, v in excluded.items() if v or k.startswith("(")}
    return cells.subset(np.flatnonzero(left)), kept_reasons


def divide(
    cells: TaskCells, labels: np.ndarray, groups: np.ndarray | None, size: Size, seed: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return training and test cells (int positions), and how many test cells were removed.

    Test cells with exactly the counts of a training cell are removed: they are in the data twice.
    """
    training, test = split_cells(labels, groups, seed)
    training = limit_per_class(training, labels, size.max_train_per_class, seed)
    known = seen_in_training(training, test, cells.counts)
    test = limit_per_class(test[~known], labels, size.max_test_per_class, seed)
    require_clean_split(training, test, groups, cells.counts)
    return training, test, int(known.sum())


def _capped(train: np.ndarray, seed: int) -> np.ndarray:
    if len(train) <= MOST_TRAINING_CELLS:
        return train
    return np.sort(np.random.default_rng(seed).choice(train, MOST_TRAINING_CELLS, replace=False))


def contenders(size: Size, models: list[Model]) -> list[Contender]:
    """Return who takes part in every fold: the table's rows, then the few-shot curve."""
    rows = [Contender(n, "baseline", None, partial(_baseline, n)) for n in BASELINES]
    if scvi_missing() is None:
        rows.append(Contender(SCVI, "baseline", None, scvi_neighbours))
    rows += [Contender(CORPUS_SVD, "baseline", m, partial(_corpus_svd, m)) for m in models if m.svd]
    rows.append(Contender(SHUFFLED, "control", None, _shuffled_genes))
    roles: tuple[Role, ...] = ("model", "twin")
    for model in models:
        by_model = _BY_MODEL | ({CELL_STATE: _cell_state} if model.state else {})
        for role in roles:
            for name, predict in by_model.items():
                rows.append(Contender(name, role, model, partial(predict, model, role)))
        name = f"{SHUFFLED}, {FROZEN}"
        rows.append(Contender(name, "control", model, partial(_shuffled_frozen, model)))
    few = [r for r in rows if r.name in (FINE_TUNED, FROZEN, LOGISTIC_REGRESSION)]
    return rows + [
        replace(r, name=f"{r.name}, {shots} a class", shots=shots)
        for shots in size.shots
        for r in few
    ]


def _compete(contender: Contender, fold: Fold) -> Outcome:
    if contender.shots is not None:
        fold = fold.few(contender.shots)
    started = time.perf_counter()
    with kept_threads():
        probabilities = contender.predict(fold)
    seconds = time.perf_counter() - started
    truth = fold.labels[fold.test]
    found = score_probabilities(truth, probabilities, fold.classes)
    details = {k: found[k] for k in ("f1_by_class", "confusion", "calibration")}
    if contender.role == "control":
        details["chance"] = chance_macro_f1(truth, probabilities.argmax(axis=1))
    return contender.outcome(fold, {s: found[s] for s in _SCORES}, seconds, details)


def _baseline(name: str, fold: Fold) -> np.ndarray:
    fitted, test = fold.genes
    known = fold.labels[fold.capped]
    estimator = BASELINES[name](known, fitted.shape[1], fold.seed)
    return predict_probabilities(estimator, fitted, known, test, len(fold.classes))


def scvi_neighbours(fold: Fold) -> np.ndarray:
    return predict_scvi(
        fold.cells.counts, fold.labels, fold.capped, fold.test, len(fold.classes), fold.seed
    )


def _shuffled_genes(fold: Fold) -> np.ndarray:
    fitted, test = fold.genes
    known = fold.shuffled[fold.capped]
    estimator = BASELINES[LOGISTIC_REGRESSION](known, fitted.shape[1], fold.seed)
    return predict_probabilities(estimator, fitted, known, test, len(fold.classes))


def _from_states(
    fold: Fold, fitted: np.ndarray, test: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    known = labels[fold.capped]
    estimator = embedding_classifier(known, fitted.shape[1], fold.seed)
    return predict_probabilities(estimator, fitted, known, test, len(fold.classes))


def _frozen(model: Model, role: Role, fold: Fold) -> np.ndarray:
    fitted, test = states(model, role, fold)
    return _from_states(fold, fitted, test, fold.labels)


def _cell_state(model: Model, role: Role, fold: Fold) -> np.ndarray:
    """Predict from cell states; the axes of a twin's are those of the training cells."""
    assert model.state
    tokens = [fold.cells.tokens[model.name][i] for i in (*fold.capped, *fold.test)]
    number, state = len(fold.capped), model.state
    means = fold.embeddings.last_layer.of(
        model, fold.twin_seed(role), np.concatenate([fold.capped, fold.test]), fold.embedded
    )
    if role == "twin":
        state = reduced(state.svd, tokens[:number], means[:number])
    found = state.of_means(tokens, means)
    return _from_states(fold, found[:number], found[number:], fold.labels)


def _corpus_svd(model: Model, fold: Fold) -> np.ndarray:
    assert model.svd
    tokens = fold.cells.tokens[model.name]
    fitted, test = (model.svd.embed_cells([tokens[i] for i in c]) for c in (fold.capped, fold.test))
    return _from_states(fold, fitted, test, fold.labels)


def _shuffled_frozen(model: Model, fold: Fold) -> np.ndarray:
    fitted, test = states(model, "model", fold)
    return _from_states(fold, fitted, test, fold.shuffled)


def states(model: Model, role: Role, fold: Fold) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings of training and test cells."""
    used = np.concatenate([fold.capped, fold.test])
    states = fold.embeddings.of(model, fold.twin_seed(role), used, fold.embedded)
    return states[: len(fold.capped)], states[len(fold.capped) :]


def _bag_of_genes(model: Model, role: Role, fold: Fold) -> np.ndarray:
    encoder = fold.encoder(model, role)
    tokens = fold.cells.tokens[model.name]
    fitted, test = (mean_of_inputs(encoder, model, tokens, c) for c in (fold.capped, fold.test))
    return _from_states(fold, fitted, test, fold.labels)


def _fine_tuned(model: Model, role: Role, fold: Fold) -> np.ndarray:
    settings = fold.settings
    steps = -(-len(fold.train) // settings.batch_cells) * settings.epochs
    if steps < _FEWEST_STEPS:
        epochs = -(-_FEWEST_STEPS * settings.batch_cells // len(fold.train))
        settings = replace(settings, epochs=max(epochs, settings.epochs))
    tokens = fold.cells.tokens[model.name]
    classifier = train(
        fold.encoder(model, role), model, tokens, fold.labels, fold.groups,
        fold.train, fold.classes, settings, fold.seed, fold.size.search_trials,
    )  # fmt: skip
    return classifier.predict_cells([tokens[i] for i in fold.test], HEAD_NAME)


_BY_MODEL: dict[str, Callable[[Model, Role, Fold], np.ndarray]] = {
    FINE_TUNED: _fine_tuned,
    FROZEN: _frozen,
    BAG_OF_GENES: _bag_of_genes,
}


def _described(fold: Fold) -> dict[str, Any]:
    """Return what is said about a fold beside its scores."""
    found: dict[str, Any] = {"train_cells": len(fold.train), "test_cells": len(fold.test)}
    if fold.groups is not None:
        found["test_groups"] = np.unique(fold.groups[fold.test]).tolist()
    return found


def _split_sentence(task: CellTask | AnnotationTask, size: Size, divided: list[dict]) -> str:
    if task.group is None:
        return (
            f"{size.seeds} seeds, stratified by class; cells of a donor may be on both sides: "
            f"{task.group_missing}"
        )
    sets = {tuple(d["test_groups"]) for d in divided}
    return (
        f"{size.seeds} seeds, each '{task.group}' whole on one side, every class on both; "
        f"{len(sets)} different sets of test groups"
    )


def _curves(few_shot: list[Outcome], test_share: float) -> dict[str, dict[str, dict]]:
    """Return display name -> cells a class -> mean, low, high of macro-F1."""
    values: dict[str, dict[str, list[float]]] = {}
    for outcome in few_shot:
        contender, number = outcome.contender.rsplit(", ", 1)
        name = display_name(contender, outcome.role, outcome.model)
        points = values.setdefault(name, {})
        score = outcome.scores[HEADLINE]
        points.setdefault(number.split()[0], []).append(np.nan if score is None else score)
    ratio = test_share / (1 - test_share)
    return {
        name: {
            shots: {k: found[k] for k in ("mean", "low", "high")}
            for shots, scores in points.items()
            for found in [corrected_interval(np.array(scores), ratio)]
        }
        for name, points in values.items()
    }

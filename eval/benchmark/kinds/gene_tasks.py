"""Gene tasks: classes of genes told apart by their states in cells, with folds over genes.

All contenders meet the same genes in the same folds and the same cells, and a gene counts once.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.metrics import roc_auc_score

from eval.benchmark.contest.folds import FINE_TUNED
from eval.benchmark.contest.verdicts import display_name
from eval.benchmark.material.gene_features import (
    STATIC_NAMES,
    embed_genes,
    expression_of_tokens,
    ranks_of_tokens,
    reduce_profiles,
    static_features,
)
from eval.benchmark.material.gene_labels import (
    LabelledGenes,
    choose_genes,
    gene_folds,
    read_labels,
)
from eval.benchmark.material.models_and_cells import Bench, Model, TaskCells, load_cells
from eval.benchmark.material.twin_encoders import settings_of
from eval.benchmark.neighbours.gene_baselines import LOGISTIC, predict_classes
from eval.benchmark.outcome import Outcome, Role, TaskRun
from eval.benchmark.scoring.gene_scores import (
    HEADLINE,
    interval,
    mean_by_gene,
    mean_roc,
    resample_genes,
    resampled_auroc,
    score_genes,
)
from eval.benchmark.task_file import GeneTask, Size
from eval.finetune.classifier import FinetuneSettings, Head, Target
from eval.finetune.training import finetune
from pretrain.export.model_folder import random_twin
from pretrain.model.architectures import Encoder, encoder_of

_SHUFFLED = "shuffled labels"
# Mean of so many shuffles in each fold: a single one of some dozen test genes is off by 0.1.
_NUM_SHUFFLES = 10
_HEAD = "genes"


@dataclass(frozen=True, eq=False)
class _Contender:
    """One row of the task's table; without a classifier it is fine-tuned."""

    name: str
    role: Role
    features: str
    classifier: str
    model: Model | None = None

    @property
    def display_name(self) -> str:
        return display_name(self.name, self.role, self.model.name if self.model else None)


def _contenders(models: list[Model]) -> list[_Contender]:
    found = []
    for model in models:
        for role in ("model", "twin"):
            found += [
                _Contender(FINE_TUNED, role, "", "", model),
                _Contender("frozen embedding", role, "frozen", LOGISTIC, model),
                _Contender("input embeddings", role, "input", LOGISTIC, model),
            ]
        if model.svd:
            name = "corpus SVD's loadings"
            found.append(_Contender(name, "baseline", "loadings", LOGISTIC, model))
        control = f"{_SHUFFLED}, frozen embedding"
        found.append(_Contender(control, "control", "frozen", LOGISTIC, model))
    for features in ("counts", "ranks"):
        for classifier in (LOGISTIC, "random forest", "SVM", "MLP"):
            name = f"{classifier} on {features}"
            found.append(_Contender(name, "baseline", features, classifier))
    for classifier in (LOGISTIC, "random forest", "SVM"):
        name = f"{classifier} on static features"
        found.append(_Contender(name, "baseline", "static", classifier))
    found.append(_Contender("detection rate alone", "baseline", "detection", LOGISTIC))
    control = f"{_SHUFFLED}, {LOGISTIC} on counts"
    found.append(_Contender(control, "control", "counts", LOGISTIC))
    return found


def num_units(task: GeneTask, size: Size, models: list[Model]) -> int:
    """Return how many outcomes `run` asks its store for."""
    return len(_contenders(models)) * size.seeds * task.folds


class _Draw:
    """Cells of one repetition, and what is known of the genes in them.

    Features are made when they are first asked for, and shared by all folds; no label is read.
    `seconds` says how long each took.
    """

    def __init__(
        self,
        cells: TaskCells,
        genes: LabelledGenes,
        models: list[Model],
        settings: FinetuneSettings,
        seed: int,
    ) -> None:
        self.cells, self.genes, self.seed, self.settings = cells, genes, seed, settings
        self.tokens = {
            m.name: m.reading_vocabulary.tokens_of(genes.ids).astype(np.int64) for m in models
        }
        self.seconds: dict[tuple, float] = {}
        self._first = models[0]
        self.vocabulary_sha256 = models[0].reading_vocabulary.sha256
        self._made: dict[tuple, Any] = {}

    def encoder(self, model: Model, role: Role) -> Encoder:
        """Return the model's encoder, or the same one with random weights."""
        if role != "twin":
            return encoder_of(model.network)
        return self._once(
            ("twin", model.name), lambda: encoder_of(random_twin(model.network, self.seed))
        )

    def features(self, contender: _Contender) -> np.ndarray:
        """Return float [genes, features] of a contender with a classifier."""
        key = (contender.features, *_weights(contender))
        return self._once(key, lambda: self._make(contender))

    def share_of_seconds(self, contender: _Contender, folds: int) -> float:
        """Return the seconds that making its features took, per fold."""
        return self.seconds.get((contender.features, *_weights(contender)), 0.0) / folds

    def forget(self) -> None:
        """Free the features."""
        self._made.clear()

    def _make(self, contender: _Contender) -> np.ndarray:
        model, kind = contender.model, contender.features
        if model is not None:
            encoder, tokens = self.encoder(model, contender.role), self.tokens[model.name]
            if kind == "loadings":
                assert model.svd
                return model.svd.components[tokens]
            if kind == "input":
                table = encoder.get_input_embeddings().weight
                return table.detach().float().cpu().numpy()[tokens]
            states = embed_genes(
                self.cells.tokens[model.name], encoder, model.vocabulary,
                self.settings.token_budget, self.settings.device, self.settings.bf16,
            )  # fmt: skip
            return states[tokens]
        tokens = self.tokens[self._first.name]
        if kind == "counts":
            return reduce_profiles(self._expression(), tokens, self.seed)
        if kind == "ranks":
            return reduce_profiles(self._ranks(), tokens, self.seed)
        static = static_features(self._expression(), self._ranks(), tokens, self._first.vocabulary)
        return static if kind == "static" else static[:, [STATIC_NAMES.index("detection rate")]]

    def _expression(self) -> scipy.sparse.csr_matrix:
        cells = self.cells
        return self._once(
            ("expression",),
            lambda: expression_of_tokens(cells.counts, cells.genes, self._first.reading_vocabulary),
        )

    def _ranks(self) -> scipy.sparse.csr_matrix:
        tokens = self.cells.tokens[self._first.name]
        return self._once(("profiles",), lambda: ranks_of_tokens(tokens, self._first.vocabulary))

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            started = time.perf_counter()
            self._made[key] = make()
            self.seconds[key] = time.perf_counter() - started
        return self._made[key]


def _weights(contender: _Contender) -> tuple:
    """Return what tells whose weights are read; a control reads those of its model."""
    return (contender.model.name, contender.role == "twin") if contender.model else ()


@dataclass(frozen=True)
class _Fold:
    number: int
    draw: _Draw
    train: np.ndarray
    test: np.ndarray


def run(task: GeneTask, size: Size, bench: Bench) -> TaskRun:
    """Return the outcomes of every contender in every fold of a gene task.

    Fold number: repetition x folds + fold; each repetition has its own folds, cells, heads and
    random weights.

    Returns
    -------
    TaskRun
        Ranks and medians of the baselines are those of the first model's vocabulary. Where `size`
        freezes more layers than a model has, one is left to train; the outcome's details name how
        many were frozen.

    Raises
    ------
    ValueError
        As `read_labels`, `choose_genes` and `load_cells`.
    """
    # Without early stopping: there are no genes to spare for a validation.
    settings = replace(settings_of(size, bench.device, bench.bf16), patience=0)
    labelled = read_labels(task, bench.data)
    every = load_cells(task.cells, (), bench.models, bench.data, None, bench.seed)
    draws = [_draw_cells(every, size.max_cells, bench.seed + r) for r in range(size.seeds)]
    genes = choose_genes(labelled, bench.models, draws, task)
    contenders = _contenders(bench.models)
    outcomes: dict[_Contender, list[Outcome]] = {c: [] for c in contenders}
    folds: list[_Fold] = []
    for repetition, cells in enumerate(draws):
        draw = _Draw(cells, genes, bench.models, settings, bench.seed + repetition)
        for train, test in gene_folds(genes.labels, task.folds, draw.seed):
            fold = _Fold(len(folds), draw, train, test)
            folds.append(fold)
            for c in contenders:
                made = bench.store.outcome(_key(c, fold), lambda c=c, f=fold: _compute(c, f, task))
                outcomes[c].append(made)
        draw.forget()
    cells_left_out = dict(every.excluded)
    not_drawn = every.counts.shape[0] - draws[0].counts.shape[0]
    if not_drawn:
        cells_left_out["not drawn"] = not_drawn
    return TaskRun(
        cells=draws[0].counts.shape[0],
        classes=[task.negative, task.positive],
        split=f"{task.folds} folds over genes, stratified by class, no gene on both sides"
        + (f"; {size.seeds} repetitions with other folds and cells" if size.seeds > 1 else ""),
        headline=HEADLINE,
        chance=0.5,
        excluded={f"cells: {k}": v for k, v in cells_left_out.items()}
        | {f"genes: {k}": v for k, v in genes.excluded.items()},
        outcomes=[_without_predictions(o) for found in outcomes.values() for o in found],
        details={"test_share": 1 / task.folds, "prevalence": float(genes.labels.mean())}
        | {"genes": np.bincount(genes.labels, minlength=2).tolist(), "settings": asdict(settings)}
        | _gene_details(outcomes, folds, genes, bench.seed),
    )


def _draw_cells(cells: TaskCells, most: int | None, seed: int) -> TaskCells:
    num_cells = cells.counts.shape[0]
    if most is None or num_cells <= most:
        return cells
    chosen = np.random.default_rng(seed).choice(num_cells, most, replace=False)
    return cells.subset(np.sort(chosen))


def _key(contender: _Contender, fold: _Fold) -> dict[str, Any]:
    """Return all that decides an outcome: the contender, its settings, cells, genes and fold."""
    draw = fold.draw
    examples = [draw.genes.ids, draw.genes.labels.tolist(), fold.test.tolist()]
    key: dict[str, Any] = {
        "contender": contender.name,
        "role": contender.role,
        "model": contender.model.digest if contender.model else None,
        "vocabulary": draw.vocabulary_sha256,
        "fold": fold.number,
        "seed": draw.seed,
        "cells": draw.cells.digest,
        "genes": hashlib.sha256(repr(examples).encode()).hexdigest(),
    }
    if contender.model:
        key["bf16"] = draw.settings.bf16
    if not contender.classifier:
        key["settings"] = {k: v for k, v in asdict(draw.settings).items() if k != "device"}
    return key


def _compute(contender: _Contender, fold: _Fold, task: GeneTask) -> Outcome:
    started = time.perf_counter()
    labels, draw = fold.draw.genes.labels, fold.draw
    truth = labels[fold.test]
    details: dict[str, Any] = {"prevalence": float(truth.mean()), "test_genes": len(truth)}
    before = sum(draw.seconds.values())
    if contender.role == "control":
        scores = _score_shuffled(contender, fold)
    elif contender.classifier:
        probability = _classify(contender, fold, labels)
        scores = score_genes(truth, probability) | {"auroc_occurrence": None}
        details["probability"] = _short(probability)
    else:
        scores, found = _finetune(contender, fold, task)
        details |= found
    # Features are made once for all folds: each fold bears its share.
    shared = sum(draw.seconds.values()) - before
    seconds = time.perf_counter() - started - shared
    seconds += draw.share_of_seconds(contender, task.folds)
    name = contender.model.name if contender.model else None
    return Outcome(contender.name, contender.role, name, fold.number, scores, seconds, details)


def _classify(contender: _Contender, fold: _Fold, labels: np.ndarray) -> np.ndarray:
    return predict_classes(
        contender.classifier, fold.draw.features(contender), labels, fold.train, fold.test,
        fold.draw.seed,
    )  # fmt: skip


def _score_shuffled(contender: _Contender, fold: _Fold) -> dict[str, float | None]:
    """Return mean scores with labels shuffled among training and among test genes.

    Apart, for a label that is used up in training is missing in the test: shuffled over all genes,
    the mean AUROC is below 0.5. The same code as for the true labels runs on them.
    """
    rng = np.random.default_rng([fold.draw.seed, fold.number])
    found = []
    for _ in range(_NUM_SHUFFLES):
        labels = fold.draw.genes.labels.copy()
        for side in (fold.train, fold.test):
            labels[side] = rng.permutation(labels[side])
        found.append(score_genes(labels[fold.test], _classify(contender, fold, labels)))
    return {k: float(np.mean([f[k] for f in found])) for k in found[0]} | {"auroc_occurrence": None}


def _finetune(
    contender: _Contender, fold: _Fold, task: GeneTask
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Return scores and details of a head on the states of genes, trained on training genes."""
    draw, model = fold.draw, contender.model
    assert model is not None
    tokens, labels = draw.tokens[model.name], draw.genes.labels
    cells = draw.cells.tokens[model.name]
    encoder = draw.encoder(model, contender.role)
    # A model of few layers keeps one to train.
    depth = encoder.config.num_hidden_layers
    settings = replace(draw.settings, freeze_layers=min(draw.settings.freeze_layers, depth - 1))
    targets = np.full(model.vocabulary.num_tokens, -1, dtype=np.int64)
    targets[tokens[fold.train]] = labels[fold.train]
    head = Head(_HEAD, "genes", (task.negative, task.positive))
    classifier = finetune(
        encoder, model.vocabulary, cells, [Target(head, targets)], settings, draw.seed
    )
    wanted = np.zeros(model.vocabulary.num_tokens, dtype=bool)
    wanted[tokens[fold.test]] = True
    predictions = classifier.predict_genes(cells, _HEAD, wanted)
    place = np.full(model.vocabulary.num_tokens, -1)
    place[tokens[fold.test]] = np.arange(len(fold.test))
    gene, by_occurrence = place[predictions.token], predictions.probabilities[:, 1]
    truth = labels[fold.test]
    probability = mean_by_gene(gene, by_occurrence, len(fold.test))
    scores = score_genes(truth, probability)
    scores["auroc_occurrence"] = float(roc_auc_score(truth[gene], by_occurrence))
    details = {
        "probability": _short(probability),
        "occurrences": np.bincount(gene, minlength=len(fold.test)).tolist(),
        "freeze_layers": settings.freeze_layers,
    }
    return scores, details


def _short(probability: np.ndarray) -> list[float]:
    """Return values with six significant digits: small ones stay apart."""
    return [float(f"{p:.6g}") for p in probability]


def _without_predictions(outcome: Outcome) -> Outcome:
    """Return an outcome for `results.json`: single predictions stay in the store."""
    small = {k: v for k, v in outcome.details.items() if k not in ("probability", "occurrences")}
    return replace(outcome, details=small)


def _gene_details(
    outcomes: dict[_Contender, list[Outcome]], folds: list[_Fold], genes: LabelledGenes, seed: int
) -> dict[str, Any]:
    """Return intervals over genes, ROC curves and the genes of the fine-tuned models.

    Keys are display names. ``difference`` is the first model's fine-tuned AUROC minus the
    contender's, in the same resamples.
    """
    predicted = {
        c: [np.array(o.details["probability"]) for o in found]
        for c, found in outcomes.items()
        if c.role != "control"
    }
    tested = [f.test for f in folds]
    truth = [genes.labels[t] for t in tested]
    weights = resample_genes(genes.labels, seed)
    resampled = {c: resampled_auroc(genes.labels, tested, p, weights) for c, p in predicted.items()}
    main = next(c for c in predicted if c.name == FINE_TUNED)
    intervals = {}
    for contender, values in resampled.items():
        scores = np.array([o.scores[HEADLINE] for o in outcomes[contender]], dtype=np.float64)
        found: dict[str, Any] = {"mean": float(scores.mean())} | interval(values)
        if contender != main:
            found["difference"] = interval(resampled[main] - values)
        intervals[contender.display_name] = found
    return {
        "intervals_over_genes": intervals,
        "roc": {c.display_name: mean_roc(truth, p) for c, p in predicted.items()},
        "predictions": {
            c.display_name: _predictions(outcomes[c], folds, genes)
            for c in predicted
            if c.name == FINE_TUNED and c.role == "model"
        },
    }


def _predictions(
    outcomes: list[Outcome], folds: list[_Fold], genes: LabelledGenes
) -> list[dict[str, Any]]:
    """Return every gene's label and out-of-fold mean probability, the most probable first.

    ``cells`` is the mean number of cells that the gene was predicted in, over repetitions.
    """
    tested = np.concatenate([f.test for f in folds])
    columns = {
        key: np.concatenate([o.details[key] for o in outcomes])
        for key in ("probability", "occurrences")
    }
    means = {k: mean_by_gene(tested, v, len(genes.ids)) for k, v in columns.items()}
    return [
        ({"symbol": genes.symbols[g]} if genes.symbols[g] else {})
        | {
            "gene": genes.ids[g],
            "label": int(genes.labels[g]),
            "probability": round(float(means["probability"][g]), 4),
            "cells": round(float(means["occurrences"][g]), 1),
        }
        for g in np.argsort(-means["probability"], kind="stable")
    ]

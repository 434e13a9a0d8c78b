"""Perturb-seq tasks: measured shifts of expression, predicted for perturbations not trained on.

Every contender of a fold has the same training and test perturbations. A linear map from what is
known of the perturbed gene is the strongest family of published re-evaluations (Ahlmann-Eltze,
Huber & Anders, Nature Methods 22, 2025), so a model is asked what its embeddings add to it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler

from eval.benchmark.contest.folds import seed_of_fold
from eval.benchmark.contest.verdicts import RIDGE
from eval.benchmark.material.gene_features import (
    embed_genes,
    expression_of_tokens,
    reduce_profiles,
)
from eval.benchmark.material.gene_pairs import read_edges
from eval.benchmark.material.in_silico import (
    chosen_holders,
    engine_of,
    gene_effects,
    genes_of,
)
from eval.benchmark.material.measured_shifts import (
    Shifts,
    measure_shifts,
    memberships,
    perturbation_folds,
)
from eval.benchmark.material.models_and_cells import Bench, Model, TaskCells, load_cells
from eval.benchmark.material.twin_encoders import encoder_of
from eval.benchmark.neighbours.gene_correlation import correlations
from eval.benchmark.outcome import Outcome, Role, TaskRun
from eval.benchmark.scoring.shift_scores import (
    affected_genes,
    rank_of_truth,
    score_ranking,
    score_shift,
)
from eval.benchmark.task_file import PerturbSeqTask, Size

_ALPHAS = np.logspace(-1, 5, 7)
# Mean of so many shuffles in each fold.
_NUM_SHUFFLES = 10


@dataclass(frozen=True)
class Genes:
    """Cells that tell what the perturbed genes are like, with caches of what they tell.

    Attributes
    ----------
    cells
        The context: cells of the task or of others.
    seed
        Of random twins.
    most_cells
        Cells in which a gene is deleted in silico.
    """

    cells: TaskCells
    bench: Bench
    seed: int
    most_cells: int | None
    _states: dict[tuple[str, Role], np.ndarray] = field(default_factory=dict)

    @property
    def models(self) -> list[Model]:
        return self.bench.models

    def tokens(self, model: Model, genes: list[str]) -> np.ndarray:
        """Return int64 tokens of gene ids, -1 where the vocabulary lacks one."""
        return model.reading_vocabulary.tokens_of(genes).astype(np.int64)

    @cached_property
    def expression(self):
        """CSR float32 [tokens of the first model, cells], log-normalised."""
        vocabulary = self.models[0].reading_vocabulary
        return expression_of_tokens(self.cells.counts, self.cells.genes, vocabulary)

    def components(self, genes: list[str]) -> np.ndarray:
        """Return float64 [genes, components]: loadings in a PCA of the cells, NaN: not detected."""
        tokens = self.tokens(self.models[0], genes)
        found = reduce_profiles(self.expression, np.maximum(tokens, 0), self.seed)
        found[(tokens < 0) | (np.diff(self.expression.indptr)[tokens] == 0)] = np.nan
        return found

    def correlated(self, perturbed: list[str], genes: list[str]) -> np.ndarray:
        """Return float64 [perturbed, genes]: correlation over the cells, 0 if one is constant."""
        first = self.models[0]
        return correlations(
            self.expression, self.tokens(first, perturbed), self.tokens(first, genes)
        )

    def embedding(self, model: Model, role: Role, kind: str, genes: list[str]) -> np.ndarray:
        """Return float [genes, width] of a model or its twin, NaN where a gene has none.

        ``input``: the gene's row of the embedding table; ``context``: its mean last-layer state in
        the cells that hold it.
        """
        encoder = encoder_of(model, self.seed if role == "twin" else None)
        if kind == "input":
            states = encoder.get_input_embeddings().weight.detach().float().cpu().numpy()
        else:
            # Once for all folds of a repetition.
            if (model.name, role) not in self._states:
                self._states[model.name, role] = embed_genes(
                    self.cells.tokens[model.name], encoder, model.vocabulary,
                    device=self.bench.device, bf16=self.bench.bf16,
                )  # fmt: skip
            states = self._states[model.name, role]
        tokens = self.tokens(model, genes)
        return np.where(tokens[:, None] >= 0, states[np.maximum(tokens, 0)], np.nan)


@dataclass(frozen=True)
class Fold:
    """Training and test perturbations (int positions, sorted), and the genes' context."""

    number: int
    shifts: Shifts
    genes: Genes
    train: np.ndarray
    test: np.ndarray

    @property
    def seed(self) -> int:
        return self.genes.seed


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    `predict` gives float [test perturbations, genes] for a fold. With `only_ranks` the values order
    genes by how much they move and are no shifts.
    """

    name: str
    role: Role
    model: Model | None
    predict: Callable[[Fold], np.ndarray]
    only_ranks: bool = False


def run(task: PerturbSeqTask, size: Size, bench: Bench) -> TaskRun:
    """Return the outcomes of all contenders of a Perturb-seq task in every fold.

    Fold number: repetition x folds + fold; each repetition has its own folds, context and twins.

    Raises
    ------
    ValueError
        As `load_cells`, `read_edges`, `measure_shifts` and `perturbation_folds`.
    """
    shifts, context = _load(task, size, bench)
    headline = "auroc" if shifts.are_memberships else "pearson_delta"
    if headline == "pearson_delta" and len(shifts.genes) > 20:
        headline = "pearson_delta_top20"
    outcomes: list[Outcome] = []
    for repetition in range(size.seeds):
        seed = seed_of_fold(bench.seed, repetition)
        genes = Genes(context, bench, seed, size.max_cells_per_gene)
        rows = contenders(bench.models, task, size)
        for place, (train, test) in enumerate(
            perturbation_folds(shifts, task.split, task.folds, seed)
        ):
            fold = Fold(repetition * task.folds + place, shifts, genes, train, test)
            for row in rows:
                outcomes.append(
                    bench.store.outcome(_key(row, fold), lambda r=row, f=fold: _compete(r, f))
                )
    return TaskRun(
        cells=context.counts.shape[0],
        classes=[],
        split=_split_sentence(task, size, shifts),
        headline=headline,
        chance=0.5 if shifts.are_memberships else 0.0,
        excluded=context.excluded | shifts.excluded,
        outcomes=outcomes,
        details={
            "test_share": 1 / task.folds,
            "perturbations": len(shifts.names),
            "genes": len(shifts.genes),
            "replicate_agreement": shifts.agreement,
        },
    )


def num_units(task: PerturbSeqTask, size: Size, models: list[Model]) -> int:
    """Return how many outcomes `run` asks its store for."""
    return len(contenders(models, task, size)) * size.seeds * task.folds


def contenders(models: list[Model], task: PerturbSeqTask, size: Size) -> list[Contender]:
    """Return who takes part in every fold; deletions in silico only where the size says so."""
    rows = [
        Contender("no change", "baseline", None, _no_change),
        Contender("train mean", "baseline", None, _train_mean),
        Contender("ridge on PCA", "baseline", None, _ridge_on_components),
        Contender("correlation", "baseline", None, _correlation),
        Contender("size of training shifts", "baseline", None, _training_size, only_ranks=True),
        Contender("mean expression", "baseline", None, _mean_expression, only_ranks=True),
    ]
    if task.split == "combinations":
        rows.append(Contender("additive", "baseline", None, _additive))
    roles: tuple[Role, ...] = ("model", "twin")
    for model in models:
        for role in roles:
            for name, kind in ((RIDGE, "input"), ("ridge on contextual embedding", "context")):
                rows.append(Contender(name, role, model, _ridge_on(model, role, kind)))
            if size.max_cells_per_gene is not None:
                deleted = partial(_deletion, model, role)
                rows.append(Contender("in silico deletion", role, model, deleted, only_ranks=True))
        name = f"shuffled genes, {RIDGE}"
        rows.append(Contender(name, "control", model, _ridge_on(model, "model", "input")))
    return rows


def ridge(features: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return float64 [wanted, genes]: shifts by a ridge regression on features of perturbations.

    One penalty for all genes, by leave-one-out on the training perturbations. A feature that is NaN
    takes its mean over them: a perturbation of which nothing is known gets about the mean shift.

    Parameters
    ----------
    features, values
        float [training perturbations, features] and [training perturbations, genes].
    wanted
        float [test perturbations, features].
    """
    known = np.isfinite(features)
    mean = np.where(known, features, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    scaler = StandardScaler().fit(np.where(known, features, mean))
    x = scaler.transform(np.where(known, features, mean))
    # Errors depend on inner products of rows alone: as many columns as rows do for the penalty.
    spread, axes = np.linalg.eigh(values @ values.T)
    penalty = RidgeCV(_ALPHAS).fit(x, axes * np.sqrt(np.maximum(spread, 0))).alpha_
    found = Ridge(penalty).fit(x, values)
    return found.predict(scaler.transform(np.where(np.isfinite(wanted), wanted, mean)))


def _load(task: PerturbSeqTask, size: Size, bench: Bench) -> tuple[Shifts, TaskCells]:
    """Return measured shifts and context cells, at most `size.max_cells` of them."""

    def load(cells: Any, columns: tuple[str, ...], most: int | None) -> TaskCells:
        return load_cells(cells, columns, bench.models, bench.data, most, bench.seed)

    if task.signatures:
        context = load(task.cells, (), size.max_cells)
        shifts = memberships(read_edges(task.signatures, bench.data))
    else:
        columns = (task.perturbation, *([task.replicate] if task.replicate else []))
        measured = load(task.cells, columns, None)
        shifts = measure_shifts(measured, task)
        if task.context:
            context = load(task.context, (), size.max_cells)
        else:
            is_control = (measured.metadata[task.perturbation] == task.control).to_numpy()
            context = measured.subset(_drawn(np.flatnonzero(is_control), size, bench.seed))
    return _with_known_genes(shifts, context, task, bench.models), context


def _drawn(cells: np.ndarray, size: Size, seed: int) -> np.ndarray:
    if size.max_cells is None or len(cells) <= size.max_cells:
        return cells
    return np.sort(np.random.default_rng(seed).choice(cells, size.max_cells, replace=False))


def _with_known_genes(
    shifts: Shifts, context: TaskCells, task: PerturbSeqTask, models: list[Model]
) -> Shifts:
    """Return shifts of perturbations that all vocabularies know.

    Of signatures, only genes that the context detects: what is not expressed at all is too easily
    told from what moves.
    """
    known = np.array(
        [
            all((m.reading_vocabulary.tokens_of(list(p)) >= 0).all() for m in models)
            for p in shifts.perturbed
        ]
    )
    genes = np.ones(len(shifts.genes), dtype=bool)
    if task.signatures:
        vocabulary = models[0].reading_vocabulary
        detected = np.asarray(context.counts.sum(axis=0)).ravel() > 0
        read = np.array([g for g, d in zip(context.genes, detected, strict=True) if d])
        genes &= np.isin(shifts.genes, read) & (vocabulary.tokens_of(shifts.genes) >= 0)
        # A signature of no gene, or of all, ranks nothing.
        moved = shifts.values[:, genes].sum(axis=1)
        known &= (moved > 0) & (moved < genes.sum())
    why = {
        "perturbations: of genes outside of a vocabulary, or without a gene": int((~known).sum()),
        "genes: not detected in the cells that are looked at": int((~genes).sum()),
    }
    if known.sum() < task.folds or not genes.any():
        raise ValueError(
            f"{task.name}: {int(known.sum())} perturbations of genes that the vocabulary knows, "
            f"fewer than {task.folds} folds; check `gene_ids`, or give --gene-names"
        )
    return shifts.restrict(genes, known, why)


def _key(row: Contender, fold: Fold) -> dict[str, Any]:
    """Return all that decides an outcome."""
    chosen = hashlib.sha256(repr((fold.train.tolist(), fold.test.tolist())).encode())
    genes = fold.genes
    return {
        "contender": row.name,
        "role": row.role,
        "model": [row.model.name, row.model.digest] if row.model else None,
        "vocabulary": genes.models[0].reading_vocabulary.sha256,
        "fold": fold.number,
        "seed": fold.seed,
        "split": chosen.hexdigest(),
        "context": genes.cells.digest,
        "shifts": fold.shifts.digest,
        "bf16": genes.bench.bf16 if row.model else None,
    }


def _compete(row: Contender, fold: Fold) -> Outcome:
    started = time.perf_counter()
    predicted = row.predict(fold)
    seconds = time.perf_counter() - started
    if row.role == "control":
        scores = _score_shuffled(predicted, fold)
    else:
        scores = score_predictions(predicted, fold, row.only_ranks)
        if not row.only_ranks:
            scores["rank_of_truth"] = _rank_of_truth(predicted, fold)
    return Outcome(
        row.name, row.role, row.model.name if row.model else None, fold.number,
        {k: v if math.isfinite(v) else None for k, v in scores.items()},
        seconds, {"test_perturbations": len(fold.test)},
    )  # fmt: skip


def score_predictions(predicted: np.ndarray, fold: Fold, only_ranks: bool) -> dict[str, float]:
    """Return the mean over a fold's test perturbations of the scores of `shift_scores`.

    Ranks say nothing of shifts: they have AUROC and AUPRC of the affected genes only. The perturbed
    genes themselves are not scored.
    """
    shifts = fold.shifts
    typical = shifts.values[fold.train].mean(axis=0)
    found = []
    for p, row in zip(fold.test, predicted, strict=True):
        keep = shifts.scored_genes(p)
        measured = shifts.values[p, keep]
        strength = row if only_ranks or shifts.are_memberships else np.abs(row)
        scores = score_ranking(affected_genes(measured), strength[keep])
        if not (only_ranks or shifts.are_memberships):
            scores |= score_shift(measured, row[keep], typical[keep])
        found.append(scores)
    return {k: _mean([f[k] for f in found]) for k in found[0]}


def _rank_of_truth(predicted: np.ndarray, fold: Fold) -> float:
    """Return the mean rank, of residuals: what all perturbations share tells none from another."""
    values = fold.shifts.values
    typical = values[fold.train].mean(axis=0)
    return _mean(rank_of_truth(values[fold.test] - typical, predicted - typical).tolist())


def _score_shuffled(predicted: np.ndarray, fold: Fold) -> dict[str, float]:
    """Return mean scores of predictions whose genes were shuffled: they must be those of chance."""
    rng = np.random.default_rng([fold.seed, fold.number])
    found = [
        score_predictions(predicted[:, rng.permutation(predicted.shape[1])], fold, False)
        for _ in range(_NUM_SHUFFLES)
    ]
    # Distances, and what is measured against the mean of training, have no chance of their own.
    kept = [k for k in found[0] if k.startswith(("pearson_delta", "auroc", "auprc"))]
    return {k: _mean([f[k] for f in found]) for k in kept}


def _mean(values: list[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return float(np.mean(known)) if known else math.nan


def _no_change(fold: Fold) -> np.ndarray:
    return np.zeros((len(fold.test), len(fold.shifts.genes)))


def _train_mean(fold: Fold) -> np.ndarray:
    return np.tile(fold.shifts.values[fold.train].mean(axis=0), (len(fold.test), 1))


def _training_size(fold: Fold) -> np.ndarray:
    """Return how much genes move in training, whatever is perturbed: a list of usual suspects."""
    return np.tile(np.abs(fold.shifts.values[fold.train]).mean(axis=0), (len(fold.test), 1))


def _mean_expression(fold: Fold) -> np.ndarray:
    genes = fold.genes
    tokens = genes.tokens(genes.models[0], fold.shifts.genes)
    mean = np.asarray(genes.expression.mean(axis=1)).ravel()
    return np.tile(np.where(tokens >= 0, mean[np.maximum(tokens, 0)], 0), (len(fold.test), 1))


def _additive(fold: Fold) -> np.ndarray:
    """Return sums of the shifts of single perturbations; an unmeasured one gets the mean single."""
    shifts = fold.shifts
    single = {shifts.perturbed[i][0]: i for i in fold.train if len(shifts.perturbed[i]) == 1}
    if not single:
        return _train_mean(fold)
    mean = shifts.values[list(single.values())].mean(axis=0)
    return np.stack(
        [
            np.sum([shifts.values[single[g]] if g in single else mean for g in genes], axis=0)
            for genes in (shifts.perturbed[i] for i in fold.test)
        ]
    )


def _by_perturbation(fold: Fold, features: Callable[[list[str]], np.ndarray]) -> np.ndarray:
    """Return float64 [perturbations, features]: sums over the genes that each perturbs."""
    genes = sorted({g for p in fold.shifts.perturbed for g in p})
    place = {g: i for i, g in enumerate(genes)}
    found = features(genes)
    return np.stack([found[[place[g] for g in p]].sum(axis=0) for p in fold.shifts.perturbed])


def _ridge(fold: Fold, features: Callable[[list[str]], np.ndarray]) -> np.ndarray:
    known = _by_perturbation(fold, features)
    return ridge(known[fold.train], fold.shifts.values[fold.train], known[fold.test])


def _ridge_on_components(fold: Fold) -> np.ndarray:
    return _ridge(fold, fold.genes.components)


def _ridge_on(model: Model, role: Role, kind: str) -> Callable[[Fold], np.ndarray]:
    def predict(fold: Fold) -> np.ndarray:
        return _ridge(fold, lambda genes: fold.genes.embedding(model, role, kind, genes))

    return predict


def _deletion(model: Model, role: Role, fold: Fold) -> np.ndarray:
    """Return how far the states of genes move when the perturbed gene is deleted from cells.

    Nothing is trained. Sums over several perturbed genes; 0 where two genes are never met together.
    """
    context = fold.genes
    perturbed = sorted({g for i in fold.test for g in fold.shifts.perturbed[i]})
    cells = genes_of(model, context.cells.tokens[model.name])
    tokens = context.tokens(model, perturbed)
    held = chosen_holders(cells, tokens, context.most_cells, context.seed)
    engine = engine_of(model, context.seed if role == "twin" else None, context.bench)
    moved = np.nan_to_num(gene_effects(engine, cells, tokens, held))
    wanted = context.tokens(model, fold.shifts.genes)
    found = np.where(wanted >= 0, moved[:, np.maximum(wanted, 0)], 0)
    place = {g: i for i, g in enumerate(perturbed)}
    return np.stack(
        [found[[place[g] for g in fold.shifts.perturbed[i]]].sum(axis=0) for i in fold.test]
    )


def _correlation(fold: Fold) -> np.ndarray:
    """Return correlations with the perturbed gene, scaled by least squares on training shifts.

    The scale carries the sign: genes that go with a gene fall when it is knocked down.
    """
    of = _by_perturbation(fold, lambda genes: fold.genes.correlated(genes, fold.shifts.genes))
    known = of[fold.train]
    norm = float((known**2).sum())
    scale = float((known * fold.shifts.values[fold.train]).sum()) / norm if norm else 0.0
    return scale * of[fold.test]


def _split_sentence(task: PerturbSeqTask, size: Size, shifts: Shifts) -> str:
    what = {
        "genes": "genes: no test perturbation is of genes that training saw alone",
        "combinations": "combinations; single perturbations are all trained on",
    }
    how = f"{len(shifts.names)} perturbations, {len(shifts.genes)} genes; {task.folds} folds over "
    how += what[task.split]
    if shifts.agreement is not None:
        how += f"; two replicates agree with r = {shifts.agreement:.2f}"
    return how + (f"; {size.seeds} repetitions" if size.seeds > 1 else "")

"""Context specificity: do the states of genes with a role in few cell types differ more by type?

The paper's example is NOTCH1 against GAPDH. Nothing is trained: genes are ordered by how far apart
their states are in cells of different types, beyond what they are within a type.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import scipy.sparse
from scipy.stats import false_discovery_control

from eval.benchmark.contest.verdicts import ZERO_SHOT
from eval.benchmark.kinds.cell_tasks import usable_cells
from eval.benchmark.matched.matched_genes import (
    MATCHED,
    Contender,
    Fold,
    GenePairs,
    Scored,
    compete,
    matched_baselines,
    pair_genes,
    score_pairs,
    shuffled_control,
)
from eval.benchmark.material.gene_features import expression_of_tokens, ranks_of_tokens
from eval.benchmark.material.models_and_cells import Bench, Model, TaskCells, load_cells
from eval.benchmark.material.twin_encoders import OncePerEncoder, encoder_of
from eval.benchmark.outcome import Role, TaskRun
from eval.benchmark.scoring.gene_scores import HEADLINE
from eval.benchmark.task_file import ContextTask, Size
from eval.cells.specificity import (
    GeneStates,
    between_minus_within,
    gene_states,
    permuted_types,
    spread_of_states,
)

_FEWEST_OF_TYPE = 3
_NUM_PERMUTATIONS = 199
_FALSE_DISCOVERIES = 0.05
# The second-to-last layer, as in `geneloom embed`.
_LAYER = -1


class _World:
    """Cells, their types and donors, and states of the paired genes, each computed once."""

    def __init__(self, cells: TaskCells, task: ContextTask, bench: Bench) -> None:
        self.cells, self.bench = cells, bench
        self.types = cells.codes(task.label)
        self.donors = cells.codes(task.donor)
        self._states: OncePerEncoder[GeneStates] = OncePerEncoder()
        self._permuted: OncePerEncoder[np.ndarray] = OncePerEncoder()

    def is_usable(self, model: Model) -> np.ndarray:
        """Return bool [num_tokens]: in 3 cells of each of two types of one donor."""
        has = ranks_of_tokens(self.cells.tokens[model.name], model.vocabulary) > 0
        strata = self.donors * (self.types.max() + 1) + self.types
        counts = (has @ _indicator(strata)).toarray() >= _FEWEST_OF_TYPE
        donor_of = np.arange(counts.shape[1]) // (self.types.max() + 1)
        per_donor = [counts[:, donor_of == d].sum(axis=1) >= 2 for d in np.unique(self.donors)]
        return np.any(per_donor, axis=0)

    def states(self, model: Model, twin_seed: int | None, tokens: np.ndarray) -> GeneStates:
        return self._states.get(
            model,
            twin_seed,
            lambda: gene_states(
                self.cells.tokens[model.name], encoder_of(model, twin_seed), model.vocabulary,
                tokens, max(_LAYER, 1 - model.network.config.num_hidden_layers),
                device=self.bench.device, bf16=self.bench.bf16,
            ),
        )  # fmt: skip

    def permuted(self, model: Model, pairs: GenePairs) -> np.ndarray:
        """Return float64 [1 + permutations, genes]: by the types, then by shuffled ones."""

        def compute() -> np.ndarray:
            rng = np.random.default_rng(self.bench.seed)
            found = self.states(model, None, pairs.tokens[model.name])
            return np.column_stack(
                [self._specificity(found, g, rng) for g in range(len(pairs.ids))]
            )

        return self._permuted.get(model, None, compute)

    def specificity(self, found: GeneStates, genes: np.ndarray) -> np.ndarray:
        """Return float64 [genes]."""
        return np.array([self._specificity(found, g, None)[0] for g in genes])

    def _specificity(
        self, found: GeneStates, gene: int, rng: np.random.Generator | None
    ) -> np.ndarray:
        cells, states = found.of(gene)
        types, donors = self.types[cells], self.donors[cells]
        labellings = permuted_types(types, donors, _NUM_PERMUTATIONS, rng) if rng else types[None]
        return between_minus_within(states, labellings, donors)


def run(task: ContextTask, size: Size, bench: Bench) -> TaskRun:
    """Return the outcomes of all contenders, one fold a seed; see `matched_genes.compete`.

    Raises
    ------
    ValueError
        The cells or lists cannot be had, fewer than two types, or fewer than 10 pairs of genes.
    """
    columns = (task.label, *([task.donor] if task.donor else []))
    loaded = load_cells(task.cells, columns, bench.models, bench.data, size.max_cells, bench.seed)
    cells, excluded = usable_cells(loaded, task.label, None)
    world = _World(cells, task, bench)
    pairs = pair_genes(task, cells, bench, world.is_usable)
    pairs.excluded.update({f"cells: {k}": v for k, v in excluded.items()})
    return compete(task, size, bench, cells, pairs, _contenders(bench.models, world, pairs))


def num_units(task: ContextTask, size: Size, models: list[Model]) -> int:
    """Return how many outcomes `run` stores."""
    return size.seeds * (len(MATCHED) + 2 + 5 * len(models))


def _contenders(models: list[Model], world: _World, pairs: GenePairs) -> list[Contender]:
    rows = matched_baselines(pairs)
    tokens = pairs.tokens[models[0].name]
    for name, profiles in (
        ("expression", _expression(world.cells, models[0])),
        ("rank", ranks_of_tokens(world.cells.tokens[models[0].name], models[0].vocabulary)),
    ):
        spread = _spread_over_types(profiles[tokens], world, name == "rank")
        score = partial(_taken, spread)
        rows.append(Contender(f"spread of {name} over types", "baseline", None, score))
    roles: tuple[Role, ...] = ("model", "twin")
    for model in models:
        for role in roles:
            score = partial(_zero_shot, world, pairs, model, role)
            rows.append(Contender(ZERO_SHOT, role, model, score))
            score = partial(_spread, world, pairs, model, role)
            rows.append(Contender("spread over all cells", role, model, score))
        own = Contender(ZERO_SHOT, "model", model, partial(_true_types, world, pairs, model))
        rows.append(shuffled_control(own))
    return rows


def _taken(values: np.ndarray, fold: Fold) -> Scored:
    return Scored(values[fold.genes])


def _zero_shot(world: _World, pairs: GenePairs, model: Model, role: Role, fold: Fold) -> Scored:
    if role == "twin":
        found = world.states(model, fold.seed, pairs.tokens[model.name])
        return Scored(world.specificity(found, fold.genes))
    every = world.permuted(model, pairs)
    p = (1 + (every[1:] >= every[0]).sum(axis=0)) / len(every)
    q = false_discovery_control(p)
    cells = np.diff(world.states(model, None, pairs.tokens[model.name]).start)
    listed, partner = (q[part] <= _FALSE_DISCOVERIES for part in fold.genes.reshape(2, -1))
    genes = {
        pairs.ids[g]: {
            "symbol": pairs.symbols[g], "listed": bool(g < pairs.num_pairs),
            "cells": int(cells[g]), "specificity": float(f"{every[0, g]:.6g}"),
            "p": float(p[g]), "q": float(f"{q[g]:.6g}"),
        }
        for g in fold.genes
    }  # fmt: skip
    scores = {"significant_listed": float(listed.mean())}
    scores |= {"significant_others": float(partner.mean())}
    # No control: where listed genes are spread more, their skewed null lies below 0 more often.
    null = [score_pairs(fold.labels, v)[HEADLINE] for v in every[1:, fold.genes]]
    scores |= {f"{HEADLINE}_shuffled_types": float(np.mean(null))}
    return Scored(every[0, fold.genes], scores, {"genes": genes})


def _spread(world: _World, pairs: GenePairs, model: Model, role: Role, fold: Fold) -> Scored:
    found = world.states(model, fold.twin_seed(role), pairs.tokens[model.name])
    values = [
        spread_of_states(states, world.donors[cells]) for cells, states in map(found.of, fold.genes)
    ]
    return Scored(np.array(values))


def _true_types(world: _World, pairs: GenePairs, model: Model, fold: Fold) -> Scored:
    return Scored(world.permuted(model, pairs)[0, fold.genes])


def _expression(cells: TaskCells, model: Model) -> scipy.sparse.csr_matrix:
    return expression_of_tokens(cells.counts, cells.genes, model.reading_vocabulary)


def _indicator(groups: np.ndarray) -> scipy.sparse.csr_matrix:
    """Return CSR float32 [cells, groups]."""
    ones = np.ones(len(groups), dtype=np.float32)
    return scipy.sparse.csr_matrix((ones, (np.arange(len(groups)), groups)))


def _spread_over_types(
    profiles: scipy.sparse.csr_matrix, world: _World, where_found: bool
) -> np.ndarray:
    """Return float64 [genes]: standard deviation over types of their means, mean over donors.

    Parameters
    ----------
    profiles
        [genes, cells].
    where_found
        Means over the cells that have the gene; types without one do not count. Else over all.
    """
    spreads = []
    for donor in np.unique(world.donors):
        cells = np.flatnonzero(world.donors == donor)
        types = _indicator(np.unique(world.types[cells], return_inverse=True)[1])
        part = profiles[:, cells]
        sums = (part @ types).toarray()
        number = ((part > 0) @ types).toarray() if where_found else types.sum(axis=0)
        number = np.broadcast_to(np.asarray(number), sums.shape)
        means = np.divide(sums, number, out=np.full(sums.shape, np.nan), where=number > 0)
        spreads.append(np.where(np.isfinite(means).sum(axis=1) > 1, _std(means), np.nan))
    return np.nan_to_num(_mean(np.array(spreads)))


def _std(means: np.ndarray) -> np.ndarray:
    values = np.ma.masked_invalid(means)
    return np.ma.filled(values.std(axis=1), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    return np.ma.filled(np.ma.masked_invalid(values).mean(axis=0), np.nan)

"""Perturbation tasks: genes edited in silico, ordered by where the edit takes the cells.

Listed genes stand beside partners of nearly the same rank, expression and detection in the cells
that are edited (`matched_genes`), for an edit of any highly ranked gene moves a cell far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import scipy.sparse
from sklearn.linear_model import LogisticRegression

from eval.benchmark.contest.verdicts import ZERO_SHOT
from eval.benchmark.matched.matched_genes import (
    MATCHED,
    Contender,
    Fold,
    GenePairs,
    Scored,
    compete,
    matched_baselines,
    pair_genes,
    shuffled_control,
)
from eval.benchmark.material.gene_features import expression_of_tokens
from eval.benchmark.material.in_silico import (
    cell_effects,
    chosen_holders,
    engine_of,
    genes_of,
)
from eval.benchmark.material.models_and_cells import Bench, Model, TaskCells, load_cells
from eval.benchmark.material.twin_encoders import OncePerEncoder
from eval.benchmark.neighbours.gene_correlation import correlations
from eval.benchmark.outcome import Role, TaskRun
from eval.benchmark.task_file import PerturbationTask, Size
from eval.perturb.screen.compare_copies import centroid
from eval.perturb.screen.edits import Edit

_GOAL = "goal"
# Rises with a gene: what an edit of this kind does to it.
_SIGN = {"delete": -1.0, "inhibit": -1.0, "overexpress": 1.0, "activate": 1.0}
_MOST_CELLS_A_STATE = 200


class World:
    """Cells of the states, the genes that are edited, and what is known of them, each once.

    Attributes
    ----------
    start
        int positions of the cells that are edited.
    """

    def __init__(self, task: PerturbationTask, size: Size, cells: TaskCells, bench: Bench) -> None:
        """Take the cells of all states.

        Raises
        ------
        ValueError
            A state has no cells.
        """
        self.task, self.size, self.cells, self.bench = task, size, cells, bench
        number = cells.counts.shape[0]
        self.donors = cells.codes(task.donor)
        self.in_start = np.ones(number, dtype=bool)
        self.in_goal = np.zeros(number, dtype=bool)
        if task.states:
            state = cells.metadata[task.states.key].to_numpy(dtype=str)
            self.in_start, self.in_goal = state == task.states.start, state == task.states.goal
            for name, found in (
                (task.states.start, self.in_start),
                (task.states.goal, self.in_goal),
            ):
                if not found.any():
                    raise ValueError(
                        f"{task.name}: no cell has '{name}' in '{task.states.key}' (it holds "
                        f"{', '.join(sorted(set(state))[:8])}); correct `states`"
                    )
        self.start = np.flatnonzero(self.in_start)
        self._known: OncePerEncoder[np.ndarray] = OncePerEncoder()

    def is_usable(self, model: Model) -> np.ndarray:
        """Return bool [num_tokens]: genes in enough of the cells that are edited.

        A gene that is inserted may be in any of the cells.
        """
        places = range(len(self.in_start)) if self.task.edit == "overexpress" else self.start
        tokens = self.cells.tokens[model.name]
        count = np.zeros(model.vocabulary.num_tokens, dtype=int)
        for place in places:
            count[tokens[place]] += 1
        return count >= self.task.min_cells

    def effects(self, model: Model, twin_seed: int | None, tokens: np.ndarray) -> np.ndarray:
        """Return float64 [tokens]: mean change toward the goal, or mean shift without a goal."""
        engine = engine_of(model, twin_seed, self.bench)
        genes = genes_of(model, self.cells.tokens[model.name])
        column = "shift"
        if self.task.states:
            goal = self._some(np.flatnonzero(self.in_goal))
            states = centroid(engine.embed([genes[i] for i in goal]), self.donors[goal])
            engine.set_centroids({_GOAL: states})
            column = f"toward_{_GOAL}"
        edited = [genes[i] for i in self.start]
        most, seed = self.size.max_cells_per_gene, self.bench.seed
        if self.task.edit == "overexpress":
            order = np.random.default_rng(seed).permutation(len(edited))[:most]
            cells = [np.sort(order)] * len(tokens)
        else:
            cells = chosen_holders(edited, tokens, most, seed)
        donors = self.donors[self.start]
        edit = Edit(self.task.edit)
        return cell_effects(engine, edited, donors, tokens, cells, edit, column)

    def _some(self, cells: np.ndarray) -> np.ndarray:
        """Return cells that a centroid is made of: few hundred place it well enough."""
        rng = np.random.default_rng(self.bench.seed)
        return np.sort(rng.permutation(cells)[:_MOST_CELLS_A_STATE])

    def model_effects(self, model: Model, tokens: np.ndarray) -> np.ndarray:
        """Return `effects` of the pretrained model, computed once for all folds."""
        return self._known.get(model, None, lambda: self.effects(model, None, tokens))

    @cached_property
    def expression(self) -> scipy.sparse.csr_matrix:
        """CSR float32 [tokens of the first model, cells], log-normalised."""
        first = self.bench.models[0]
        return expression_of_tokens(self.cells.counts, self.cells.genes, first.reading_vocabulary)

    @cached_property
    def both(self) -> np.ndarray:
        """int positions of the cells of both states."""
        return np.flatnonzero(self.in_start | self.in_goal)


def run(task: PerturbationTask, size: Size, bench: Bench) -> TaskRun:
    """Return the outcomes of all contenders, one fold a seed; see `matched_genes.compete`.

    Raises
    ------
    ValueError
        The cells or lists cannot be had, a state has no cells, or fewer than 10 pairs of genes.
    """
    columns = [task.donor] if task.donor else []
    columns += [task.states.key] if task.states else []
    cells = load_cells(
        task.cells, tuple(columns), bench.models, bench.data, size.max_cells, bench.seed
    )
    world = World(task, size, cells, bench)
    # Alike in the cells that are edited; genes that are inserted, in all cells.
    alike = cells if task.edit == "overexpress" else cells.subset(world.start)
    pairs = pair_genes(task, alike, bench, world.is_usable)
    pairs = fewer_pairs(pairs, size.max_perturbed, bench.seed)
    return compete(task, size, bench, cells, pairs, contenders(world, pairs))


def num_units(task: PerturbationTask, size: Size, models: list[Model]) -> int:
    """Return how many outcomes `run` asks its store for."""
    return size.seeds * (len(MATCHED) + len(_baselines(task)) + 3 * len(models))


def fewer_pairs(pairs: GenePairs, most_genes: int | None, seed: int) -> GenePairs:
    """Return pairs with at most so many genes in all, drawn with `seed`."""
    half = pairs.num_pairs
    if most_genes is None or 2 * half <= most_genes:
        return pairs
    chosen = np.sort(np.random.default_rng(seed).permutation(half)[: most_genes // 2])
    both = np.concatenate([chosen, half + chosen])
    return replace(
        pairs,
        ids=[pairs.ids[i] for i in both],
        symbols=[pairs.symbols[i] for i in both],
        tokens={name: tokens[both] for name, tokens in pairs.tokens.items()},
        static=pairs.static[both],
        excluded=pairs.excluded | {"pairs: not drawn": half - len(chosen)},
    )


def contenders(world: World, pairs: GenePairs) -> list[Contender]:
    """Return who takes part in every fold."""
    first = world.bench.models[0]
    tokens = pairs.tokens[first.name]

    def baseline(score: Callable[[World, np.ndarray], np.ndarray], fold: Fold) -> Scored:
        return Scored(score(world, tokens)[fold.genes])

    rows = [
        Contender(name, "baseline", None, partial(baseline, score))
        for name, score in _baselines(world.task).items()
    ]
    rows += matched_baselines(pairs)
    for model in world.bench.models:
        own = Contender(
            ZERO_SHOT, "model", model, partial(_zero_shot, world, pairs, model, "model")
        )
        twin = partial(_zero_shot, world, pairs, model, "twin")
        rows += [own, Contender(ZERO_SHOT, "twin", model, twin), shuffled_control(own)]
    return rows


def _zero_shot(world: World, pairs: GenePairs, model: Model, role: Role, fold: Fold) -> Scored:
    tokens = pairs.tokens[model.name]
    if role == "model":
        return Scored(world.model_effects(model, tokens)[fold.genes])
    return Scored(world.effects(model, fold.twin_seed(role), tokens[fold.genes]))


def _baselines(task: PerturbationTask) -> dict[str, Callable[[World, np.ndarray], np.ndarray]]:
    if task.states is None:
        return {"correlation with all genes": _connected}
    return {
        "differential expression": _fold_change,
        "correlation with the state": _correlation,
        "logistic regression": _coefficients,
    }


def _fold_change(world: World, tokens: np.ndarray) -> np.ndarray:
    """Return differences of mean log expression, in the direction that the edit takes a gene."""
    rows = world.expression[tokens]
    goal = np.asarray(rows[:, np.flatnonzero(world.in_goal)].mean(axis=1)).ravel()
    start = np.asarray(rows[:, world.start].mean(axis=1)).ravel()
    return _SIGN[world.task.edit] * (goal - start)


def _correlation(world: World, tokens: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation with being in the goal, in the direction of the edit."""
    state = scipy.sparse.csr_matrix(world.in_goal[world.both][None].astype(np.float32))
    stacked = scipy.sparse.vstack([world.expression[tokens][:, world.both], state]).tocsr()
    number = len(tokens)
    found = correlations(stacked, np.array([number]), np.arange(number))[0]
    return _SIGN[world.task.edit] * found


def _coefficients(world: World, tokens: np.ndarray) -> np.ndarray:
    """Return coefficients of a logistic regression of the goal on all genes' expression."""
    features = world.expression[:, world.both].T.tocsr()
    spread = np.sqrt(np.asarray(features.multiply(features).mean(axis=0)).ravel())
    scale = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
    model = LogisticRegression(max_iter=500, C=0.1, random_state=world.bench.seed)
    model.fit(features @ scipy.sparse.diags(scale), world.in_goal[world.both])
    return _SIGN[world.task.edit] * model.coef_[0][tokens]


def _connected(world: World, tokens: np.ndarray) -> np.ndarray:
    """Return the mean absolute correlation of a gene with all genes that are usable."""
    every = np.flatnonzero(np.diff(world.expression.indptr) >= world.task.min_cells)
    return np.abs(correlations(world.expression, tokens, every)).mean(axis=1)

"""Perturbation tasks: genes edited in silico, ordered by where the edit takes the cells.

Listed genes stand beside partners of nearly the same rank, expression and detection in the cells
that are edited (`matched_genes`), for an edit of any highly ranked gene moves a cell far.
"""

from __future__ import annotations

from functools import cached_property, partial

import numpy as np

from eval.benchmark.contest.contest import Contender, Fold, baselines
from eval.benchmark.contest.verdicts import ZERO_SHOT
from eval.benchmark.matched.matched_contest import MatchedContest, Ordered
from eval.benchmark.matched.matched_genes import MatchedPairs, fewer_pairs, pair_genes
from eval.benchmark.material.in_silico import cell_effects, chosen_holders, engine_of, genes_of
from eval.benchmark.material.models_and_cells import Model, TaskCells
from eval.benchmark.neighbours import state_baselines as baseline
from eval.benchmark.outcome import Role
from eval.benchmark.task_file import PerturbationTask
from eval.perturb.screen.compare_copies import centroid
from eval.perturb.screen.edits import Edit

_GOAL = "goal"
# Rises with a gene: what an edit of this kind does to it.
_SIGN = {"delete": -1.0, "inhibit": -1.0, "overexpress": 1.0, "activate": 1.0}
# Few hundred cells place a centroid well enough.
_MOST_CELLS_A_STATE = 200
_WITH_GOAL = {
    "differential expression": baseline.fold_change,
    "correlation with the state": baseline.correlation_with_goal,
    "logistic regression": baseline.coefficients_of_goal,
}


class Perturbation(MatchedContest[PerturbationTask]):
    """Genes are ordered by how far their edit moves cells toward the goal, or at all."""

    @cached_property
    def cells(self) -> TaskCells:
        """Cells of all states."""
        states = self.task.states
        columns = (self.task.donor, states.key if states else None)
        return self.bench.cells(self.task.cells, columns, self.size.max_cells)

    @cached_property
    def start_and_goal(self) -> tuple[np.ndarray, np.ndarray]:
        """bool [cells]: which are edited (all, where there are no states), which are the goal.

        Raises
        ------
        ValueError
            A state has no cells.
        """
        number, states = self.cells.counts.shape[0], self.task.states
        if states is None:
            return np.ones(number, dtype=bool), np.zeros(number, dtype=bool)
        state = self.cells.metadata[states.key].to_numpy(dtype=str)
        for name in (states.start, states.goal):
            if name not in state:
                raise ValueError(
                    f"{self.task.name}: no cell has '{name}' in '{states.key}' (it holds "
                    f"{', '.join(sorted(set(state))[:8])}); correct `states`"
                )
        return state == states.start, state == states.goal

    @cached_property
    def start(self) -> np.ndarray:
        """int positions of the cells that are edited."""
        return np.flatnonzero(self.start_and_goal[0])

    @cached_property
    def pairs(self) -> MatchedPairs:
        """Genes alike in the cells that are edited; genes that are inserted, in all cells."""
        inserted = self.task.edit == "overexpress"
        alike = self.cells if inserted else self.cells.subset(self.start)
        pairs = pair_genes(self.task, alike, self.bench, self.is_usable)
        return fewer_pairs(pairs, self.size.max_perturbed, self.bench.seed)

    def is_usable(self, model: Model) -> np.ndarray:
        """Return bool [num_tokens]: genes in enough of the cells that are edited.

        A gene that is inserted may be in any of the cells.
        """
        tokens = self.cells.tokens[model.name]
        places = range(len(tokens)) if self.task.edit == "overexpress" else self.start
        count = np.zeros(model.vocabulary.num_tokens, dtype=int)
        for place in places:
            count[tokens[place]] += 1
        return count >= self.task.min_cells

    def contenders(self) -> list[Contender[Fold]]:
        """Return every model's edits, and what goes with the goal without any edit."""
        names = _WITH_GOAL if self.task.states else ("correlation with all genes",)
        rows = baselines({n: partial(self.without_model, n) for n in names})
        rows += self.matched_baselines()
        for model in self.models:
            own, twin = (
                Contender(ZERO_SHOT, role, model, partial(self.edited, model, role))
                for role in ("model", "twin")
            )
            rows += [own, twin, self.shuffled_control(own)]
        return rows

    def without_model(self, name: str, fold: Fold) -> Ordered:
        """Order genes by a baseline, in the direction that the edit takes a gene."""
        start, goal = self.start_and_goal
        tokens = self.pairs.tokens[self.models[0].name]

        def make() -> np.ndarray:
            expression = self.expression_of(self.cells)
            if name not in _WITH_GOAL:
                return baseline.connection(expression, tokens, self.task.min_cells)
            found = _WITH_GOAL[name](expression, tokens, start, goal, self.bench.seed)
            return _SIGN[self.task.edit] * found

        return Ordered(self.once.get(name, None, make)[fold.test])

    def edited(self, model: Model, role: Role, fold: Fold) -> Ordered:
        """Order genes by their edit; the pretrained model edits all of them once."""
        tokens = self.pairs.tokens[model.name]
        if role == "twin":
            return Ordered(self.effects(model, fold.seed, tokens[fold.test]))
        every = self.once.get(model.name, None, lambda: self.effects(model, None, tokens))
        return Ordered(every[fold.test])

    def effects(self, model: Model, twin_seed: int | None, tokens: np.ndarray) -> np.ndarray:
        """Return float64 [tokens]: mean change toward the goal, or mean shift without a goal."""
        engine, seed = engine_of(model, twin_seed, self.bench), self.bench.seed
        genes = genes_of(model, self.cells.tokens[model.name])
        donors = self.cells.codes(self.task.donor)
        column = "shift"
        if self.task.states:
            goal = np.random.default_rng(seed).permutation(np.flatnonzero(self.start_and_goal[1]))
            goal = np.sort(goal[:_MOST_CELLS_A_STATE])
            states = centroid(engine.embed([genes[i] for i in goal]), donors[goal])
            engine.set_centroids({_GOAL: states})
            column = f"toward_{_GOAL}"
        edited, most = [genes[i] for i in self.start], self.size.max_cells_per_gene
        if self.task.edit == "overexpress":
            order = np.random.default_rng(seed).permutation(len(edited))[:most]
            cells = [np.sort(order)] * len(tokens)
        else:
            cells = chosen_holders(edited, tokens, most, seed)
        edit, of_start = Edit(self.task.edit), donors[self.start]
        return cell_effects(engine, edited, of_start, tokens, cells, edit, column)

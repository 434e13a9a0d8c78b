"""Context specificity: do the states of genes with a role in few cell types differ more by type?

The paper's example is NOTCH1 against GAPDH. Nothing is trained: genes are ordered by how far apart
their states are in cells of different types, beyond what they are within a type.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, partial

import numpy as np
from scipy.stats import false_discovery_control

from eval.benchmark.contest.contest import ROLES, Contender, Fold, baselines
from eval.benchmark.contest.verdicts import ZERO_SHOT
from eval.benchmark.matched.matched_contest import MatchedContest, Ordered, score_pairs
from eval.benchmark.matched.matched_genes import MatchedPairs
from eval.benchmark.material.gene_features import ranks_of_tokens
from eval.benchmark.material.labelled_cells import usable_cells
from eval.benchmark.material.models_and_cells import Model, TaskCells
from eval.benchmark.neighbours.spread_over_types import seen_in_two_types, spread_over_types
from eval.benchmark.outcome import Role
from eval.benchmark.scoring.gene_scores import HEADLINE
from eval.benchmark.task_file import ContextTask
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


class Context(MatchedContest[ContextTask]):
    """Genes are ordered by how much their states depend on the type of the cell."""

    @cached_property
    def usable(self) -> tuple[TaskCells, dict[str, int]]:
        """Cells with a type, and which were left out."""
        columns = (self.task.label, self.task.donor)
        loaded = self.bench.cells(self.task.cells, columns, self.size.max_cells)
        return usable_cells(loaded, self.task.label, None)

    @property
    def cells(self) -> TaskCells:
        """Cells with a type."""
        return self.usable[0]

    @cached_property
    def pairs(self) -> MatchedPairs:
        """Listed genes and their partners."""
        pairs = super().pairs
        pairs.excluded.update({f"cells: {k}": v for k, v in self.usable[1].items()})
        return pairs

    @cached_property
    def types_and_donors(self) -> tuple[np.ndarray, np.ndarray]:
        """Both int64 [cells]."""
        return self.cells.codes(self.task.label), self.cells.codes(self.task.donor)

    def is_usable(self, model: Model) -> np.ndarray:
        """Return bool [num_tokens]: in 3 cells of each of two types of one donor."""
        is_there = ranks_of_tokens(self.cells.tokens[model.name], model.vocabulary) > 0
        return seen_in_two_types(is_there, *self.types_and_donors, _FEWEST_OF_TYPE)

    def contenders(self) -> list[Contender[Fold]]:
        """Return differences by type, plain spread, and the same of expression and rank."""
        rows = self.matched_baselines()
        for name in ("expression", "rank"):
            spread = partial(self.spread_without_model, name)
            rows += baselines({f"spread of {name} over types": spread})
        for model in self.models:
            for role in ROLES:
                by_type = self.permuted_by_type if role == "model" else self.by_type
                rows.append(Contender(ZERO_SHOT, role, model, partial(by_type, model, role)))
                spread = partial(self.spread, model, role)
                rows.append(Contender("spread over all cells", role, model, spread))
            own = Contender(ZERO_SHOT, "model", model, partial(self.by_type, model, "model"))
            rows.append(self.shuffled_control(own))
        return rows

    def spread_without_model(self, name: str, fold: Fold) -> Ordered:
        """Order genes by the spread over types of their expression, or of their rank."""
        profiles = (self.ranks_of if name == "rank" else self.expression_of)(self.cells)
        own = profiles[self.pairs.tokens[self.models[0].name]]
        make = partial(spread_over_types, own, *self.types_and_donors, name == "rank")
        return Ordered(self.once.get(name, None, make)[fold.test])

    def states(self, model: Model, role: Role, fold: Fold) -> GeneStates:
        """Return the states of the paired genes in all cells, once for each encoder."""

        def make() -> GeneStates:
            return gene_states(
                self.cells.tokens[model.name], fold.encoder(model, role), model.vocabulary,
                self.pairs.tokens[model.name],
                max(_LAYER, 1 - model.network.config.num_hidden_layers),
                device=self.bench.device, bf16=self.bench.bf16,
            )  # fmt: skip

        return self.once.get(("states", model.name), fold.twin_seed(role), make)

    def differences(
        self, states: GeneStates, genes: Iterable[int], rng: np.random.Generator | None
    ) -> np.ndarray:
        """Return float64 [1 + permutations, genes]: by the types, then by shuffled ones."""
        types, donors = self.types_and_donors
        columns = []
        for cells, of_gene in map(states.of, genes):
            own, of_donor = types[cells], donors[cells]
            drawn = permuted_types(own, of_donor, _NUM_PERMUTATIONS, rng) if rng else own[None]
            columns.append(between_minus_within(of_gene, drawn, of_donor))
        return np.column_stack(columns)

    def permuted(self, model: Model, fold: Fold) -> np.ndarray:
        """Return `differences` of all genes by a pretrained model, with permutations, once."""
        rng, genes = np.random.default_rng(self.bench.seed), range(len(self.pairs.ids))
        make = partial(self.differences, self.states(model, "model", fold), genes, rng)
        return self.once.get(("permuted", model.name), None, make)

    def by_type(self, model: Model, role: Role, fold: Fold) -> Ordered:
        """Order genes by how much their states differ between types."""
        if role == "model":
            return Ordered(self.permuted(model, fold)[0, fold.test])
        return Ordered(self.differences(self.states(model, role, fold), fold.test, None)[0])

    def permuted_by_type(self, model: Model, role: Role, fold: Fold) -> Ordered:
        """Order genes as `by_type` does, and say which differ by more than shuffled types do."""
        every, pairs = self.permuted(model, fold), self.pairs
        p = (1 + (every[1:] >= every[0]).sum(axis=0)) / len(every)
        q = false_discovery_control(p)
        cells = np.diff(self.states(model, role, fold).start)
        listed, partner = (q[part] <= _FALSE_DISCOVERIES for part in fold.test.reshape(2, -1))
        genes = {
            pairs.ids[g]: {
                "symbol": pairs.symbols[g], "listed": bool(g < pairs.num_pairs),
                "cells": int(cells[g]), "specificity": float(f"{every[0, g]:.6g}"),
                "p": float(p[g]), "q": float(f"{q[g]:.6g}"),
            }
            for g in fold.test
        }  # fmt: skip
        # No control: where listed genes are spread more, their skewed null lies below 0 more often.
        labels = np.repeat([1, 0], len(fold.test) // 2)
        null = [score_pairs(labels, v)[HEADLINE] for v in every[1:, fold.test]]
        scores = {
            "significant_listed": float(listed.mean()),
            "significant_others": float(partner.mean()),
            f"{HEADLINE}_shuffled_types": float(np.mean(null)),
        }
        return Ordered(every[0, fold.test], scores, {"genes": genes})

    def spread(self, model: Model, role: Role, fold: Fold) -> Ordered:
        """Order genes by how far apart their states are, whatever the types."""
        states = self.states(model, role, fold)
        of_genes, donors = map(states.of, fold.test), self.types_and_donors[1]
        return Ordered(np.array([spread_of_states(s, donors[c]) for c, s in of_genes]))

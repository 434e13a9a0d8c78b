"""Targets tasks: which genes does a deleted regulator move, and are they its known targets?

Every target has a partner of nearly the same rank, expression and detection (`matched_genes`), for
any deletion moves highly ranked genes most, whoever regulates them.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.ensemble import RandomForestRegressor

from eval.benchmark.contest.contest import Contender, Results, draw_share
from eval.benchmark.contest.verdicts import ZERO_SHOT
from eval.benchmark.matched.deletions import DeletionContest, Draw, Values
from eval.benchmark.matched.hidden_genes import logit_effects
from eval.benchmark.matched.regulators import Regulator, choose_regulators
from eval.benchmark.material.in_silico import chosen_holders, engine_of, gene_effects, genes_of
from eval.benchmark.material.models_and_cells import Model
from eval.benchmark.neighbours.gene_correlation import correlations
from eval.benchmark.outcome import TaskRun
from eval.benchmark.task_file import TargetsTask
from pretrain.export.model_folder import random_twin

_TREES = 30
PARTIAL = "partial correlation"


class Targets(DeletionContest[TargetsTask]):
    """A fold is a draw of 80 % of the regulators."""

    readings = (ZERO_SHOT,)

    @cached_property
    def chosen(self) -> tuple[list[Regulator], dict[str, int]]:
        """Regulators with the most targets, and what was left out."""
        return choose_regulators(self.task, self.size, self.cells, self.edges, self.bench)

    @property
    def regulators(self) -> list[Regulator]:
        """Regulators with the most targets."""
        return self.chosen[0]

    def contenders(self) -> list[Contender[Draw]]:
        """Return deletions, and what goes with a regulator over cells."""
        names = ("correlation", "co-detection", "random forest importance")
        return self.rows_of(names if self.task.reading == "state" else (*names, PARTIAL))

    def folds(self, number: int) -> list[Draw]:
        """Return a draw of regulators, with all of their targets."""
        seed, total = self.seed_of(number), len(self.regulators)
        drawn = draw_share(total, np.random.default_rng(seed))
        genes = [np.arange(len(self.regulators[i].genes)) for i in drawn]
        return [Draw(number, seed, drawn, genes=genes)]

    def decides(self, contender: Contender[Draw], fold: Draw) -> dict[str, Any]:
        """Return what every deletion's outcome depends on, and how logits are read."""
        of_logits = {"logits": "of all genes"} if self.task.reading == "logit" else {}
        return super().decides(contender, fold) | of_logits

    def deleted(self, model: Model, twin_seed: int | None, drawn: np.ndarray) -> list[Values]:
        """Return how much each gene's state, or logit, changes when its regulator is deleted."""
        asked = [self.regulators[i] for i in drawn]
        genes = genes_of(model, self.cells.tokens[model.name])
        tokens = model.tokens_of([r.gene for r in asked])
        cells = chosen_holders(genes, tokens, self.size.max_cells_per_gene, self.bench.seed)
        if self.task.reading == "logit":
            network = model.network if twin_seed is None else random_twin(model.network, twin_seed)
            torch.nn.Module.to(network, device=torch.device(self.bench.device)).eval()
            moved = logit_effects(network, model.vocabulary, genes, tokens, cells, self.bench.seed)
        else:
            moved = gene_effects(engine_of(model, twin_seed, self.bench), genes, tokens, cells)
        return [[row[model.tokens_of(r.genes)] for row, r in zip(moved, asked, strict=True)]]

    def without_model(self, name: str) -> Values:
        """Return correlations over cells, of expression or detection, or a forest's importance."""
        if name == "random forest importance":
            return self._random_forest()
        profiles = self.expression_of(self.cells)
        if name == "co-detection":
            profiles = profiles.copy()
            profiles.data[:] = 1
        if name == PARTIAL:
            return self._partial(profiles)
        return self._together(profiles)

    def _together(self, profiles: scipy.sparse.csr_matrix) -> Values:
        """Return absolute correlations: a regulator may raise or lower its targets."""
        first = self.models[0]
        pairs = ((first.tokens_of([r.gene]), first.tokens_of(r.genes)) for r in self.regulators)
        return [np.abs(correlations(profiles, own, genes)[0]) for own, genes in pairs]

    def _partial(self, profiles: scipy.sparse.csr_matrix) -> Values:
        """Return absolute correlations given all other genes of the task.

        The precision is that of a covariance shrunk after Ledoit & Wolf (2004).
        """
        ids = sorted({g for r in self.regulators for g in (r.gene, *r.genes)})
        place = {gene: i for i, gene in enumerate(ids)}
        x = profiles[self.models[0].tokens_of(ids)].toarray().T
        x = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-9)
        precision = np.linalg.inv(ledoit_wolf(x)[0])
        scale = np.sqrt(np.diag(precision))
        partial = np.abs(precision / np.outer(scale, scale))
        return [partial[place[r.gene], [place[g] for g in r.genes]] for r in self.regulators]

    def _random_forest(self) -> Values:
        """Return how much a regulator helps to predict a gene from all regulators' expression.

        As GENIE3 (Huynh-Thu et al., PLoS ONE 2010), with fewer trees; a gene's own expression is
        left out where it is a regulator itself.
        """
        first, profiles = self.models[0], self.expression_of(self.cells)
        regulators = first.tokens_of([r.gene for r in self.regulators])
        x = profiles[regulators].toarray().T
        importance: dict[str, np.ndarray] = {}
        for gene in sorted({g for r in self.regulators for g in r.genes}):
            (token,) = first.tokens_of([gene])
            others = np.flatnonzero(regulators != token)
            forest = RandomForestRegressor(
                _TREES, max_features="sqrt", min_samples_leaf=3, random_state=self.bench.seed
            )
            y = profiles[[token]].toarray()[0]
            found = np.zeros(len(regulators))
            found[others] = forest.fit(x[:, others], y).feature_importances_
            importance[gene] = found
        return [
            np.array([importance[g][i] for g in r.genes]) for i, r in enumerate(self.regulators)
        ]

    def report(self, results: Results[Draw]) -> TaskRun:
        """Return the outcomes; a regulator's targets stand beside genes expressed alike."""
        task = self.task
        split = (
            f"{len(self.regulators)} regulators with {task.min_targets} to {task.max_targets} "
            "known targets, each beside a gene of nearly the same mean rank, mean expression and "
            f"detection rate; {self.size.seeds} seeds draw 80 % of the regulators each, the cells "
            "are the same. Nothing is trained. Subsamples overlap: intervals say how scores vary "
            "with regulators"
        )
        excluded = self.cells.excluded | self.chosen[1]
        return self.task_run(results, ["expressed alike", "target"], split, excluded)

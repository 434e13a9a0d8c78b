"""Cooperativity tasks: two regulators deleted together, against the sum of both deletions alone.

Genes that both regulate stand beside genes that only one of them regulates, of nearly the same
rank, expression and detection (`matched_genes`).
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from eval.benchmark.contest.contest import Contender, Results, draw_share
from eval.benchmark.contest.verdicts import ZERO_SHOT
from eval.benchmark.matched.deletions import DeletionContest, Draw, Values
from eval.benchmark.matched.regulators import Panel, Regulator, candidate_pairs, with_partners
from eval.benchmark.material.in_silico import chosen_holders, engine_of, gene_effects, genes_of
from eval.benchmark.material.models_and_cells import Model
from eval.benchmark.neighbours.gene_correlation import correlations
from eval.benchmark.outcome import TaskRun
from eval.benchmark.task_file import CooperativityTask


class Cooperativity(DeletionContest[CooperativityTask]):
    """A fold is a draw of 80 % of the genes of each pair of regulators."""

    # What a model says of a gene: how much more both deletions move it together than one by one
    # (this stands for the model), and the two that this is the difference of.
    readings = (ZERO_SHOT, "combined deletion", "sum of single deletions")

    @cached_property
    def regulators(self) -> list[Regulator]:
        """Pairs of regulators.

        Raises
        ------
        ValueError
            No pair of regulators has enough shared targets.
        """
        task, size, seed = self.task, self.size, self.bench.seed
        panel = Panel(self.cells, self.bench, size.max_cells_per_gene)
        candidates = candidate_pairs(task, self.edges, panel, seed)
        chosen = with_partners(candidates, panel, task, size.max_perturbed, seed)
        if not chosen:
            raise ValueError(
                f"{task.name}: no two regulators share {task.min_targets} targets that have "
                "partners in the cells that hold both. Use more cells, or another `min_targets` or "
                "`min_cells`"
            )
        return chosen

    def contenders(self) -> list[Contender[Draw]]:
        """Return deletions of both, and correlations with both."""
        return self.rows_of(("product of correlations", "sum of correlations"))

    def folds(self, number: int) -> list[Draw]:
        """Return every pair of regulators, with 80 % of its targets and their partners."""
        seed = self.seed_of(number)
        rng = np.random.default_rng(seed)
        genes = []
        for regulator in self.regulators:
            half = len(regulator.genes) // 2
            drawn = draw_share(half, rng)
            genes.append(np.concatenate([drawn, half + drawn]))
        return [Draw(number, seed, np.arange(len(self.regulators)), genes=genes)]

    def deleted(self, model: Model, twin_seed: int | None, drawn: np.ndarray) -> list[Values]:
        """Return, for each of `readings` and each pair, the values of its genes."""
        asked = [self.regulators[i] for i in drawn]
        genes = genes_of(model, self.cells.tokens[model.name])
        tokens = np.stack([model.tokens_of(_two(r)) for r in asked])
        # All three in the cells that hold both.
        cells = chosen_holders(genes, tokens, self.size.max_cells_per_gene, self.bench.seed)
        engine = engine_of(model, twin_seed, self.bench)
        combined, first, second = (
            gene_effects(engine, genes, edited, cells)
            for edited in (tokens, tokens[:, :1], tokens[:, 1:])
        )
        readings = (combined - (first + second), combined, first + second)
        places = [model.tokens_of(r.genes) for r in asked]
        return [[row[p] for row, p in zip(values, places, strict=True)] for values in readings]

    def without_model(self, name: str) -> Values:
        """Return the product or the sum of absolute correlations with both regulators."""
        first, found = self.models[0], []
        for regulator in self.regulators:
            own, genes = first.tokens_of(_two(regulator)), first.tokens_of(regulator.genes)
            both = np.abs(correlations(self.expression_of(self.cells), own, genes))
            found.append(both.prod(axis=0) if name.startswith("product") else both.sum(axis=0))
        return found

    def report(self, results: Results[Draw]) -> TaskRun:
        """Return the outcomes; shared targets stand beside targets of one regulator."""
        task = self.task
        split = (
            f"{len(self.regulators)} pairs of regulators with {task.min_targets} to "
            f"{task.max_targets} shared targets, each beside a gene that one of the two regulates, "
            "of nearly the same mean rank, mean expression and detection rate; "
            f"{self.size.seeds} seeds draw 80 % of the genes, the cells and regulators are the "
            "same. Nothing is trained. Subsamples overlap: intervals say how scores vary with the "
            "genes"
        )
        classes = ["regulated by one", "regulated by both"]
        return self.task_run(results, classes, split, self.cells.excluded)


def _two(regulator: Regulator) -> list[str]:
    """Return the ids of a pair's two regulators."""
    return regulator.gene.split("+")

"""Choose regulators with known target genes, and a matched partner gene for every target.

A benchmark deletes a regulator in silico and asks whether its targets respond more than their
partners. A partner is a gene with similar expression that the table does not list as a target;
without it, a model could score well only because targets are highly expressed. A regulator may
also be a set of genes that are deleted together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from eval.benchmark.matched.matched_genes import MATCHED, matched_features, nearest_pairs
from eval.benchmark.material.gene_pairs import GenePairs
from eval.benchmark.material.in_silico import chosen_holders, genes_of
from eval.benchmark.material.models_and_cells import Bench, TaskCells
from eval.benchmark.task_file import CooperativityTask, RegulatorsTask, Size, TargetsTask

FEWEST_REGULATORS = 3


@dataclass(frozen=True)
class Regulator:
    """A regulator; `genes` are the ids of its targets, then of their partners in the same order.

    `gene` is the id of the regulator, or the ids of genes that are deleted together, joined by +.
    `static` is float64 [genes, 3], the properties on which partners are matched, columns as in
    `matched_genes.MATCHED`.
    """

    gene: str
    genes: list[str]
    static: np.ndarray

    @property
    def is_target(self) -> np.ndarray:
        """bool [genes]."""
        return np.arange(len(self.genes)) < len(self.genes) // 2


@dataclass(frozen=True)
class Candidate:
    """A regulator that may be chosen, its usable targets, and the genes that may be partners.

    `own` are the genes of the regulator. All are positions in the first model's vocabulary.
    """

    own: tuple[int, ...]
    positive: np.ndarray
    negative: np.ndarray


class Panel:
    """Genes of the first model's vocabulary, and the cells whose tokens contain them.

    A gene that is expressed in a cell can be missing from a model's tokens, because the model cuts
    long cells.

    Attributes
    ----------
    ids
        str [genes], the gene ids.
    static
        float64 [genes, 3], the properties on which partners are matched, columns as in
        `matched_genes.MATCHED`; NaN for genes that are in no cell's tokens.
    """

    def __init__(self, cells: TaskCells, bench: Bench, most_cells: int | None) -> None:
        """Take the cells; a regulator is deleted in at most `most_cells` of them."""
        self._first, self._most, self._seed = bench.models[0], most_cells, bench.seed
        self._start = self._first.vocabulary.first_gene_token
        self.ids = np.array(self._first.vocabulary.genes, dtype=str)
        self._read = np.zeros(len(self.ids), dtype=bool)
        self._genes = {m.name: genes_of(m, cells.tokens[m.name]) for m in bench.models}
        read = np.unique(np.concatenate(self._genes[self._first.name])) - self._start
        self._read[read] = True
        self._tokens = {
            m.name: m.reading_vocabulary.tokens_of(self.ids.tolist()) for m in bench.models
        }
        self.static = np.full((len(self.ids), len(MATCHED)), np.nan)
        self.static[read] = matched_features(cells, self._first, read + self._start)

    def place(self, gene: str) -> int | None:
        """Return the position of a gene; None if no cell's tokens contain it."""
        own = int(self._first.reading_vocabulary.tokens_of([gene])[0]) - self._start
        return own if own >= 0 and self._read[own] else None

    def usable(self, own: tuple[int, ...], min_cells: int) -> np.ndarray:
        """Return bool [genes]: genes that occur together with `own` in enough cells.

        `own` are the positions of the regulator's genes, which are never usable themselves. Only
        the cells in which the regulator is deleted are counted, since all of its genes occur there.
        A gene must reach `min_cells` of these cells with every model.
        """
        usable = self._read.copy()
        usable[list(own)] = False
        for name, tokens in self._tokens.items():
            genes = self._genes[name]
            (held,) = chosen_holders(genes, tokens[[list(own)]], self._most, self._seed)
            usable &= _met([genes[c] for c in held], tokens, min_cells)
        return usable

    def flags(self, ids: list[str]) -> np.ndarray:
        """Return bool [genes]: those with these ids."""
        tokens = self._first.reading_vocabulary.tokens_of(ids) - self._start
        found = np.zeros(len(self.ids), dtype=bool)
        found[tokens[tokens >= 0]] = True
        return found


def choose_regulators(
    task: TargetsTask, size: Size, cells: TaskCells, pairs: GenePairs, bench: Bench
) -> tuple[list[Regulator], dict[str, int]]:
    """Return the regulators with the most usable targets, and how many were left out, by reason.

    A target is usable if its gene is in the vocabulary of every model and if, with every model, it
    is among the tokens of at least `min_cells` of the cells in which the regulator is deleted. Its
    partner is a gene that is usable too, but that the table `pairs` does not list as a target of
    this regulator.

    Raises
    ------
    ValueError
        Fewer than 3 regulators are left.
    """
    panel = Panel(cells, bench, size.max_cells_per_gene)
    sources = np.unique(pairs.source)
    possible = []
    for source in sources:
        own = panel.place(source)
        if own is None:
            continue
        usable = panel.usable((own,), task.min_cells)
        is_target = panel.flags(pairs.targets_of(source).tolist())
        is_partner = ~is_target
        if task.partners == "listed":
            is_partner &= panel.flags(pairs.others.get(str(source), []))
        positive, negative = np.flatnonzero(usable & is_target), np.flatnonzero(usable & is_partner)
        if len(positive) >= task.min_targets:
            possible.append(Candidate((own,), positive, negative))
    possible.sort(key=lambda p: -len(p.positive))
    found = with_partners(possible, panel, task, size.max_perturbed, bench.seed)
    if len(found) < FEWEST_REGULATORS:
        raise ValueError(
            f"{task.name}: {len(found)} regulators have {task.min_targets} targets with partners "
            f"in these cells; {FEWEST_REGULATORS} are needed. Use more cells, or another "
            "`min_targets` or `min_cells`"
        )
    excluded = {
        "regulators: too few targets in these cells": len(sources) - len(possible),
        "regulators: not among those with the most targets": len(possible) - len(found),
    }
    return found, {k: v for k, v in excluded.items() if v}


def candidate_pairs(
    task: CooperativityTask, edges: GenePairs, panel: Panel, seed: int
) -> Iterator[Candidate]:
    """Yield pairs of regulators with enough usable shared targets: the task's, or in random order.

    Raises
    ------
    ValueError
        A regulator of the task's own pairs has no target in the table, or is in no cell.
    """
    wanted = {g for pair in task.pairs for g in pair} or set(np.unique(edges.source).tolist())
    place = {g: own for g in sorted(wanted) if (own := panel.place(g)) is not None}
    targets = {g: panel.flags(edges.targets_of(g).tolist()) for g in place}
    missing = [g for g in sorted(wanted) if g not in place or not targets[g].any()]
    if task.pairs and missing:
        raise ValueError(
            f"{task.name}: {', '.join(missing)} of `pairs` has no target in {task.edges.file} or "
            "is in none of the cells; name regulators as the table does"
        )
    pairs = list(task.pairs)
    if not pairs:
        every = list(combinations(place, 2))
        pairs = [every[i] for i in np.random.default_rng(seed).permutation(len(every))]
    for first, second in pairs:
        both = targets[first] & targets[second]
        own = (place[first], place[second])
        if both.sum() < task.min_targets:
            continue
        usable = panel.usable(own, task.min_cells)
        positive = np.flatnonzero(usable & both)
        negative = np.flatnonzero(usable & (targets[first] ^ targets[second]))
        if len(positive) >= task.min_targets:
            yield Candidate(own, positive, negative)


def with_partners(
    possible: Iterable[Candidate],
    panel: Panel,
    task: RegulatorsTask,
    most: int | None,
    seed: int,
) -> list[Regulator]:
    """Match partners to the targets of each candidate; return those with enough of them.

    `possible` is tried in its order until `most` regulators are found (None: no limit). `seed`
    decides which targets stay where there are more than the task asks for.
    """
    found: list[Regulator] = []
    for one in possible:
        paired = nearest_pairs(panel.static[one.positive], panel.static[one.negative])
        if len(paired) < task.min_targets:
            continue
        paired = np.random.default_rng([seed, *one.own]).permutation(paired)[: task.max_targets]
        chosen = np.concatenate([one.positive[paired[:, 0]], one.negative[paired[:, 1]]])
        name = "+".join(panel.ids[list(one.own)])
        found.append(Regulator(name, panel.ids[chosen].tolist(), panel.static[chosen]))
        if len(found) == most:  # the next candidate may be dear to look at
            break
    return found


def _met(cells: list[np.ndarray], tokens: np.ndarray, min_cells: int) -> np.ndarray:
    """Return bool [genes]: whether a gene's token occurs in at least `min_cells` cells.

    A gene whose token is -1 is not in the vocabulary and never occurs.
    """
    together = np.zeros(int(tokens.max()) + 1, dtype=int)
    for cell in cells:
        together[cell[cell < len(together)]] += 1
    return (tokens >= 0) & (together[tokens] >= min_cells)

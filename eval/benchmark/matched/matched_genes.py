"""Listed genes and partners that are expressed alike.

A pair's genes have nearly the same mean rank, mean expression and detection rate in the cells, so
a score that only measures these orders a pair one way as often as the other: AUROC 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import rankdata

from eval.benchmark.material.gene_features import (
    STATIC_NAMES,
    expression_of_tokens,
    ranks_of_tokens,
    static_features,
)
from eval.benchmark.material.gene_labels import table_path
from eval.benchmark.material.models_and_cells import Bench, Model, TaskCells
from eval.benchmark.task_file import MatchedGenesTask
from eval.cells.gene_lists import read_genes

MATCHED = ("mean rank", "mean expression", "detection rate")
# Largest distance of partners: percentiles of the three among all genes that could be paired.
CALIPER = 0.1
FEWEST_PAIRS = 10
_FOREIGN = 1e3  # distance of genes that are no partners


@dataclass(frozen=True)
class MatchedPairs:
    """Listed genes and their partners.

    Attributes
    ----------
    ids, symbols
        All listed genes, then their partners in the same order; '' for an unknown symbol.
    tokens
        Model name -> int64 [2 x pairs].
    static
        float64 [2 x pairs, 3], columns as in `MATCHED`.
    excluded
        Reason -> genes that were left out.
    """

    ids: list[str]
    symbols: list[str]
    tokens: dict[str, np.ndarray]
    static: np.ndarray
    excluded: dict[str, int]

    @property
    def num_pairs(self) -> int:
        return len(self.ids) // 2


def pair_genes(
    task: MatchedGenesTask,
    cells: TaskCells,
    bench: Bench,
    is_usable: Callable[[Model], np.ndarray],
) -> MatchedPairs:
    """Return listed genes, each with another partner: the division that is nearest as a whole.

    Parameters
    ----------
    is_usable
        Model -> bool [num_tokens]: tokens of genes that are in enough cells.

    Raises
    ------
    ValueError
        A list cannot be read, or fewer than 10 pairs are left.
    """
    first = bench.models[0]
    usable = _usable_everywhere(bench.models, is_usable)
    excluded = {f"cells: {k}": v for k, v in cells.excluded.items()}
    listed, symbols = [], {}
    for genes in task.lists:
        path = table_path(genes.file, bench.data, task.cells.recipe)
        found = read_genes(path, genes.keep)
        tokens = first.reading_vocabulary.tokens_of(list(found)).astype(np.int64)
        symbols |= dict(zip(tokens.tolist(), found.values(), strict=True))
        known = np.unique(tokens[tokens >= 0])
        excluded[f"{genes.name}: not in the vocabulary"] = int((tokens < 0).sum())
        excluded[f"{genes.name}: in too few cells"] = int((~usable[known]).sum())
        listed.append(known)
    others = listed[1] if len(listed) > 1 else np.arange(len(usable))
    both = np.intersect1d(listed[0], listed[1]) if len(listed) > 1 else np.empty(0, np.int64)
    excluded["in both lists"] = len(both)
    positive = np.setdiff1d(listed[0][usable[listed[0]]], both)
    negative = np.setdiff1d(others[usable[others]], listed[0])
    static = matched_features(cells, first, np.concatenate([positive, negative]))
    pairs = nearest_pairs(static[: len(positive)], static[len(positive) :])
    excluded[f"{task.positive.name}: no partner"] = len(positive) - len(pairs)
    shown = {k: v for k, v in excluded.items() if v}
    if len(pairs) < FEWEST_PAIRS:
        raise ValueError(
            f"{task.name}: {len(pairs)} pairs of '{task.positive.name}' and genes expressed alike; "
            f"{FEWEST_PAIRS} are needed. {len(positive)} and {len(negative)} genes are in enough "
            f"cells (left out: {shown}); use more cells or longer lists"
        )
    chosen = np.concatenate([pairs[:, 0], len(positive) + pairs[:, 1]])
    tokens = np.concatenate([positive, negative])[chosen]
    ids = [first.vocabulary.genes[t - first.vocabulary.first_gene_token] for t in tokens]
    by_model = {m.name: m.reading_vocabulary.tokens_of(ids).astype(np.int64) for m in bench.models}
    return MatchedPairs(
        ids, [symbols.get(int(t), "") for t in tokens], by_model, static[chosen], shown
    )


def _usable_everywhere(models: list[Model], is_usable: Callable[[Model], np.ndarray]) -> np.ndarray:
    """Return bool [tokens of the first model]: usable genes, for every model."""
    first = models[0]
    usable = is_usable(first).copy()
    usable[: first.vocabulary.first_gene_token] = False
    for model in models[1:]:
        tokens = model.reading_vocabulary.tokens_of(list(first.vocabulary.genes))
        usable[first.vocabulary.first_gene_token :] &= (tokens >= 0) & is_usable(model)[tokens]
    return usable


def matched_features(cells: TaskCells, model: Model, tokens: np.ndarray) -> np.ndarray:
    """Return float64 [tokens, 3]: what partners have in common; columns as in `MATCHED`."""
    expression = expression_of_tokens(cells.counts, cells.genes, model.reading_vocabulary)
    ranks = ranks_of_tokens(cells.tokens[model.name], model.vocabulary)
    static = static_features(expression, ranks, tokens, model.vocabulary)
    return static[:, [STATIC_NAMES.index(name) for name in MATCHED]]


def nearest_pairs(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Return int64 [pairs, 2], positions in both: most pairs within `CALIPER`, then the nearest."""
    if not len(positive) or not len(negative):
        return np.empty((0, 2), dtype=np.int64)
    every = np.concatenate([positive, negative])
    percentile = rankdata(every, axis=0) / len(every)
    distance = cdist(percentile[: len(positive)], percentile[len(positive) :])
    distance[distance > CALIPER] = _FOREIGN
    rows, columns = linear_sum_assignment(distance)
    return np.column_stack([rows, columns])[distance[rows, columns] <= CALIPER]


def fewer_pairs(pairs: MatchedPairs, most_genes: int | None, seed: int) -> MatchedPairs:
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

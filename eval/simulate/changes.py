"""Perturb simulated cells truly: the same cells, with genes deleted or overexpressed.

`read_perturbations` reads what to perturb, `log_change` gives the true change, and `draw_changed`
the counts. Counts of a perturbed cell are coupled to those of its original cell: if a gene's
expected count falls, its counts are thinned; if it rises, counts are added. Both are exactly
gamma-Poisson at the new expected count, and a gene that the perturbation does not reach keeps its
count.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import pandas as pd

from eval.simulate.cells import SimulatedBlock, Simulation, stream

DELETE, OVEREXPRESS = "delete", "overexpress"
KINDS = (DELETE, OVEREXPRESS)
_TARGET_SUM = 1e4


@dataclass(frozen=True)
class Perturbation:
    """Genes that are changed together, as indices of genes, and their common name."""

    kind: str
    genes: tuple[int, ...]
    name: str


def read_perturbations(text: str, gene_ids: list[str], tfs: np.ndarray) -> list[Perturbation]:
    """Return the perturbations that a text asks for, each as deletion and as overexpression.

    Parameters
    ----------
    text
        ``none``, ``all`` (each TF), or gene ids separated by commas; ``A+B`` for two together.

    Raises
    ------
    ValueError
        A gene is not simulated, or is given twice.
    """
    if text == "none":
        return []
    position = {g: i for i, g in enumerate(gene_ids)}
    names = [gene_ids[t] for t in sorted(tfs)] if text == "all" else text.split(",")
    groups = [tuple(g.strip() for g in name.split("+")) for name in names]
    unknown = sorted({g for group in groups for g in group} - position.keys())
    if unknown:
        raise ValueError(
            f"--perturb: {len(unknown)} genes are not simulated, e.g. {unknown[:3]}; give none, "
            f"all, or ids such as {gene_ids[tfs[0]]}, with commas between and + within a group"
        )
    places = [tuple(sorted(position[g] for g in group)) for group in groups]
    if len(set(places)) < len(places) or any(len(set(p)) < len(p) for p in places):
        raise ValueError("--perturb: a gene or group of genes stands twice")
    return [
        Perturbation(kind, genes, "+".join(gene_ids[g] for g in genes))
        for kind in KINDS
        for genes in places
    ]


def choose_origins(simulation: Simulation) -> np.ndarray:
    """Return the indices of the cells to perturb, int64, ascending, evenly over the types."""
    settings = simulation.settings
    order = stream(settings.seed, "origins").permutation(settings.cells)
    kinds = simulation.cells["type"].to_numpy()[order]
    turn = pd.Series(kinds).groupby(kinds).cumcount().to_numpy()
    return np.sort(order[np.argsort(turn, kind="stable")[: settings.perturb_cells]])


def subset(blocks: list[SimulatedBlock], cells: np.ndarray) -> SimulatedBlock:
    """Return the chosen cells of several blocks as one block; `cells` is sorted."""
    chosen = [np.isin(b.cells, cells) for b in blocks]
    return SimulatedBlock(
        *(
            np.concatenate([getattr(b, name)[c] for b, c in zip(blocks, chosen, strict=True)])
            for name in SimulatedBlock.__dataclass_fields__
        )
    )


def reached_genes(simulation: Simulation, perturbation: Perturbation) -> pd.DataFrame:
    """Return the genes that a perturbation reaches: gene (int), relation (self, direct, indirect).

    A perturbed gene that another perturbed gene regulates has the relation self.
    """
    distance = np.zeros(simulation.settings.genes, dtype=int)
    network = simulation.network
    for tf in np.flatnonzero(np.isin(network.tfs, perturbation.genes)):
        steps = network.distances[tf]
        distance = np.where((steps > 0) & ((distance == 0) | (steps < distance)), steps, distance)
    relation = np.select([distance == 1, distance > 1], ["direct", "indirect"], "")
    relation[list(perturbation.genes)] = "self"
    genes = np.flatnonzero(relation != "")
    return pd.DataFrame({"gene": genes, "relation": relation[genes]})


def log_change(
    simulation: Simulation, origins: SimulatedBlock, perturbation: Perturbation
) -> np.ndarray:
    """Return the true change of the logarithm of expression, float64 [cells, genes].

    It is -inf at deleted genes, and exactly 0 at genes that the perturbation does not reach.
    """
    network = simulation.network
    is_changed = np.isin(network.tfs, perturbation.genes)
    boost = np.log(simulation.settings.overexpression_fold)
    if perturbation.kind == DELETE:
        active = network.activities(origins.drives, silenced=is_changed)
        own = -np.inf
    else:
        active = network.activities(origins.drives, boosts=boost * is_changed)
        own = boost
    change = network.log_effect(active - origins.active)
    genes = list(perturbation.genes)
    change[:, genes] = own if own == -np.inf else change[:, genes] + own
    return change


def draw_changed(
    simulation: Simulation, origins: SimulatedBlock, perturbation: Perturbation, change: np.ndarray
) -> np.ndarray:
    """Return the counts of the perturbed cells, int32 [cells, genes]."""
    key = zlib.crc32(f"{perturbation.kind}:{perturbation.genes}".encode())
    rng = stream(simulation.settings.seed, "perturbation", key)
    counts = origins.counts.copy()
    genes = np.flatnonzero((change != 0).any(axis=0))
    ratio = np.exp(change[:, genes])
    thinned = rng.binomial(counts[:, genes], np.minimum(ratio, 1))
    rate = origins.expected[:, genes] * origins.gains[:, genes]
    counts[:, genes] = thinned + rng.poisson(rate * np.maximum(ratio - 1, 0))
    return counts


def mean_effects(
    origins: SimulatedBlock, kinds: np.ndarray, change: np.ndarray, genes: np.ndarray
) -> pd.DataFrame:
    """Return true mean effects by cell type: type (int), gene (int), cells, and three means.

    ``log_fold_change`` is the mean over cells of the change of the logarithm; ``expected_before``
    and ``expected_after`` are counts without noise.
    """
    before = origins.expected[:, genes]
    after = before * np.exp(change[:, genes])
    tables = []
    for kind in np.unique(kinds):
        cells = kinds == kind
        tables.append(
            pd.DataFrame(
                {
                    "type": kind,
                    "gene": genes,
                    "cells": cells.sum(),
                    "log_fold_change": change[cells][:, genes].mean(axis=0),
                    "expected_before": before[cells].mean(axis=0),
                    "expected_after": after[cells].mean(axis=0),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def true_shifts(
    simulation: Simulation, origins: SimulatedBlock, perturbation: Perturbation, change: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return how far cells move, float64 [cells], and toward which types, [cells, types].

    A state is log(1 + expression per 10,000), without noise, without gene effects of donors and
    batches, and without the perturbed genes themselves. The move is 1 - cosine(before, after),
    exactly 0 if nothing changed; the move toward a type is cosine(after, type) - cosine(before,
    type).
    """
    others = np.ones(simulation.settings.genes, dtype=bool)
    others[list(perturbation.genes)] = False
    scale = np.log(_TARGET_SUM) - np.log(np.exp(origins.state).sum(axis=1, keepdims=True))
    before = np.log1p(np.exp(origins.state + scale))[:, others]
    after = np.log1p(np.exp(origins.state + scale + change))[:, others]
    types = simulation.centroids()
    types += np.log(_TARGET_SUM) - np.log(np.exp(types).sum(axis=1, keepdims=True))
    types = _unit(np.log1p(np.exp(types))[:, others])
    before, after = _unit(before), _unit(after)
    is_moved = (change[:, others] != 0).any(axis=1)
    # This is 1 - cosine of unit vectors, computed without cancellation.
    move = ((after - before) ** 2).sum(axis=1) / 2
    return np.where(is_moved, move, 0), np.where(is_moved[:, None], (after - before) @ types.T, 0)


def _unit(states: np.ndarray) -> np.ndarray:
    return states / np.linalg.norm(states, axis=1, keepdims=True)

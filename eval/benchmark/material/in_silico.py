"""Perturbations in silico as benchmark tasks need them: means over cells, in memory."""

from __future__ import annotations

import copy

import numpy as np

from eval.benchmark.material.models_and_cells import Bench, Model
from eval.benchmark.material.twin_encoders import encoder_of
from eval.perturb.screen.compare_copies import CopyEngine, EngineSettings, centroid
from eval.perturb.screen.edits import Edit, GeneSets


def engine_of(model: Model, twin_seed: int | None, bench: Bench) -> CopyEngine:
    """Return an engine of a model (`twin_seed` None) or its twin, on weights of its own."""
    encoder = copy.deepcopy(encoder_of(model, twin_seed))
    settings = EngineSettings(
        layer=-1 if encoder.config.num_hidden_layers > 1 else 0,
        bf16=bench.bf16, device=bench.device,
    )  # fmt: skip
    return CopyEngine(encoder, model.vocabulary, settings)


def genes_of(model: Model, tokens: list[np.ndarray]) -> list[np.ndarray]:
    """Return int64 gene tokens of cells, by rank, without special ones."""
    first = model.vocabulary.first_gene_token
    return [t[t >= first].astype(np.int64) for t in tokens]


def holders(genes: list[np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Return int positions of the cells that hold a gene, or all of several."""
    wanted = np.atleast_1d(tokens)
    found = [i for i, cell in enumerate(genes) if np.isin(wanted, cell).all()]
    return np.array(found, dtype=np.int64)


def chosen_holders(
    genes: list[np.ndarray], tokens: np.ndarray, most: int | None, seed: int
) -> list[np.ndarray]:
    """Return for each gene the cells it is perturbed in: those that hold it, at most so many.

    `tokens` are int [genes], or [sets, genes] for genes that are perturbed together. Cells come in
    one order, drawn with `seed`, so that genes share cells as far as they can.
    """
    order = np.random.default_rng(seed).permutation(len(genes))
    place = np.argsort(order)
    found = []
    for token in tokens:
        cells = holders(genes, token)
        found.append(np.sort(cells[np.argsort(place[cells])][:most]))
    return found


def sets_of(tokens: np.ndarray) -> GeneSets:
    """Return each gene as a set of its own; of tokens [sets, genes], each row as a set."""
    members = np.asarray(tokens, dtype=np.int32).reshape(len(tokens), -1)
    return GeneSets(members, np.ones(members.shape, dtype=bool))


def gene_effects(
    engine: CopyEngine, genes: list[np.ndarray], tokens: np.ndarray, cells: list[np.ndarray]
) -> np.ndarray:
    """Return float64 [tokens, num_tokens]: mean shift of every gene's state when one is deleted.

    NaN where the two are in none of the cells together.

    Parameters
    ----------
    genes
        Gene tokens of every cell.
    tokens
        int [genes] that are deleted one by one, or [sets, genes], each row together.
    cells
        For each of them the cells it is deleted in.
    """
    width = engine.vocabulary.num_tokens
    sums, counts = np.zeros((2, len(tokens), width))
    for cell in sorted({int(c) for chosen in cells for c in chosen}):
        rows = np.array([i for i, chosen in enumerate(cells) if cell in chosen])
        found = engine.perturb(genes[cell], sets_of(tokens[rows]), Edit("delete"), True)
        for sets, moved, compared, shift in found.genes:
            for row, other, known, by in zip(rows[sets], moved, compared, shift, strict=True):
                sums[row, other[known]] += by[known]
                counts[row, other[known]] += 1
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def moved_by_deletions(
    engine: CopyEngine,
    cells: list[np.ndarray],
    deleted: np.ndarray,
    wanted: np.ndarray,
    most: int | None,
    seed: int,
) -> np.ndarray:
    """Return float64 [deleted, wanted]: how far genes move when others are deleted one by one.

    0 where the two never meet, and for tokens of -1.

    Parameters
    ----------
    cells
        Gene tokens of every cell.
    deleted, wanted
        int tokens; each is deleted in at most `most` of the cells that hold it, drawn with `seed`.
    """
    held = chosen_holders(cells, deleted, most, seed)
    moved = np.nan_to_num(gene_effects(engine, cells, deleted, held))
    return np.where(wanted >= 0, moved[:, np.maximum(wanted, 0)], 0)


def set_types(
    engine: CopyEngine, genes: list[np.ndarray], kinds: np.ndarray, types: list[str], most: int
) -> None:
    """Give an engine the centroid of each type: of its first cells, at most so many.

    Parameters
    ----------
    genes, kinds
        Gene tokens and type (str) of every cell.
    """
    centroids = {}
    for kind in types:
        of_kind = np.flatnonzero(kinds == kind)[:most]
        states = engine.embed([genes[i] for i in of_kind])
        centroids[kind] = centroid(states, np.zeros(len(of_kind), dtype=int))
    engine.set_centroids(centroids)


def moves_of_cells(
    engine: CopyEngine, genes: list[np.ndarray], tokens: np.ndarray, asked: np.ndarray, edit: Edit
) -> np.ndarray:
    """Return float64 [columns of the engine, cells, tokens]: each cell's move; NaN: not asked.

    Parameters
    ----------
    genes
        Gene tokens of every cell.
    tokens
        int [genes] that are edited one by one.
    asked
        bool [cells, tokens]: which are edited in which cell.
    """
    values = np.full((len(engine.columns), *asked.shape), np.nan)
    for cell in np.flatnonzero(asked.any(axis=1)):
        columns = np.flatnonzero(asked[cell])
        found = engine.perturb(genes[cell], sets_of(tokens[columns]), edit)
        for row, column in enumerate(engine.columns):
            values[row, cell, columns[found.sets]] = found.values[column]
    return values


def cell_effects(
    engine: CopyEngine,
    genes: list[np.ndarray],
    donors: np.ndarray,
    tokens: np.ndarray,
    cells: list[np.ndarray],
    edit: Edit,
    column: str,
) -> np.ndarray:
    """Return float64 [tokens]: what an edit of one gene does to cells, mean over donors' means.

    0 for a gene that could not be edited in any of its cells.

    Parameters
    ----------
    genes, donors
        Gene tokens and donor of every cell.
    tokens, cells
        Genes that are edited one by one, and for each of them the cells it is edited in.
    column
        ``shift`` or ``toward_<state>``.
    """
    _, place = np.unique(donors, return_inverse=True)
    sums, counts = np.zeros((2, len(tokens), place.max() + 1))
    for cell in sorted({int(c) for chosen in cells for c in chosen}):
        rows = np.array([i for i, chosen in enumerate(cells) if cell in chosen])
        sets = sets_of(tokens[rows])
        if edit.kind == "overexpress":
            sets = GeneSets(sets.members, np.zeros(sets.members.shape, dtype=bool))
        found = engine.perturb(genes[cell], sets, edit)
        sums[rows[found.sets], place[cell]] += found.values[column]
        counts[rows[found.sets], place[cell]] += 1
    by_donor = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    return by_donor.sum(axis=1) / np.maximum((counts > 0).sum(axis=1), 1)

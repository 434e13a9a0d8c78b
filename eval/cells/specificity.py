"""Measure how much the state of a gene depends on the type of its cell.

`gene_states` computes the states; `between_minus_within` compares them between and within types.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from data_prep.genes.vocabulary import Vocabulary
from pretrain.cell_states.frozen_states import computing, encode_batch, length_batches
from pretrain.model.architectures import Encoder


@dataclass(frozen=True)
class GeneStates:
    """States of chosen genes in all cells that have them, each of length 1 (or 0 if it was 0).

    Attributes
    ----------
    start
        int64 [genes + 1]: the first row of each gene in the arrays below.
    cell
        int64 [occurrences], indices of cells.
    state
        float32 [occurrences, width].
    """

    start: np.ndarray
    cell: np.ndarray
    state: np.ndarray

    def of(self, gene: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the cells and states of a gene, given by its index."""
        rows = slice(self.start[gene], self.start[gene + 1])
        return self.cell[rows], self.state[rows]


def gene_states(
    cells: list[np.ndarray],
    encoder: Encoder,
    vocabulary: Vocabulary,
    genes: np.ndarray,
    layer: int = -1,
    token_budget: int = 16_384,
    device: str = "cpu",
    bf16: bool = False,
) -> GeneStates:
    """Return the states of genes in cells; they need 4 bytes x occurrences x width of memory.

    Parameters
    ----------
    genes
        int [genes], tokens, each once.
    layer
        As in `eval.cells.embed.embed_cells`.
    """
    gene_of_token = np.full(vocabulary.num_tokens, -1)
    gene_of_token[genes] = np.arange(len(genes))
    lengths = np.array([len(c) for c in cells], dtype=np.int64)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    with computing(encoder, layer, device, bf16):
        for batch in length_batches(lengths, token_budget):
            hidden_BLD, _ = encode_batch(encoder, [cells[i] for i in batch], vocabulary)
            for row, cell in enumerate(batch):
                gene = gene_of_token[cells[cell]]
                places = np.flatnonzero(gene >= 0)
                chosen_ND = hidden_BLD[row, torch.from_numpy(places).to(hidden_BLD.device)].float()
                unit_ND = nn.functional.normalize(chosen_ND, dim=1).cpu().numpy()
                found.append((gene[places], np.full(len(places), cell), unit_ND))
    gene, cell, state = (np.concatenate(part) for part in zip(*found, strict=True))
    # Batches are sorted by length; this restores the order of cells within each gene.
    order = np.lexsort((cell, gene))
    start = np.searchsorted(gene[order], np.arange(len(genes) + 1))
    return GeneStates(start, cell[order], state[order])


def between_minus_within(states: np.ndarray, types: np.ndarray, donors: np.ndarray) -> np.ndarray:
    """Return float64 [labellings]: mean distance of a gene's states between minus within types.

    The distance is 1 - cosine of the states in two cells of one donor. "Between" is the mean over
    pairs of types of the mean over pairs of cells. "Within" is the mean over types of the mean over
    pairs of different cells. Both are unbiased, so their difference is 0 on average if types do not
    matter, however few cells a type has. The result is a mean over donors; it is NaN if no donor
    has two types with two cells each.

    Parameters
    ----------
    states
        float [cells, width], each of length 1.
    types
        int [labellings, cells]: types 0, 1, ...; each row is another order of the types within
        donors.
    donors
        int [cells].
    """
    by_donor = [
        _of_donor(states[donors == d], types[:, donors == d], int(types.max()) + 1)
        for d in np.unique(donors)
    ]
    known = [d for d in by_donor if d is not None]
    return np.mean(known, axis=0) if known else np.full(len(types), np.nan)


def _of_donor(states_CD: np.ndarray, types_PC: np.ndarray, num_types: int) -> np.ndarray | None:
    counts_T = np.bincount(types_PC[0], minlength=num_types)
    used = np.flatnonzero(counts_T >= 2)
    if len(used) < 2:
        return None
    counts_T = counts_T[used].astype(np.float64)
    is_type_PTC = (types_PC[:, None, :] == used[:, None]).astype(states_CD.dtype)
    sums_PTD = (is_type_PTC @ states_CD).astype(np.float64)
    similar_PTT = np.einsum("ptd,psd->pts", sums_PTD, sums_PTD)
    # A cell does not form a pair with itself. (The length of a state is 1, or 0 if it was 0
    # before.)
    alone_PT = is_type_PTC @ (states_CD**2).sum(axis=1)
    own_PT = np.einsum("ptt->pt", similar_PTT) - alone_PT
    within_PT = 1 - own_PT / (counts_T * (counts_T - 1))
    between_PTT = 1 - similar_PTT / np.outer(counts_T, counts_T)
    first, second = np.triu_indices(len(used), 1)
    return between_PTT[:, first, second].mean(axis=1) - within_PT.mean(axis=1)


def permuted_types(
    types: np.ndarray, donors: np.ndarray, number: int, rng: np.random.Generator
) -> np.ndarray:
    """Return int [1 + number, cells]: the types, then the types shuffled within each donor."""
    out = np.tile(types, (number + 1, 1))
    for donor in np.unique(donors):
        cells = np.flatnonzero(donors == donor)
        out[1:, cells] = rng.permuted(out[1:, cells], axis=1)
    return out


def spread_of_states(states: np.ndarray, donors: np.ndarray) -> float:
    """Return the mean distance of a gene's states in two cells of a donor, whatever their types."""
    every = []
    for donor in np.unique(donors):
        chosen = states[donors == donor].astype(np.float64)
        number = len(chosen)
        if number > 1:
            total = float((chosen.sum(axis=0) ** 2).sum() - (chosen**2).sum())
            every.append(1 - total / (number * (number - 1)))
    return float(np.mean(every)) if every else float("nan")

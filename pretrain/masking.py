"""Which genes are hidden from the model, and what stands in their place.

The masks are a function of (seed, epoch, cell number, place in the cell) alone, so they do not
depend on ranks, micro-batches or threads. Special tokens are never hidden and never stand in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from data_prep.hashing import stream_key
from data_prep.vocab import Vocabulary
from pretrain.config import MaskingConfig

NO_LABEL = -100  # what torch's cross_entropy leaves out
_PLACE_BITS = np.uint64(16)  # a place in a cell beside the cell's number, in one 64-bit integer
_EVERYTHING = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class Masks:
    """How genes are hidden in one epoch: keys of the random numbers, rates, token ids."""

    place_key: np.uint64
    action_key: np.uint64
    gene_key: np.uint64
    probability: float
    mask_share: float
    random_share: float
    mask_token: int
    first_gene: int
    num_genes: int
    framed: bool

    def most(self, length: int) -> int:
        """Return how many genes of a cell of `length` tokens can be hidden at most."""
        return int(num_masked(np.array([length]), self.probability)[0])


def masks_of(
    seed: int, split: str, epoch: int, vocabulary: Vocabulary, config: MaskingConfig
) -> Masks:
    """Return the masks of an epoch; evaluation uses epoch 0 of its split for ever."""
    stream = stream_key(seed, "mask", split, epoch)
    return Masks(
        np.uint64(stream),
        np.uint64(stream_key(stream, "action")),
        np.uint64(stream_key(stream, "gene")),
        config.probability,
        config.mask_share,
        config.random_share,
        vocabulary.mask_token,
        vocabulary.first_gene_token,
        len(vocabulary.genes),
        vocabulary.has_cls,
    )


def num_masked(num_genes: np.ndarray, probability: float) -> np.ndarray:
    """Return int64 how many genes of a cell are hidden: the rounded share, at least one.

    A fixed number a cell, not a coin per gene: the same share in short and long cells, and shapes
    that are known before the tokens are. Cells without genes: 0.
    """
    share = np.floor(num_genes * probability + 0.5).astype(np.int64)
    return np.where(num_genes > 0, np.maximum(share, 1), 0)


def mask_rows(
    tokens: np.ndarray,
    offsets: np.ndarray,
    cells: np.ndarray,
    masks: Masks,
    pad_token: int,
    inputs: np.ndarray,
    places: np.ndarray,
    labels: np.ndarray,
    relative_ranks: np.ndarray,
) -> int:
    """Fill a padded micro-batch with cells whose genes are partly hidden; return how many are.

    Parameters
    ----------
    tokens, offsets
        uint16 or uint32, flat; int64 [rows + 1]. A row without tokens becomes padding.
    cells
        int64 [rows], cell numbers; any value at rows without tokens.
    inputs
        int64 [rows, L], written.
    places, labels, relative_ranks
        int64, int64, float32 [M], written: flat place in rows x L, ascending; the hidden gene;
        its rank over the cell's length. What is behind the last gets 0, `NO_LABEL`, 0. M must
        hold ``masks.most(L)`` for every row: not checked.
    """
    return _mask_rows(
        tokens, offsets, cells.view(np.uint64), pad_token, masks.place_key, masks.action_key,
        masks.gene_key, masks.probability, masks.mask_share, masks.mask_share + masks.random_share,
        masks.mask_token, masks.first_gene, masks.num_genes, int(masks.framed),
        inputs, places, labels, relative_ranks,
    )  # fmt: skip


@numba.njit(inline="always")
def _mix64(x):
    """One splitmix64 step, as `data_prep.hashing.mix64`."""
    x += np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(inline="always")
def _unit(x):
    return np.float64(x >> np.uint64(11)) * 2.0**-53


@numba.njit(cache=True, nogil=True)
def _mask_rows(
    tokens, offsets, cells, pad_token, place_key, action_key, gene_key, probability, mask_share,
    changed_share, mask_token, first_gene, num_genes, framed,
    inputs, places, labels, relative_ranks,
):  # fmt: skip
    width = inputs.shape[1]
    hashes = np.empty(width, dtype=np.uint64)
    candidates = np.empty(width + 1, dtype=np.uint64)
    found = 0
    for row in range(inputs.shape[0]):
        start, length = offsets[row], offsets[row + 1] - offsets[row]
        line = inputs[row]
        for place in range(length):
            line[place] = tokens[start + place]
        line[length:] = pad_token
        genes = length - 2 * framed
        if genes <= 0:
            continue
        identity = cells[row] << _PLACE_BITS
        for i in range(genes):
            mixed = _mix64(identity + np.uint64(i + framed))
            hashes[i] = _mix64(mixed ^ place_key)
        hidden = max(1, int(np.floor(genes * probability + 0.5)))
        limit = _kth_smallest(hashes[:genes], hidden, candidates)
        for i in range(genes):
            if hashes[i] > limit:
                continue
            place = i + framed
            gene = line[place]
            mixed = _mix64(identity + np.uint64(place))
            action = _unit(_mix64(mixed ^ action_key))
            if action < mask_share:
                line[place] = mask_token
            elif action < changed_share:
                line[place] = first_gene + int(_unit(_mix64(mixed ^ gene_key)) * num_genes)
            places[found] = row * width + place
            labels[found] = gene
            relative_ranks[found] = place / length
            found += 1
    places[found:] = 0
    labels[found:] = NO_LABEL
    relative_ranks[found:] = 0
    return found


@numba.njit(cache=True, nogil=True)
def _kth_smallest(hashes, k, candidates):
    """Return the k-th smallest (from 1) of different uniform hashes.

    Only those below a bound that the k-th exceeds once in ten thousand times are looked at.
    """
    bound = (k + 4.0 * np.sqrt(k) + 8.0) / len(hashes)
    limit = np.uint64(bound * 2.0**64) if bound < 0.999 else _EVERYTHING
    count = 0
    while True:
        for value in hashes:
            candidates[count] = value  # overwritten by the next, unless it stays
            count += value <= limit
        if count >= k:
            break
        count, limit = 0, _EVERYTHING
    return np.partition(candidates[:count], k - 1)[k - 1]

"""Decide which genes are hidden from the model, and what replaces them.

`masks_of` makes the random keys of an epoch; `mask_rows` applies them to the cells of a
micro-batch. The masks are a function of (seed, epoch, cell number, position in the cell) alone, so
they do not depend on ranks, micro-batches or threads. Special tokens are never hidden and never
replace a gene.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import numpy as np

from data_prep.genes.vocabulary import Vocabulary
from data_prep.hashing import mix64_of, stream_key
from pretrain.config import MaskingConfig

# Held-out cells always hide 15 %, whatever the training run uses, so that curves stay comparable.
# All hidden genes become <mask>: under 80/10/10 a tenth of the answers can be copied from the
# input. That was worth 0.75 nats to a 6-layer model, and a baseline that ignores the cell cannot
# copy.
EVALUATION_MASKING = MaskingConfig(mask_share=1.0, random_share=0.0)
NO_LABEL = -100  # the label that torch's cross_entropy ignores
_PLACE_BITS = np.uint64(16)  # bits for the position beside the cell number in one 64-bit integer
_EVERYTHING = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class Masks:
    """The masking of one epoch: keys of the random numbers, probabilities and token ids."""

    place_key: np.uint64
    subset_key: np.uint64
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
        """Return the largest number of genes that can be hidden in a cell of `length` tokens."""
        return int(num_masked(np.array([length]), self.probability)[0])


def masks_of(
    seed: int, split: str, epoch: int, vocabulary: Vocabulary, config: MaskingConfig
) -> Masks:
    """Return the masks of an epoch; evaluation always uses epoch 0 of its split."""
    stream = stream_key(seed, "mask", split, epoch)
    return Masks(
        np.uint64(stream),
        np.uint64(stream_key(stream, "subset")),
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
    """Return the number of hidden genes of each cell (int64): the rounded share, at least one.

    The number is fixed for a cell length, instead of a coin toss per gene. Short and long cells
    hide the same share, and shapes are known before the tokens are read. Cells without genes give
    0.
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
    real: np.ndarray,
    places: np.ndarray,
    labels: np.ndarray,
    relative_ranks: np.ndarray,
) -> int:
    """Fill a padded micro-batch with cells, hide some of their genes, and return how many.

    Parameters
    ----------
    tokens, offsets
        uint16 or uint32, the tokens of all rows one after another; int64 [rows + 1], where each row
        begins in them. A row without tokens becomes padding.
    cells
        int64 [rows], the cell numbers; rows without tokens may have any value.
    inputs, real
        int32 and bool [rows, L], written. `real` is True at tokens, and at the first position of a
        row without tokens, because a softmax over nothing would be NaN.
    places, labels, relative_ranks
        int64, int64, float32 [M], written: the flat position in rows x L, ascending; the hidden
        gene; its rank divided by the cell's length. Entries behind the last hidden gene are 0,
        `NO_LABEL`, 0. M must be at least ``masks.most(L)`` for every row, which is not checked.
    """
    # The arrays always have the same types here and are flat, because numba compiles a loop anew
    # for each combination of argument types.
    frozen = tokens.view()
    frozen.flags.writeable = False
    found = _mask_rows(
        frozen, offsets, cells.view(np.uint64), pad_token, masks.place_key, masks.action_key,
        masks.gene_key, masks.probability, masks.mask_share, masks.mask_share + masks.random_share,
        masks.mask_token, masks.first_gene, masks.num_genes, int(masks.framed),
        np.uintp(inputs.shape[1]), _flat(inputs), _flat(real), places, labels, relative_ranks,
    )  # fmt: skip
    return int(found)


def _flat(array: np.ndarray) -> np.ndarray:
    """Return a one-dimensional view; raise AttributeError if that would need a copy."""
    view = array.view()
    view.shape = (array.size,)
    return view


@numba.njit(inline="always")
def place_identity(cell, place):
    """Return 64 bits that identify a position in a cell."""
    return (cell << _PLACE_BITS) + np.uint64(place)


@numba.njit(inline="always")
def _unit(x):
    return np.float64(x >> np.uint64(11)) * 2.0**-53


@numba.njit(cache=True, nogil=True)
def _mask_rows(
    tokens, offsets, cells, pad_token, place_key, action_key, gene_key, probability, mask_share,
    changed_share, mask_token, first_gene, num_genes, framed, width, flat, flat_real,
    places, labels, relative_ranks,
):  # fmt: skip
    # Indices are unsigned, because numba adds a check for negative numbers to every signed index.
    hashes = np.empty(width, dtype=np.uint64)
    low_hashes = np.empty(width + np.uintp(1), dtype=np.uint64)
    low_genes = np.empty(width + np.uintp(1), dtype=np.uintp)
    bins = np.empty(256, dtype=np.uintp)
    found = np.uintp(0)
    for row in range(np.uintp(len(offsets) - 1)):
        start, line = np.uintp(offsets[row]), row * width
        length = np.uintp(offsets[row + np.uintp(1)]) - start
        for place in range(length):
            flat[line + place] = tokens[start + place]
        for place in range(length, width):
            flat[line + place] = pad_token
        for place in range(width):
            flat_real[line + place] = place < length
        flat_real[line] = True
        if length <= np.uintp(2 * framed):
            continue
        genes = length - np.uintp(2 * framed)
        identity = place_identity(cells[row], framed)
        for i in range(genes):
            hashes[i] = mix64_of(mix64_of(identity + np.uint64(i)) ^ place_key)
        hidden = np.uintp(math.floor(genes * probability + 0.5))
        hidden = hidden if hidden > np.uintp(1) else np.uintp(1)
        count, bound = lowest(hashes, genes, hidden, low_hashes, low_genes)
        # The hashes are copied: their place serves as room to sort in.
        limit = kth_lowest(low_hashes, count, hidden, bound, bins, hashes)
        for i in range(count):
            if low_hashes[i] > limit:
                continue
            place = low_genes[i] + np.uintp(framed)
            at = line + place
            mixed = mix64_of(identity + np.uint64(low_genes[i]))
            places[found] = at
            labels[found] = flat[at]
            relative_ranks[found] = place / length
            found += np.uintp(1)
            action = _unit(mix64_of(mixed ^ action_key))
            if action < mask_share:
                flat[at] = mask_token
            elif action < changed_share:
                flat[at] = first_gene + int(_unit(mix64_of(mixed ^ gene_key)) * num_genes)
    for at in range(found, np.uintp(len(places))):
        places[at], labels[at], relative_ranks[at] = 0, NO_LABEL, 0
    return found


@numba.njit(cache=True, nogil=True)
def lowest(hashes, genes, wanted, low_hashes, low_genes):
    """Copy the hashes up to a bound, with their genes; return how many, and the bound.

    At least `wanted` hashes are copied. The bound is chosen such that the wanted-th lowest of
    uniform hashes exceeds it once in ten thousand times; in that case all hashes are copied.
    """
    share = (wanted + 4.0 * math.sqrt(wanted) + 8.0) / genes
    bound = np.uint64(share * 2.0**64) if share < 0.999 else _EVERYTHING
    while True:
        count = np.uintp(0)
        for i in range(genes):
            low_hashes[count] = hashes[i]  # the next hash overwrites it unless it stays
            low_genes[count] = i
            count += np.uintp(hashes[i] <= bound)
        if count >= wanted:
            return count, bound
        bound = _EVERYTHING


@numba.njit(cache=True, nogil=True)
def kth_lowest(values, count, k, bound, bins, room):
    """Return the k-th lowest (counted from 1) of uniform values up to a bound.

    The values are counted into 256 bins by their leading bits, and only the one or two values in
    the bin of the result are sorted. This takes an eighth of the time of a quickselect.
    """
    shift = np.uint64(0)
    while bound >> shift > np.uint64(255):
        shift += np.uint64(1)
    for number in range(np.uintp(len(bins))):
        bins[number] = np.uintp(0)
    for i in range(count):
        bins[values[i] >> shift] += np.uintp(1)
    before, number = np.uintp(0), np.uintp(0)
    while before + bins[number] < k:
        before += bins[number]
        number += np.uintp(1)
    size = np.uintp(0)
    for i in range(count):
        if values[i] >> shift == number:
            at = size
            while at > 0 and room[at - np.uintp(1)] > values[i]:
                room[at] = room[at - np.uintp(1)]
                at -= np.uintp(1)
            room[at] = values[i]
            size += np.uintp(1)
    return room[np.uintp(k) - before - np.uintp(1)]

"""Which genes are hidden from the model, and what stands in their place.

The masks are a function of (seed, epoch, cell number, place in the cell) alone, so they do not
depend on ranks, micro-batches or workers. Special tokens are never hidden and never stand in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.hashing import keyed_hash, stream_key, unit_interval
from data_prep.vocab import Vocabulary
from pretrain.config import MaskingConfig

_PLACE_BITS = 16  # a place in a cell beside the cell's number, in one 64-bit integer


@dataclass(frozen=True)
class MaskedRows:
    """Rows with hidden genes.

    `inputs` int64 [rows, L]; `places` int64 [masked], flat index row * L + place, ascending;
    `labels` int64 [masked], the hidden genes.
    """

    inputs: np.ndarray
    places: np.ndarray
    labels: np.ndarray


def num_masked(num_genes: np.ndarray, probability: float) -> np.ndarray:
    """Return int64 how many genes of a cell are hidden: the rounded share, at least one.

    A fixed number a cell, not a coin per gene: the same share in short and long cells, and shapes
    that are known before the tokens are. Cells without genes: 0.
    """
    share = np.floor(num_genes * probability + 0.5).astype(np.int64)
    return np.where(num_genes > 0, np.maximum(share, 1), 0)


def mask_rows(
    tokens: np.ndarray,
    lengths: np.ndarray,
    cells: np.ndarray,
    stream: int,
    vocabulary: Vocabulary,
    config: MaskingConfig,
) -> MaskedRows:
    """Return rows with genes hidden.

    Parameters
    ----------
    tokens
        int64 [rows, L], padded with the pad token; not modified.
    lengths
        int64 [rows], real tokens of each row, special tokens included; 0 for filler rows.
    cells
        int64 [rows], cell numbers; any value at filler rows.
    stream
        64-bit key of the masks, see `mask_stream`.
    """
    num_rows, width = tokens.shape
    place = np.arange(width)
    first, specials = (1, 2) if vocabulary.has_cls else (0, 0)
    is_gene = (place >= first) & (place < (lengths - (specials - first))[:, None])
    identity = (cells[:, None] << _PLACE_BITS) + place
    order_hash = keyed_hash(stream, identity)
    order_hash[~is_gene] = np.iinfo(np.uint64).max
    counts = num_masked(is_gene.sum(axis=1), config.probability)
    # The places with the smallest hashes of each row are hidden.
    most = int(counts.max(initial=0))
    if most == 0:
        empty = np.zeros(0, dtype=np.int64)
        return MaskedRows(tokens.astype(np.int64), empty, empty)
    lowest = np.argpartition(order_hash, min(most, width - 1), axis=1)[:, :most]
    by_hash = np.take_along_axis(order_hash, lowest, axis=1).argsort(axis=1)
    lowest = np.take_along_axis(lowest, by_hash, axis=1)
    chosen = np.arange(most) < counts[:, None]
    places = np.sort((np.arange(num_rows)[:, None] * width + lowest)[chosen])

    inputs = tokens.astype(np.int64)
    flat = inputs.reshape(-1)
    labels = flat[places].copy()
    at = identity.reshape(-1)[places]
    action = unit_interval(keyed_hash(stream_key(stream, "action"), at))
    gene = unit_interval(keyed_hash(stream_key(stream, "gene"), at))
    random_gene = vocabulary.first_gene_token + (gene * len(vocabulary.genes)).astype(np.int64)
    becomes_mask = action < config.mask_share
    becomes_random = ~becomes_mask & (action < config.mask_share + config.random_share)
    flat[places[becomes_mask]] = vocabulary.mask_token
    flat[places[becomes_random]] = random_gene[becomes_random]
    return MaskedRows(inputs, places, labels)


def mask_stream(seed: int, split: str, epoch: int) -> int:
    """Return the key of the masks of one epoch; evaluation uses epoch 0 of its split for ever."""
    return stream_key(seed, "mask", split, epoch)

"""Select the genes of a cell that the model sees: a random subset, or all that are not hidden.

Like the masks, the subset is a function of (seed, epoch, cell number, position in the cell) alone.
`draw_subsets` draws the subset before genes are hidden; `take_out_hidden` removes the hidden genes
afterwards.
"""

from __future__ import annotations

import numba
import numpy as np

from data_prep.hashing import mix64_of
from pretrain.objective.masking import (
    Masks,
    kth_lowest,
    lowest,
    num_masked,
    place_identity,
)


def shown_length(length: int, subset: int | None, masks: Masks) -> int:
    """Return the largest length of a cell of `length` tokens after its subset is drawn."""
    return length if subset is None else min(length, subset + 2 * masks.framed)


def length_without_hidden(length: int, masks: Masks) -> int:
    """Return the largest length of a cell of `length` tokens after its hidden genes are removed."""
    genes = np.array([length - 2 * masks.framed])
    return max(1, length - int(num_masked(genes, masks.probability)[0]))


def draw_subsets(
    tokens: np.ndarray, offsets: np.ndarray, cells: np.ndarray, subset: int, masks: Masks
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and offsets of cells with at most `subset` genes each, in the same rank order.

    Special tokens stay. The subset is drawn anew in each epoch, without replacement, and each gene
    has the same probability.

    Parameters
    ----------
    tokens, offsets, cells
        uint16 or uint32, one cell after another; int64 [rows + 1]; int64 [rows], the cell numbers.
    """
    lengths = np.minimum(np.diff(offsets), subset + 2 * masks.framed)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    drawn = np.empty(starts[-1], tokens.dtype)
    frozen = tokens.view()
    frozen.flags.writeable = False
    _draw(
        frozen, offsets, cells.view(np.uint64), masks.subset_key, subset, int(masks.framed), drawn,
        starts,
    )  # fmt: skip
    return drawn, starts


@numba.njit(cache=True, nogil=True)
def _draw(tokens, offsets, cells, key, subset, framed, drawn, starts):
    longest = np.uintp(0)
    for row in range(len(cells)):
        longest = max(longest, np.uintp(offsets[row + 1] - offsets[row]))
    hashes = np.empty(longest, dtype=np.uint64)
    low_hashes = np.empty(longest + np.uintp(1), dtype=np.uint64)
    low_genes = np.empty(longest + np.uintp(1), dtype=np.uintp)
    bins = np.empty(256, dtype=np.uintp)
    for row in range(np.uintp(len(cells))):
        start, at = np.uintp(offsets[row]), np.uintp(starts[row])
        length = np.uintp(offsets[row + np.uintp(1)]) - start
        stop = np.uintp(starts[row + np.uintp(1)])
        if stop - at == length:
            drawn[at:stop] = tokens[start : start + length]
            continue
        if framed:
            drawn[at], drawn[stop - np.uintp(1)] = tokens[start], tokens[start + length - 1]
            at += np.uintp(1)
        genes = length - np.uintp(2 * framed)
        identity = place_identity(cells[row], framed)
        for i in range(genes):
            hashes[i] = mix64_of(mix64_of(identity + np.uint64(i)) ^ key)
        count, bound = lowest(hashes, genes, np.uintp(subset), low_hashes, low_genes)
        limit = kth_lowest(low_hashes, count, np.uintp(subset), bound, bins, hashes)
        for i in range(count):
            if low_hashes[i] <= limit:
                drawn[at] = tokens[start + low_genes[i] + np.uintp(framed)]
                at += np.uintp(1)


def take_out_hidden(
    inputs: np.ndarray,
    real: np.ndarray,
    places: np.ndarray,
    pad_token: int,
    shown: np.ndarray,
    shown_real: np.ndarray,
) -> None:
    """Write the tokens that are not hidden into a narrower micro-batch, without gaps.

    Parameters
    ----------
    inputs, real
        int32 and bool [rows, L], as `pretrain.objective.masking.mask_rows` has written them.
    places
        int64 [hidden], flat positions of the hidden genes.
    shown, shown_real
        int32 and bool [rows, `length_without_hidden` of L], written.
    """
    stays = real.copy()
    stays.reshape(-1)[places] = False
    sizes = stays.sum(axis=1)
    is_filled = np.arange(shown.shape[1]) < sizes[:, None]
    shown[:] = pad_token
    shown[is_filled] = inputs[stays]
    # The first position of a row counts as real even if it is empty, as in `mask_rows`.
    shown_real[:] = is_filled
    shown_real[:, 0] = True

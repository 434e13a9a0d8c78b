"""Chooses length buckets: as few padded lengths as possible that keep the padding small."""

from __future__ import annotations

import numpy as np

# Multiples of 64 suit GPU kernels and compiled shapes; short cells need a finer grid to stay
# below the padding limit (at 200 tokens a cell, 64-wide buckets pad 14 %).
GRANULARITIES = (64, 32, 16, 8)
MAX_PADDING = 0.03


def choose_buckets(
    histogram: np.ndarray, max_length: int, max_padding: float = MAX_PADDING
) -> list[int]:
    """Return ascending padded lengths that cover all cells with at most `max_padding` padding.

    The function takes the coarsest grid that can reach the limit, and on this grid the fewest
    boundaries, which dynamic programming places. Padding is the share of padding tokens among all
    tokens after padding.

    Parameters
    ----------
    histogram
        int64 [longest + 1], number of cells of each length; no cell of length 0, at least one cell.
    max_length
        Length of the longest possible bucket: the model has no more positions.
    max_padding
        Share between 0 and 1. If even multiples of 8 need more padding, all of these are used.
    """
    lengths = np.flatnonzero(histogram)
    real = int((lengths * histogram[lengths]).sum())
    for granularity in GRANULARITIES:
        # cells[i] is the number of cells whose padded length on this grid is (i + 1) * granularity.
        cells = np.bincount(-(-lengths // granularity) - 1, weights=histogram[lengths])
        occupied = np.flatnonzero(cells)
        ends = np.minimum((occupied + 1) * granularity, max_length)
        finest = int((cells[occupied] * ends).sum())
        if 1 - real / finest <= max_padding or granularity == GRANULARITIES[-1]:
            allowed = max(finest, int(real / (1 - max_padding)))
            return _fewest_ends(cells[occupied], ends, allowed)
    raise AssertionError("unreachable: the last granularity always returns")


def _fewest_ends(cells: np.ndarray, ends: np.ndarray, allowed: int) -> list[int]:
    """Return the fewest of `ends` (the last included) whose padded token sum is <= `allowed`."""
    n = len(cells)
    prefix = np.r_[0, np.cumsum(cells)]
    # After round k, best[j] is the lowest number of padded tokens of the first j groups in k
    # buckets, of which the last ends at group j.
    best = np.full(n + 1, np.inf)
    best[0] = 0
    choices: list[np.ndarray] = []
    for _ in range(n):
        candidate = best[None, :n] + (prefix[1:, None] - prefix[None, :n]) * ends[:, None]
        candidate[np.triu_indices(n, 1)] = np.inf
        choice = candidate.argmin(axis=1)
        best = np.r_[np.inf, candidate[np.arange(n), choice]]
        choices.append(choice)
        if best[n] <= allowed:
            break
    chosen, j = [], n
    for choice in reversed(choices):
        chosen.append(int(ends[j - 1]))
        j = int(choice[j - 1])
    return chosen[::-1]


def bucket_of(lengths: np.ndarray, buckets: list[int]) -> np.ndarray:
    """Return the index of the shortest bucket that holds each length."""
    return np.searchsorted(np.asarray(buckets), lengths, side="left")

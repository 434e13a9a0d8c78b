"""Baselines that a model must beat: predictions of hidden genes that need only counting.

Baselines that do not look at the cell:

- ``unigram``: how often a gene is expressed.
- ``unigram_by_rank``: how often a gene is expressed at this relative rank.
- ``mean_rank``: each gene is normally distributed around its own mean relative rank. Kedzierska et
  al. (Genome Biology 2025) found that Geneformer performs worse than a gene's mean rank.

Baselines that use the visible genes of the cell:

- ``no_repeat``: like ``unigram_by_rank``, but genes that occur elsewhere in the cell are left out.
- ``arithmetic``: uses the medians of the nearest visible genes, see `pretrain.counting.arithmetic`.

`RankBaselines` counts all except the last; `Baselines` scores all of them on the same hidden genes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_prep.shards.reader import ShardSet
from pretrain.counting.arithmetic import MIXED_SHARE, Arithmetic, MaskedRows
from pretrain.counting.arithmetic_kernels import score_without_repeats
from pretrain.counting.counted_tables import train_blocks

RANK_BASELINES = ("unigram", "unigram_by_rank", "mean_rank")
ARITHMETIC = "arithmetic"
BASELINE_NAMES = (*RANK_BASELINES, "no_repeat", ARITHMETIC)
RANK_BINS = 50
_SMALLEST_SPREAD = 0.02  # of relative rank; a gene seen once has no spread
# The share of the plain frequency in the prediction by the mean rank: genes are found far from
# their mean more often than a normal distribution predicts, and the loss would become infinite
# there.
_FREQUENCY_SHARE = 0.05


class RankBaselines:
    """Log-probability tables of the baselines, counted in training cells.

    Parameters
    ----------
    shards
        Prepared cells; whole blocks of the train split are read until `max_cells` are reached.
    left_out
        As in `pretrain.counting.counted_tables.train_blocks`.
    """

    def __init__(self, shards: ShardSet, max_cells: int, left_out: set[int] | None = None) -> None:
        vocabulary = shards.vocabulary
        size, first = vocabulary.num_tokens, vocabulary.first_gene_token
        table = np.zeros((RANK_BINS, size))
        rank_sum, rank_square = np.zeros(size), np.zeros(size)
        for tokens, ranks in _train_tokens(shards, max_cells, left_out):
            bins = rank_bins(ranks)
            table += np.bincount(bins * size + tokens, minlength=table.size).reshape(table.shape)
            rank_sum += np.bincount(tokens, weights=ranks, minlength=size)
            rank_square += np.bincount(tokens, weights=ranks**2, minlength=size)
        table[:, :first] = 0
        counts = table.sum(axis=0)
        smoothed = counts + 0.5
        smoothed[:first] = 0
        frequency = smoothed / smoothed.sum()
        # Witten-Bell smoothing: the number of pseudo-counts is the number of different genes seen
        # in the bin.
        pseudo_counts = np.maximum((table > 0).sum(axis=1, keepdims=True), 1)
        by_rank = table + pseudo_counts * frequency
        mean = np.where(counts > 0, rank_sum / np.maximum(counts, 1), 0.5)
        variance = rank_square / np.maximum(counts, 1) - mean**2
        spread = np.sqrt(np.maximum(variance, _SMALLEST_SPREAD**2))
        spread[counts < 2] = 0.3
        centre = (np.arange(RANK_BINS)[:, None] + 0.5) / RANK_BINS
        density = frequency * np.exp(-0.5 * ((centre - mean) / spread) ** 2) / spread
        total = np.maximum(density.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        near = (1 - _FREQUENCY_SHARE) * density / total + _FREQUENCY_SHARE * frequency
        weights = np.broadcast_to(frequency, table.shape), by_rank, near
        self.log_probabilities = {
            name: _normalised_log(w) for name, w in zip(RANK_BASELINES, weights, strict=True)
        }
        self._frequency, self._by_rank = (
            frequency,
            np.exp(self.log_probabilities["unigram_by_rank"]),
        )
        self._mask_token, self._first_gene = vocabulary.mask_token, first
        self._places = {k: _places(table) for k, table in self.log_probabilities.items()}

    def losses(self, labels: np.ndarray, relative_ranks: np.ndarray) -> dict[str, np.ndarray]:
        """Return for each baseline float64 [M], the cross-entropy (nats) of hidden genes.

        Parameters
        ----------
        labels
            int [M], the hidden genes.
        relative_ranks
            float [M] in [0, 1), the rank of each in its cell divided by the cell's length.
        """
        bins = rank_bins(relative_ranks)
        return {k: -table[bins, labels] for k, table in self.log_probabilities.items()}

    def places(self, labels: np.ndarray, relative_ranks: np.ndarray) -> dict[str, np.ndarray]:
        """Return for each baseline int32 [M]: how many genes it finds more likely than the label.

        This is the label's place among the guesses, 0 = the first; equally likely genes all get the
        best place of their group.
        """
        bins = rank_bins(relative_ranks)
        return {k: table[bins, labels] for k, table in self._places.items()}

    def without_repeats(
        self, rows: MaskedRows, relative_ranks: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return float64 [M] losses and int32 [M] places of the baseline ``no_repeat``."""
        losses, places = np.empty(len(rows.labels)), np.empty(len(rows.labels), np.int32)
        score_without_repeats(
            rows.inputs, rows.lengths, rows.labels, rank_bins(relative_ranks), self._mask_token,
            self._first_gene, self._by_rank, self._places["unigram_by_rank"], self._frequency,
            MIXED_SHARE, losses, places,
        )  # fmt: skip
        return losses, places


class Baselines:
    """All baselines, scored on the same hidden genes.

    Parameters
    ----------
    arithmetic
        None if the vocabulary has no medians; the results then lack this baseline.
    """

    def __init__(self, ranks: RankBaselines, arithmetic: Arithmetic | None) -> None:
        self._ranks, self._arithmetic = ranks, arithmetic
        self.names = tuple(n for n in BASELINE_NAMES if arithmetic or n != ARITHMETIC)

    def scores(
        self, rows: MaskedRows, relative_ranks: np.ndarray
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return for each baseline float64 [M] losses (nats) and int32 [M] places of the labels.

        Parameters
        ----------
        relative_ranks
            float [M] in [0, 1), the rank of each hidden gene in its cell divided by the cell's
            length.
        """
        losses = self._ranks.losses(rows.labels, relative_ranks)
        places = self._ranks.places(rows.labels, relative_ranks)
        scores = {name: (losses[name], places[name]) for name in RANK_BASELINES}
        scores["no_repeat"] = self._ranks.without_repeats(rows, relative_ranks)
        if self._arithmetic:
            scores[ARITHMETIC] = self._arithmetic.scores(rows)
        return scores


def rank_bins(relative_ranks: np.ndarray) -> np.ndarray:
    """Return int64 [M], the bin of each relative rank."""
    return np.minimum((relative_ranks * RANK_BINS).astype(np.int64), RANK_BINS - 1)


def _places(table: np.ndarray) -> np.ndarray:
    """Return int32 [bins, V], for each entry the number of larger entries in its row."""
    places = np.empty(table.shape, dtype=np.int32)
    for place, row in zip(places, table, strict=True):
        place[:] = len(row) - np.searchsorted(np.sort(row), row, side="right")
    return places


def _train_tokens(
    shards: ShardSet, max_cells: int, left_out: set[int] | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (tokens int64, relative ranks float64) of blocks of training cells."""
    for block in train_blocks(shards, max_cells, left_out):
        lengths = np.diff(block.offsets)
        places = np.arange(len(block.tokens)) - np.repeat(block.offsets[:-1], lengths)
        yield block.tokens.astype(np.int64), places / np.repeat(lengths, lengths)


def _normalised_log(weights: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(weights / weights.sum(axis=1, keepdims=True))

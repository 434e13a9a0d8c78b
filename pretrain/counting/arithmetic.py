"""The arithmetic baseline: predict a hidden gene by counting alone; a model must have a lower loss.

A cell is a sorted list, so the value of a hidden gene, count x 1 / median, lies between those of
its visible neighbours. Counts are whole and mostly small, so the difference of log(1 / median)
between a gene and its neighbour is near the logarithm of a ratio of small whole numbers, and few
genes have such a median. No biology is needed for that, only tables of counts and a product:

1. u = log(1 / median) of every gene is put on a fine grid.
2. Genes of training cells are hidden in the same way as in held-out cells. For each of the 4
   nearest visible genes on both sides it is counted at which difference of u the hidden gene
   stands, and this is divided by how often a gene drawn by frequency would stand there; separately
   by class of rank and of length. The estimate of a fine bin with few counts is pulled toward that
   of the wider bin around it.
3. The weight of a gene is its frequency times these ratios of all 8 neighbours, each raised to its
   own exponent, because neighbours carry the same information. The 8 exponents maximise the
   likelihood on training cells that were not counted (the problem is convex). Genes that are
   visible in the cell have the weight 0, because no gene occurs twice in a cell.

`arithmetic_tables` counts or reads the tables; `Arithmetic` predicts with them. The baseline
``no_repeat`` is the frequency at the gene's rank with visible genes left out, and needs no medians.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.genes.vocabulary import Vocabulary
from data_prep.shards.reader import ShardSet
from pretrain.counting.arithmetic_kernels import (
    NEIGHBOURS,
    RANK_CLASSES,
    SLOTS,
    count_hidden,
    exponents_step,
    score_hidden,
)
from pretrain.counting.counted_tables import TrainBlock, counted_tables, train_blocks
from pretrain.objective.masking import EVALUATION_MASKING, Masks, mask_rows, masks_of

logger = logging.getLogger(__name__)

TABLES_NAME = "arithmetic"
# Tables by fold, for a network that learns on training cells: the cells are divided into so many
# folds by cell number, and each fold has tables that were counted on all others. Otherwise a small
# corpus would be known by heart: in the demo's cells the tables give their own cells 0.7 nats less
# than held-out ones.
FOLDS = 4
FOLDED_NAME = "prior"
# A prediction contains this share of the plain frequency, so that no loss is infinite: a corpus of
# tokens may contain a gene twice in a cell. It costs other predictions a ten thousandth of a nat.
MIXED_SHARE = 1e-4
_VERSION = 1  # of the method: another version has other file names
_SEED = 0
# Finer steps still improved the loss (0.001: 4.44, 0.0005: 4.30 nats on 13 real data sets), at a
# proportional cost. Genes beyond the quantiles, a thousandth at each end, share the outermost grid
# point.
_STEP = 0.0005
_OUTERMOST = 0.001
# The ratio of a bin is estimated from bins of these widths in steps, the widest first; `_PULL` is
# the strength of the pull in counts.
_WIDTHS = (256, 32, 8, 2, 1)
_PULL = 1.0
# A class of length gets its own tables if it has so many hidden genes.
_GENES_A_CLASS, _MOST_CLASSES = 150_000, 4
# In a small corpus genes are hidden several times, at other positions each time.
_WANTED_GENES, _MOST_ROUNDS = 400_000, 8
# The exponents are chosen on so many training cells, at most an eighth of them, and on so many of
# their genes.
_CHOOSING_CELLS, _CHOOSING_SHARE, _CHOOSING_GENES = 400, 8, 3_000
_NEWTON_STEPS = 8


@dataclass(frozen=True)
class MaskedRows:
    """Padded cells whose hidden genes are <mask>: int32 [B, L] inputs, int64 [B] lengths.

    ``labels`` int64 [M]: the hidden genes in the order of the rows. It is not checked that their
    number equals the number of masks.
    """

    inputs: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class _Grid:
    """Genes on the grid of u: `place` int32 [V], `frequency` float64 [V], `mass` float64 [G]."""

    place: np.ndarray
    frequency: np.ndarray
    mass: np.ndarray

    @property
    def size(self) -> int:
        return len(self.mass)


class Arithmetic:
    """The arithmetic baseline with its tables, ready to predict.

    Parameters
    ----------
    tables
        The result of `arithmetic_tables`.
    """

    def __init__(self, tables: dict[str, np.ndarray], vocabulary: Vocabulary) -> None:
        self._grid = _grid_of(vocabulary, tables["frequency"])
        self._edges = tables["length_edges"]
        self.exponents = tables["exponents"]
        self._factors = np.exp(tables["log_ratios"] * self.exponents[:, None].astype(np.float32))
        genes = np.arange(vocabulary.first_gene_token, vocabulary.num_tokens)
        place = self._grid.place[genes]
        self._ordered = genes[np.lexsort((-self._grid.frequency[genes], place))]
        self._starts = np.searchsorted(np.sort(place), np.arange(self._grid.size + 1))
        self._most = np.zeros(self._grid.size, np.float32)
        np.maximum.at(self._most, self._grid.place, self._grid.frequency)
        self._mask_token = vocabulary.mask_token
        self._first_gene = vocabulary.first_gene_token

    def scores(self, rows: MaskedRows) -> tuple[np.ndarray, np.ndarray]:
        """Return float64 [M] losses (nats) and int32 [M] places of hidden genes.

        A place is the number of possible genes that are more likely than the label.
        """
        labels = rows.labels
        losses, places = np.empty(len(labels)), np.empty(len(labels), np.int32)
        score_hidden(
            rows.inputs, rows.lengths, labels, self._mask_token, self._first_gene, self._grid.place,
            self._grid.frequency, self._grid.mass, self._edges, self._factors, self._most,
            self._ordered, self._starts, MIXED_SHARE, losses, places,
        )  # fmt: skip
        return losses, places


def arithmetic_tables(
    shards: ShardSet,
    max_cells: int,
    quarantine: bool = False,
    fallback: Path | None = None,
    by_fold: bool = False,
) -> dict[str, np.ndarray]:
    """Return the tables of the baseline, stored beside the shards or newly counted.

    ``frequency`` float64 [V]. ``length_edges`` int64, the longest cell lengths of all length
    classes except the last. ``log_ratios`` float32 [contexts, 8, 2 G - 1] and ``exponents`` float64
    [8], for the neighbours from the farthest on the left to the farthest on the right. ``counted``
    int64 [2], the number of training cells and of hidden genes.

    Parameters
    ----------
    max_cells
        Number of training cells to read, in whole blocks, spread over the corpus.
    quarantine
        Leave damaged blocks out, instead of raising.
    fallback
        Folder for the tables if the folder of the shards is not writable.
    by_fold
        ``log_ratios`` has an additional first dimension of `FOLDS` + 1: table f was counted without
        the training cells with number % `FOLDS` = f, and the last table with all cells.

    Raises
    ------
    ValueError
        The vocabulary has no medians, or no training cell can be read.
    """
    require_medians(shards)
    settings = {"version": _VERSION, "max_cells": max_cells, "step": _STEP}
    name, folds = (FOLDED_NAME, FOLDS) if by_fold else (TABLES_NAME, 1)
    return counted_tables(
        shards, name, settings | ({"folds": folds} if by_fold else {}),
        lambda left_out: _count(shards, max_cells, folds, left_out), fallback, quarantine,
    )  # fmt: skip


def of_all_cells(tables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return, from tables by fold, those that would have been counted without folds."""
    return tables | {"log_ratios": tables["log_ratios"][-1]}


def require_medians(shards: ShardSet) -> None:
    """Raise ValueError if the vocabulary has no medians of its own."""
    if not shards.vocabulary.has_medians:
        raise ValueError(
            f"{shards.name}: the vocabulary has no medians (all are the same number), and the "
            "arithmetic baseline is made of them; prepare the cells with the medians that their "
            "tokens were ranked by, or leave objective.prior at none"
        )


def _count(
    shards: ShardSet, max_cells: int, folds: int, left_out: set[int] | None = None
) -> dict[str, np.ndarray]:
    def blocks():
        return train_blocks(shards, max_cells, left_out)

    vocabulary = shards.vocabulary
    frequency, lengths = _frequency_and_lengths(blocks(), vocabulary)
    grid = _grid_of(vocabulary, frequency)
    hidden = int(lengths.sum() * EVALUATION_MASKING.probability)
    rounds = min(_MOST_ROUNDS, max(1, _WANTED_GENES // max(hidden, 1)))
    edges = _length_edges(lengths, hidden * rounds)
    shape = ((len(edges) + 1) * RANK_CLASSES, SLOTS)
    differences = np.zeros((folds, *shape, 2 * grid.size - 1), np.int64)
    neighbours = np.zeros((folds, *shape, grid.size), np.int64)
    choosing_differences, choosing_neighbours = (
        np.zeros_like(a[0]) for a in (differences, neighbours)
    )
    stride = max(_CHOOSING_SHARE, len(lengths) // _CHOOSING_CELLS)
    counted, choosing = 0, []
    for number in range(rounds):
        masks = masks_of(_SEED, "train", number, vocabulary, EVALUATION_MASKING)
        first = 0
        for block in blocks():
            for fold in range(folds):
                members = np.flatnonzero(block.cells % folds == fold)
                rows = _hidden_rows(block.take(members), masks, vocabulary.pad_token)
                counted += _count_rows(
                    rows, vocabulary, grid, edges, differences[fold], neighbours[fold]
                )
            chosen = np.arange(-first % stride, len(block.cells), stride)
            first += len(block.cells)
            rows = _hidden_rows(block.take(chosen), masks, vocabulary.pad_token)
            _count_rows(rows, vocabulary, grid, edges, choosing_differences, choosing_neighbours)
            choosing += [rows] if number == 0 else []
    whole, beside = differences.sum(axis=0), neighbours.sum(axis=0)
    others = _log_ratios(whole - choosing_differences, beside - choosing_neighbours, grid.mass)
    exponents = _fit_exponents(choosing, others, vocabulary, grid, edges)
    log_ratios = _log_ratios(whole, beside, grid.mass)
    if folds > 1:
        without = (
            _log_ratios(whole - differences[fold], beside - neighbours[fold], grid.mass)
            for fold in range(folds)
        )
        log_ratios = np.stack([*without, log_ratios])
    return {
        "frequency": frequency,
        "length_edges": edges,
        "log_ratios": log_ratios,
        "exponents": exponents,
        "counted": np.array([len(lengths), counted]),
    }


def _frequency_and_lengths(blocks, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of each gene among the tokens (float64 [V]), and the cell lengths."""
    counts = np.zeros(vocabulary.num_tokens, np.int64)
    lengths = [np.zeros(0, np.int64)]
    for block in blocks:
        counts += np.bincount(block.tokens, minlength=len(counts))
        lengths.append(np.diff(block.offsets))
    smoothed = counts + 0.5
    smoothed[: vocabulary.first_gene_token] = 0
    return smoothed / smoothed.sum(), np.concatenate(lengths)


def grid_places(vocabulary: Vocabulary) -> np.ndarray:
    """Return int32 [V], each gene's index on the grid of log(1 / median); 0 for special tokens."""
    u = -np.log(vocabulary.medians)
    lowest, highest = np.quantile(u, [_OUTERMOST, 1 - _OUTERMOST])
    place = np.zeros(vocabulary.num_tokens, np.int32)
    place[vocabulary.first_gene_token :] = (np.clip(u, lowest, highest) - lowest) / _STEP
    return place


def _grid_of(vocabulary: Vocabulary, frequency: np.ndarray) -> _Grid:
    place = grid_places(vocabulary)
    return _Grid(place, frequency, np.bincount(place, frequency))


def _length_edges(lengths: np.ndarray, hidden: int) -> np.ndarray:
    """Return int64, the longest cell lengths of all length classes except the last.

    All classes have the same number of tokens. Classes are needed because, at the same rank, deeply
    sequenced cells have other counts than shallow ones.
    """
    classes = min(_MOST_CLASSES, max(1, hidden // _GENES_A_CLASS))
    ordered = np.sort(lengths)
    tokens = np.cumsum(ordered)
    wanted = np.arange(1, classes) * (tokens[-1] / classes)
    edges = np.unique(ordered[np.searchsorted(tokens, wanted)])
    return edges[edges < ordered[-1]]


def _hidden_rows(block: TrainBlock, masks: Masks, pad_token: int) -> MaskedRows:
    """Return the cells of a block, padded, with genes hidden as in held-out cells."""
    lengths = np.diff(block.offsets)
    shape = (len(lengths), int(lengths.max(initial=1)))
    inputs, real = np.empty(shape, np.int32), np.empty(shape, np.bool_)
    most = shape[0] * masks.most(shape[1])
    places, labels = np.empty(most, np.int64), np.empty(most, np.int64)
    found = mask_rows(
        block.tokens, block.offsets, block.cells, masks, pad_token, inputs, real, places, labels,
        np.empty(most, np.float32),
    )  # fmt: skip
    return MaskedRows(inputs, lengths, labels[:found])


def _count_rows(
    rows: MaskedRows,
    vocabulary: Vocabulary,
    grid: _Grid,
    edges: np.ndarray,
    differences: np.ndarray,
    neighbours: np.ndarray,
) -> int:
    return count_hidden(
        rows.inputs, rows.lengths, rows.labels, vocabulary.mask_token, vocabulary.first_gene_token,
        grid.place, edges, differences, neighbours,
    )  # fmt: skip


def _log_ratios(differences: np.ndarray, neighbours: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Return float32 [contexts, SLOTS, 2 G - 1], the log of counts over expected counts.

    The estimate goes from the widest bins to the finest: the ratio of a bin starts from that of the
    bin around it, and its own counts change it as far as they outweigh `_PULL`.
    """
    size = len(mass)
    bins = [(np.arange(2 * size - 1) + width // 2) // width for width in _WIDTHS]
    result = np.empty(differences.shape, np.float32)
    for context, slot in np.ndindex(differences.shape[:2]):
        counts = differences[context, slot].astype(np.float64)
        # The count that each difference would have if the hidden gene were drawn by frequency.
        expected = _convolve(mass, neighbours[context, slot, ::-1])
        ratio = np.ones(len(counts))
        for bin_of in bins:
            seen = np.bincount(bin_of, counts)
            foreseen = np.bincount(bin_of, expected * ratio)
            ratio *= ((seen + _PULL) / (foreseen + _PULL))[bin_of]
        result[context, slot] = np.log(ratio)
    return result


def _convolve(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return float64 [2 G - 1], the convolution of two arrays [G] without negative values."""
    length = 1 << (2 * len(first) - 2).bit_length()
    product = np.fft.rfft(first, length) * np.fft.rfft(second, length)
    return np.fft.irfft(product, length)[: 2 * len(first) - 1].clip(0)


def _fit_exponents(
    choosing: list[MaskedRows],
    log_ratios: np.ndarray,
    vocabulary: Vocabulary,
    grid: _Grid,
    edges: np.ndarray,
) -> np.ndarray:
    """Return float64 [SLOTS], the exponents that maximise the likelihood of hidden genes."""
    exponents = np.full(SLOTS, 1 / SLOTS)
    hidden = sum(len(rows.labels) for rows in choosing)
    every = max(1, hidden // _CHOOSING_GENES)
    for _ in range(_NEWTON_STEPS):
        gradient, curvature = np.zeros(SLOTS), np.zeros((SLOTS, SLOTS))
        for rows in choosing:
            exponents_step(
                rows.inputs, rows.lengths, rows.labels, vocabulary.mask_token,
                vocabulary.first_gene_token, grid.place, grid.frequency, grid.mass, edges,
                log_ratios, exponents, every, gradient, curvature,
            )  # fmt: skip
        # A little curvature is added, so that the exponent of a slot that is empty in all these
        # cells does not change.
        curvature[np.diag_indices(SLOTS)] += 1.0
        change = np.linalg.solve(curvature, -gradient)
        exponents = np.clip(exponents + change, 0, 1)
        if np.abs(change).max() < 1e-3:
            break
    return exponents


def describe(tables: dict[str, np.ndarray]) -> str:
    """Return one line about the tables for the log."""
    cells, genes = tables["counted"].tolist()
    exponents = ", ".join(f"{e:.2f}" for e in tables["exponents"])
    return (
        f"arithmetic baseline: {cells:,} training cells, {genes:,} hidden genes counted, "
        f"{NEIGHBOURS} visible neighbours on each side, exponents {exponents}"
    )

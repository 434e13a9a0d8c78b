"""The guesses that a model is measured against, on the cells of the golden shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from data_prep.shards.reader import ShardSet

if TYPE_CHECKING:
    from pretrain.counting.baselines import RankBaselines

pytestmark = pytest.mark.quick

SHARDS = Path(__file__).parent / "golden" / "shards-1"


@pytest.fixture(scope="module")
def baselines() -> RankBaselines:
    from pretrain.counting.baselines import RankBaselines

    return RankBaselines(ShardSet(SHARDS), max_cells=1000)


def test_tables_are_distributions_over_genes(baselines):
    for table in baselines.log_probabilities.values():
        np.testing.assert_allclose(np.exp(table).sum(axis=1), 1)
        assert np.isneginf(table[:, :2]).all(), "special tokens are never guessed"
        assert np.isfinite(table[:, 2:]).all(), "an unseen gene is unlikely, not impossible"


def test_unigram_is_the_frequency(baselines):
    shards = ShardSet(SHARDS)
    counts = np.zeros(shards.vocabulary.num_tokens)
    for block in shards.iter_blocks("train"):
        counts += np.bincount(block.tokens, minlength=len(counts))
    smoothed = (counts + 0.5)[2:]
    expected = -np.log(smoothed / smoothed.sum())
    labels = np.arange(2, len(counts))
    got = baselines.losses(labels, np.full(len(labels), 0.3))["unigram"]
    np.testing.assert_allclose(got, expected)


def test_rank_helps_where_rank_decides(baselines):
    """On its own training cells a table by rank must beat the unigram."""
    losses = {k: [] for k in baselines.log_probabilities}
    for block in ShardSet(SHARDS).iter_blocks("train"):
        lengths = np.diff(block.offsets)
        places = np.arange(len(block.tokens)) - np.repeat(block.offsets[:-1], lengths)
        ranks = places / np.repeat(lengths, lengths)
        for name, values in baselines.losses(block.tokens.astype(np.int64), ranks).items():
            losses[name].append(values)
    means = {k: np.concatenate(v).mean() for k, v in losses.items()}
    assert means["unigram_by_rank"] < means["unigram"]
    assert means["mean_rank"] < means["unigram"]


@pytest.mark.parametrize("name", ["unigram", "unigram_by_rank", "mean_rank"])
def test_places_count_the_more_likely_genes(baselines, name):
    """Every gene at every rank, one by one."""
    from pretrain.counting.baselines import RANK_BINS

    table = baselines.log_probabilities[name]
    genes = np.arange(table.shape[1])
    for number, row in enumerate(table):
        rank = (number + 0.5) / RANK_BINS
        got = baselines.places(genes, np.full(len(genes), rank))[name]
        assert got.tolist() == [sum(other > own for other in row) for own in row]


def test_the_last_rank_is_in_the_last_bin(baselines):
    best = baselines.log_probabilities["mean_rank"][-1].argmax(keepdims=True)
    assert baselines.places(best, np.array([0.9999999]))["mean_rank"].tolist() == [0]

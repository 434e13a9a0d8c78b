"""Logits of hidden genes as a reading of targets tasks, and the world in which it pays."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from data_prep.genes.vocabulary import CLS, EOS, MASK, PAD, Vocabulary
from eval.simulate.cells import Simulation
from eval.simulate.settings import make_settings

GENES = tuple(f"ENSG{i:011d}" for i in range(12))


def vocabulary(*special):
    specials = {name: i for i, name in enumerate((PAD, MASK, *special))}
    return Vocabulary(GENES, np.ones(len(GENES)), specials, 64)


def additive(effects):
    """Return a network whose logits at each place are the sums of effects of all visible tokens."""
    import torch

    class Additive(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask):
            assert attention_mask.all()
            total = torch.from_numpy(effects)[input_ids[0]].sum(dim=0)
            return SimpleNamespace(logits=total.expand(1, input_ids.shape[1], -1))

    return Additive()


@pytest.mark.parametrize("special", [(), (CLS, EOS)])
def test_a_planted_effect_is_found_exactly(special):
    from eval.benchmark.matched.hidden_genes import logit_effects

    words, rng = vocabulary(*special), np.random.default_rng(0)
    first = words.first_gene_token
    effects = rng.normal(size=(words.num_tokens, words.num_tokens))
    genes = [first + rng.permutation(11)[:9] for _ in range(6)]
    tokens = first + np.array([0, 1])
    cells = [np.array([i for i, g in enumerate(genes) if t in g]) for t in tokens]
    found = logit_effects(additive(effects), words, genes, tokens, cells, seed=3)
    of_genes = effects[:, first:].mean(axis=1)
    for row, token in enumerate(tokens):
        others = np.setdiff1d(np.arange(first, words.num_tokens), token)
        expected = np.abs(effects[token] - of_genes[token])[others]
        assert found[row, others] == pytest.approx(expected)


def test_an_effect_that_cancels_over_ranks_is_found():
    """A gene that is raised is expected more among high ranks, and less among low ones."""
    import torch

    from eval.benchmark.matched.hidden_genes import logit_effects

    class Moving(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask):
            length = input_ids.shape[1]
            logits = torch.zeros(1, length, words.num_tokens)
            if (input_ids == regulator).any():
                logits[0, :, moved] = torch.where(torch.arange(length) < length / 2, 1.0, -1.0)
            return SimpleNamespace(logits=logits)

    words, rng = vocabulary(), np.random.default_rng(0)
    regulator, moved = words.first_gene_token, words.first_gene_token + 5
    genes = [words.first_gene_token + rng.permutation(12) for _ in range(8)]
    found = logit_effects(Moving(), words, genes, np.array([regulator]), [np.arange(8)], seed=0)[0]
    assert found[moved] == pytest.approx(11 / 12)
    assert np.delete(found, [0, 1, moved]) == pytest.approx(1 / 12)


def test_a_regulator_that_no_cell_has_moves_nothing_known():
    from eval.benchmark.matched.hidden_genes import logit_effects

    words = vocabulary()
    network = additive(np.ones((words.num_tokens, words.num_tokens)))
    genes = [np.arange(2, 8)]
    found = logit_effects(network, words, genes, np.array([2, 13]), [np.arange(1), np.arange(0)], 0)
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


def test_partners_and_regulators_do_not_decide_what_is_hidden():
    from eval.benchmark.matched.hidden_genes import logit_effects

    words, rng = vocabulary(), np.random.default_rng(1)
    effects = rng.normal(size=(words.num_tokens, words.num_tokens))
    genes = [2 + rng.permutation(12) for _ in range(3)]
    every = np.arange(3)
    network = additive(effects)
    both = logit_effects(network, words, genes, np.array([2, 5]), [every, every], 0)
    one = logit_effects(network, words, genes, np.array([5]), [every], 0)
    assert np.array_equal(both[1], one[0], equal_nan=True)


OPPOSED = {
    "cells": 1500, "genes": 60, "tfs": 6, "types": 128, "donors": 1, "batches": 1, "depth": 200,
    "wiring": "opposed", "program_share": 0.9, "switch_level": 2.5, "mean_effect": 3.0,
    "mature_share": 1.0, "tf_noise_sd": 0.1, "switched_share": 0.5, "basal_sd": 0.5,
    "dispersion": 0.3, "dispersion_sd": 0.3, "donor_sd": 0.0, "donor_tf_sd": 0.0, "batch_sd": 0.0,
    "batch_depth_sd": 0.0,
}  # fmt: skip


def test_opposed_regulators():
    world = Simulation(make_settings(**OPPOSED))
    weights = world.network.weights.toarray()
    is_tf = np.isin(np.arange(60), world.network.tfs)
    assert not weights[:, is_tf].any()
    assert ((weights[:, ~is_tf] == 3.0).sum(axis=0) == 1).all()
    assert ((weights[:, ~is_tf] == -3.0).sum(axis=0) == 1).all()
    assert not world.network.among_tfs.any()


def test_a_programme_switches_regulators_together():
    every = Simulation(make_settings(**OPPOSED | {"program_share": 1.0}))
    on = every.programs > 0
    assert (on == (np.arange(128)[:, None] % 2 == 1)).all()
    some = Simulation(make_settings(**OPPOSED))
    assert 0.9 < ((some.programs > 0) == on).mean() < 0.99


def test_correlation_hides_what_partial_correlation_sees():
    """Regulators that rise together: their targets hardly go with either, but given the other."""
    world = Simulation(make_settings(**OPPOSED))
    counts = np.concatenate([world.block(i).counts for i in range(world.num_blocks)])
    x = np.log1p(100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    tfs = world.network.tfs
    is_edge = world.network.weights.toarray() != 0
    rest = np.setdiff1d(np.arange(60), tfs)
    precision = np.linalg.pinv(np.cov(x.T))
    scale = np.sqrt(np.diag(precision))
    partial = np.abs(precision / np.outer(scale, scale))[np.ix_(tfs, rest)]
    correlation = np.abs(np.corrcoef(x.T))[np.ix_(tfs, rest)]

    def auroc(values):
        true, false = values[is_edge[:, rest]], values[~is_edge[:, rest]]
        return (true[:, None] > false[None]).mean()

    assert auroc(correlation) < 0.75 < 0.85 < auroc(partial)


def test_older_settings_give_the_cells_they_gave():
    """The new settings at their defaults draw nothing."""
    import hashlib

    block = Simulation(make_settings(cells=200, genes=60, tfs=6, types=3, seed=5)).block(0)
    assert hashlib.sha256(block.counts.tobytes()).hexdigest()[:16] == "0f535c073cf474f6"

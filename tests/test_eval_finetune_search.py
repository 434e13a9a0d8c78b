"""The search for settings: nested, by group, resumable."""

import multiprocessing
import time
from dataclasses import replace

import numpy as np
import pytest

from tests.ranks import kill
from tests.test_eval_finetune import (
    both_targets,
    cell_head,
    cells_of_types,
    encoder,
    gene_labels,
    quick,
    vocabulary,
)


def test_inner_split_keeps_groups_and_genes_apart():
    from eval.finetune.classifier import Target
    from eval.finetune.search import inner_split

    vocab = vocabulary()
    tokens, types = cells_of_types(vocab, 60)
    groups = np.array([f"donor{i % 5}" for i in range(60)])
    group_of = {id(t): g for t, g in zip(tokens, groups, strict=True)}
    (left, left_targets), (right, right_targets) = inner_split(
        tokens, both_targets(vocab, types), groups, 0
    )
    assert len(left) + len(right) == 60
    assert not {group_of[id(t)] for t in left} & {group_of[id(t)] for t in right}
    type_of = {id(t): k for t, k in zip(tokens, types, strict=True)}
    assert [type_of[id(t)] for t in right] == right_targets[0].labels.tolist()
    known = [np.flatnonzero(t[1].labels >= 0) for t in (left_targets, right_targets)]
    np.testing.assert_array_equal(np.sort(np.concatenate(known)), np.arange(2, 42))
    (left, _), (right, right_targets) = inner_split(tokens, [Target(cell_head(), types)], None, 0)
    assert np.bincount(right_targets[0].labels).tolist() == [5, 5, 5]
    with pytest.raises(ValueError, match="at least two"):
        inner_split(tokens, [Target(cell_head(), types)], np.full(60, "x"), 0)


def _scored_by_rate(classifier, tokens, targets):
    """A score with a known best: learning rates near 1e-4."""
    return -abs(np.log10(classifier.settings.learning_rate) + 4)


def _slowly_scored(classifier, tokens, targets):
    time.sleep(0.3)
    return _scored_by_rate(classifier, tokens, targets)


def _search_into(folder, score):
    from eval.finetune.classifier import Target
    from eval.finetune.search import search

    vocab = vocabulary()
    tokens, types = cells_of_types(vocab, 12)
    target = Target(cell_head(), types)
    settings = replace(quick(), learning_rate=1e-3)
    return search(encoder(vocab), vocab, tokens, [target], settings, 0, 6, None, folder, score)


def test_search_finds_and_a_killed_one_finds_the_same(tmp_path):
    from eval.finetune.classifier import Target
    from eval.finetune.search import search

    whole = _search_into(None, _scored_by_rate)
    assert 10**-4.7 < whole.learning_rate < 10**-3.3, "the first trial has 1e-3"
    assert 0.5 <= whole.layer_decay < 1, "the first trial has 1"
    assert (whole.batch_cells, whole.warmup_share) == (quick().batch_cells, quick().warmup_share)
    process = multiprocessing.get_context("forkserver").Process(
        target=_search_into, args=(tmp_path, _slowly_scored)
    )
    process.start()
    while not (tmp_path / "trial-0002").exists():
        assert process.is_alive(), "it came to its end before it could be killed"
    kill(process)
    assert _search_into(tmp_path, _scored_by_rate) == whole
    assert not list(tmp_path.glob("trial-*"))
    vocab = vocabulary()
    tokens, types = cells_of_types(vocab, 12, seed=1)
    with pytest.raises(ValueError, match="another search"):
        search(
            encoder(vocab),
            vocab,
            tokens,
            [Target(cell_head(), types)],
            quick(),
            0,
            6,
            None,
            tmp_path,
        )
    with pytest.raises(ValueError, match="at least 1"):
        search(encoder(vocab), vocab, tokens, [Target(cell_head(), types)], quick(), 0, 0)


def test_macro_f1_by_hand():
    from eval.finetune.search import macro_f1
    from eval.finetune.training import finetune

    vocab = vocabulary()
    tokens, types = cells_of_types(vocab, 20)
    tokens[3] = np.zeros(0, dtype=np.int32)
    types[5] = -1
    labels = gene_labels(vocab)
    targets = both_targets(vocab, types)
    settings = replace(quick(), epochs=1, learning_rate=1e-3)
    classifier = finetune(encoder(vocab), vocab, tokens, targets, settings, 0)
    cells = [(types[i], classifier.predict_cells([tokens[i]], "type")[0].argmax())
             for i in range(20) if i not in (3, 5)]  # fmt: skip
    found = classifier.predict_genes(tokens, "dosage", labels >= 0)
    genes = [(labels[g], found.probabilities[found.token == g].mean(axis=0).argmax())
             for g in set(found.token.tolist())]  # fmt: skip
    expected = []
    for pairs in (cells, genes):
        scores = []
        for each in {truth for truth, _ in pairs}:
            hits = sum(t == p == each for t, p in pairs)
            scores.append(2 * hits / sum(int(t == each) + int(p == each) for t, p in pairs))
        expected.append(np.mean(scores))
    assert min(expected) > 0 and max(expected) < 1
    np.testing.assert_allclose(macro_f1(classifier, tokens, targets), np.mean(expected))

"""15 % of the genes, 80/10/10, never a special token."""

import numpy as np
import pytest

from data_prep.vocab import from_dictionaries
from pretrain.config import MaskingConfig
from pretrain.masking import mask_rows, mask_stream, num_masked

NUM_GENES = 500


def vocabulary(has_cls: bool):
    special = {"<pad>": 0, "<mask>": 1} | ({"<cls>": 2, "<eos>": 3} if has_cls else {})
    genes = [f"g{i}" for i in range(NUM_GENES)]
    tokens = special | {g: i + len(special) for i, g in enumerate(genes)}
    return from_dictionaries(tokens, dict.fromkeys(genes, 1.0))


def rows(has_cls: bool, num_rows: int = 400, width: int = 200):
    rng = np.random.default_rng(0)
    vocab = vocabulary(has_cls)
    lengths = rng.integers(8, width + 1, num_rows)
    lengths[0] = 0
    tokens = np.zeros((num_rows, width), dtype=np.int64)
    for row, length in enumerate(lengths):
        genes = rng.permutation(NUM_GENES)[:length] + vocab.first_gene_token
        if has_cls and length:
            genes[0], genes[-1] = 2, 3
        tokens[row, :length] = genes
    return vocab, tokens, lengths


@pytest.mark.parametrize("has_cls", [False, True])
def test_rates(has_cls):
    vocab, tokens, lengths = rows(has_cls)
    cells = np.arange(len(lengths))
    masked = mask_rows(tokens, lengths, cells, mask_stream(0, "train", 0), vocab, MaskingConfig())
    genes = np.maximum(lengths - (2 if has_cls else 0), 0)
    row = masked.places // tokens.shape[1]
    counts = np.bincount(row, minlength=len(lengths))
    np.testing.assert_array_equal(counts, num_masked(genes, 0.15))
    assert abs(counts.sum() / genes.sum() - 0.15) < 0.002
    np.testing.assert_array_equal(masked.labels, tokens.reshape(-1)[masked.places])
    assert (masked.labels >= vocab.first_gene_token).all()
    shown = masked.inputs.reshape(-1)[masked.places]
    share_mask = (shown == vocab.mask_token).mean()
    share_same = (shown == masked.labels).mean()
    assert abs(share_mask - 0.8) < 0.02
    assert abs(share_same - 0.1) < 0.015
    replaced = shown[(shown != vocab.mask_token) & (shown != masked.labels)]
    assert replaced.min() >= vocab.first_gene_token
    assert len(np.unique(replaced)) > NUM_GENES / 2
    untouched = np.ones(tokens.size, dtype=bool)
    untouched[masked.places] = False
    np.testing.assert_array_equal(
        masked.inputs.reshape(-1)[untouched], tokens.reshape(-1)[untouched]
    )


def test_masks_belong_to_the_cell_not_to_the_batch():
    vocab, tokens, lengths = rows(False)
    cells = np.arange(len(lengths)) + 10**9
    stream = mask_stream(7, "train", 3)
    whole = mask_rows(tokens, lengths, cells, stream, vocab, MaskingConfig())
    order = np.random.default_rng(1).permutation(len(lengths))[:50]
    wider = np.pad(tokens[order], ((0, 0), (0, 56)))
    part = mask_rows(wider, lengths[order], cells[order], stream, vocab, MaskingConfig())
    np.testing.assert_array_equal(part.inputs[:, : tokens.shape[1]], whole.inputs[order])
    other = mask_rows(tokens, lengths, cells, mask_stream(7, "train", 4), vocab, MaskingConfig())
    assert not np.array_equal(other.places, whole.places)


@pytest.mark.parametrize(("genes", "expected"), [(0, 0), (1, 1), (7, 1), (10, 2), (100, 15)])
def test_at_least_one_gene_is_hidden(genes, expected):
    assert num_masked(np.array([genes]), 0.15)[0] == expected

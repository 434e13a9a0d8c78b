"""15 % of the genes, 80/10/10, never a special token; equal to plain numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from data_prep.genes.vocabulary import from_dictionaries
from data_prep.hashing import keyed_hash, unit_interval
from pretrain.config import MaskingConfig
from pretrain.objective.masking import NO_LABEL, Masks, mask_rows, masks_of, num_masked

pytestmark = pytest.mark.quick

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
        genes = rng.integers(0, NUM_GENES, length) + vocab.first_gene_token
        if has_cls and length:
            genes[0], genes[-1] = 2, 3
        tokens[row, :length] = genes
    return vocab, tokens, lengths


@dataclass
class Masked:
    inputs: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    ranks: np.ndarray


def mask(tokens: np.ndarray, lengths: np.ndarray, cells: np.ndarray, masks: Masks) -> Masked:
    """Run the kernel on padded rows; return what is hidden, without what is unused behind it."""
    num_rows, width = tokens.shape
    flat = np.concatenate([row[:n] for row, n in zip(tokens, lengths, strict=True)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    most = num_rows * masks.most(width)
    out = Masked(
        np.empty((num_rows, width), dtype=np.int64),
        np.empty(most, dtype=np.int64),
        np.empty(most, dtype=np.int64),
        np.empty(most, dtype=np.float32),
    )
    real = np.empty((num_rows, width), dtype=bool)
    found = mask_rows(
        flat.astype(np.uint16), offsets, cells, masks, 0, out.inputs, real, out.places, out.labels,
        out.ranks,
    )  # fmt: skip
    assert (out.labels[found:] == NO_LABEL).all()
    assert (out.places[found:] == 0).all()
    np.testing.assert_array_equal(real, np.arange(width) < np.maximum(lengths, 1)[:, None])
    return Masked(out.inputs, out.places[:found], out.labels[:found], out.ranks[:found])


def mask_in_numpy(tokens, lengths, cells, masks: Masks) -> Masked:
    """Say what masks are, row by row, as plainly as possible."""
    inputs, places, labels, ranks = tokens.copy(), [], [], []
    width = tokens.shape[1]
    first = int(masks.framed)
    for row, (length, cell) in enumerate(zip(lengths, cells, strict=True)):
        genes = np.arange(first, max(first, length - first))
        identity = (np.int64(cell) << 16) + genes
        order = np.argsort(keyed_hash(int(masks.place_key), identity))
        hidden = int(num_masked(np.array([len(genes)]), masks.probability)[0])
        for i in np.sort(order[:hidden]):
            place = genes[i]
            action = unit_interval(keyed_hash(int(masks.action_key), identity[i]))
            gene = unit_interval(keyed_hash(int(masks.gene_key), identity[i]))
            labels.append(tokens[row, place])
            places.append(row * width + place)
            ranks.append(np.float32(place / length))
            if action < masks.mask_share:
                inputs[row, place] = masks.mask_token
            elif action < masks.mask_share + masks.random_share:
                inputs[row, place] = masks.first_gene + int(gene * masks.num_genes)
    return Masked(inputs, np.array(places), np.array(labels), np.array(ranks))


@pytest.mark.parametrize("has_cls", [False, True])
@pytest.mark.parametrize("width", [8, 40, 700])
@pytest.mark.parametrize("probability", [0.15, 0.5, 0.9])
def test_kernel_equals_numpy(has_cls, width, probability):
    vocab, tokens, lengths = rows(has_cls, num_rows=60, width=width)
    cells = np.random.default_rng(1).integers(0, 10**9, len(lengths))
    config = MaskingConfig(probability=probability, mask_share=0.6, random_share=0.3)
    masks = masks_of(5, "train", 2, vocab, config)
    got, expected = (
        mask(tokens, lengths, cells, masks),
        mask_in_numpy(tokens, lengths, cells, masks),
    )
    for name in ("inputs", "places", "labels", "ranks"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)


@pytest.mark.parametrize("has_cls", [False, True])
def test_rates(has_cls):
    vocab, tokens, lengths = rows(has_cls)
    masks = masks_of(0, "train", 0, vocab, MaskingConfig())
    masked = mask(tokens, lengths, np.arange(len(lengths)), masks)
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
    masks = masks_of(7, "train", 3, vocab, MaskingConfig())
    whole = mask(tokens, lengths, cells, masks)
    order = np.random.default_rng(1).permutation(len(lengths))[:50]
    wider = np.pad(tokens[order], ((0, 0), (0, 56)))
    part = mask(wider, lengths[order], cells[order], masks)
    np.testing.assert_array_equal(part.inputs[:, : tokens.shape[1]], whole.inputs[order])
    other = mask(tokens, lengths, cells, masks_of(7, "train", 4, vocab, MaskingConfig()))
    assert not np.array_equal(other.places, whole.places)


@pytest.mark.parametrize(("genes", "expected"), [(0, 0), (1, 1), (7, 1), (10, 2), (100, 15)])
def test_at_least_one_gene_is_hidden(genes, expected):
    assert num_masked(np.array([genes]), 0.15)[0] == expected


@pytest.mark.parametrize("named", ["seed", "split", "epoch"])
def test_each_name_of_a_stream_gives_other_masks(named):
    """Of a run with another seed, of the other split, of the next epoch; and the same again."""
    vocab, tokens, lengths = rows(False, 40)
    cells = np.arange(40)
    name = {"seed": 7, "split": "train", "epoch": 3}
    other = name | {named: {"seed": 8, "split": "heldout", "epoch": 4}[named]}

    def places(of: dict) -> np.ndarray:
        masks = masks_of(of["seed"], of["split"], of["epoch"], vocab, MaskingConfig())
        return mask(tokens, lengths, cells, masks).places

    np.testing.assert_array_equal(places(name), places(name))
    assert (places(name) != places(other)).mean() > 0.5

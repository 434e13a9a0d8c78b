"""First weights of genes: by hand, from the vocabulary and from training cells alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

WIDE = {"num_layers": 1, "hidden_size": 80, "num_heads": 2, "intermediate_size": 16}
ARCHITECTURES = ["bert", "modernbert"]


def settings_of(architecture: str, **changes):
    from pretrain.settings.model_settings import ModelConfig

    return ModelConfig.model_validate(
        WIDE | {"architecture": architecture, "init_genes": "counted"} | changes
    )


def filled(shards, settings, seed: int = 3):
    """Return embeddings and bias of a model of these shards before and after, and the record."""
    import torch

    from pretrain.model.architectures import architecture_of, encoder_of, input_table
    from pretrain.model.counted_start import count_genes, fill
    from pretrain.model.masked_gene_model import build_model

    counted = count_genes(shards, settings)
    model = build_model(settings, shards.vocabulary, seed)
    bias = dict(model.bert.named_parameters())[architecture_of(model.bert).bias]
    table = input_table(encoder_of(model.bert))
    before = table.detach().numpy().copy()
    others = {n: p.detach().clone() for n, p in model.named_parameters()}
    given = None if counted.bias is None else torch.from_numpy(counted.bias)
    dimensions = torch.from_numpy(counted.dimensions)
    fill(model, dimensions, given, shards.vocabulary.first_gene_token, settings)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, others[n])}
    return before, table.detach().numpy(), bias.detach().numpy(), moved, counted.record


@pytest.fixture(scope="module")
def shard_set(shards):
    from data_prep.shards.reader import ShardSet

    return ShardSet(shards)


@pytest.fixture(scope="module")
def train_cells(shard_set) -> list[np.ndarray]:
    return [
        block.tokens[a:b]
        for block in shard_set.iter_blocks("train")
        for a, b in zip(block.offsets[:-1], block.offsets[1:], strict=True)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_parts_by_hand(architecture, shard_set, train_cells):
    before, table, bias, moved, record = filled(shard_set, settings_of(architecture))
    vocab = shard_set.vocabulary
    first = vocab.first_gene_token
    assert len(moved) == 2, "embeddings (tied to the head) and its bias, nothing else"
    np.testing.assert_array_equal(table[:first], before[:first])
    for gene, median in ((0, vocab.medians[0]), (17, vocab.medians[17])):
        row = table[first + gene]
        for j, frequency in enumerate((0.5, 1, 2, 4, 8, 16, 32, 64)):
            assert row[2 * j] == pytest.approx(0.06 * np.sin(frequency * np.log(median)), abs=1e-6)
            assert row[2 * j + 1] == pytest.approx(
                0.06 * np.cos(frequency * np.log(median)), abs=1e-6
            )
    # Loadings: the singular vectors of cells x tokens, each up to its sign.
    matrix = np.zeros((len(train_cells), vocab.num_tokens))
    for row, cell in zip(matrix, train_cells, strict=True):
        row[cell] = 1 - np.arange(len(cell)) / len(cell)
    vectors = np.linalg.svd(matrix, full_matrices=False)[2][:3].T
    scaled = 0.06 * vectors / np.sqrt(np.mean(vectors[first:] ** 2, axis=0))
    found = table[first:, 16:19]
    signs = np.sign((scaled[first:] * found).sum(axis=0))
    np.testing.assert_allclose(
        found, (scaled[first:] * signs).clip(-0.24, 0.24), atol=1e-3, rtol=1e-3
    )
    assert np.abs(table[first:, 16:66]).max() <= 0.24 + 1e-6
    np.testing.assert_allclose(table[first:, 66:], before[first:, 66:] / 10, rtol=1e-5)
    counts = np.bincount(np.concatenate(train_cells), minlength=vocab.num_tokens)[first:] + 0.5
    np.testing.assert_allclose(bias[first:], np.log(counts / counts.sum()), rtol=1e-5)
    assert (bias[:first] == bias[first:].min()).all()
    assert record["counted"]["svd"]["dimensions"] == 50
    assert record["shards_fingerprint"] == shard_set.fingerprint


@pytest.mark.parametrize(
    ("parts", "counted"),
    [(("medians",), 16), (("svd",), 50), (("frequency",), 0), (("svd", "frequency"), 50)],
)
def test_each_part_alone(parts, counted, shard_set):
    before, table, bias, _, record = filled(shard_set, settings_of("modernbert", counted=parts))
    first = shard_set.vocabulary.first_gene_token
    rest = before[first:, counted:] / (10 if counted else 1)
    np.testing.assert_allclose(table[first:, counted:], rest, rtol=1e-5)
    assert (bias != 0).any() == ("frequency" in parts)
    assert record["counted"].keys() == set(parts)


@pytest.mark.parametrize(("width", "medians", "svd"), [(8, 4, 4), (32, 16, 16), (64, 16, 48)])
def test_narrow_models_say_what_they_leave_out(width, medians, svd, shard_set):
    from pretrain.model.counted_start import count_genes, describe

    record = count_genes(shard_set, settings_of("bert", hidden_size=width)).record
    said = describe(record)
    assert f"medians in {medians} dimensions" in said
    assert f"{svd} of 50 components" in said


def test_same_cells_same_weights(shard_set):
    from pretrain.model.counted_start import count_genes

    settings = settings_of("bert")
    first, second = (count_genes(shard_set, settings).record["sha256"] for _ in range(2))
    other = count_genes(shard_set, settings_of("bert", counted=("svd",))).record["sha256"]
    assert first == second != other


def test_a_vocabulary_without_medians_is_refused(shard_set):
    from pretrain.model.counted_start import require_countable

    vocab = shard_set.vocabulary
    without = replace(vocab, medians=np.ones(len(vocab.genes)))
    with pytest.raises(ValueError, match=r"all medians .* are 1, so .*model.counted=\[frequency"):
        require_countable(settings_of("bert"), without)
    require_countable(settings_of("bert", counted=("frequency", "svd")), without)
    require_countable(settings_of("bert"), vocab)

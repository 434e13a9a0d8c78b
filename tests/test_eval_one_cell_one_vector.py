"""A cell's embedding has the same bits whatever stands beside it."""

import numpy as np
import pytest

from data_prep.genes.vocabulary import Vocabulary

NUM_GENES = 300


@pytest.fixture(scope="module", params=["bert", "modernbert"])
def encoder(request):
    from pretrain.model.architectures import encoder_of
    from pretrain.model.masked_gene_model import build_model
    from pretrain.settings.model_settings import ModelConfig

    settings = ModelConfig(
        architecture=request.param, num_layers=3, hidden_size=128, num_heads=4,
        intermediate_size=256,
    )  # fmt: skip
    return encoder_of(build_model(settings, vocabulary(), 0).bert)


def vocabulary() -> Vocabulary:
    genes = tuple(f"ENSG{i:011d}" for i in range(NUM_GENES))
    return Vocabulary(genes, np.linspace(0.5, 4.0, NUM_GENES), {"<pad>": 0, "<mask>": 1}, 256)


@pytest.fixture(scope="module")
def cells() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = [256, 255, 64, 130, 1, 7, 0, 97, 64, 200]
    return [(rng.permutation(NUM_GENES)[:n] + 2).astype(np.uint16) for n in lengths]


@pytest.mark.parametrize("bf16", [False, True])
def test_bits_of_a_cell_are_its_own(encoder, cells, bf16):
    """Alone, in any order, beside any others, at any token budget, with any number of threads."""
    import torch

    from pretrain.cell_states.frozen_states import embed_layers

    def embed(chosen, **settings):
        found = embed_layers(chosen, encoder, vocabulary(), (0, -1), bf16=bf16, **settings)
        return np.concatenate([found[0], found[-1]], axis=1)

    together = embed(cells)
    assert np.isnan(together[6]).all() and np.isfinite(together[[0, 4, 9]]).all()
    order = np.random.default_rng(1).permutation(len(cells))
    np.testing.assert_array_equal(embed([cells[i] for i in order]), together[order])
    np.testing.assert_array_equal(embed(cells, token_budget=64), together)
    np.testing.assert_array_equal(np.concatenate([embed([c]) for c in cells]), together)
    threads = torch.get_num_threads()
    try:
        # Where several threads share a cell, three of them gave other bits than two.
        for number in (1, 2, 3, 8):
            torch.set_num_threads(number)
            np.testing.assert_array_equal(embed(cells), together)
            assert torch.get_num_threads() == number, "as the caller had it"
    finally:
        torch.set_num_threads(threads)


def test_a_pass_on_a_gpu_has_a_shape_that_no_other_cell_decides():
    from pretrain.cell_states.frozen_states import _passes

    lengths = np.array([10, 64, 65, 0, 300, 1, 64, 2])
    found = [(batch.tolist(), width) for batch, width in _passes(lengths, 192, "cuda")]
    assert found == [([0, 1, 5], 64), ([6, 7, 6], 64), ([2], 128), ([4], 320)]
    for company in ([0], [0, 2], [0, 1, 2, 4]):
        passes = list(_passes(lengths[company], 192, "cuda"))
        assert (len(passes[0][0]), passes[0][1]) == (3, 64), "the first cell's pass"

"""A ModernBERT in every evaluation: states, perturbations, classifiers and attention are right."""

from __future__ import annotations

import copy

import numpy as np
import pytest

NUM_GENES, LONGEST = 40, 40


def vocabulary():
    from data_prep.genes.vocabulary import Vocabulary

    genes = tuple(f"ENSG{i:011d}" for i in range(NUM_GENES))
    return Vocabulary(genes, np.linspace(0.5, 4.0, NUM_GENES), {"<pad>": 0, "<mask>": 1}, LONGEST)


@pytest.fixture(scope="module")
def network():
    import torch

    from pretrain.model.masked_gene_model import build_model
    from pretrain.settings.model_settings import ModelConfig

    settings = ModelConfig(
        architecture="modernbert", num_layers=3, hidden_size=32, num_heads=2, intermediate_size=48,
        local_window=4,
    )  # fmt: skip
    network = build_model(settings, vocabulary(), 0).bert.eval()
    with torch.no_grad():  # random weights of the usual size hardly look at their neighbours
        for weight in network.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
    return network


@pytest.fixture(scope="module")
def cells() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    every = np.arange(2, NUM_GENES + 2)
    return [rng.permutation(every)[:n].astype(np.int64) for n in (40, 25, 11, 6)]


def plain_states(network, cell: np.ndarray, number: int) -> np.ndarray:
    """Return float64 [genes, D]: a cell alone, after `number` layers, through the last norm."""
    import torch

    seen = []
    hook = network.model.layers[number - 1].register_forward_hook(
        lambda m, i, out: seen.append(out)
    )
    with torch.no_grad():
        network(input_ids=torch.from_numpy(cell)[None])
        hook.remove()
        return network.model.final_norm(seen[0])[0].double().numpy()


@pytest.mark.parametrize("layer", [0, -1])
def test_embedding_is_that_of_the_cell_alone(layer, network, cells):
    from pretrain.cell_states.frozen_states import embed_cells, embed_layers

    found = embed_cells(cells, network.base_model, vocabulary(), layer=layer, token_budget=90)
    expected = [plain_states(network, c, 3 + layer).mean(axis=0) for c in cells]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(network.model.layers) == 3, "all layers are there again"
    both = embed_layers(cells, network.base_model, vocabulary(), (0, -1), token_budget=90)
    np.testing.assert_array_equal(both[layer], found)


def test_states_by_windows_are_those_of_transformers(tmp_path):
    """Cells long enough to be cut into blocks, padded and not; an export says nothing of it."""
    from typing import Any

    import torch
    from transformers import AutoModelForMaskedLM

    from data_prep.genes.vocabulary import Vocabulary
    from pretrain.cell_states.frozen_states import encode_batch
    from pretrain.export.model_folder import load_exported
    from pretrain.model.masked_gene_model import build_model
    from pretrain.settings.model_settings import ModelConfig

    genes = tuple(f"ENSG{i:011d}" for i in range(100))
    vocab = Vocabulary(genes, np.linspace(0.5, 4.0, 100), {"<pad>": 0, "<mask>": 1}, 100)
    settings = ModelConfig(
        architecture="modernbert", num_layers=4, hidden_size=32, num_heads=2, intermediate_size=48,
        local_window=4,
    )  # fmt: skip
    made = build_model(settings, vocab, 0).bert
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
    made.save_pretrained(tmp_path)
    vocab.save(tmp_path / "vocabulary.json")
    assert "windows" not in (tmp_path / "config.json").read_text()
    plain: Any = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    own: Any = load_exported(tmp_path)[0]
    assert plain.config._attn_implementation == "sdpa" != own.config._attn_implementation
    rng = np.random.default_rng(0)
    for lengths in ((96, 96), (100, 61, 5)):
        cells = [rng.permutation(np.arange(2, 102))[:n].astype(np.int64) for n in lengths]
        with torch.no_grad():
            (found, _), (expected, _) = (
                encode_batch(m.base_model, cells, vocab) for m in (own, plain)
            )
            real = torch.arange(found.shape[1]) < torch.tensor(lengths)[:, None]
            torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
            logits = (m.decoder(m.head(s[real])) for m, s in ((own, found), (plain, expected)))
            torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_head", [False, True])
def test_deletions_and_what_changes_nothing(with_head, network, cells):
    """With a head all layers are computed, without only those that are read: the same shifts."""
    from eval.finetune.classifier import Classifier, FinetuneSettings, Head
    from eval.perturb.screen.compare_copies import CopyEngine
    from eval.perturb.screen.edits import Edit, GeneSets

    encoder, vocab = copy.deepcopy(network.base_model), vocabulary()
    classifier = None
    if with_head:
        heads = (Head("type", "cells", ("a", "b")),)
        classifier = Classifier(encoder, vocab, heads, FinetuneSettings())
    engine = CopyEngine(encoder, vocab, classifier=classifier)
    cell = cells[1]
    members = np.arange(2, NUM_GENES + 2)[:, None]
    sets = GeneSets(members, np.zeros_like(members, dtype=bool))
    found = engine.perturb(cell, sets, Edit("delete"))
    assert len(found.sets) == len(cell)
    before = plain_states(network, cell, 2)
    shifts = []
    for number in found.sets:
        kept = np.flatnonzero(cell != number + 2)
        old = before[kept].mean(axis=0)
        new = plain_states(network, cell[kept], 2).mean(axis=0)
        shifts.append(1 - old @ new / np.linalg.norm(old) / np.linalg.norm(new))
    np.testing.assert_allclose(found.values["shift"], shifts, atol=1e-5)
    assert max(shifts) > 3e-4, "something has to happen"
    first = GeneSets(cell[:1, None], np.zeros((1, 1), dtype=bool))
    nothing = engine.perturb(cell, first, Edit("overexpress"))
    assert not nothing.changed.any()
    assert not any(v.any() for v in nothing.values.values()), "exactly 0"


def test_bfloat16_keeps_places_apart(network):
    """Frequencies of rotary positions are no weights: far places would fall together."""
    import torch

    from pretrain.model.architectures import to_bfloat16

    encoder = copy.deepcopy(network.base_model)
    frequencies = {n: b.clone() for n, b in encoder.named_buffers()}
    assert len(frequencies) >= 2
    to_bfloat16(encoder)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    for name, buffer in encoder.named_buffers():
        assert torch.equal(buffer, frequencies[name])


@pytest.mark.parametrize("rank", [0, 2])
def test_finetune_save_and_load(rank, network, cells, tmp_path):
    from eval.finetune.classifier import (
        FinetuneSettings,
        Head,
        Target,
        load_classifier,
        save_classifier,
    )
    from eval.finetune.training import finetune

    encoder = copy.deepcopy(network.base_model)
    before = {n: p.detach().clone() for n, p in encoder.named_parameters()}
    target = Target(Head("type", "cells", ("a", "b")), np.array([0, 1, 0, 1]))
    settings = FinetuneSettings(
        epochs=1, learning_rate=1e-3, batch_cells=4, freeze_layers=1, lora_rank=rank
    )
    trained = finetune(encoder, vocabulary(), cells, [target], settings, 0)
    moved = {
        n
        for n, p in trained.encoder.named_parameters()
        if "lora_" in n or not np.array_equal(p.detach(), before[n.replace(".base_layer", "")])
    }
    if rank:
        assert moved == {
            f"layers.{layer}.attn.Wqkv.lora_{part}.default.weight"
            for layer in (1, 2)
            for part in "AB"
        }
    else:
        assert moved, "the upper layers learn"
        assert not [n for n in moved if n.startswith(("layers.0", "embeddings"))]
    save_classifier(trained, tmp_path / "classifier", {})
    loaded = load_classifier(tmp_path / "classifier")
    expected = trained.predict_cells(cells, "type")
    np.testing.assert_array_equal(loaded.predict_cells(cells, "type"), expected)


def test_attention_is_that_of_the_eager_model(network, cells):
    import torch

    from eval.cells.attention import mean_attention

    genes = np.arange(2, 12)
    before = network.config._attn_implementation
    found = mean_attention(cells, network.base_model, vocabulary(), genes).received[0]
    plain = copy.deepcopy(network)
    plain.set_attn_implementation("eager")
    sums, number = np.zeros(found.shape), np.zeros(len(genes))
    with torch.no_grad():
        for cell in cells:
            output = plain(input_ids=torch.from_numpy(cell)[None], output_attentions=True)
            weights = np.stack([w[0].double().numpy() for w in output.attentions])
            for place, token in enumerate(cell):
                if token in genes:
                    sums[:, :, token - 2] += weights[:, :, :, place].mean(axis=2) * len(cell)
                    number[token - 2] += 1
    np.testing.assert_allclose(found, sums / number, atol=1e-4)
    assert network.config._attn_implementation == before != "eager"


def test_screen_is_refused(network):
    from types import SimpleNamespace
    from typing import Any

    from eval.perturb.screen.estimate import require_screenable

    subject: Any = SimpleNamespace(engine=SimpleNamespace(encoder=network.base_model))
    screen: Any = SimpleNamespace(genes=None)
    with pytest.raises(ValueError, match="this model is a modernbert, .* leave --screen out"):
        require_screenable(screen, subject)

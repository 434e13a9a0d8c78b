"""The fine-tuning engine: what it learns, that it repeats, goes on and divides over ranks."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest

from data_prep.genes.vocabulary import CLS, EOS, MASK, PAD, Vocabulary
from pretrain.settings.model_settings import ModelConfig
from tests.ranks import kill, run_ranks

if TYPE_CHECKING:
    from transformers import BertModel

    from eval.finetune.classifier import Classifier, FinetuneSettings, Head, Target

NUM_GENES = 60
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=2, intermediate_size=64,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


@cache
def cell_head() -> Head:
    from eval.finetune.classifier import Head

    return Head("type", "cells", ("a", "b", "c"))


@cache
def gene_head() -> Head:
    from eval.finetune.classifier import Head

    return Head("dosage", "genes", ("no", "yes"))


@cache
def quick() -> FinetuneSettings:
    from eval.finetune.classifier import FinetuneSettings

    return FinetuneSettings(epochs=2, learning_rate=5e-3, batch_cells=8, dropout=0.0)


def vocabulary(has_cls: bool = False) -> Vocabulary:
    special = {PAD: 0, MASK: 1} | ({CLS: 2, EOS: 3} if has_cls else {})
    genes = tuple(f"ENSG{i:011d}" for i in range(NUM_GENES))
    return Vocabulary(genes, np.ones(NUM_GENES), special, 64)


def encoder(vocab: Vocabulary, dropout: float = 0.0) -> BertModel:
    from pretrain.model.masked_gene_model import build_model

    config = MODEL.model_copy(update={"hidden_dropout": dropout})
    return build_model(config, vocab, 0).bert.bert


def cells_of_types(vocab: Vocabulary, num_cells: int = 48, seed: int = 0):
    """Return tokens and types: genes of the cell's own type stand first. Lengths of 5 to 50."""
    rng = np.random.default_rng(seed)
    types = np.arange(num_cells) % 3
    tokens = []
    for kind in types:
        genes = rng.permutation(NUM_GENES)
        ranked = np.concatenate([genes[genes % 3 == kind], genes[genes % 3 != kind]])
        ids = ranked[: rng.integers(5, 50)] + vocab.first_gene_token
        if vocab.has_cls:
            ids = np.concatenate([[2], ids, [3]])
        tokens.append(ids.astype(np.int32))
    return tokens, types


def gene_labels(vocab: Vocabulary) -> np.ndarray:
    """Return classes of the first 40 genes: even or odd."""
    labels = np.full(vocab.num_tokens, -1)
    labels[vocab.first_gene_token :][:40] = np.arange(40) % 2
    return labels


def both_targets(vocab: Vocabulary, types: np.ndarray) -> list[Target]:
    from eval.finetune.classifier import Target

    return [Target(cell_head(), types), Target(gene_head(), gene_labels(vocab))]


def weights_of(classifier: Classifier) -> dict[str, np.ndarray]:
    return {k: v.numpy().copy() for k, v in classifier.state_dict().items()}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("has_cls", [False, True])
def test_learns_cells_and_genes_at_once(has_cls):
    from eval.finetune.training import finetune

    vocab = vocabulary(has_cls)
    tokens, types = cells_of_types(vocab, 90)
    settings = replace(quick(), epochs=6)
    classifier = finetune(
        encoder(vocab), vocab, tokens[:60], both_targets(vocab, types[:60]), settings, 0
    )
    cells = classifier.predict_cells(tokens[60:], "type")
    np.testing.assert_allclose(cells.sum(axis=1), 1, rtol=1e-5)
    assert (cells.argmax(axis=1) == types[60:]).mean() > 0.9
    labels = gene_labels(vocab)
    genes = classifier.predict_genes(tokens[60:], "dosage", labels >= 0)
    assert (genes.probabilities.argmax(axis=1) == labels[genes.token]).mean() > 0.9
    expected = [(c, t) for c, cell in enumerate(tokens[60:]) for t in cell if labels[t] >= 0]
    assert list(zip(genes.cell, genes.token, strict=True)) == expected


def test_loss_by_hand():
    """One step over cells of many lengths, in several passes, is plain PyTorch's step."""
    import torch
    from torch.nn import functional

    from eval.finetune.classifier import Classifier
    from eval.finetune.training import finetune

    vocab = vocabulary()
    tokens, types = cells_of_types(vocab, 10)
    types = np.array([0, 0, 0, 0, 1, 1, 2, -1, -1, 0])
    targets = both_targets(vocab, types)
    settings = replace(quick(), epochs=1, batch_cells=10, weight_decay=0.0)
    classifier = finetune(encoder(vocab), vocab, tokens, targets, settings, 0)

    bert = encoder(vocab)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = Classifier(bert, vocab, (cell_head(), gene_head()), settings)
    losses, masses = [0.0, 0.0], [0.0, 0.0]
    labels = gene_labels(vocab)
    counts = [
        np.bincount(types[types >= 0]),
        np.bincount([labels[t] for cell in tokens for t in cell if labels[t] >= 0]),
    ]
    for cell, kind in zip(tokens, types, strict=True):
        hidden = start.encoder(torch.from_numpy(cell.astype(np.int64))[None]).last_hidden_state[0]
        items = [[(hidden.mean(dim=0), kind)], list(zip(hidden, labels[cell], strict=True))]
        for head in (0, 1):
            for state, label in items[head]:
                if label >= 0:
                    weight = counts[head].sum() / counts[head][label] / len(counts[head])
                    logits = start.outputs[head](state)[None]
                    loss = functional.cross_entropy(logits, torch.tensor([label]))
                    losses[head] = losses[head] + weight * loss
                    masses[head] += weight
    expected = (losses[0] / masses[0] + losses[1] / masses[1]) / 2
    np.testing.assert_allclose(
        classifier.history[0]["train_loss"], float(expected.detach()), rtol=1e-5
    )
    expected.backward()
    gradients = [p.grad for p in start.parameters()]
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
    before = dict(start.named_parameters())
    for name, after in classifier.named_parameters():
        # AdamW's first step is the learning rate times the sign of the gradient.
        clipped = before[name].grad / norm.clamp(min=1.0)
        move = -settings.learning_rate * clipped / (clipped.abs() + 1e-8)
        clear = clipped.abs() > 1e-5
        np.testing.assert_allclose(
            (after - before[name]).detach()[clear], move[clear], atol=2e-5, err_msg=name
        )


@pytest.mark.parametrize("change", [{}, {"lora_rank": 2}, {"freeze_layers": 1}])
def test_what_is_trained_and_what_is_not(change):
    import torch

    from eval.finetune.training import finetune

    vocab = vocabulary()
    tokens, types = cells_of_types(vocab)
    bert = encoder(vocab)
    before = {k: v.clone() for k, v in bert.state_dict().items()}
    classifier = finetune(
        bert, vocab, tokens, both_targets(vocab, types), replace(quick(), **change), 0
    )
    assert_same_bits(
        {k: v.numpy() for k, v in before.items()},
        {k: v.numpy() for k, v in bert.state_dict().items()},
    )
    moved = set()
    for name, after in classifier.encoder.state_dict().items():
        original = before.get(name.replace(".base_layer", ""))
        if original is None or not torch.equal(original, after):
            moved.add(name)
    layer_0 = {n for n in moved if n.startswith(("encoder.layer.0", "embeddings"))}
    if "lora_rank" in change:
        assert moved and all("lora_" in n for n in moved)
        assert any(".0.attention" in n for n in moved) and any(".1.attention" in n for n in moved)
        zero = [n for n in moved if "lora_B" in n and not classifier.encoder.state_dict()[n].any()]
        assert not zero, "adapters that were never trained"
    elif "freeze_layers" in change:
        assert moved and not layer_0
    else:
        assert layer_0


def test_same_seed_same_bits_and_callers_random_state():
    import torch

    from eval.finetune.training import finetune

    vocab = vocabulary()
    tokens, types = cells_of_types(vocab)
    bert, settings = encoder(vocab, dropout=0.1), replace(quick(), dropout=0.2)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = finetune(bert, vocab, tokens, both_targets(vocab, types), settings, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = finetune(bert, vocab, tokens, both_targets(vocab, types), settings, 5)
    other = finetune(bert, vocab, tokens, both_targets(vocab, types), settings, 6)
    assert_same_bits(weights_of(first), weights_of(again))
    assert first.history == again.history != other.history


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_saved_is_what_was_trained(lora_rank, tmp_path):
    from eval.finetune.classifier import load_classifier, save_classifier
    from eval.finetune.training import finetune

    vocab = vocabulary(has_cls=True)
    tokens, types = cells_of_types(vocab)
    settings = replace(quick(), lora_rank=lora_rank)
    classifier = finetune(encoder(vocab), vocab, tokens, both_targets(vocab, types), settings, 0)
    save_classifier(classifier, tmp_path / "head", {"task": "types"})
    loaded = load_classifier(tmp_path / "head")
    assert_same_bits(weights_of(classifier), weights_of(loaded))
    assert (loaded.settings, loaded.heads) == (settings, (cell_head(), gene_head()))
    assert loaded.history == classifier.history
    assert loaded.vocabulary.sha256 == vocab.sha256
    np.testing.assert_array_equal(
        classifier.predict_cells(tokens, "type"), loaded.predict_cells(tokens, "type")
    )
    assert json.loads((tmp_path / "head" / "classifier.json").read_text())["record"] == {
        "task": "types"
    }
    with pytest.raises(ValueError, match="not an empty folder"):
        save_classifier(classifier, tmp_path / "head", {})
    weights = tmp_path / "head" / "classifier.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged"):
        load_classifier(tmp_path / "head")
    with pytest.raises(ValueError, match="no classifier.json"):
        load_classifier(tmp_path)


def test_a_cell_is_predicted_as_if_alone():
    from eval.finetune.training import finetune

    vocab = vocabulary(has_cls=True)
    tokens, types = cells_of_types(vocab)
    classifier = finetune(encoder(vocab), vocab, tokens, both_targets(vocab, types), quick(), 0)
    tokens[7] = np.array([2, 3], dtype=np.int32)
    together = classifier.predict_cells(tokens, "type")
    assert np.flatnonzero(np.isnan(together).any(axis=1)).tolist() == [7]
    for i in (0, 1, 20, 47):
        np.testing.assert_allclose(
            together[i], classifier.predict_cells([tokens[i]], "type")[0], atol=1e-5
        )
    wanted = np.zeros(vocab.num_tokens, dtype=bool)
    assert len(classifier.predict_genes(tokens, "dosage", wanted).cell) == 0
    with pytest.raises(ValueError, match="no such head of cells"):
        classifier.predict_cells(tokens, "dosage")


def test_cells_without_a_label_change_nothing():
    from eval.finetune.classifier import Target
    from eval.finetune.training import finetune

    vocab = vocabulary()
    tokens, types = cells_of_types(vocab, 30)
    target = Target(cell_head(), types)
    more = Target(cell_head(), np.append(types, [-1, 2]))
    alone = finetune(encoder(vocab), vocab, tokens, [target], quick(), 0)
    beside = finetune(
        encoder(vocab), vocab, [*tokens, tokens[0], np.zeros(0, np.int32)], [more], quick(), 0
    )
    # The empty cell has a label that cannot be learnt from; it may not count in class weights.
    assert_same_bits(weights_of(alone), weights_of(beside))


def test_early_stopping_returns_the_best_weights():
    from eval.finetune.classifier import Target
    from eval.finetune.training import finetune

    vocab = vocabulary()
    tokens, types = cells_of_types(vocab, 30)
    wrong = Target(cell_head(), (types + 1) % 3)
    settings = replace(quick(), epochs=30, patience=2)
    right = [Target(cell_head(), types)]
    classifier = finetune(
        encoder(vocab), vocab, tokens, right, settings, 0, validation=(tokens, [wrong])
    )
    losses = [h["validation_loss"] for h in classifier.history]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 30
    probabilities = classifier.predict_cells(tokens, "type")
    loss = -np.log(probabilities[np.arange(30), wrong.labels]).mean()
    np.testing.assert_allclose(loss, losses[best], rtol=1e-4)
    with pytest.raises(ValueError, match="needs validation"):
        finetune(encoder(vocab), vocab, tokens, right, settings, 0)


@pytest.mark.parametrize(
    ("head", "labels", "times", "message"),
    [
        (cell_head, np.zeros(3, int), 1, "one per cell"),
        (cell_head, np.full(48, 3), 1, "0 to 2"),
        (cell_head, np.full(48, -1), 1, "no cell has a labelled item"),
        (gene_head, np.zeros(5, int), 1, "one per gene"),
        (cell_head, np.zeros(48, int), 2, "a name of its own"),
    ],
)
def test_refuses(head, labels, times, message):
    from eval.finetune.classifier import Target
    from eval.finetune.training import finetune

    targets = [Target(head(), labels)] * times
    vocab = vocabulary()
    tokens, _ = cells_of_types(vocab)
    with pytest.raises(ValueError, match=message):
        finetune(encoder(vocab), vocab, tokens, targets, quick(), 0)
    with pytest.raises(ValueError, match="epochs=0"):
        replace(quick(), epochs=0)


def _finetune_into(folder, settings):
    from eval.finetune.training import finetune

    vocab = vocabulary()
    tokens, types = cells_of_types(vocab, 30)
    targets = both_targets(vocab, types)
    classifier = finetune(
        encoder(vocab, dropout=0.1), vocab, tokens, targets, settings, 0,
        validation=(tokens, targets), folder=folder,
    )  # fmt: skip
    return weights_of(classifier), classifier.history


@pytest.mark.parametrize(
    "change", [pytest.param({}, marks=pytest.mark.long), {"lora_rank": 2, "patience": 3}]
)
def test_killed_and_continued_is_the_same_bits(change, tmp_path):
    settings = replace(quick(), epochs=24, dropout=0.2, **change)
    whole, history = _finetune_into(None, settings)
    forkserver = multiprocessing.get_context("forkserver")
    process = forkserver.Process(target=_finetune_into, args=(tmp_path, settings))
    process.start()
    while not list(tmp_path.glob("epoch-0000[3-9]")):
        assert process.is_alive(), "it came to its end before it could be killed"
    kill(process)
    # At most one that was just replaced by the next.
    assert 1 <= len(list(tmp_path.glob("epoch-*"))) <= 2
    assert not list(tmp_path.glob("epoch-00024")), "nothing is left to continue"
    continued, history_continued = _finetune_into(tmp_path, settings)
    assert_same_bits(whole, continued)
    assert history == history_continued
    with pytest.raises(ValueError, match="another fine-tuning"):
        _finetune_into(tmp_path, replace(settings, learning_rate=1e-3))
    (torn,) = tmp_path.glob("epoch-*")
    (torn / "progress.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged"):
        _finetune_into(tmp_path, settings)


def _finetune_on_ranks(batch_cells):
    from eval.finetune.training import finetune
    from pretrain.ranks import dist

    ranks = dist.start(timeout_s=60, threads=1)
    vocab = vocabulary()
    tokens, types = cells_of_types(vocab, 31)
    # Few cells of one class and few labelled genes: a mean of means would be another number.
    types[4:] = np.where(types[4:] == 2, -1, types[4:])
    targets = both_targets(vocab, types)
    settings = replace(quick(), batch_cells=batch_cells, learning_rate=1e-3)
    classifier = finetune(
        encoder(vocab), vocab, tokens, targets, settings, 0,
        validation=(tokens, targets), ranks=ranks,
    )  # fmt: skip
    dist.leave()
    return weights_of(classifier), classifier.history


def test_two_ranks_are_one():
    """Batches of 5 leave a last one of a single cell: one rank then has none."""
    (alone, history), *_ = run_ranks(1, _finetune_on_ranks, 5)
    (first, history_first), (second, _) = run_ranks(2, _finetune_on_ranks, 5)
    assert_same_bits(first, second)
    for name in alone:
        np.testing.assert_allclose(alone[name], first[name], atol=1e-5, err_msg=name)
    for one, two in zip(history, history_first, strict=True):
        np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=1e-5)

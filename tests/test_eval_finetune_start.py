"""Fine-tuning begins at the probe of the frozen states, and ends no worse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data_prep.genes.vocabulary import Vocabulary

WIDTH = 12


@pytest.fixture(scope="module")
def states() -> tuple[np.ndarray, np.ndarray]:
    """Three classes that overlap, dimensions of very different size and mean."""
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 3], 40)
    centres = random.normal(0, 1.2, (4, WIDTH))
    scale, shift = 10.0 ** random.uniform(-3, 3, WIDTH), random.normal(0, 50, WIDTH)
    return (
        ((centres[labels] + random.normal(0, 1, (len(labels), WIDTH))) * scale + shift).astype(
            np.float32
        ),
        labels,
    )


def layer(classes: int):
    import torch

    return torch.nn.Linear(WIDTH, classes)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("classes", [[0, 1, 3], [1, 3]])
def test_the_layer_says_what_the_regression_says(states, balanced, classes):
    """Also with two classes, for which scikit-learn has one row, and a class that nobody has."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from eval.finetune.probe_start import PENALTIES, start_from_probe

    values, labels = states
    kept = np.isin(labels, classes)
    kept[np.flatnonzero(labels == 1)[25:]] = False
    values, labels = values[kept], labels[kept]
    output = layer(5)
    strength = start_from_probe(output, values, labels, np.arange(len(labels)), balanced, seed=0)
    assert strength in PENALTIES
    scaled = StandardScaler().fit_transform(values)
    weight = "balanced" if balanced else None
    expected = LogisticRegression(C=strength, max_iter=300, class_weight=weight).fit(scaled, labels)
    with torch.no_grad():
        found = output(torch.from_numpy(values)).softmax(dim=1).numpy()
    np.testing.assert_allclose(found[:, classes], expected.predict_proba(scaled), atol=2e-3)
    absent = [c for c in range(5) if c not in classes]
    assert found[:, absent].max() < 1e-3


def test_folds_keep_groups_together(states):
    """Twelve genes, each in ten cells with nearly one state: only a strong penalty helps others."""
    from eval.finetune.probe_start import PENALTIES, start_from_probe

    random = np.random.default_rng(1)
    genes = np.repeat(np.arange(12), 10)
    labels = genes % 2
    values = random.normal(0, 1, (12, WIDTH))[genes] + random.normal(0, 0.01, (120, WIDTH))
    values = values.astype(np.float32)
    together = start_from_probe(layer(2), values, labels, genes, True, seed=0)
    apart = start_from_probe(layer(2), values, labels, np.arange(120), True, seed=0)
    assert together == PENALTIES[0]
    assert apart == PENALTIES[-1]


def test_what_cannot_be_fitted_stays_random(states):
    import torch

    from eval.finetune.probe_start import PENALTIES, UNCHOSEN, start_from_probe

    values, labels = states
    output = layer(4)
    before = output.weight.detach().clone()
    zeros = np.zeros(len(labels), np.int64)
    assert np.isnan(start_from_probe(output, values, zeros, zeros, True, seed=0))
    assert torch.equal(output.weight, before)
    # One cell of a class, or one donor, is too few for folds; two are enough for two.
    few = [0, 1, 40, 41]
    for groups, expected in (([0, 1, 2, 2], (UNCHOSEN,)), ([0, 1, 2, 3], PENALTIES)):
        chosen = start_from_probe(output, values[few], labels[few], np.array(groups), True, seed=0)
        assert chosen in expected


@pytest.fixture(scope="module")
def labelled():
    """A small encoder, cells of two kinds that share most genes, and what a head is to learn."""
    import torch

    from eval.finetune.classifier import Head, Target
    from pretrain.model.architectures import encoder_of
    from pretrain.model.masked_gene_model import build_model
    from pretrain.settings.model_settings import ModelConfig

    torch.set_num_threads(1)
    genes = tuple(f"ENSG{i:011d}" for i in range(60))
    vocabulary = Vocabulary(genes, np.ones(60), {"<pad>": 0, "<mask>": 1}, 64)
    settings = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32)
    encoder = encoder_of(build_model(settings, vocabulary, 0).bert)
    random = np.random.default_rng(0)
    first = vocabulary.first_gene_token
    labels = random.integers(0, 2, 48)
    cells = [first + random.permutation(np.r_[0:40][:30] + 8 * label)[:20] for label in labels]
    of_cells = Target(Head("kind", "cells", ("a", "b")), labels)
    tokens = np.arange(vocabulary.num_tokens)
    of_genes = Target(
        Head("half", "genes", ("low", "high")), np.where(tokens < first, -1, tokens % 2)
    )
    return encoder, vocabulary, cells, of_cells, of_genes


def test_it_begins_at_the_probe_and_takes_the_steps_asked_for(labelled):
    """Both kinds of heads: the first loss is the regression's, far below that of random heads."""
    from eval.finetune.classifier import FinetuneSettings
    from eval.finetune.training import finetune

    encoder, vocabulary, cells, of_cells, of_genes = labelled
    settings = FinetuneSettings(
        epochs=1, steps=7, batch_cells=16, learning_rate=1e-6, head_learning_rate=1e-6, dropout=0.0
    )
    loss = {}
    for start in ("probe", "random"):
        chosen = replace(settings, start=start)
        trained = finetune(encoder, vocabulary, cells, [of_cells, of_genes], chosen, seed=0)
        assert len(trained.history) == 3  # 3 steps an epoch
        loss[start] = trained.history[0]["train_loss"]
    assert loss["probe"] < 0.6 * loss["random"]


def test_the_penalty_is_chosen_by_whole_donors(labelled, caplog):
    """One donor for each class: cells of the same donor say nothing about others, so no choice."""
    from eval.finetune.classifier import FinetuneSettings
    from eval.finetune.probe_start import PENALTIES, UNCHOSEN
    from eval.finetune.training import finetune

    encoder, vocabulary, cells, of_cells, of_genes = labelled
    settings = FinetuneSettings(epochs=1, batch_cells=48, start="probe")
    donors = np.array(["ill", "well"])[of_cells.labels]
    chosen = []
    for groups in (None, donors, np.char.add(donors, np.arange(48).astype(str))):
        targets = [replace(of_cells, groups=groups), of_genes]
        with caplog.at_level("DEBUG", "eval.finetune.training"):
            caplog.clear()
            finetune(encoder, vocabulary, cells, targets, settings, seed=0)
        said = [m for m in caplog.messages if "from a probe" in m]
        chosen.append([float(m.rpartition(" = ")[2]) for m in said])
    assert chosen[1][0] == UNCHOSEN
    assert chosen[0][0] in PENALTIES
    assert chosen[0] == chosen[2], "each cell is a donor: as without donors"
    assert chosen[0][1] == chosen[1][1], "a head of genes has no donors"
    with pytest.raises(ValueError, match=r"groups of shape \(3,\), expected \(48,\)"):
        finetune(encoder, vocabulary, cells, [replace(of_cells, groups=donors[:3])], settings, 0)


def test_dropout_does_not_undo_the_probe(labelled):
    """States vary little around their mean, and the probe's weights are large: a 0 among them says
    more than any cell, so dropout puts the mean there. Heads of random weights have no centre."""
    import torch
    from torch.nn import functional

    from eval.finetune.classifier import FinetuneSettings, Items
    from eval.finetune.training import finetune

    encoder, vocabulary, cells, of_cells, of_genes = labelled
    settings = FinetuneSettings(
        epochs=1, batch_cells=48, learning_rate=1e-9, head_learning_rate=1e-9, dropout=0.2
    )
    both = [of_genes, of_cells]
    assert not finetune(encoder, vocabulary, cells, both, settings, seed=0).centres.any()
    trained = finetune(encoder, vocabulary, cells, both, replace(settings, start="probe"), seed=0)
    every, labels = np.arange(len(cells)), torch.from_numpy(of_cells.labels)
    none = Items(every[:0], every[:0], every[:0])
    items = [none, Items(every, np.zeros_like(every), of_cells.labels)]
    states = trained.states(cells, items)[1]
    torch.testing.assert_close(trained.centres[1], states.mean(dim=0), rtol=0, atol=1e-5)

    @torch.no_grad()
    def loss() -> float:
        torch.manual_seed(0)
        each = [functional.cross_entropy(trained(cells, items)[1], labels) for _ in range(20)]
        return float(torch.stack(each).mean())

    of_probe = loss()
    trained.train()
    around_mean = loss()
    trained.centres.zero_()
    around_zero = loss()
    assert around_mean < 0.2 and around_mean < 3 * of_probe, "as measured: 0.05 and 0.09"
    assert around_zero > 1, "as measured: 1.5"


def test_early_stopping_may_keep_the_probe(labelled, tmp_path):
    """A rate that destroys the start: validation says so, also to a training that goes on."""
    from eval.finetune.classifier import FinetuneSettings
    from eval.finetune.results import training_record
    from eval.finetune.training import finetune

    encoder, vocabulary, cells, of_cells, _ = labelled
    settings = FinetuneSettings(
        epochs=4, batch_cells=48, learning_rate=0.5, warmup_share=0, start="probe", patience=2
    )
    examples = (cells, [of_cells])
    wild = finetune(encoder, vocabulary, *examples, settings, 0, examples, tmp_path)
    record = training_record(wild)
    assert [step for step, _ in record["validation"]] == [0, 1, 2] and record["kept_step"] == 0
    assert record["validation"][0][1] < 0.2 < 1 < record["validation"][1][1]
    still = replace(settings, learning_rate=1e-12, patience=0, epochs=1)
    probe = finetune(encoder, vocabulary, *examples, still, 0)
    for p, q in zip(probe.parameters(), wild.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-6
    again = finetune(encoder, vocabulary, *examples, settings, 0, examples, tmp_path)
    assert training_record(again) == record
    good = replace(settings, learning_rate=1e-3)
    assert training_record(finetune(encoder, vocabulary, *examples, good, 0, examples))["kept_step"]


def test_heads_have_a_rate_of_their_own(labelled):
    from eval.finetune.classifier import FinetuneSettings
    from eval.finetune.training import finetune

    encoder, vocabulary, cells, of_cells, _ = labelled
    settings = FinetuneSettings(
        epochs=1, batch_cells=48, learning_rate=1e-5, head_learning_rate=1e-2, weight_decay=0,
        warmup_share=0, start="probe",
    )  # fmt: skip
    slow = finetune(encoder, vocabulary, cells, [of_cells], settings, seed=0)
    still = replace(settings, head_learning_rate=1e-9)
    start = finetune(encoder, vocabulary, cells, [of_cells], still, seed=0)
    # AdamW's first step moves every weight by its rate.
    before, after = (dict(c.named_parameters())["outputs.0.weight"] for c in (start, slow))
    moved = (after - before).abs()
    assert moved.mean().item() == pytest.approx(1e-2, rel=1e-3)
    before = dict(encoder.named_parameters())
    for name, value in slow.encoder.named_parameters():
        if name in before and value.ndim == 2:
            assert (value - before[name]).abs().max().item() < 1.1e-5
    with pytest.raises(ValueError, match="head_learning_rate=0 .above 0.*start=zero"):
        replace(settings, head_learning_rate=0, start="zero")  # type: ignore


def test_a_training_below_its_frozen_embedding_is_called_failed():
    from eval.finetune.results import remarks
    from eval.scores.baselines import CORPUS_SVD

    def seed(tuned: float) -> dict:
        scores = {
            "fine-tuned, pretrained": tuned, "frozen embedding, pretrained": 0.6,
            "fine-tuned, random weights": 0.7, "frozen embedding, random weights": 0.6,
        }  # fmt: skip
        return {"scores": {name: {"macro_f1": score} for name, score in scores.items()}}

    (said,) = remarks([seed(0.55), seed(0.57)], CORPUS_SVD)
    assert said.startswith("fine-tuned, pretrained: macro-F1 0.560 is below that of its own frozen")
    assert remarks([seed(0.595), seed(0.6)], CORPUS_SVD) == []


def test_a_model_that_is_not_above_the_svd_of_its_corpus_is_told_so():
    from eval.finetune.results import remarks
    from eval.scores.baselines import CORPUS_SVD

    scores = {
        f"{kind}, {weights}": 0.6
        for kind in ("fine-tuned", "frozen embedding", "cell state")
        for weights in ("pretrained", "random weights")
    }

    def seed(svd: float) -> dict:
        tuned = {"fine-tuned, pretrained": 0.695, "cell state, pretrained": 0.7}
        every = {**scores, **tuned, "corpus SVD": svd}
        return {"scores": {name: {"macro_f1": score} for name, score in every.items()}}

    (said,) = remarks([seed(0.75), seed(0.71)], CORPUS_SVD)
    assert said.startswith("Nothing of the model is above the SVD of its corpus")
    assert "0.730 against 0.700 (cell state, pretrained)" in said
    assert remarks([seed(0.65)], CORPUS_SVD) == []


def test_cells_that_are_in_a_file_twice_are_used_once():
    """Random labels of cells that are there twice would be told from the copies."""
    import pandas as pd
    import scipy.sparse

    from eval.cells.read_cells import CellSet
    from eval.finetune.score_cells import _labelled

    rng = np.random.default_rng(0)
    counts = scipy.sparse.csr_matrix(rng.integers(0, 3, (20, 30)).astype(np.float32))
    twice = scipy.sparse.vstack([counts, counts]).tocsr()
    found, dropped = _labelled(
        CellSet(
            [np.array([5])] * 40, np.ones(40, dtype=bool), twice,
            pd.DataFrame({"kind": list("ab") * 20}, index=[f"c{i}" for i in range(40)]),
            [f"G{i}" for i in range(30)],
        ),
        "kind", None,
    )  # fmt: skip
    assert dropped == {"exactly the counts of another cell": 20}
    assert list(found.metadata.index) == [f"c{i}" for i in range(20)]


def test_a_benchmark_says_which_training_failed():
    """Fine-tuned against its own frozen embedding, pretrained and random, by the headline."""
    from eval.benchmark.run import _remarks

    def row(contender: str, role: str, mean: float) -> dict:
        name = f"{contender}, m" + " with random weights" * (role == "twin")
        scores = {"auroc": {"mean": mean}, "auprc": {"mean": 0.1}}
        return {"contender": contender, "role": role, "model": "m", "name": name, "scores": scores}

    rows = [
        row("fine-tuned", "model", 0.7), row("frozen embedding", "model", 0.705),
        row("fine-tuned", "twin", 0.6), row("frozen embedding", "twin", 0.62),
    ]  # fmt: skip
    (said,) = _remarks(rows, "auroc")
    assert said.startswith(
        "fine-tuned, m with random weights: AUROC 0.600 is below that of its own"
    )
    assert _remarks(rows[:2] + [row("zero-shot", "twin", 0.1)], "auroc") == []


def test_rates_fall_layer_by_layer(labelled):
    """lr * decay^k, k layers below the top; embeddings below all; heads have their own."""
    from eval.finetune.classifier import FinetuneSettings
    from eval.finetune.training import _groups, finetune

    encoder, vocabulary, cells, of_cells, _ = labelled
    settings = FinetuneSettings(
        epochs=1, batch_cells=48, learning_rate=1e-3, head_learning_rate=5e-3, weight_decay=0,
        warmup_share=0, dropout=0.0, layer_decay=0.5,
    )  # fmt: skip
    trained = finetune(encoder, vocabulary, cells, [of_cells], settings, seed=0)
    before = dict(encoder.named_parameters())
    rates = {"embeddings.": 2.5e-4, "encoder.layer.0.": 5e-4, "encoder.layer.1.": 1e-3}
    for prefix, rate in rates.items():
        moved = [
            (value - before[name]).abs().max().item()
            for name, value in trained.encoder.named_parameters()
            if name.startswith(prefix)
        ]
        # AdamW's first step moves what has a gradient by its rate.
        assert max(moved) == pytest.approx(rate, rel=0.02), prefix
    shares = {}
    for group in _groups(trained):
        shares |= dict.fromkeys(group["params"], group["share"])
    named = dict(trained.named_parameters())
    assert shares.keys() == set(named.values()), "each in one group"
    assert {shares[p] for n, p in named.items() if n.startswith("outputs")} == {5.0}
    assert {shares[p] for n, p in named.items() if "layer.0." in n} == {0.5}
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError, match="layer_decay"):
            replace(settings, layer_decay=wrong)


def test_no_decay_is_one_group_for_all_layers(labelled):
    """So the optimizer, and every bit, is what it was: groups, their order and members."""
    from eval.finetune.classifier import Classifier, FinetuneSettings
    from eval.finetune.training import _groups
    from pretrain.optim import parameter_groups

    encoder, vocabulary, _, of_cells, of_genes = labelled
    settings = FinetuneSettings(learning_rate=3e-4, head_learning_rate=1e-3)
    made = Classifier(encoder, vocabulary, (of_cells.head, of_genes.head), settings)
    heads = set(made.outputs.parameters())
    expected = []
    for group in parameter_groups(made, settings.weight_decay):
        for of_heads, share in ((False, 1.0), (True, 1e-3 / 3e-4)):
            members = [id(p) for p in group["params"] if (p in heads) == of_heads]
            expected.append((group["weight_decay"], share, members))
    found = [(g["weight_decay"], g["share"], [id(p) for p in g["params"]]) for g in _groups(made)]
    assert found == expected


def test_early_stopping_needs_twenty_validation_cells_of_each_class():
    from eval.scores.splits import FEWEST_VALIDATION_CELLS, too_few_to_stop_by, validation_cells

    assert FEWEST_VALIDATION_CELLS == 20
    enough, few = np.repeat([0, 1], [134, 300]), np.repeat([0, 1], [120, 300])
    fit, held = validation_cells(np.arange(434), enough, None, 0)
    assert np.bincount(enough[held]).min() == 20 and len(fit) + len(held) == 434
    with pytest.raises(ValueError, match="18 validation cells of the smallest class, at least 20"):
        validation_cells(np.arange(420), few, None, 0)
    with pytest.raises(ValueError, match="too few to divide"):
        validation_cells(np.arange(3), np.array([0, 0, 1]), None, 0)
    assert too_few_to_stop_by(np.array([-1, -1])).startswith("0 validation cells")


def test_each_gene_counts_once(labelled):
    """However many cells hold it: in the probe, as scikit-learn weighs it, and in the loss."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from eval.finetune.classifier import FinetuneSettings
    from eval.finetune.examples import Examples, class_weights, gene_weights
    from eval.finetune.probe_start import PENALTIES, start_from_probe

    _, vocabulary, cells, _, of_genes = labelled
    settings = FinetuneSettings(start="probe")
    (weights,) = gene_weights(cells, [of_genes], settings)
    assert weights is not None
    held = np.bincount(np.concatenate(cells), minlength=vocabulary.num_tokens)
    is_known = (of_genes.labels >= 0) & (held > 0)
    for label in (0, 1):
        of_class = (weights * held)[is_known & (of_genes.labels == label)]
        assert of_class == pytest.approx(of_class[0]), "a gene counts once"
    totals = np.bincount(of_genes.labels[is_known], (weights * held)[is_known])
    assert totals[0] == pytest.approx(totals[1]) and not weights[~is_known].any()
    assert (weights * held).sum() == pytest.approx(held[is_known].sum())
    assert gene_weights(cells, [of_genes], replace(settings, start="random")) == [None]

    # The loss: by hand, for logits that are known.
    every = np.arange(len(cells))
    plain = class_weights(cells, [of_genes], settings)
    examples = Examples(cells, [of_genes], plain, "cpu", [weights])
    (items,) = examples.items(every)
    tokens = np.array([cells[c][p] for c, p in zip(items.cell, items.place, strict=True)])
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(len(tokens), 2)))
    found = examples.loss(lambda *_: [logits], every, examples.scale(every))  # pyright: ignore
    nll = -logits.log_softmax(dim=1)[torch.arange(len(tokens)), torch.from_numpy(items.label)]
    assert float(found) == pytest.approx(np.average(nll.numpy(), weights=weights[tokens]), rel=1e-5)

    # The probe.
    rng = np.random.default_rng(1)
    genes = rng.integers(0, 12, 300) ** 2 // 12
    labels, states = genes % 2, rng.normal(size=(300, WIDTH)).astype(np.float32)
    states[:, 0] += labels
    output = layer(2)
    strength = start_from_probe(output, states, labels, genes, True, 0, each_group_once=True)
    assert strength in PENALTIES
    weight = 1 / np.bincount(genes)[genes]
    weight /= np.bincount(labels, weight)[labels]
    fitted = LogisticRegression(C=strength, max_iter=300)
    scaled = StandardScaler().fit_transform(states)
    fitted.fit(scaled, labels, sample_weight=weight * 300 / weight.sum())
    with torch.no_grad():
        said = output(torch.from_numpy(states)).softmax(dim=1).numpy()
    np.testing.assert_allclose(said, fitted.predict_proba(scaled), atol=2e-3)

"""Heads of cells that read cell states: what they read, that it is trained, saved and loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_prep.genes.vocabulary import Vocabulary
from eval.finetune.settings import FinetuneSettings
from tests.ranks import run_ranks

QUICK = FinetuneSettings(
    epochs=2, batch_cells=12, learning_rate=1e-3, head_learning_rate=1e-3, start="probe",
    features="state",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """An encoder with a cell state in a model folder, cells of two kinds, and their heads."""
    return make(tmp_path_factory.mktemp("state") / "model")


def make(folder: Path | None) -> SimpleNamespace:
    """Return them; with None they are in memory alone, as ranks need them."""
    import torch

    from eval.finetune.classifier import Head, Target
    from pretrain.cell_states.cell_state import reduced
    from pretrain.cell_states.frozen_states import embed_cells
    from pretrain.counting.corpus_svd import CorpusSvd
    from pretrain.export.model_folder import weights_digest
    from pretrain.model.architectures import encoder_of
    from pretrain.model.masked_gene_model import build_model
    from pretrain.settings.model_settings import ModelConfig

    torch.set_num_threads(1)
    genes = tuple(f"ENSG{i:011d}" for i in range(60))
    vocabulary = Vocabulary(genes, np.ones(60), {"<pad>": 0, "<mask>": 1}, 64)
    settings = ModelConfig(
        num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32, hidden_dropout=0.0,
        attention_dropout=0.0,
    )  # fmt: skip
    network = build_model(settings, vocabulary, 0).bert
    if folder:
        network.save_pretrained(folder)
        vocabulary.save(folder / "vocabulary.json")
    random, first = np.random.default_rng(0), vocabulary.first_gene_token
    labels = random.integers(0, 2, 48)
    cells = [first + random.permutation(np.r_[0:40][:30] + 8 * label)[:20] for label in labels]
    loadings = np.zeros((vocabulary.num_tokens, 5), dtype=np.float32)
    loadings[first:] = random.normal(size=(60, 5))
    origin = {"shards_fingerprint": "planted", "cells": 48, "residual": 0.0}
    svd = CorpusSvd(loadings, np.ones(5, np.float32), vocabulary.sha256, first, origin)
    encoder = encoder_of(network)
    digest = weights_digest(folder) if folder else ""
    state = reduced(svd, cells, embed_cells(cells, encoder, vocabulary), digest)
    if folder:
        state.save(folder)
    tokens = np.arange(vocabulary.num_tokens)
    of_genes = np.where(tokens < first, -1, tokens % 2)
    return SimpleNamespace(
        encoder=encoder, vocabulary=vocabulary, cells=cells, state=state, folder=folder,
        of_cells=Target(Head("kind", "cells", ("a", "b")), labels),
        of_genes=Target(Head("half", "genes", ("low", "high")), of_genes),
    )  # fmt: skip


def train(made, settings: FinetuneSettings = QUICK, **changes):
    from eval.finetune.training import finetune

    how = {"state": made.state, "targets": [made.of_cells, made.of_genes], "seed": 0} | changes
    return finetune(made.encoder, made.vocabulary, made.cells, how.pop("targets"), settings,
                    how.pop("seed"), **how)  # fmt: skip


def test_a_head_reads_the_cell_state(made):
    """Before any step: what `geneloom embed` writes. A head of genes reads the gene's state."""
    import copy

    import torch

    from eval.finetune.classifier import Classifier, Items

    encoder = copy.deepcopy(made.encoder)
    heads = (made.of_cells.head, made.of_genes.head)
    read = Classifier(encoder, made.vocabulary, heads, QUICK, made.state).eval()
    every, nothing = np.arange(7), np.zeros(7, dtype=np.int64)
    items = [Items(every, nothing, nothing), Items(every, nothing, nothing)]
    with torch.no_grad():
        of_cells, of_genes = read.states(made.cells[:7], items)
    expected = made.state.embed(made.cells[:7], made.encoder, made.vocabulary)
    np.testing.assert_allclose(of_cells.numpy(), expected, atol=2e-5)
    assert of_cells.shape == (7, made.state.width) and of_genes.shape == (7, 16)


def test_training_begins_at_the_probe_of_cell_states(made):
    """The first loss is that of a regression on cell states, by scikit-learn."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.preprocessing import StandardScaler

    from eval.finetune.probe_start import PENALTIES

    one_step = replace(
        QUICK, epochs=1, batch_cells=48, learning_rate=1e-9, head_learning_rate=1e-9, dropout=0.0
    )
    trained = train(made, one_step, targets=[made.of_cells])
    states = StandardScaler().fit_transform(
        made.state.embed(made.cells, made.encoder, made.vocabulary)
    )
    labels = made.of_cells.labels
    known = [
        LogisticRegression(C=c, class_weight="balanced", max_iter=300).fit(states, labels)
        for c in PENALTIES
    ]
    weights = np.where(labels, 1 / labels.sum(), 1 / (1 - labels).sum())
    losses = [log_loss(labels, k.predict_proba(states), sample_weight=weights) for k in known]
    assert min(abs(trained.losses[0] - loss) for loss in losses) < 2e-3


def test_the_encoder_learns_and_the_axes_stay(made):
    trained, axes = train(made), made.state.axes.copy()
    before = dict(made.encoder.named_parameters())
    moved = [n for n, p in trained.encoder.named_parameters() if not p.equal(before[n])]
    assert any("layer.0" in n or "layers.0" in n for n in moved)
    assert trained.reader and np.array_equal(trained.reader.axes.numpy(), axes)
    kinds = trained.predict_cells(made.cells, "kind").argmax(axis=1)
    assert (kinds == made.of_cells.labels).mean() > 0.9


def test_saved_with_its_cell_state(made, tmp_path):
    from eval.finetune.classifier import load_classifier, save_classifier

    trained = train(made)
    save_classifier(trained, tmp_path / "head", {})
    loaded = load_classifier(tmp_path / "head")
    for name in ("kind", "half"):
        wanted = np.ones(made.vocabulary.num_tokens, dtype=bool)
        found, expected = (
            c.predict_cells(made.cells, name) if name == "kind"
            else c.predict_genes(made.cells, name, wanted).probabilities
            for c in (loaded, trained)
        )  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    (tmp_path / "head" / "cell_state.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cell_state\.safetensors: cannot be read"):
        load_classifier(tmp_path / "head")


def test_folders_from_before_read_means(made, tmp_path):
    from eval.finetune.classifier import load_classifier, save_classifier

    trained = train(made, state=None)
    save_classifier(trained, tmp_path / "head", {})
    record = tmp_path / "head" / "classifier.json"
    content = json.loads(record.read_text())
    assert content.pop("cell_state") is None and content["settings"].pop("features")
    record.write_text(json.dumps(content))
    loaded = load_classifier(tmp_path / "head")
    assert loaded.reader is None
    found, expected = (c.predict_cells(made.cells, "kind") for c in (loaded, trained))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_killed_training_is_of_its_cell_state(made, tmp_path):
    """The progress of one with another cell state, or of means, is not gone on with."""
    train(made, replace(QUICK, epochs=1), folder=tmp_path / "progress")
    for other in (None, replace(made.state, scales=made.state.scales * 2)):
        shutil.copytree(tmp_path / "progress", tmp_path / "copy", dirs_exist_ok=True)
        with pytest.raises(ValueError, match="another fine-tuning"):
            train(made, replace(QUICK, epochs=1), folder=tmp_path / "copy", state=other)


@pytest.fixture(scope="module")
def labelled_cells(made, tmp_path_factory) -> Path:
    """The cells as counts: more of a gene that stands further up."""
    import anndata
    import pandas as pd

    first, counts = made.vocabulary.first_gene_token, np.zeros((48, 60), dtype=np.float32)
    for row, tokens in enumerate(made.cells):
        counts[row, tokens - first] = np.arange(len(tokens), 0, -1)
    kinds = np.array(["a", "b"])[made.of_cells.labels]
    obs = pd.DataFrame({"kind": kinds}, index=[f"cell{i}" for i in range(48)])
    var = pd.DataFrame(index=list(made.vocabulary.genes))
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    anndata.AnnData(counts, obs, var).write_h5ad(path)
    return path


def test_the_command_takes_the_state_where_there_is_one(made, labelled_cells, tmp_path):
    """And means where they are asked for, or the model has no cell state."""
    from eval.finetune.classifier import load_classifier
    from eval.finetune.score_cells import finetune_cells
    from eval.finetune.settings import FinetuneOptions

    bare = tmp_path / "bare"
    shutil.copytree(made.folder, bare)
    (bare / "cell_state.safetensors").unlink()
    quick = replace(QUICK, epochs=1, batch_cells=24)
    for name, folder, settings in (
        ("state", made.folder, quick),
        ("mean", made.folder, replace(quick, features="mean")),
        ("none", bare, quick),
    ):
        options = FinetuneOptions(settings=settings, save_head=tmp_path / name)
        found = finetune_cells(labelled_cells, folder, "kind", tmp_path / f"{name} scores", options)
        assert (load_classifier(tmp_path / name).reader is not None) == (name == "state")
        assert ("cell state, pretrained" in found["summary"]) == (name != "none")


def test_the_better_of_both_is_read(made):
    """By held-out training cells; whole donors, so that one donor a class says nothing."""
    still = replace(QUICK, epochs=1, learning_rate=1e-9, head_learning_rate=1e-9, features="auto")
    noise = np.random.default_rng(1).normal(size=made.state.svd.components.shape)
    # A counted part of noise, that outweighs what is learned: the scales of a broken state.
    of_noise = replace(
        made.state, svd=replace(made.state.svd, components=noise.astype(np.float32)),
        axes=np.zeros_like(made.state.axes),
    )  # fmt: skip
    for state, donors, reads in (
        (made.state, None, True),
        (of_noise, None, False),
        (of_noise, np.array(["ill", "well"])[made.of_cells.labels], True),
        (of_noise, np.arange(48) // 4, False),
    ):
        target = replace(made.of_cells, groups=donors)
        trained = train(made, still, targets=[target, made.of_genes], state=state)
        assert (trained.reader is not None) == reads, (state is of_noise, donors)
        assert training_reads(trained) == ("cell state" if reads else "mean")
    of_genes = train(made, still, targets=[made.of_genes])
    assert training_reads(of_genes) == "gene state" and of_genes.reader is None
    random = train(made, replace(still, start="random"), targets=[made.of_cells])
    assert random.reader is None, "a head that begins at random reads means, as published"


def training_reads(trained) -> str:
    from eval.finetune.results import training_record

    return training_record(trained)["reads"]


def train_on_ranks():
    """Train in this rank, whose own last bits say something else than the other's."""
    from eval.finetune import training
    from pretrain.ranks import dist

    ranks = dist.start(timeout_s=60, threads=1)
    own, of_state = training.heldout_loss, 1e-9 if ranks.rank else 0.0
    made = make(None)

    def nearly_tied(states, *arguments):
        assert own(states, *arguments) > 0
        return 1.0 + (of_state if states.shape[1] == made.state.width else 0.0)

    training.heldout_loss = nearly_tied
    try:
        settings = replace(QUICK, epochs=1, features="auto")
        trained = train(made, settings, targets=[made.of_cells], ranks=ranks)
    finally:
        training.heldout_loss = own
    dist.leave()
    return trained.reader is not None, {n: p.numpy() for n, p in trained.state_dict().items()}


def test_ranks_read_the_same():
    """One decision for all: heads of two shapes could not be trained together."""
    (one, first), (two, second) = run_ranks(2, train_on_ranks)
    assert not one and not two, "by the sum of both, means are better"
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_what_a_head_reads_is_in_the_keys():
    """Older keys, of heads of means, stay."""
    auto = replace(QUICK, features="auto")
    assert auto.reading(True) == {"reads": "chosen"}
    assert QUICK.reading(True) == {"reads": "cell state"}
    for settings, has_state in (
        (auto, False), (QUICK, False), (replace(auto, start="random"), True),
        (replace(QUICK, features="mean"), True),
    ):  # fmt: skip
        assert settings.reading(has_state) == {}
    assert "features" not in auto.deciding()
    with pytest.raises(ValueError, match=r"features=both \(auto, state or mean\)"):
        replace(QUICK, features="both")


def test_a_screen_reads_the_cell_states_of_copies(made):
    """Both parts change when a gene is deleted."""
    from eval.perturb.screen.compare_copies import CopyEngine
    from eval.perturb.screen.edits import Edit
    from tests.test_eval_perturb import sets_of

    still = replace(QUICK, epochs=1, learning_rate=1e-9, head_learning_rate=1e-9)
    trained = train(made, still, targets=[made.of_cells])
    unsure = np.abs(trained.predict_cells(made.cells, "kind")[:, 1] - 0.5).argmin()
    cell = made.cells[unsure].astype(np.int64)
    before, *after = trained.predict_cells([cell, *(cell[cell != g] for g in cell)], "kind")
    engine = CopyEngine(trained.encoder, made.vocabulary, classifier=trained)
    found = engine.perturb(cell, sets_of(*[[int(g)] for g in cell]), Edit("delete"))
    assert found.before["probability_b"] == pytest.approx(before[1], abs=1e-5)
    expected = np.array(after)[:, 1] - before[1]
    np.testing.assert_allclose(found.values["class_b"], expected, atol=1e-5)
    assert np.abs(expected).max() > 1e-2


def test_an_estimate_refuses_a_head_of_cell_states(made):
    """Of deletions by derivatives: the counted part has none."""
    from eval.perturb.screen.cells_and_genes import GeneChoice
    from eval.perturb.screen.compare_copies import CopyEngine
    from eval.perturb.screen.estimate import require_screenable
    from eval.perturb.screen.settings import Screen

    trained = train(made, replace(QUICK, epochs=1), targets=[made.of_cells])
    engine = CopyEngine(trained.encoder, made.vocabulary, classifier=trained)
    with pytest.raises(ValueError, match=r"--screen: this head reads cell states.*features mean"):
        subject: Any = SimpleNamespace(engine=engine)
        require_screenable(Screen(genes=GeneChoice(("a",))), subject)

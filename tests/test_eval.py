"""Embeddings, splits, scores and baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.sparse

from data_prep.genes.vocabulary import CLS, EOS, MASK, PAD, Vocabulary
from data_prep.prepare.medians import gene_medians
from data_prep.prepare.run import SERIAL
from data_prep.sources.source_spec import SourceOptions, source_at
from eval.cells.read_cells import encode_file
from pretrain.settings.model_settings import ModelConfig
from tests.ranks import run_ranks
from tests.runs import run_training, tiny_config
from tests.synthetic import make_cells, write_cells

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

_IMAGE = '<img src="data:image/svg+xml;base64,'
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=2, intermediate_size=64,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


def vocabulary_of(path, has_cls=False) -> Vocabulary:
    specs = [source_at(path, SourceOptions())]
    found = gene_medians(specs, path.parent, SERIAL, lambda what, done, total: None)
    built = found.vocabulary(1, 256, with_cls=False)
    special = {PAD: 0, MASK: 1} | ({CLS: 2, EOS: 3} if has_cls else {})
    return Vocabulary(built.genes, built.medians, special, 256)


@pytest.mark.parametrize("has_cls", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embedding_is_that_of_the_cell_alone(has_cls, pooling, tmp_path):
    from eval.cells.embed import embed_cells
    from pretrain.model.masked_gene_model import build_model

    path = write_cells(tmp_path / "cells.h5ad", num_cells=40)
    vocabulary = vocabulary_of(path, has_cls)
    bert: BertForMaskedLM = build_model(MODEL, vocabulary, 0).bert
    cells = encode_file(path, vocabulary)
    if pooling == "cls" and not has_cls:
        with pytest.raises(ValueError, match="no <cls>"):
            embed_cells(cells.tokens, bert.bert, vocabulary, pooling)
        return
    together = embed_cells(cells.tokens, bert.bert, vocabulary, pooling, token_budget=2000)
    assert np.isfinite(together).all()
    for i in (0, 7, 39):
        (alone,) = embed_cells([cells.tokens[i]], bert.bert, vocabulary, pooling)
        np.testing.assert_allclose(together[i], alone, atol=1e-5)


def test_layers_count_from_the_top(tmp_path):
    import torch

    from eval.cells.embed import embed_cells
    from pretrain.model.masked_gene_model import build_model

    path = write_cells(tmp_path / "cells.h5ad", num_cells=5)
    vocabulary = vocabulary_of(path)
    bert = build_model(MODEL, vocabulary, 0).bert.eval()
    cells = encode_file(path, vocabulary)
    ids = torch.from_numpy(cells.tokens[0].astype(np.int64))[None]
    states = bert.bert(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in (0, -1):
        got = embed_cells(cells.tokens, bert.bert, vocabulary, layer=layer)
        expected = states[2 + layer][0].mean(dim=0).detach().numpy()
        np.testing.assert_allclose(got[0], expected, atol=1e-5)
    with pytest.raises(ValueError, match="--layer -2"):
        embed_cells(cells.tokens, bert.bert, vocabulary, layer=-2)


def test_splits_keep_donors_whole_and_classes_on_both_sides():
    from eval.scores.splits import limit_per_class, split_cells

    rng = np.random.default_rng(0)
    labels, donors = rng.integers(0, 3, 600), np.array([f"d{i}" for i in rng.integers(0, 9, 600)])
    for seed in range(5):
        train, test = split_cells(labels, donors, seed)
        assert not set(donors[train]) & set(donors[test])
        assert set(labels[train]) == set(labels[test]) == {0, 1, 2}
        assert len(train) + len(test) == 600
    train, test = split_cells(labels, None, 0)
    np.testing.assert_allclose(
        np.bincount(labels[test]) / 180, np.bincount(labels) / 600, atol=0.01
    )
    assert np.bincount(labels[limit_per_class(train, labels, 10, 0)]).tolist() == [10, 10, 10]
    with pytest.raises(ValueError, match="no choice of"):
        split_cells(np.array([0, 0, 1, 1]), np.array(["a", "a", "b", "b"]), 0)


def test_scores_by_hand():
    from eval.scores.metrics import mean_and_interval, score_classes

    truth, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    scores = score_classes(truth, predicted, ["a", "b", "never seen"])
    assert scores["accuracy"] == 0.75
    np.testing.assert_allclose(scores["balanced_accuracy"], (2 / 3 + 1) / 2)
    np.testing.assert_allclose(scores["f1_by_class"]["a"], 0.8)
    np.testing.assert_allclose(scores["macro_f1"], (0.8 + 2 / 3) / 2)
    assert "never seen" not in scores["f1_by_class"]
    interval = mean_and_interval([0.1, 0.2, 0.3])
    np.testing.assert_allclose(interval["half_width"], 4.302652729 * 0.1 / np.sqrt(3))


def test_baselines_learn_from_training_cells_only():
    from eval.scores.baselines import predict_baselines
    from eval.scores.splits import split_cells

    cells = make_cells(150)
    labels = np.arange(150) % 3
    train, test = split_cells(labels, None, 0)
    predictions = predict_baselines(scipy.sparse.csr_matrix(cells.X), labels, train, test, 0)
    accuracy = {n: (p == labels[test]).mean() for n, p in predictions.items()}
    assert accuracy["logistic regression on genes"] > 0.9
    assert accuracy["kNN on PCA"] > 0.9
    assert accuracy["majority class"] < 0.4
    shuffled = np.random.default_rng(0).permutation(labels)
    chance = predict_baselines(scipy.sparse.csr_matrix(cells.X), shuffled, train, test, 0)
    assert (chance["logistic regression on genes"] == shuffled[test]).mean() < 0.6


def test_log_normalise():
    from eval.scores.baselines import log_normalise

    counts = scipy.sparse.csr_matrix(np.array([[1.0, 3.0], [0.0, 0.0]]))
    expected = [[np.log1p(2500), np.log1p(7500)], [0, 0]]
    np.testing.assert_allclose(log_normalise(counts).toarray(), expected, rtol=1e-6)


@pytest.fixture(scope="module")
def pretrained(shards, tmp_path_factory):
    from pretrain.export.model_folder import export

    folder = tmp_path_factory.mktemp("pretrained")
    config = tiny_config(shards, folder / "run", run__max_steps=60)
    run_ranks(1, run_training, config)
    export(config.run.out, folder / "model")
    return folder


def test_embed_finetune_report(pretrained, tmp_path):
    """Every cell in input order, the empty one as NaN; scores beside baselines; one page."""
    import anndata

    from eval.cells.embed import OBSM_KEY, embed_file
    from eval.finetune.score_cells import finetune_cells
    from eval.finetune.settings import FinetuneOptions, FinetuneSettings
    from eval.report.run_page import write_report

    cells = make_cells(90)
    matrix = cells.X.tolil()
    matrix[5] = 0
    cells.X = matrix.tocsr()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    model = pretrained / "model"
    message = embed_file(tmp_path / "cells.h5ad", model, tmp_path / "out.h5ad")
    assert "1 cells without any gene" in message
    out = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(out.obs_names) == list(cells.obs_names)
    # A cell state: 80 counted, and all directions of a width of 32 but the one that a layer norm
    # leaves without spread.
    assert out.obsm[OBSM_KEY].shape == (90, 80 + 31)
    assert np.flatnonzero(np.isnan(out.obsm[OBSM_KEY]).any(axis=1)).tolist() == [5]
    with pytest.raises(ValueError, match="exists"):
        embed_file(tmp_path / "cells.h5ad", model, tmp_path / "out.h5ad")

    settings = FinetuneSettings(epochs=4, learning_rate=5e-3)
    results = finetune_cells(
        tmp_path / "cells.h5ad", model, "cell_type", tmp_path / "scores",
        FinetuneOptions(settings=settings),
    )  # fmt: skip
    assert results["dropped"] == {"no gene of the vocabulary": 1}
    contenders = {"majority class", "logistic regression on genes", "kNN on PCA"} | {
        f"{how}, {weights}"
        for how in ("fine-tuned", "frozen embedding", "cell state")
        for weights in ("pretrained", "random weights")
    }
    contenders |= {"corpus SVD"}
    assert set(results["summary"]) == contenders
    assert results["summary"]["fine-tuned, pretrained"]["macro_f1"]["mean"] > 0.5
    assert results["summary"]["majority class"]["macro_f1"]["mean"] < 0.3
    page = write_report(
        pretrained / "run", tmp_path / "report.html", [tmp_path / "scores"], None, None, None
    )
    html = (tmp_path / "report.html").read_text()
    assert page.endswith("report.html")
    assert html.count(_IMAGE) == 9, "seven of the run, two of the scores"
    for text in ("unigram by rank", "kNN on PCA", f"{len(contenders)}"):
        assert text in html
    assert "UMAP" not in html


@pytest.mark.long  # compiling UMAP takes longer than all else
def test_report_with_embedding(pretrained, tmp_path):
    from eval.cells.embed import embed_file
    from eval.report.run_page import write_report

    make_cells(90).write_h5ad(tmp_path / "cells.h5ad")
    embed_file(tmp_path / "cells.h5ad", pretrained / "model", tmp_path / "out.h5ad")
    write_report(
        pretrained / "run", tmp_path / "report.html", [], tmp_path / "out.h5ad", "cell_type", None
    )
    html = (tmp_path / "report.html").read_text()
    assert html.count(_IMAGE) == 8, "seven of the run, and the UMAP"
    assert "UMAP" in html


@pytest.mark.long
def test_finetune_by_donor(pretrained, tmp_path):
    from eval.finetune.score_cells import finetune_cells
    from eval.finetune.settings import FinetuneOptions, FinetuneSettings

    make_cells(90).write_h5ad(tmp_path / "cells.h5ad")
    found = finetune_cells(
        tmp_path / "cells.h5ad", pretrained / "model", "cell_type", tmp_path / "scores",
        FinetuneOptions(donor="donor", settings=FinetuneSettings(epochs=1)),
    )  # fmt: skip
    assert found["split"] == "by donor"


@pytest.mark.parametrize(
    ("label", "seeds", "message"),
    [("nope", 3, "no column"), ("donor", 2, "at least 3"), ("same", 3, "fewer than two classes")],
)
def test_finetune_refuses(label, seeds, message, pretrained, tmp_path):
    from eval.finetune.score_cells import finetune_cells
    from eval.finetune.settings import FinetuneOptions

    cells = make_cells(60)
    cells.obs["same"] = "x"
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=message):
        finetune_cells(
            tmp_path / "cells.h5ad", pretrained / "model", label, tmp_path / "o",
            FinetuneOptions(seeds=seeds),
        )  # fmt: skip
    assert not (tmp_path / "o").exists()


def test_cells_of_another_species_are_refused(pretrained, tmp_path):
    from eval.cells.embed import embed_file

    cells = make_cells(60)
    cells.var_names = [n.replace("ENSG", "ENSMUSG") for n in cells.var_names]
    cells.write_h5ad(tmp_path / "mouse.h5ad")
    with pytest.raises(ValueError, match="0 of 200 gene ids"):
        embed_file(tmp_path / "mouse.h5ad", pretrained / "model", tmp_path / "out.h5ad")
    assert not (tmp_path / "out.h5ad").exists()
